// Scores of additive attention without a tanh per pair: the factored form. Part of a SIMD level: see simd.h.
//
// With E = e^{2q} e^{2k} and the exponentials computed once per row, a pair of query and step costs a multiply-add and
// a reciprocal for each hidden unit, and in the forward units share reciprocals over a common denominator. Guards
// choose, for each tile of queries and each step, a form in which nothing overflows (limits: ../additive_math.h):
//
//   largest |q| + largest |k|   forward                          backward
//   <= kMaxBoundThree           three units share a division     a division for each pair
//   <= kMaxBoundBackward        one division each                a division for each pair
//   <= kMaxBoundOne             one division each                the same for few queries, tanh itself for many
//   beyond, or NaN              tanh itself                      tanh itself
//
// In low precision, where the target has them, estimates of the reciprocal, one each, take the place of the forward's
// divisions. Elsewhere an estimate that is refined takes the place of a division where that is faster (kernels.cpp has
// the table), in the same ranges: there denominators and their reciprocals are normal numbers.
//
// The forward also uses tanh itself where a large v would show the rounding of the factored form (min_abs_bound).
#pragma once

#include "../additive_attention.h"
#include "../additive_math.h"
#include "attention.h"

namespace attn {
namespace ATTN_LEVEL {

// How the reciprocals of denominators are made: three by one division, or one refined estimate, by a division each, or
// by an estimate each.
enum class Reciprocals { three, three_refined, one, estimate };

// v and bias as vectors that end in zeros, and what the factored form needs of v.
template <typename T>
struct FactoredV {
  int64_t n, size;  // A, and A in whole vectors
  T *v, *bias;
  T *constant, *factor;  // d = constant + factor * e^{2q} e^{2k}
  T sum_v, scale;        // score = sum_v - scale * sum of 1 / d
  bool factored;         // whether the factored form may be used,
  T min_bound;           // and from which |q| + |k| on
  bool estimated;        // whether estimates may be used,
  T min_bound_estimate;  // and from which |q| + |k| on
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
    // Not for NaN or Inf, nor for float64, which is there to be exact.
    min_bound = min_abs_bound(static_cast<float>(sum<T>(squares)), n);
    factored = sizeof(T) == 4 && abs_max > kMinAbsMaxV && abs_max < kMaxAbsMaxV && min_bound <= kMaxBoundThree;
    estimated = false;
    refined = sizeof(T) == 4 && kCanRefine && level().estimates;
    if (!factored) return;
    int exponent;
    frexp(abs_max, &exponent);
    const T unit = static_cast<T>(ldexp(1.0, exponent)), smallest = unit * T(kMinRelativeV);
    Vec<T> total{}, lost{}, dropped{};  // lost: by rounding the total
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
    // Each is below the rounding of the largest unit; all of them together have to be, too.
    factored = sum<T>(dropped) <= smallest;
    estimated = factored && kHasEstimate && op.query.dtype != native<T>;
    const T least = op.query.dtype == Dtype::bfloat16 ? kMinBoundEstimateBFloat16 : kMinBoundEstimateFloat16;
    min_bound_estimate = min_bound > least ? min_bound : least;
    sum_v = sum<T>(total) + sum<T>(lost);
    scale = static_cast<T>(2 * unit * kDenominatorScale);
  }

  // Whether three units may share a division, or one each may be used, where |q| + |k| is at most `bound`. NaN:
  // neither.
  bool fits_three(T bound) const { return factored && bound >= min_bound && bound <= kMaxBoundThree; }
  bool fits_one(T bound) const { return factored && bound >= min_bound && bound <= kMaxBoundOne; }
  // Whether estimates will do, of one denominator each.
  bool fits_estimate(T bound) const { return estimated && bound >= min_bound_estimate && bound <= kMaxBoundOne; }

  template <Reciprocals kBy>
  bool in_range(T bound) const {
    return kBy == Reciprocals::one        ? fits_one(bound)
           : kBy == Reciprocals::estimate ? fits_estimate(bound)
                                          : fits_three(bound);
  }

  // f(how three units share, as a constant).
  template <class F>
  ATTN_INLINE void by_three(const F& f) const {
    if constexpr (sizeof(T) == 4 && kCanRefine)
      if (refined) return f(std::integral_constant<Reciprocals, Reciprocals::three_refined>());
    f(std::integral_constant<Reciprocals, Reciprocals::three>());
  }
};

// e = e^{2x} (meaningful up to kMaxBoundOne) for the vectors x = row(c) of a row, times factor where there is one.
// Returns its largest |x|; NaN if it has a NaN.
template <typename T, class Row>
ATTN_INLINE T exponentials(int64_t size, T* e, const Row& row, const T* factor = nullptr) {
  IntVec<T> abs_max{};
  for (int64_t c = 0; c < size; c += width<T>) {
    const Vec<T> x = row(c);
    if constexpr (sizeof(T) == 4) {
      const Vec<T> power = exp_in_range(x + x);
      store(e + c, factor == nullptr ? power : power * load(factor + c));
    }
    abs_max = larger_magnitude<T>(abs_max, x);
  }
  return largest_magnitude<T>(abs_max);
}

// The same for row (b, i) of a, of n elements, plus bias where there is one. buffer: of a row.
template <typename T>
T row_exponentials(const StridedView3& a, int64_t b, int64_t i, int64_t n, T* e, T* buffer, const T* bias = nullptr,
                   const T* factor = nullptr) {
  const int64_t whole = n / width<T> * width<T>;
  auto of = [&](const auto* row) __attribute__((always_inline)) {
    return exponentials(
        padded<T>(n), e,
        [&](int64_t c) __attribute__((always_inline)) {
          const Vec<T> x = c < whole ? load_element(row + c) : load_element(row + c, n - c);
          return bias == nullptr ? x : x + load(bias + c);
        },
        factor);
  };
  if (a.stride[2] != 1) return of(read_row(a, b, i, n, buffer));
  return by_element<T>(a.dtype, [&](auto* element) {
    return of(static_cast<decltype(element)>(a.data) + b * a.stride[0] + i * a.stride[1]);
  });
}

// Rows of queries (bias added; e^{2q} times the factor of the unit), with the largest |q| of each row.
template <typename T>
struct QueryRows {
  int64_t first, n, ld;
  T *e, *abs_max;  // (n, ld), (n)
};

// Steps as rows of e^{2k}, with the largest |k| of each row.
template <typename T>
struct KeyRows {
  const T** e;
  T* abs_max;
};

// acc[i * NK + j] = sums of 1 / d of NQ queries and NK steps; key(j, c, last) is the vector of e^{2k} from unit c on,
// which may be the row's last only where `last` says so.
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

// out[i * out_ld + j]: the scores of NQ queries and NK steps. next: rows that will be read soon, or null.
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

// Scores of NQ queries and NK steps: by the form kBy if all are in its range, otherwise each by one that is. direct(a,
// b) is the score of query i + a and step j + b by tanh itself.
template <typename T, int NQ, int NK, Reciprocals kBy, class Exact>
ATTN_INLINE void score_tile(const FactoredV<T>& units, const QueryRows<T>& q, int64_t i, const KeyRows<T>& k, int64_t j,
                            T* out, int64_t out_ld, const Exact& exact, const T* const* next = nullptr) {
  // A pair has the same score beside pairs out of range.
  constexpr Reciprocals kThree = kBy == Reciprocals::three_refined ? kBy : Reciprocals::three;
  const int64_t ld = q.ld;
  bool in_range = units.factored;
  for (int a = 0; a < NQ; ++a)
    for (int b = 0; b < NK; ++b)
      in_range = in_range && units.template in_range<kBy>(q.abs_max[i + a] + k.abs_max[j + b]);
  if (in_range) return factored_tile<T, NQ, NK, kBy>(units, q.e + i * ld, ld, k.e + j, out, out_ld, next);
  for (int a = 0; a < NQ; ++a)
    for (int b = 0; b < NK; ++b) {
      T* to = out + a * out_ld + b;
      const T* qe = q.e + (i + a) * ld;
      const T bound = q.abs_max[i + a] + k.abs_max[j + b];
      if (units.fits_three(bound))
        factored_tile<T, 1, 1, kThree>(units, qe, ld, k.e + j + b, to, out_ld);
      else if (units.fits_one(bound))
        factored_tile<T, 1, 1, Reciprocals::one>(units, qe, ld, k.e + j + b, to, out_ld);
      else
        *to = exact(i + a, j + b);
    }
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
