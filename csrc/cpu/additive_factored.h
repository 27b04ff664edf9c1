// Scores of additive attention without a tanh per pair: the factored form. Part of a SIMD level: see simd.h.
//
// With E = e^{2q} e^{2k} and the exponentials computed once per row, a pair of query and step costs a multiply-add and
// a reciprocal for each hidden unit. In the forward, units share reciprocals over a common denominator. Guards choose,
// for each tile of queries and steps, a form in which nothing overflows (limits: ../additive_math.h):
//
//   largest |q| + largest |k|       forward                        backward
//   <= kMaxBoundThree               three units share a division   a division for each pair
//   beyond, |q| and |k| by
//   themselves <= kMaxAbsExponential  additive_compensated.h       the same
//   beyond that, or NaN             tanh itself                    tanh itself
//
// In low precision the forward replaces divisions by reciprocal estimates, one per unit, if the target has them. In
// other dtypes refined estimates replace divisions if that is faster (kernels.cpp has the table). The limits are the
// same: within them, denominators and their reciprocals are normal numbers.
//
// The forward also uses the form of additive_compensated.h if a large v would amplify the rounding of the factored form
// (min_abs_bound).
#pragma once

#include "../additive_attention.h"
#include "../additive_math.h"
#include "attention.h"

namespace attn {
namespace ATTN_LEVEL {

// How the reciprocals of denominators are computed: three units share a division, three share a refined estimate, or
// each unit has its own estimate.
enum class Reciprocals { three, three_refined, estimate };

// v and bias, padded with zeros to whole vectors, and the constants of v for the factored form.
template <typename T>
struct FactoredV {
  int64_t n, size;  // A, and A in whole vectors
  T *v, *bias;
  T *constant, *factor;  // d = constant + factor * e^{2q} e^{2k}
  T sum_v, scale;        // score = sum_v - scale * sum of 1 / d
  T *paired_v, unit;     // for each two vectors of v / unit, their sum and difference; a single last one as is
  bool v_in_range;       // whether the compensated form may be used with this v
  bool factored;         // whether the factored form may be used
  T min_bound;           // the smallest |q| + |k| for the factored form
  bool estimated;        // whether estimates may be used
  T min_bound_estimate;  // the smallest |q| + |k| for estimates
  bool refined;          // whether three share a refined estimate, not a division

  FactoredV(const VectorScores& op, Scratch& scratch) : n(op.A), size(padded<T>(op.A)) {
    v = alloc<T>(scratch, size);
    bias = alloc<T>(scratch, size);
    constant = alloc<T>(scratch, size);
    factor = alloc<T>(scratch, size);
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
    const T abs_max = largest_magnitude<T>(top_bits);
    // False for NaN or Inf, and for float64, which always uses the exact form.
    min_bound = min_abs_bound(static_cast<float>(sum<T>(squares)), n);
    factored = v_in_range = sizeof(T) == 4 && abs_max > kMinAbsMaxV && abs_max < kMaxAbsMaxV;
    estimated = false;
    refined = sizeof(T) == 4 && kCanRefine && level().estimates;
    if (!v_in_range) return;
    int exponent;
    frexp(abs_max, &exponent);
    unit = static_cast<T>(ldexp(1.0, exponent));
    const T smallest = unit * T(kMinRelativeV);
    paired_v = alloc<T>(scratch, size);
    for (int64_t c = 0; c < size; c += 2 * width<T>) {
      const bool alone = c + width<T> == size;
      const Vec<T> zero{}, x = load(v + c) / unit, y = alone ? zero : load(v + c + width<T>) / unit;
      store(paired_v + c, x + y);
      if (!alone) store(paired_v + c + width<T>, x - y);
    }
    Vec<T> total{}, lost{}, dropped{};  // lost: the rounding errors of total
    for (int64_t c = 0; c < size; c += width<T>) {
      const Vec<T> x = load(v + c), zero{};
      const IntVec<T> kept = absolute<T>(x) >= smallest;
      const Vec<T> inverse = unit * T(kDenominatorScale) / x;
      store(factor + c, kept ? inverse : zero);
      store(constant + c, kept ? inverse : broadcast(T(kDroppedDenominator)));
      const Vec<T> term = kept ? x : zero, next = total + term, of_term = next - total;
      lost += (total - (next - of_term)) + (term - of_term);
      total = next;
      dropped += kept ? zero : absolute<T>(x);
    }
    // Each dropped unit is below the rounding of the largest; their sum must be, too.
    factored = sum<T>(dropped) <= smallest && min_bound <= kMaxBoundThree;
    estimated = factored && kHasEstimate && op.query.dtype != native<T>;
    const T least = op.query.dtype == Dtype::bfloat16 ? kMinBoundEstimateBFloat16 : kMinBoundEstimateFloat16;
    min_bound_estimate = min_bound > least ? min_bound : least;
    sum_v = sum<T>(total) + sum<T>(lost);
    scale = static_cast<T>(2 * unit * kDenominatorScale);
  }

  // Whether three units may share a division for |q| + |k| of at most `bound`. False for NaN.
  bool fits_three(T bound) const { return factored && bound >= min_bound && bound <= kMaxBoundThree; }
  // Whether the compensated form may be used, given the largest |q| and |k|. Below min_bound it needs a multiply-add:
  // the rounding of a separate product before the subtraction of 1 would be visible.
  bool fits_compensated(T q, T k) const {
    return v_in_range && q <= kMaxAbsExponential && k <= kMaxAbsExponential && (kHasMultiplyAdd || q + k >= min_bound);
  }
  // Whether a query or step with this largest |x| may be in a pair that needs the rests of the compensated form.
  bool needs_rest(T abs_max) const { return v_in_range && abs_max < min_bound; }
  // Whether estimates, one per denominator, are accurate enough.
  bool fits_estimate(T bound) const { return estimated && bound >= min_bound_estimate && bound <= kMaxBoundOne; }

  template <Reciprocals kBy>
  bool in_range(T bound) const {
    return kBy == Reciprocals::estimate ? fits_estimate(bound) : fits_three(bound);
  }

  // Calls f with Reciprocals::three or three_refined as a compile-time constant.
  template <class F>
  ATTN_INLINE void by_three(const F& f) const {
    if constexpr (sizeof(T) == 4 && kCanRefine)
      if (refined) return f(std::integral_constant<Reciprocals, Reciprocals::three_refined>());
    f(std::integral_constant<Reciprocals, Reciprocals::three>());
  }
};

// e = e^{2x} (valid up to kMaxAbsExponential) for the vectors x = row(c) of a row. With factor, e is multiplied by it,
// and plain = e^{2x}. Returns the largest |x| of the row; NaN if it has a NaN.
template <typename T, class Row>
ATTN_INLINE T exponentials(int64_t size, T* e, const Row& row, const T* factor = nullptr, T* plain = nullptr) {
  IntVec<T> abs_max{};
  for (int64_t c = 0; c < size; c += width<T>) {
    const Vec<T> x = row(c);
    if constexpr (sizeof(T) == 4) {
      const Vec<T> power = exp_of_twice(x);
      if (factor == nullptr) {
        store(e + c, power);
      } else {
        store(e + c, power * load(factor + c));
        store(plain + c, power);
      }
    }
    abs_max = larger_magnitude<T>(abs_max, x);
  }
  return largest_magnitude<T>(abs_max);
}

// Calls use(row), where row(c) is a vector of row (b, i) of a, of n elements, plus bias unless null. buffer: room for a
// row.
template <typename T, class Use>
ATTN_INLINE auto use_row(const StridedView3& a, int64_t b, int64_t i, int64_t n, T* buffer, const T* bias,
                         const Use& use) {
  const int64_t whole = n / width<T> * width<T>;
  auto of = [&](const auto* row) __attribute__((always_inline)) {
    return use([&](int64_t c) __attribute__((always_inline)) {
      const Vec<T> x = c < whole ? load_element(row + c) : load_element(row + c, n - c);
      return bias == nullptr ? x : x + load(bias + c);
    });
  };
  if (a.stride[2] != 1) return of(read_row(a, b, i, n, buffer));
  return by_element<T>(a.dtype, [&](auto* element) {
    return of(static_cast<decltype(element)>(a.data) + b * a.stride[0] + i * a.stride[1]);
  });
}

// exponentials() of such a row.
template <typename T>
T row_exponentials(const StridedView3& a, int64_t b, int64_t i, int64_t n, T* e, T* buffer, const T* bias = nullptr,
                   const T* factor = nullptr, T* plain = nullptr) {
  return use_row(a, b, i, n, buffer, bias, [&](const auto& row) __attribute__((always_inline)) {
    return exponentials(padded<T>(n), e, row, factor, plain);
  });
}

// Rows of queries, bias added: e is e^{2q} times the factor of the unit, plain is e^{2q}. Each row has its largest |q|
// and, if needed, its rest (additive_compensated.h). With a rest, `plain` is the rounded exponential that it belongs
// to.
template <typename T>
struct QueryRows {
  int64_t first, n, ld;
  T *e, *plain, *abs_max, *rest;  // (n, ld), (n, ld), (n), (n)
};

// The same for steps. Here e and plain are both e^{2k}, and differ only if there is a rest.
template <typename T>
struct KeyRows {
  const T **e, **plain;
  T *abs_max, *rest;
};

// acc[i * NK + j] = sums of 1 / d of NQ queries and NK steps. key(j, c, last) returns the vector of e^{2k} from unit c
// on. Only if `last` is true may it be the last vector of the row.
template <typename T, int NQ, int NK, Reciprocals kBy, class Key>
ATTN_INLINE void factored_sums(const FactoredV<T>& units, const T* q, int64_t ld, const Key& key, Vec<T>* acc) {
  constexpr int64_t w = width<T>;
  constexpr std::false_type inner{};
  constexpr std::true_type last{};
  constexpr bool kRefined = kBy == Reciprocals::three_refined, kThree = kRefined || kBy == Reciprocals::three;
  const int64_t whole = units.n / w * w;
  clear(acc, std::make_index_sequence<NQ * NK>());
  auto denominator = [&](int64_t c, int i, Vec<T> e)
                         __attribute__((always_inline)) { return load(units.constant + c) + load(q + i * ld + c) * e; };
  const bool in_parts = units.size > 2 * kTermsOfSum * w;
  auto whole_vectors = [&](int64_t& c, int64_t step, const auto& add) __attribute__((always_inline)) {
    if (in_parts) {
      Vec<T> parts[NQ * NK];
      clear(parts, std::make_index_sequence<NQ * NK>());
      while (c + kTermsOfSum * w <= whole) {
        for (const int64_t end = c + kTermsOfSum * w; c < end; c += step) add(inner);
        for (int n = 0; n < NQ * NK; ++n) parts[n] += acc[n];
        clear(acc, std::make_index_sequence<NQ * NK>());
      }
      for (int n = 0; n < NQ * NK; ++n) acc[n] = parts[n];
    }
    for (; c + step <= whole; c += step) add(inner);
  };
  int64_t c = 0;
  if constexpr (kThree) {
    auto three = [&](auto where) __attribute__((always_inline)) {
      for (int j = 0; j < NK; ++j) {
        const Vec<T> e1 = key(j, c, where), e2 = key(j, c + w, where), e3 = key(j, c + 2 * w, where);
        for (int i = 0; i < NQ; ++i) {
          const Vec<T> d1 = denominator(c, i, e1), d2 = denominator(c + w, i, e2), d3 = denominator(c + 2 * w, i, e3);
          const Vec<T> product = d1 * d2;
          acc[i * NK + j] += quotient<kRefined, T>((d1 + d2) * d3 + product, product * d3);
        }
      }
    };
    whole_vectors(c, 3 * w, three);
    if (c + 3 * w <= units.size) {
      three(last);
      c += 3 * w;
    }
    if (c + 2 * w <= units.size) {
      for (int j = 0; j < NK; ++j) {
        const Vec<T> e1 = key(j, c, last), e2 = key(j, c + w, last);
        for (int i = 0; i < NQ; ++i) {
          const Vec<T> d1 = denominator(c, i, e1), d2 = denominator(c + w, i, e2);
          acc[i * NK + j] += quotient<kRefined, T>(d1 + d2, d1 * d2);
        }
      }
      c += 2 * w;
    }
  }
  auto one = [&](auto where) __attribute__((always_inline)) {
    for (int j = 0; j < NK; ++j) {
      const Vec<T> e = key(j, c, where);
      for (int i = 0; i < NQ; ++i) {
        const Vec<T> d = denominator(c, i, e);
        if constexpr (kBy == Reciprocals::estimate)
          acc[i * NK + j] += reciprocal_estimate(d);
        else
          acc[i * NK + j] += quotient<kRefined, T>(broadcast(T(1)), d);
      }
    }
  };
  if constexpr (!kThree)
    if (in_parts || kBy == Reciprocals::estimate) whole_vectors(c, w, one);
  for (; c < units.size; c += w) one(last);
}

// out[i * out_ld + j]: the scores of NQ queries and NK steps. next: rows to prefetch, or null.
template <typename T, int NQ, int NK, Reciprocals kBy>
ATTN_INLINE void factored_tile(const FactoredV<T>& units, const T* q, int64_t ld, const T* const* k, T* out,
                               int64_t out_ld, const T* const* next = nullptr) {
  Vec<T> acc[NQ * NK];
  if (next != nullptr)
    factored_sums<T, NQ, NK, kBy>(
        units, q, ld,
        [&](int j, int64_t c, auto) __attribute__((always_inline)) {
          prefetch(next[j] + c);
          return load(k[j] + c);
        },
        acc);
  else
    factored_sums<T, NQ, NK, kBy>(
        units, q, ld, [&](int j, int64_t c, auto) __attribute__((always_inline)) { return load(k[j] + c); }, acc);
  sums<T, NQ * NK>(acc, [&](int i, T s) __attribute__((always_inline)) {
    out[i / NK * out_ld + i % NK] = units.sum_v - units.scale * s;
  });
}

// Scores by several forms: additive_compensated.h.
template <typename T, int NQ, int NK, Reciprocals kThree, class Exact>
void mixed_tile(const FactoredV<T>& units, const QueryRows<T>& q, int64_t i, const KeyRows<T>& k, int64_t j, T* out,
                int64_t out_ld, const Exact& exact);

// Scores of NQ queries and NK steps. If all pairs are within the limits of the form kBy, they are computed by it,
// otherwise each pair by a form that is valid for it. exact(a, b) is the score of query a and step b in the exact form.
template <typename T, int NQ, int NK, Reciprocals kBy, class Exact>
ATTN_INLINE void score_tile(const FactoredV<T>& units, const QueryRows<T>& q, int64_t i, const KeyRows<T>& k, int64_t j,
                            T* out, int64_t out_ld, const Exact& exact, const T* const* next = nullptr) {
  // In float32, the score of a pair does not depend on whether the tile has pairs out of range. With one estimate per
  // unit, pairs in such a tile use the form of three instead.
  constexpr Reciprocals kThree = kBy == Reciprocals::three_refined ? kBy : Reciprocals::three;
  const int64_t ld = q.ld;
  bool in_range = units.factored;
  for (int a = 0; a < NQ; ++a)
    for (int b = 0; b < NK; ++b)
      in_range = in_range && units.template in_range<kBy>(q.abs_max[i + a] + k.abs_max[j + b]);
  if (in_range) return factored_tile<T, NQ, NK, kBy>(units, q.e + i * ld, ld, k.e + j, out, out_ld, next);
  // At most 4 queries at once, whose sums fill the registers.
  constexpr int kMost = NQ < 4 ? NQ : 4, kRest = NQ % kMost;
  for (int a = 0; a + kMost <= NQ; a += kMost)
    mixed_tile<T, kMost, NK, kThree>(units, q, i + a, k, j, out + a * out_ld, out_ld, exact);
  if constexpr (kRest > 0)
    mixed_tile<T, kRest, NK, kThree>(units, q, i + NQ - kRest, k, j, out + (NQ - kRest) * out_ld, out_ld, exact);
}

template <typename T, int NQ, int NK, Reciprocals kBy, class Exact>
void score_strip(const FactoredV<T>& units, const QueryRows<T>& q, int64_t i, const KeyRows<T>& k, int64_t n, T* out,
                 int64_t out_ld, const Exact& exact, bool ahead = false) {
  int64_t j = 0;
  if (ahead)
    for (; j + 2 * NK <= n; j += NK)
      score_tile<T, NQ, NK, kBy>(units, q, i, k, j, out + j, out_ld, exact, k.e + j + NK);
  for (; j + NK <= n; j += NK) score_tile<T, NQ, NK, kBy>(units, q, i, k, j, out + j, out_ld, exact);
  for (; j < n; ++j) score_tile<T, NQ, 1, kBy>(units, q, i, k, j, out + j, out_ld, exact);
}

}  // namespace ATTN_LEVEL
}  // namespace attn
