// Additive attention from scratch, as fast as this processor allows. The kernels of csrc/ are compared with it; it
// shares no code with them. scratch.py compiles this file for the machine it runs on and calls it through ctypes.
//
// With E = e^{2q} e^{2k}, whose factors are computed once per row, and r = 1 / (1 + E): tanh(q + k) = 1 - 2 r and
// 1 - tanh^2 = 4 r (1 - r). Units (in the backward, queries) share a reciprocal through a common denominator.
//
// This is for benchmarks only. It has no guards: products of four denominators overflow from |q + k| of about 10 on,
// scores must be below 80, v must not be near 0, and r (1 - r) loses accuracy where units are saturated. It takes
// contiguous float32, no mask and no bias. A and D are multiples of 4 vectors. For more than one query, Tq and Tk are
// multiples of 10. It runs on the calling thread.
#include <stddef.h>

#include "vectors.h"

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

#if VECTOR_BYTES == 64 || defined(__aarch64__)  // 32 registers
#define QUERIES 5
#define BACK_QUERIES 10
#define COLUMNS 4
#else
#define QUERIES 5
#define BACK_QUERIES 5
#define COLUMNS 2
#endif
#define KEYS 2

enum By { DIVIDED, ESTIMATED, MIXED };  // MIXED: alternates, so that divider and multipliers work in parallel

// Constants for scratch.py.
const int32_t lanes = LANES;
const int32_t rows = 10;
const int32_t units = 4 * LANES;
#ifdef STREAM_STORE
const int32_t can_stream = 1;
#else
const int32_t can_stream = 0;
#endif

typedef struct {
  int64_t B, Tq, Tk, A, D;
} Sizes;

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef SHUFFLE
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Ints){__VA_ARGS__})
#endif

// Pairwise sums of two vectors, interleaved by elements, by pairs, and by quarters of a vector.
#if LANES == 16
#define ELEMENTS(a, b)                                                      \
  SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) + \
      SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define PAIRS(a, b)                                                         \
  SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) + \
      SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#define QUARTERS(a, b)                                                    \
  SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) + \
      SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
#define LAST(a, b)                                                          \
  SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) + \
      SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
#elif LANES == 8
#define ELEMENTS(a, b) SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13) + SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#define PAIRS(a, b) SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#define LAST(a, b) SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15)
#else
#define ELEMENTS(a, b) SHUFFLE(a, b, 0, 4, 1, 5) + SHUFFLE(a, b, 2, 6, 3, 7)
#define PAIRS(a, b) SHUFFLE(a, b, 0, 1, 4, 5) + SHUFFLE(a, b, 2, 3, 6, 7)
#endif

// The sums of four vectors within each quarter of a vector.
INLINE Floats four_sums(const float* x) {
  const Floats a = ELEMENTS(load(x), load(x + LANES)), b = ELEMENTS(load(x + 2 * LANES), load(x + 3 * LANES));
  return PAIRS(a, b);
}

// The horizontal sums of LANES vectors, as one vector.
INLINE Floats row_sums(const float* x) {
#if LANES == 16
  const Floats a = QUARTERS(four_sums(x), four_sums(x + 4 * LANES));
  const Floats b = QUARTERS(four_sums(x + 8 * LANES), four_sums(x + 12 * LANES));
  return LAST(a, b);
#elif LANES == 8
  return LAST(four_sums(x), four_sums(x + 4 * LANES));
#else
  return four_sums(x);
#endif
}

INLINE Floats all(float x) { return x - (Floats){0}; }

INLINE float sum(Floats x) {
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += x[i];
  return total;
}

INLINE int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

INLINE float* take(float** scratch, int64_t n) {
  float* taken = *scratch;
  *scratch += padded(n);
  return taken;
}

// An upper bound on the number of elements that the functions below need at `scratch`.
int64_t scratch_size(int64_t Tq, int64_t Tk, int64_t A, int64_t D) {
  return 2 * (Tq + Tk + 8) * (A + LANES) + 8 * A + 2 * D + 4 * (Tq + LANES) * (Tk + LANES) +
         (8 + Tk + Tq + 2 * LANES) * 8 * LANES;
}

// acc + a / b.
INLINE Floats add_quotient(const int divided, Floats acc, Floats a, Floats b) {
  return divided ? acc + a / b : acc + a * refined_reciprocal(b);
}

// acc + 1 / d[0] + ... for n denominators, with one reciprocal.
INLINE Floats add_inverses(const int n, const int divided, Floats acc, const Floats* d) {
  if (n == 1) return add_quotient(divided, acc, all(1), d[0]);
  const Floats p = d[0] * d[1], s = d[0] + d[1];
  if (n == 2) return add_quotient(divided, acc, s, p);
  if (n == 3) return add_quotient(divided, acc, s * d[2] + p, p * d[2]);
  const Floats t = d[2] * d[3];
  return add_quotient(divided, acc, s * t + (d[2] + d[3]) * p, p * t);
}

// Replaces each of n values d by 1 / d, with one reciprocal in all.
INLINE void invert(const int n, const int divided, Floats* d) {
  const Floats p = n > 1 ? d[0] * d[1] : d[0], s = n == 4 ? d[2] * d[3] : d[2 % n];
  const Floats all_of_them = n > 2 ? p * s : p;
  const Floats inverse = divided ? 1.0f / all_of_them : refined_reciprocal(all_of_them);
  const Floats a = n > 2 ? inverse * s : inverse, b = inverse * p, d0 = d[0], d2 = d[2 % n];
  if (n == 1) d[0] = inverse;
  if (n > 1) d[0] = a * d[1], d[1] = a * d0;
  if (n == 3) d[2] = b;
  if (n == 4) d[2] = b * d[3], d[3] = b * d2;
}

// Forward -------------------------------------------------------------------------------------------------------------

// Denominators d = c + q k of 1 / d = v / (1 + E): c = 1 / v, and q = e^{2q} / v.
static float fold(const float* v, int64_t A, float* c) {
  Floats total = {0};
  for (int64_t u = 0; u < A; u += LANES) {
    store(c + u, 1.0f / load(v + u));
    total += load(v + u);
  }
  return sum(total);
}

// e^{2x} of a row, times c unless c is NULL.
static void exponential_row(const float* x, const float* c, int64_t A, float* e) {
  for (int64_t u = 0; u < A; u += LANES) store(e + u, exponential(load(x + u)) * (c ? load(c + u) : all(1)));
}

// sums (QUERIES, LANES of keys, LANES): sums of 1 / d over the units of a query and a key, not reduced across lanes.
INLINE void score_tile(const int share, const enum By by, int64_t A, const float* c, const float* q, const float* k,
                       float* sums) {
  Floats acc[QUERIES][KEYS] = {{{0}}};
  int64_t u = 0;
  for (; u + share * LANES <= A; u += share * LANES) {
    Floats constant[4], key[4], d[4];
    UNROLL for (int n = 0; n < share; ++n) constant[n] = load(c + u + n * LANES);
    UNROLL for (int j = 0; j < KEYS; ++j) {
      UNROLL for (int n = 0; n < share; ++n) key[n] = load(k + j * A + u + n * LANES);
      UNROLL for (int i = 0; i < QUERIES; ++i) {
        UNROLL for (int n = 0; n < share; ++n) d[n] = constant[n] + load(q + i * A + u + n * LANES) * key[n];
        acc[i][j] = add_inverses(share, by == DIVIDED || (by == MIXED && i % 2 == 0), acc[i][j], d);
      }
    }
  }
  for (; share == 3 && u < A; u += 2 * LANES)  // the one or two remaining vectors
    for (int j = 0; j < KEYS; ++j) UNROLL for (int i = 0; i < QUERIES; ++i) {
        const float *qi = q + i * A + u, *kj = k + j * A + u;
        Floats d[2] = {load(c + u) + load(qi) * load(kj)};
        if (u + LANES < A) d[1] = load(c + u + LANES) + load(qi + LANES) * load(kj + LANES);
        acc[i][j] =
            u + LANES < A ? add_inverses(2, by == DIVIDED, acc[i][j], d) : add_inverses(1, by == DIVIDED, acc[i][j], d);
      }
  UNROLL for (int i = 0; i < QUERIES; ++i) UNROLL for (int j = 0; j < KEYS; ++j)
      store(sums + (i * LANES + j) * LANES, acc[i][j]);
}

// Does not subtract the maximum: no score is so large that its exponential overflows.
static void softmax(float* x, int64_t n) {
  Floats total = {0};
  for (int64_t j = n; j < padded(n); ++j) x[j] = -40;
  for (int64_t j = 0; j < n; j += LANES) store(x + j, exponential(load(x + j) * 0.5f));
  for (int64_t j = n; j < padded(n); ++j) x[j] = 0;
  for (int64_t j = 0; j < n; j += LANES) total += load(x + j);
  const float inverse = 1 / sum(total);
  for (int64_t j = 0; j < n; j += LANES) store(x + j, load(x + j) * inverse);
}

// Prefetches elements that are read or written later: a few cache lines in each call, during the arithmetic.
typedef struct {
  struct {
    const float* at;
    int64_t n;
  } parts[6];
  int count, part;
  int64_t done, lines;
} Ahead;

INLINE void later(Ahead* ahead, const float* at, int64_t n) {
  ahead->parts[ahead->count].at = at;
  ahead->parts[ahead->count++].n = n;
}

// Distributes all cache lines over `calls` calls.
INLINE void begin(Ahead* ahead, int64_t calls) {
  int64_t n = 0;
  for (int i = 0; i < ahead->count; ++i) n += ahead->parts[i].n / 16 + 1;
  ahead->lines = n / calls + 1;
}

INLINE void fetch(Ahead* ahead) {
  for (int64_t i = 0; i < ahead->lines && ahead->part < ahead->count; ++i) {
    __builtin_prefetch(ahead->parts[ahead->part].at + ahead->done, 0, 2);
    ahead->done += 16;
    if (ahead->done >= ahead->parts[ahead->part].n) ahead->part += 1, ahead->done = 0;
  }
}

// out (m, columns) = a (m, n) times b (n, columns); a has leading dimension lda. packed: COLUMNS vectors per row of b.
static void product(const float* a, int64_t lda, const float* b, int64_t m, int64_t n, int64_t columns, float* packed,
                    float* out) {
  for (int64_t c = 0; c < columns; c += COLUMNS * LANES) {
    for (int64_t j = 0; j < n; ++j)
      UNROLL for (int s = 0; s < COLUMNS; ++s)
          store(packed + (j * COLUMNS + s) * LANES, load(b + j * columns + c + s * LANES));
    for (int64_t i = 0; i < m; i += 5) {
      Floats acc[5][COLUMNS] = {{{0}}};
      for (int64_t j = 0; j < n; ++j) {
        Floats row[COLUMNS];
        UNROLL for (int s = 0; s < COLUMNS; ++s) row[s] = load(packed + (j * COLUMNS + s) * LANES);
        UNROLL for (int r = 0; r < 5; ++r) {
          const Floats factor = all(a[(i + r) * lda + j]);
          UNROLL for (int s = 0; s < COLUMNS; ++s) acc[r][s] += factor * row[s];
        }
      }
      UNROLL for (int r = 0; r < 5; ++r) UNROLL for (int s = 0; s < COLUMNS; ++s)
          store(out + (i + r) * columns + c + s * LANES, acc[r][s]);
    }
  }
}

INLINE void forward_many(const int share, const enum By by, Sizes n, const float* q, const float* k,
                         const float* values, const float* v, float* context, float* alignments, float* scratch) {
  const int64_t ld = padded(n.Tk);
  float *c = take(&scratch, n.A), *eq = take(&scratch, n.Tq * n.A), *ek = take(&scratch, n.Tk * n.A);
  float *scores = take(&scratch, n.Tq * ld), *sums = take(&scratch, QUERIES * LANES * LANES);
  const float sum_v = fold(v, n.A, c);
  for (int64_t b = 0; b < n.B; ++b) {
    for (int64_t i = 0; i < n.Tq; ++i) exponential_row(q + (b * n.Tq + i) * n.A, c, n.A, eq + i * n.A);
    for (int64_t j = 0; j < n.Tk; ++j) exponential_row(k + (b * n.Tk + j) * n.A, NULL, n.A, ek + j * n.A);
    Ahead ahead = {0};
    later(&ahead, values + b * n.Tk * n.D, n.Tk * n.D);
    if (b + 1 < n.B) {
      later(&ahead, q + (b + 1) * n.Tq * n.A, n.Tq * n.A);
      later(&ahead, k + (b + 1) * n.Tk * n.A, n.Tk * n.A);
    }
    begin(&ahead, n.Tq / QUERIES * (n.Tk / KEYS));
    for (int64_t i = 0; i < n.Tq; i += QUERIES)
      for (int64_t j = 0; j < n.Tk; j += LANES) {
        for (int64_t at = 0; at < LANES && j + at < n.Tk; at += KEYS, fetch(&ahead))
          score_tile(share, by, n.A, c, eq + i * n.A, ek + (j + at) * n.A, sums + at * LANES);
        for (int r = 0; r < QUERIES; ++r)
          store(scores + (i + r) * ld + j, sum_v - 2.0f * row_sums(sums + r * LANES * LANES));
      }
    for (int64_t i = 0; i < n.Tq; ++i) {
      softmax(scores + i * ld, n.Tk);
      memcpy(alignments + (b * n.Tq + i) * n.Tk, scores + i * ld, n.Tk * sizeof(float));
    }
    product(scores, ld, values + b * n.Tk * n.D, n.Tq, n.Tk, n.D, scratch, context + b * n.Tq * n.D);
  }
}

// sums (m, LANES): sums of 1 / d over the units of one query and m keys, not reduced across lanes.
INLINE void score_rows(const int m, const int share, const enum By by, int64_t A, const float* c, const float* eq,
                       const float* k, float* sums) {
  Floats total[4] = {{0}};
  int64_t u = 0;
  for (; u + share * LANES <= A; u += share * LANES) UNROLL for (int r = 0; r < m; ++r) {
      Floats d[4];
      UNROLL for (int s = 0; s < share; ++s) {
        const int64_t at = u + s * LANES;
        __builtin_prefetch(k + (m + r) * A + at);
        d[s] = load(c + at) + load(eq + at) * exponential(load(k + r * A + at));
      }
      total[r] = add_inverses(share, by == DIVIDED || (by == MIXED && r % 2 == 0), total[r], d);
    }
  for (; share == 3 && u < A; u += LANES) UNROLL for (int r = 0; r < m; ++r) {
      const Floats d = load(c + u) + load(eq + u) * exponential(load(k + r * A + u));
      total[r] = add_inverses(1, by == DIVIDED, total[r], &d);
    }
  UNROLL for (int r = 0; r < m; ++r) store(sums + r * LANES, total[r]);
}

// acc += the sum of m rows of n elements, each times its factor.
INLINE void add_rows(const int m, int64_t n, const float* factors, const float* rows_of, float* acc) {
  for (int64_t u = 0; u < n; u += LANES) {
    Floats x = load(acc + u);
    UNROLL for (int r = 0; r < m; ++r) x += factors[r] * load(rows_of + r * n + u);
    store(acc + u, x);
  }
}

// One query: keys and values are read once, sequentially, several rows at a time.
INLINE void forward_one(const int share, const enum By by, Sizes n, const float* q, const float* k, const float* values,
                        const float* v, float* context, float* alignments, float* scratch) {
  const int64_t ld = padded(n.Tk);
  float *c = take(&scratch, n.A), *eq = take(&scratch, n.A), *scores = take(&scratch, ld);
  float *sums = take(&scratch, ld * LANES), *acc = take(&scratch, n.D);
  const float sum_v = fold(v, n.A, c);
  memset(sums, 0, ld * LANES * sizeof(float));
  for (int64_t b = 0; b < n.B; ++b) {
    const float *keys = k + b * n.Tk * n.A, *rows_of = values + b * n.Tk * n.D;
    exponential_row(q + b * n.A, c, n.A, eq);
    int64_t j = 0;
    for (; j + 4 <= n.Tk; j += 4) score_rows(4, share, by, n.A, c, eq, keys + j * n.A, sums + j * LANES);
    for (; j < n.Tk; ++j) score_rows(1, share, by, n.A, c, eq, keys + j * n.A, sums + j * LANES);
    for (j = 0; j < ld; j += LANES) store(scores + j, sum_v - 2.0f * row_sums(sums + j * LANES));
    softmax(scores, n.Tk);
    memcpy(alignments + b * n.Tk, scores, n.Tk * sizeof(float));
    memset(acc, 0, n.D * sizeof(float));
    for (j = 0; j + 8 <= n.Tk; j += 8) add_rows(8, n.D, scores + j, rows_of + j * n.D, acc);
    for (; j + 2 <= n.Tk; j += 2) add_rows(2, n.D, scores + j, rows_of + j * n.D, acc);
    for (; j < n.Tk; ++j) add_rows(1, n.D, scores + j, rows_of + j * n.D, acc);
    memcpy(context + b * n.D, acc, n.D * sizeof(float));
  }
}

// Backward ------------------------------------------------------------------------------------------------------------

// sums (BACK_QUERIES, LANES of keys, LANES): dot products of rows of a and b (n elements), not reduced across lanes.
INLINE void dot_tile(int64_t n, const float* a, const float* b, float* sums) {
  Floats acc[BACK_QUERIES][KEYS] = {{{0}}};
  for (int64_t c = 0; c < n; c += LANES) {
    Floats row[KEYS];
    UNROLL for (int j = 0; j < KEYS; ++j) row[j] = load(b + j * n + c);
    UNROLL for (int i = 0; i < BACK_QUERIES; ++i) {
      const Floats x = load(a + i * n + c);
      UNROLL for (int j = 0; j < KEYS; ++j) acc[i][j] += x * row[j];
    }
  }
  UNROLL for (int i = 0; i < BACK_QUERIES; ++i) UNROLL for (int j = 0; j < KEYS; ++j)
      store(sums + (i * LANES + j) * LANES, acc[i][j]);
}

// For one vector of units, BACK_QUERIES queries and n keys. Inputs: q = e^{2q}, k = e^{2k} and the gradients of the
// scores ds (n, BACK_QUERIES). Writes the sums of g = ds r (1 - r) to dq and adds them to dk; returns the sum of ds r.
INLINE Floats gradient_tile(const int share, const enum By by, int64_t n, const float* q, const float* k,
                            const float* ds, float* dq, float* dk) {
  // Groups of about `share` queries; the first `more` groups have one query more than the others.
  const int groups = (BACK_QUERIES + share / 2) / share, least = BACK_QUERIES / groups, more = BACK_QUERIES % groups;
  Floats sums[BACK_QUERIES] = {{0}}, total[2] = {{0}};
  for (int64_t j = 0; j < n; ++j) {
    const Floats key = load(k + j * LANES);
    Floats of_key = load(dk + j * LANES), r[BACK_QUERIES];
    UNROLL for (int i = 0; i < BACK_QUERIES; ++i) r[i] = 1.0f + load(q + i * LANES) * key;
    UNROLL for (int i = 0; i < groups; ++i) {
      const int at = i * least + (i < more ? i : more), divided = by == DIVIDED || (by == MIXED && i % 2 == 0);
      if (i < more)
        invert(least + 1, divided, r + at);
      else
        invert(least, divided, r + at);
    }
    UNROLL for (int i = 0; i < BACK_QUERIES; ++i) {
      const Floats p = r[i] * all(ds[j * BACK_QUERIES + i]), g = p - p * r[i];
      sums[i] += g;
      of_key += g;
      total[i % 2] += p;
    }
    store(dk + j * LANES, of_key);
  }
  UNROLL for (int i = 0; i < BACK_QUERIES; ++i) store(dq + i * LANES, sums[i]);
  return total[0] + total[1];
}

// For one sentence: ds, with BACK_QUERIES queries interleaved, and the gradient of the values. w: alignments (Tq, Tk).
static void score_gradients(Sizes n, const float* values, const float* w, const float* dc, float* ds, float* dvalues,
                            float* scratch) {
  const int64_t ld = padded(n.Tk), ld_q = padded(n.Tq);
  float *transposed = take(&scratch, n.Tk * ld_q), *dw = take(&scratch, BACK_QUERIES * ld);
  float* sums = take(&scratch, BACK_QUERIES * LANES * LANES);
  for (int64_t i = 0; i < n.Tq; i += BACK_QUERIES) {
    for (int64_t j = 0; j < n.Tk; j += LANES) {
      for (int64_t at = 0; at < LANES && j + at < n.Tk; at += KEYS)
        dot_tile(n.D, dc + i * n.D, values + (j + at) * n.D, sums + at * LANES);
      for (int r = 0; r < BACK_QUERIES; ++r) store(dw + r * ld + j, row_sums(sums + r * LANES * LANES));
    }
    for (int r = 0; r < BACK_QUERIES; ++r) {
      const float *of = w + (i + r) * n.Tk, *d = dw + r * ld;
      float delta = 0;
      for (int64_t j = 0; j < n.Tk; ++j) delta += of[j] * d[j];
      for (int64_t j = 0; j < n.Tk; ++j) {
        transposed[j * ld_q + i + r] = of[j];
        ds[i * n.Tk + j * BACK_QUERIES + r] = of[j] * (d[j] - delta);
      }
    }
  }
  product(transposed, ld_q, dc, n.Tk, n.Tq, n.D, scratch, dvalues);
}

// e^{2x} of x (rows, A), in the layout (A / LANES, rows, LANES).
static void exponential_columns(const float* x, int64_t of_rows, int64_t A, float* e) {
  for (int64_t i = 0; i < of_rows; ++i)
    for (int64_t u = 0; u < A; u += LANES) store(e + u * of_rows + i * LANES, exponential(load(x + i * A + u)));
}

INLINE void backward_many(const int share, const enum By by, Sizes n, const float* q, const float* k,
                          const float* values, const float* v, const float* alignments, const float* dcontext,
                          float* dq, float* dk, float* dvalues, float* dv, float* scratch) {
  float *eq = take(&scratch, n.Tq * n.A), *ek = take(&scratch, n.Tk * n.A), *ds = take(&scratch, n.Tq * n.Tk);
  float *of_queries = take(&scratch, n.Tq * LANES), *of_keys = take(&scratch, n.Tk * LANES);
  const int64_t of_q = n.Tq * n.A, of_k = n.Tk * n.A, of_values = n.Tk * n.D, of_context = n.Tq * n.D;
  memset(dv, 0, n.A * sizeof(float));
  for (int64_t b = 0; b < n.B; ++b, q += of_q, dq += of_q, k += of_k, dk += of_k) {
    exponential_columns(q, n.Tq, n.A, eq);
    exponential_columns(k, n.Tk, n.A, ek);
    score_gradients(n, values + b * of_values, alignments + b * n.Tq * n.Tk, dcontext + b * of_context, ds,
                    dvalues + b * of_values, scratch);
    Ahead ahead = {0};
    later(&ahead, dq, of_q);
    later(&ahead, dk, of_k);
    if (b + 1 < n.B) {
      later(&ahead, q + of_q, of_q);
      later(&ahead, k + of_k, of_k);
      later(&ahead, values + (b + 1) * of_values, of_values);
      later(&ahead, dcontext + (b + 1) * of_context, of_context);
    }
    begin(&ahead, n.A / LANES * (n.Tq / BACK_QUERIES));
    for (int64_t u = 0; u < n.A; u += LANES) {
      Floats total = {0};
      memset(of_keys, 0, n.Tk * LANES * sizeof(float));
      for (int64_t i = 0; i < n.Tq; i += BACK_QUERIES, fetch(&ahead))
        total += gradient_tile(share, by, n.Tk, eq + u * n.Tq + i * LANES, ek + u * n.Tk, ds + i * n.Tk,
                               of_queries + i * LANES, of_keys);
      store(dv + u, load(dv + u) - 2.0f * total);  // + ds, whose sum over the keys of a query is 0
      const Floats factor = 4.0f * load(v + u);
      for (int64_t i = 0; i < n.Tq; ++i) store(dq + i * n.A + u, factor * load(of_queries + i * LANES));
      for (int64_t j = 0; j < n.Tk; ++j) store(dk + j * n.A + u, factor * load(of_keys + j * LANES));
    }
  }
}

INLINE void put(const int streamed, float* p, Floats x) {
#ifdef STREAM_STORE
  if (streamed) {
    STREAM_STORE(p, x);
    return;
  }
#endif
  store(p, x);
}

// The gradients of m keys, given the gradients ds of their scores. Adds the gradient of the query to of_query, and ds r
// to of_v.
INLINE void gradient_rows(const int m, const int share, const enum By by, const int streamed, int64_t A,
                          const float* eq, const float* factor, const float* k, const float* ds, float* dk,
                          float* of_query, float* of_v) {
  for (int64_t u = 0; u < A; u += 4 * LANES) {
    Floats dq[4], dv[4];
    UNROLL for (int s = 0; s < 4; ++s) dq[s] = load(of_query + u + s * LANES), dv[s] = load(of_v + u + s * LANES);
    UNROLL for (int i = 0; i < m; ++i) {
      Floats r[4];
      UNROLL for (int s = 0; s < 4; ++s) {
        const float* key = k + i * A + u + s * LANES;
        __builtin_prefetch(key + m * A);
        r[s] = 1.0f + load(eq + u + s * LANES) * exponential(load(key));
      }
      UNROLL for (int s = 0; s < 4; s += share) invert(share, by == DIVIDED || (by == MIXED && s / share % 2), r + s);
      UNROLL for (int s = 0; s < 4; ++s) {
        const Floats p = r[s] * ds[i], g = (p - p * r[s]) * load(factor + u + s * LANES);
        put(streamed, dk + i * A + u + s * LANES, g);
        dq[s] += g;
        dv[s] += p;
      }
    }
    UNROLL for (int s = 0; s < 4; ++s) store(of_query + u + s * LANES, dq[s]), store(of_v + u + s * LANES, dv[s]);
  }
}

// One query: values and keys are read once, and their gradients are written once, sequentially.
INLINE void backward_one(const int share, const enum By by, const int streamed, Sizes n, const float* q, const float* k,
                         const float* values, const float* v, const float* alignments, const float* dcontext, float* dq,
                         float* dk, float* dvalues, float* dv, float* scratch) {
  const int64_t ld = padded(n.Tk);
  float *eq = take(&scratch, n.A), *sums = take(&scratch, ld * LANES), *dw = take(&scratch, ld);
  float *factor = take(&scratch, n.A), *of_query = take(&scratch, n.A), *of_v = take(&scratch, n.A);
  memset(sums, 0, ld * LANES * sizeof(float));
  memset(of_v, 0, n.A * sizeof(float));
  for (int64_t u = 0; u < n.A; u += LANES) store(factor + u, 4.0f * load(v + u));
  for (int64_t b = 0; b < n.B; ++b) {
    const float *w = alignments + b * n.Tk, *dc = dcontext + b * n.D;
    exponential_row(q + b * n.A, NULL, n.A, eq);
    for (int64_t j = 0; j < n.Tk; ++j) {
      const float* x = values + (b * n.Tk + j) * n.D;
      float* dx = dvalues + (b * n.Tk + j) * n.D;
      Floats acc[4] = {{0}};
      for (int64_t c = 0; c < n.D; c += 4 * LANES) UNROLL for (int m = 0; m < 4; ++m) {
          __builtin_prefetch(x + 2 * n.D + c + m * LANES);
          const Floats d = load(dc + c + m * LANES);
          acc[m] += d * load(x + c + m * LANES);
          put(streamed, dx + c + m * LANES, w[j] * d);
        }
      store(sums + j * LANES, (acc[0] + acc[1]) + (acc[2] + acc[3]));
    }
    for (int64_t j = 0; j < ld; j += LANES) store(dw + j, row_sums(sums + j * LANES));
    float delta = 0;
    for (int64_t j = 0; j < n.Tk; ++j) delta += w[j] * dw[j];
    memset(of_query, 0, n.A * sizeof(float));
    for (int64_t j = 0; j < n.Tk; ++j) dw[j] = w[j] * (dw[j] - delta);
    const float* keys = k + b * n.Tk * n.A;
    float* dkeys = dk + b * n.Tk * n.A;
    int64_t j = 0;
    for (; j + 4 <= n.Tk; j += 4)
      gradient_rows(4, share, by, streamed, n.A, eq, factor, keys + j * n.A, dw + j, dkeys + j * n.A, of_query, of_v);
    for (; j < n.Tk; ++j)
      gradient_rows(1, share, by, streamed, n.A, eq, factor, keys + j * n.A, dw + j, dkeys + j * n.A, of_query, of_v);
    memcpy(dq + b * n.A, of_query, n.A * sizeof(float));
  }
  for (int64_t u = 0; u < n.A; u += LANES) store(dv + u, -2.0f * load(of_v + u));
  if (streamed) STREAM_END();
}

// The functions that scratch.py calls, by form of the reciprocals; the fastest counts ---------------------------------

#define FORWARD(name, share, by)                                                                      \
  void name(int64_t B, int64_t Tq, int64_t Tk, int64_t A, int64_t D, const float* q, const float* k,  \
            const float* values, const float* v, float* context, float* alignments, float* scratch) { \
    const Sizes n = {B, Tq, Tk, A, D};                                                                \
    if (Tq == 1)                                                                                      \
      forward_one(share, by, n, q, k, values, v, context, alignments, scratch);                       \
    else                                                                                              \
      forward_many(share, by, n, q, k, values, v, context, alignments, scratch);                      \
  }
FORWARD(forward_three_divided, 3, DIVIDED)
FORWARD(forward_three_estimated, 3, ESTIMATED)
FORWARD(forward_four_divided, 4, DIVIDED)
FORWARD(forward_four_estimated, 4, ESTIMATED)
FORWARD(forward_four_mixed, 4, MIXED)

#define BACKWARD(name, call, ...)                                                                                      \
  void name(int64_t B, int64_t Tq, int64_t Tk, int64_t A, int64_t D, const float* q, const float* k,                   \
            const float* values, const float* v, const float* alignments, const float* dcontext, float* dq, float* dk, \
            float* dvalues, float* dv, float* scratch) {                                                               \
    const Sizes n = {B, Tq, Tk, A, D};                                                                                 \
    call(__VA_ARGS__, n, q, k, values, v, alignments, dcontext, dq, dk, dvalues, dv, scratch);                         \
  }
BACKWARD(backward_many_one_estimated, backward_many, 1, ESTIMATED)
BACKWARD(backward_many_two_estimated, backward_many, 2, ESTIMATED)
BACKWARD(backward_many_two_mixed, backward_many, 2, MIXED)
BACKWARD(backward_many_three_divided, backward_many, 3, DIVIDED)
BACKWARD(backward_one_divided, backward_one, 4, DIVIDED, 0)
BACKWARD(backward_one_estimated, backward_one, 2, ESTIMATED, 0)
BACKWARD(backward_one_streamed_divided, backward_one, 4, DIVIDED, 1)
BACKWARD(backward_one_streamed_estimated, backward_one, 2, ESTIMATED, 1)
