// Bare loops whose speed is a bound on the speed of the kernels. ceilings.py compiles them for the machine it runs on,
// calls them through ctypes, and times them. They share no code with the kernels of csrc/: otherwise the bound would
// have the same faults as the kernels.
//
// Every function repeats its work `repeats` times. Sizes are multiples of the amount that a loop processes at once
// (BLOCK floats or a tile). Pointers are aligned to whole vectors, like the data of PyTorch tensors.
#include "vectors.h"

// 32 registers allow more independent chains: there are processors with 4 pipes of latency 4.
#if VECTOR_BYTES == 64 || defined(__aarch64__)
#define CHAINS 16
#define BACKWARD_QUERIES 6
#else
#define CHAINS 12
#define BACKWARD_QUERIES 2
#endif
#define STREAMS 8
#define FORWARD_QUERIES 4
#define FORWARD_KEYS 2

#if VECTOR_BYTES == 64
#define POSITIVE_PART(x) (Floats) _mm512_maskz_max_ps(0xffff, (__m512)(Floats){0}, (__m512)(x))
#elif VECTOR_BYTES == 32
#define POSITIVE_PART(x) (Floats) _mm256_max_ps((__m256)(Floats){0}, (__m256)(x))
#else
#define POSITIVE_PART(x) (Floats)(((x) > (Floats){0}) & (Ints)(x))  // GCC has no vector ?: in C
#endif

// Constants for ceilings.py.
const int32_t lanes = LANES;
const int32_t block = STREAMS * LANES;
const int32_t chains = CHAINS;
const int32_t forward_queries = FORWARD_QUERIES;
const int32_t forward_keys = FORWARD_KEYS;
const int32_t forward_units = 3 * LANES;  // three vectors of units share a division
const int32_t backward_queries = BACKWARD_QUERIES;
#ifdef STREAM_STORE
const int32_t can_stream = 1;
#else
const int32_t can_stream = 0;
#endif

// Memory --------------------------------------------------------------------------------------------------------------

// The sum, modulo 2^32, of the n words at x. An integer sum does not depend on the order.
uint32_t read_words(const uint32_t* x, int64_t n, int64_t repeats) {
  Words sums[STREAMS] = {{0}};
  for (int64_t r = 0; r < repeats; ++r) {
    for (int64_t i = 0; i < n; i += STREAMS * LANES)
      for (int s = 0; s < STREAMS; ++s) {
        Words w;
        memcpy(&w, x + i + s * LANES, sizeof(w));
        sums[s] += w;
      }
    BARRIER();
  }
  uint32_t total = 0;
  for (int s = 0; s < STREAMS; ++s)
    for (int i = 0; i < LANES; ++i) total += sums[s][i];
  return total;
}

// Ordinary stores: a cache line that is not in the cache is read before it is written.
void write_floats(float* x, int64_t n, float value, int64_t repeats) {
  const Floats v = value - (Floats){0};
  for (int64_t r = 0; r < repeats; ++r)
    for (int64_t i = 0; i < n; i += STREAMS * LANES) {
      for (int s = 0; s < STREAMS; ++s) store(x + i + s * LANES, v);
      BARRIER();  // prevents a call of memset, which streams above some size
    }
}

// Non-temporal stores, which bypass the caches. Does nothing if they are not available (can_stream).
void stream_floats(float* x, int64_t n, float value, int64_t repeats) {
#ifdef STREAM_STORE
  const Floats v = value - (Floats){0};
  for (int64_t r = 0; r < repeats; ++r)
    for (int64_t i = 0; i < n; i += STREAMS * LANES) {
      for (int s = 0; s < STREAMS; ++s) STREAM_STORE(x + i + s * LANES, v);
      BARRIER();
    }
  STREAM_END();
#else
  (void)x, (void)n, (void)value, (void)repeats;
#endif
}

// y = x + value. Reads and writes overlap, so the time can be less, or more, than the sum of both times.
void copy_floats(const float* x, float* y, int64_t n, float value, int64_t repeats) {
  for (int64_t r = 0; r < repeats; ++r)
    for (int64_t i = 0; i < n; i += STREAMS * LANES) {
      for (int s = 0; s < STREAMS; ++s) store(y + i + s * LANES, load(x + i + s * LANES) + value);
      BARRIER();
    }
}

void copy_streaming(const float* x, float* y, int64_t n, float value, int64_t repeats) {
#ifdef STREAM_STORE
  for (int64_t r = 0; r < repeats; ++r)
    for (int64_t i = 0; i < n; i += STREAMS * LANES) {
      for (int s = 0; s < STREAMS; ++s) STREAM_STORE(y + i + s * LANES, load(x + i + s * LANES) + value);
      BARRIER();
    }
  STREAM_END();
#else
  (void)x, (void)y, (void)n, (void)value, (void)repeats;
#endif
}

// Arithmetic ----------------------------------------------------------------------------------------------------------

// A chain of dependent additions, one per cycle. Returns step times their number (16 per repeat). The step is in a
// register, because some processors add constants without using a cycle.
uint64_t add_integers(uint64_t step, int64_t repeats) {
  uint64_t x = 0;
  for (int64_t r = 0; r < repeats; ++r)
    for (int i = 0; i < 16; ++i) {
      x += step;
      __asm__ volatile("" : "+r"(x), "+r"(step));
    }
  return x;
}

// x <- x a + b in CHAINS vectors; x starts as the index of the chain. sums (LANES): the sum of the vectors.
void multiply_add(float a, float b, int64_t repeats, float* sums) {
  Floats x[CHAINS];
  for (int s = 0; s < CHAINS; ++s) x[s] = (float)s - (Floats){0};
  for (int64_t r = 0; r < repeats; ++r)
    for (int s = 0; s < CHAINS; ++s) x[s] = x[s] * a + b;
  Floats total = {0};
  for (int s = 0; s < CHAINS; ++s) total += x[s];
  store(sums, total);
}

// e^{2x} of n floats, |2x| < 87.
void exponentials(const float* x, int64_t n, int64_t repeats, float* e) {
  for (int64_t r = 0; r < repeats; ++r) {
    for (int64_t i = 0; i < n; i += STREAMS * LANES)
      for (int s = 0; s < STREAMS; ++s) store(e + i + s * LANES, exponential(load(x + i + s * LANES)));
    BARRIER();
  }
}

// The scores of additive attention in factored form; three units share a division or a refined estimate. Sums 1 / (c +
// q k) over the units of c (units), q (FORWARD_QUERIES, units) and k (FORWARD_KEYS, units). The sums are not reduced
// across lanes: sums (FORWARD_QUERIES, FORWARD_KEYS, LANES).
static inline __attribute__((always_inline)) void forward(const int estimated, const float* c, const float* q,
                                                          const float* k, int64_t units, int64_t repeats, float* sums) {
  for (int64_t r = 0; r < repeats; ++r) {
    Floats acc[FORWARD_QUERIES][FORWARD_KEYS] = {{{0}}};
    for (int64_t u = 0; u < units; u += 3 * LANES) {
      const Floats c1 = load(c + u), c2 = load(c + u + LANES), c3 = load(c + u + 2 * LANES);
      for (int i = 0; i < FORWARD_QUERIES; ++i)
        for (int j = 0; j < FORWARD_KEYS; ++j) {
          const float *qi = q + i * units + u, *kj = k + j * units + u;
          const Floats d1 = c1 + load(qi) * load(kj);
          const Floats d2 = c2 + load(qi + LANES) * load(kj + LANES);
          const Floats d3 = c3 + load(qi + 2 * LANES) * load(kj + 2 * LANES);
          const Floats product = d1 * d2;
          const Floats numerator = (d1 + d2) * d3 + product;
          acc[i][j] += estimated ? numerator * refined_reciprocal(product * d3) : numerator / (product * d3);
        }
    }
    for (int i = 0; i < FORWARD_QUERIES; ++i)
      for (int j = 0; j < FORWARD_KEYS; ++j) store(sums + (i * FORWARD_KEYS + j) * LANES, acc[i][j]);
    BARRIER();
  }
}

void forward_divided(const float* c, const float* q, const float* k, int64_t units, int64_t repeats, float* sums) {
  forward(0, c, q, k, units, repeats, sums);
}

void forward_estimated(const float* c, const float* q, const float* k, int64_t units, int64_t repeats, float* sums) {
  forward(1, c, q, k, units, repeats, sums);
}

// The scores v . relu(q + k) of the same tile, with v in place of c.
void relu_pairs(const float* v, const float* q, const float* k, int64_t units, int64_t repeats, float* sums) {
  for (int64_t r = 0; r < repeats; ++r) {
    Floats acc[FORWARD_QUERIES][FORWARD_KEYS] = {{{0}}};
    for (int64_t u = 0; u < units; u += LANES) {
      const Floats vu = load(v + u);
      for (int i = 0; i < FORWARD_QUERIES; ++i)
        for (int j = 0; j < FORWARD_KEYS; ++j)
          acc[i][j] += vu * POSITIVE_PART(load(q + i * units + u) + load(k + j * units + u));
    }
    for (int i = 0; i < FORWARD_QUERIES; ++i)
      for (int j = 0; j < FORWARD_KEYS; ++j) store(sums + (i * FORWARD_KEYS + j) * LANES, acc[i][j]);
    BARRIER();
  }
}

// The backward pass for one vector of units, BACKWARD_QUERIES queries and n keys. Inputs are q (2, BACKWARD_QUERIES,
// LANES) and k (2, n, LANES), where the second half of each has the reciprocals of the first half, and ds
// (BACKWARD_QUERIES, n). With e = q k, 1/e = q' k' and g = ds / (e + 1/e + 2), it adds g to dq (BACKWARD_QUERIES,
// LANES) and dk (n, LANES), and g (e - 1/e) to dv (LANES). SHARED: two queries share a division, which replaces
// divisions by multiplications. ESTIMATED: each query has a refined estimate, with the same effect. Which form is
// fastest depends on the processor.
enum Reciprocals { SINGLE, SHARED, ESTIMATED };
static inline __attribute__((always_inline)) void backward(const enum Reciprocals by, const float* q, const float* k,
                                                           const float* ds, int64_t n, int64_t repeats, float* dq,
                                                           float* dk, float* dv) {
  for (int64_t repeat = 0; repeat < repeats; ++repeat) {
    Floats up[BACKWARD_QUERIES], down[BACKWARD_QUERIES], sums[BACKWARD_QUERIES], sum1 = load(dv), sum2 = {0};
    for (int a = 0; a < BACKWARD_QUERIES; ++a) {
      up[a] = load(q + a * LANES);
      down[a] = load(q + (BACKWARD_QUERIES + a) * LANES);
      sums[a] = load(dq + a * LANES);
    }
    for (int64_t j = 0; j < n; ++j) {
      const Floats k1 = load(k + j * LANES), k2 = load(k + (n + j) * LANES);
      Floats sum_k = load(dk + j * LANES);
      for (int a = 0; a < BACKWARD_QUERIES; a += 2) {
        const Floats e1 = up[a] * k1, i1 = down[a] * k2, e2 = up[a + 1] * k1, i2 = down[a + 1] * k2;
        const Floats d1 = (e1 + 2.0f) + i1, d2 = (e2 + 2.0f) + i2, zero = {0};
        const Floats s1 = ds[a * n + j] - zero, s2 = ds[(a + 1) * n + j] - zero;
        Floats g1, g2;
        if (by == SHARED) {
          const Floats inverse = 1.0f / (d1 * d2);
          g1 = (s1 * d2) * inverse;
          g2 = (s2 * d1) * inverse;
        } else if (by == ESTIMATED) {
          g1 = s1 * refined_reciprocal(d1);
          g2 = s2 * refined_reciprocal(d2);
        } else {
          g1 = s1 / d1;
          g2 = s2 / d2;
        }
        sums[a] += g1;
        sums[a + 1] += g2;
        sum_k += g1;
        sum_k += g2;
        sum1 += g1 * (e1 - i1);
        sum2 += g2 * (e2 - i2);
      }
      store(dk + j * LANES, sum_k);
    }
    for (int a = 0; a < BACKWARD_QUERIES; ++a) store(dq + a * LANES, sums[a]);
    store(dv, sum1 + sum2);
    BARRIER();
  }
}

void backward_shared(const float* q, const float* k, const float* ds, int64_t n, int64_t repeats, float* dq, float* dk,
                     float* dv) {
  backward(SHARED, q, k, ds, n, repeats, dq, dk, dv);
}

void backward_single(const float* q, const float* k, const float* ds, int64_t n, int64_t repeats, float* dq, float* dk,
                     float* dv) {
  backward(SINGLE, q, k, ds, n, repeats, dq, dk, dv);
}

void backward_estimated(const float* q, const float* k, const float* ds, int64_t n, int64_t repeats, float* dq,
                        float* dk, float* dv) {
  backward(ESTIMATED, q, k, ds, n, repeats, dq, dk, dv);
}
