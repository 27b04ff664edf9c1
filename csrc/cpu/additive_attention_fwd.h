// Additive attention without a tanh per pair. Part of a SIMD level: see simd.h.
//
// tanh(q + k) = 1 - 2 / (1 + E), E = e^{2q} e^{2k}, so that with exponentials made once per row a pair of query and step
// costs a multiply-add and a reciprocal for each hidden unit, and units or queries share reciprocals over a common
// denominator. Guards choose, for each tile of queries and each step, a form in which nothing overflows:
//
//   largest |q| + largest |k|   forward                          backward
//   <= kThree, kPair            three units share a division     two queries share a division
//   <= kSingle                  one division each                one division each
//   beyond, or NaN              tanh itself                      tanh itself
//
// The forward also uses tanh itself where a large v would show the rounding of the factored form (least_reach_of).
#pragma once

#include "../additive_attention.h"
#include "attention.h"

namespace attn {
namespace ATTN_LEVEL {

// Forward, with v folded in: v / (1 + E) = 1 / d, d = (1/v) + (e^{2q}/v) e^{2k}. With v scaled to at most 1, units smaller
// than 2^-24 dropped (they are below the rounding of the others) and d scaled by 2^-40, three denominators lie between
// 2^-40 and 2^(24 - 40) (1 + E), so their product is in range while 1 + E < 2^56.
constexpr float kThree = 19.0f;
constexpr float kSingle = 43.0f;  // e^{2q}, e^{2k} and their product are in range
constexpr float kPair = 21.5f;    // the product of two 1 + E is
constexpr double kSmallestUnit = 0x1p-24, kUnitScale = 0x1p-40;
// 1 - 2 / (1 + E) is off by an ulp of 1, where tanh itself is off by an ulp of its value. That shows only where scores are
// sums of small tanh times a large v. Measured against eager (A = 4 to 2048, inputs of standard deviation 0.01 to 3, norms
// of v up to 64), the error is no larger
//   for any input       while the norm of v is at most 2,
//   from |q| + |k| = 2  while it is at most 8,
//   from |q| + |k| = 5  while it is at most that of a standard normal v (its square about A).
template <typename T>
T least_reach_of(T norm2, int64_t units) {
  if (norm2 <= 4) return 0;
  if (norm2 <= 64) return 2;
  return norm2 <= T(1.3) * units ? T(5) : static_cast<T>(__builtin_inf());
}

// v and bias as vectors that end in zeros, and what the factored form needs of v.
template <typename T>
struct Units {
  int64_t n, size;  // A, and A in whole vectors
  T *v, *bias;
  T *constant, *factor;  // d = constant + factor * e^{2q} e^{2k}
  T sum_v, scale;        // score = sum_v - scale * sum of 1 / d
  bool factored;         // whether the factored form may be used,
  T least_reach;         // and from which |q| + |k| on

  Units(const AdditiveScores& op, Scratch& scratch) : n(op.A), size(padded<T>(op.A)) {
    v = take<T>(scratch, size);
    bias = take<T>(scratch, size);
    constant = take<T>(scratch, size);
    factor = take<T>(scratch, size);
    IntVec<T> top_bits{};
    Vec<T> squares{};
    for (int64_t c = 0; c < size; c += width<T>) {
      const Vec<T> x = load_as<T>(op.v.data, op.v.dtype, c * op.v.stride[2], op.v.stride[2], n - c);
      const Vec<T> zero{};
      store(v + c, x);
      store(bias + c,
            op.bias ? load_as<T>(op.bias.data, op.bias.dtype, c * op.bias.stride[2], op.bias.stride[2], n - c) : zero);
      top_bits = larger_magnitude<T>(top_bits, x);
      squares += x * x;
    }
    const T top = largest_magnitude<T>(top_bits);
    // Not for NaN or Inf, nor for float64, which is there to be exact.
    const T norm2 = sum<T>(squares);
    least_reach = least_reach_of(norm2, n);
    factored = sizeof(T) == 4 && top > T(1e-30) && least_reach <= kThree;
    if (!factored) return;
    int exponent;
    frexp(top, &exponent);
    const T unit = static_cast<T>(ldexp(1.0, exponent)), smallest = unit * T(kSmallestUnit);
    Vec<T> total{};
    for (int64_t c = 0; c < size; c += width<T>) {
      const Vec<T> x = load(v + c), zero{};
      const IntVec<T> kept = absolute<T>(x) >= smallest;
      const Vec<T> inverse = unit * T(kUnitScale) / x;
      store(factor + c, kept ? inverse : zero);
      store(constant + c, kept ? inverse : broadcast(T(256)));  // 1 / d is then 2^-48 of the largest
      total += kept ? x : zero;
    }
    sum_v = sum<T>(total);
    scale = static_cast<T>(2 * unit * kUnitScale);
  }
};

// e = e^{2x} (meaningful up to kSingle) for the vectors x = row(c) of a row. Returns its largest |x|; NaN if it has a NaN.
template <typename T, class Row>
ATTN_INLINE T exponentials(int64_t size, T* e, const Row& row) {
  IntVec<T> top{};
  for (int64_t c = 0; c < size; c += width<T>) {
    const Vec<T> x = row(c);
    if constexpr (sizeof(T) == 4) store(e + c, exp_in_range(x + x));
    top = larger_magnitude<T>(top, x);
  }
  return largest_magnitude<T>(top);
}

// Rows of queries (bias added) or of keys, as exponentials with the largest magnitude of each row.
template <typename T>
struct Projected {
  int64_t ld;
  T *e, *top;  // (n, ld), (n)

  Projected(int64_t n, int64_t ld, Scratch& scratch) : ld(ld), e(take<T>(scratch, n * ld)), top(take<T>(scratch, n)) {}
};

// score[i][j] of NQ queries and NK steps. kShare: three units share a division, otherwise one each.
template <typename T, int NQ, int NK, bool kShare>
ATTN_INLINE void factored_tile(const Units<T>& units, const T* q, const T* k, int64_t ld, T* out, int64_t out_ld) {
  constexpr int64_t w = width<T>;
  Vec<T> acc[NQ][NK] = {};
  auto denominator = [&](int64_t c, int i, int j) __attribute__((always_inline)) {
    return load(units.constant + c) + load(q + i * ld + c) * load(k + j * ld + c);
  };
  int64_t c = 0;
  if constexpr (kShare) {
    for (; c + 3 * w <= units.size; c += 3 * w)
      for (int i = 0; i < NQ; ++i)
        for (int j = 0; j < NK; ++j) {
          const Vec<T> d1 = denominator(c, i, j), d2 = denominator(c + w, i, j), d3 = denominator(c + 2 * w, i, j);
          const Vec<T> product = d1 * d2;
          acc[i][j] += ((d1 + d2) * d3 + product) / (product * d3);
        }
    for (; c + 2 * w <= units.size; c += 2 * w)
      for (int i = 0; i < NQ; ++i)
        for (int j = 0; j < NK; ++j) {
          const Vec<T> d1 = denominator(c, i, j), d2 = denominator(c + w, i, j);
          acc[i][j] += (d1 + d2) / (d1 * d2);
        }
  }
  for (; c < units.size; c += w)
    for (int i = 0; i < NQ; ++i)
      for (int j = 0; j < NK; ++j) acc[i][j] += T(1) / denominator(c, i, j);
  for (int i = 0; i < NQ; ++i)
    for (int j = 0; j < NK; ++j) out[i * out_ld + j] = units.sum_v - units.scale * sum<T>(acc[i][j]);
}

// Scores of NQ queries and NK steps, by the fastest form that is in range. direct(a, b) is the score of query i + a and step
// j + b by tanh itself.
template <typename T, int NQ, int NK, class Direct>
ATTN_INLINE void score_tile(const Units<T>& units, const Projected<T>& q, int64_t i, const Projected<T>& k, int64_t j,
                            T* out, int64_t out_ld, const Direct& direct) {
  const int64_t ld = q.ld;
  bool in_range = units.factored;
  for (int a = 0; a < NQ; ++a)
    for (int b = 0; b < NK; ++b) {
      const T reach = q.top[i + a] + k.top[j + b];
      in_range = in_range && reach >= units.least_reach && reach <= kThree;
    }
  if (in_range) return factored_tile<T, NQ, NK, true>(units, q.e + i * ld, k.e + j * ld, ld, out, out_ld);
  for (int a = 0; a < NQ; ++a)
    for (int b = 0; b < NK; ++b) {
      T* to = out + a * out_ld + b;
      const T *qe = q.e + (i + a) * ld, *ke = k.e + (j + b) * ld;
      const T reach = q.top[i + a] + k.top[j + b];
      const bool factored = units.factored && reach >= units.least_reach;
      if (factored && reach <= kThree)
        factored_tile<T, 1, 1, true>(units, qe, ke, ld, to, out_ld);
      else if (factored && reach <= kSingle)
        factored_tile<T, 1, 1, false>(units, qe, ke, ld, to, out_ld);
      else
        *to = direct(i + a, j + b);
    }
}

template <typename T, int NQ, int NK, class Direct>
void score_strip(const Units<T>& units, const Projected<T>& q, int64_t i, const Projected<T>& k, int64_t n, T* out,
                 int64_t out_ld, const Direct& direct) {
  int64_t j = 0;
  for (; j + NK <= n; j += NK) score_tile<T, NQ, NK>(units, q, i, k, j, out + j, out_ld, direct);
  for (; j < n; ++j) score_tile<T, NQ, 1>(units, q, i, k, j, out + j, out_ld, direct);
}

template <typename T>
struct AdditiveScore {
  const AdditiveScores& op;
  const Units<T>& units;

  struct Queries {
    Projected<T> rows;
    int64_t first, n;
  };

  int64_t cost() const { return op.A; }

  Queries queries(int64_t b, int64_t first, int64_t n, Scratch& scratch) const {
    Queries q{Projected<T>(n, units.size, scratch), first, n};
    ScratchScope scope(scratch);
    T* buffer = take<T>(scratch, op.A);
    for (int64_t i = 0; i < n; ++i) {
      const T* row = read_row(op.query, b, first + i, op.A, buffer);
      T* e = q.rows.e + i * units.size;
      q.rows.top[i] = exponentials(units.size, e, [&](int64_t c) __attribute__((always_inline)) {
        return load_upto(row + c, op.A - c) + load(units.bias + c);
      });
      if (units.factored)
        for (int64_t c = 0; c < units.size; c += width<T>) store(e + c, load(e + c) * load(units.factor + c));
    }
    return q;
  }

  // The exponentials of a block of keys stay in L2 for many queries, in L1 for few.
  void block(const Queries& q, int64_t b, const int32_t* list, int64_t n, T* out, int64_t ld, Scratch& scratch) const {
    const int64_t row_bytes = units.size * static_cast<int64_t>(sizeof(T));
    const int64_t most = smaller(n, larger(4, (q.n > 2 ? 1 << 18 : 1 << 14) / larger(row_bytes, 1)));
    ScratchScope scope(scratch);
    Projected<T> k(most, units.size, scratch);
    T* buffer = take<T>(scratch, op.A);
    T* query_buffer = take<T>(scratch, op.A);
    for (int64_t j = 0; j < n; j += most) {
      const int64_t count = smaller(most, n - j);
      for (int64_t r = 0; r < count; ++r) {
        const T* row = read_row(op.keys, b, list[j + r], op.A, buffer);
        const int64_t whole = units.n / width<T> * width<T>;
        k.top[r] = exponentials(units.size, k.e + r * units.size, [&](int64_t c) __attribute__((always_inline)) {
          return c < whole ? load(row + c) : load_part(row + c, op.A - c);
        });
      }
      auto direct = [&](int64_t i, int64_t r) {
        const T* query = read_row(op.query, b, q.first + i, op.A, query_buffer);
        const T* key = read_row(op.keys, b, list[j + r], op.A, buffer);
        Vec<T> acc{};
        for (int64_t c = 0; c < op.A; c += width<T>) {  // past the end, 0 * tanh(0)
          const Vec<T> x = load_upto(query + c, op.A - c) + load(units.bias + c) + load_upto(key + c, op.A - c);
          acc += load(units.v + c) * tanh_any(x);
        }
        return sum<T>(acc);
      };
      int64_t i = 0;
      for (; i + 4 <= q.n; i += 4) score_strip<T, 4, 2>(units, q.rows, i, k, count, out + i * ld + j, ld, direct);
      for (; i < q.n; ++i) score_strip<T, 1, 4>(units, q.rows, i, k, count, out + i * ld + j, ld, direct);
    }
  }
};

template <typename T>
void additive_attention(const AdditiveAttentionForward& op) {
  ScratchScope scope(thread_scratch());
  const Units<T> units(op, thread_scratch());
  const Problem problem{op.B, op.Tq, op.Tk, op.D, op.query.dtype, op.values, op.attended};
  attention_forward<T>(problem, op.context, op.alignments, AdditiveScore<T>{op, units});
}

template <typename T>
void additive_scores(const AdditiveScoresForward& op) {
  ScratchScope scope(thread_scratch());
  const Units<T> units(op, thread_scratch());
  const AdditiveScore<T> score{op, units};
  const Chunks chunks(op.B, op.Tq, op.Tk, false);
  for_each_task(chunks.tasks, chunks.size * op.Tk * op.A, [&](int64_t task, Scratch& scratch) {
    const int64_t b = task / chunks.per_sentence, first = task % chunks.per_sentence * chunks.size;
    const int64_t nq = smaller(chunks.size, op.Tq - first), ld = padded<T>(op.Tk);
    int32_t* list = take<int32_t>(scratch, op.Tk);
    list_steps(Attended{}, b, first, op.Tk, list);
    T* scores = take<T>(scratch, nq * ld);
    score.block(score.queries(b, first, nq, scratch), b, list, op.Tk, scores, ld, scratch);
    for (int64_t i = 0; i < nq; ++i)
      write_row(op.scores, op.query.dtype, (b * op.Tq + first + i) * op.Tk, scores + i * ld, op.Tk);
  });
}

}  // namespace ATTN_LEVEL
}  // namespace attn
