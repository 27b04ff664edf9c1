// Compensated scores of additive attention, for inputs beyond the accuracy or the range of the factored form.
// Part of a SIMD level: see simd.h; ../additive_math.h has the limits.
//
//   tanh(q + k) = n / (n + 2),   n = e^{2q} e^{2k} - 1
//
// A multiply-add computes n with one rounding, so there is no cancellation. The error of the quotient is a few ulps of
// its own value, while the error of 1 - 2 / (n + 2) is an ulp of 1. The remaining error is the rounding of the
// exponentials: they are exact for q - r_q and k - r_k, with rests r of the order of 2^-24. Since
//
//   tanh(x + r) = tanh(x) + r (1 - tanh(x)^2) + O(r^2)
//
// the rests of all units add sum of v r_q + sum of v r_k to a score. That is one number per query and one per step, and
// no work per pair. It leaves out r tanh(x)^2, which is below the rounding of tanh(x).
//
// Two units share a division, with v folded in as its sum and its difference:
//
//   v1 n1 / (n1 + 2) + v2 n2 / (n2 + 2) = ((v1 + v2) g + (v1 - v2) (n1 - n2)) / (g + n1 + n2 + 4),
//   g = e^{2 (x1 + x2)} - 1 = n1 n2 + n1 + n2
//
// That is five multiplications and five additions for two units. The factored form has six and two for three units.
// Products of exponentials may overflow, so n is clamped to kMaxNumerator, where tanh rounds to 1.
#pragma once

#include "additive_factored.h"

namespace attn {
namespace ATTN_LEVEL {

// Returns e, the float32 nearest to e^{2x}, and sets *rest to r with e^{2 (x - r)} = e up to the rounding of x. Valid
// for |x| <= kMaxAbsExponential.
ATTN_INLINE Vec<float> nearest_exponential(Vec<float> x, Vec<float>* rest) {
  const Reduced a = reduce_range(x + x);
  const Vec<float> r = a.r + __builtin_convertvector(a.n >> 23, Vec<float>) * kLn2Excess;
  const Vec<float> less_1 = (third_term<6>(r) * r) * r + r;  // e^r - 1, accurate to its own rounding
  const Vec<float> mantissa = less_1 + 1.0f, lost = less_1 - (mantissa - 1.0f);
  *rest = lost * (0.5f - 0.5f * r);  // about lost / (2 e^r); e^r is the mantissa
  return (Vec<float>)(bits<float>(mantissa) + a.n);
}

// Computes e = e^{2x} of row x = (b, i) of a, plus bias unless null, in whole vectors, and sets *rest to the sum of
// v r. If scaled is not null, it receives e times the units' factors. Returns the largest |x|; NaN if the row has a
// NaN. buffer: room for a row.
template <typename T>
T compensated_row(const FactoredV<T>& units, const StridedView3& a, int64_t b, int64_t i, T* e, T* rest, T* buffer,
                  const T* bias = nullptr, T* scaled = nullptr) {
  static_assert(sizeof(T) == 4, "float64 has tanh itself");
  Vec<T> total{};
  IntVec<T> abs_max{};
  use_row(a, b, i, units.n, buffer, bias, [&](const auto& row) __attribute__((always_inline)) {
    for (int64_t c = 0; c < units.size; c += width<T>) {
      const Vec<T> x = row(c);
      Vec<T> r;
      const Vec<T> power = nearest_exponential(x, &r);
      store(e + c, power);
      if (scaled != nullptr) store(scaled + c, power * load(units.factor + c));
      total += load(units.v + c) * r;
      abs_max = larger_magnitude<T>(abs_max, x);
    }
  });
  *rest = sum<T>(total);
  return largest_magnitude<T>(abs_max);
}

// out[i * out_ld + j] = scores of NQ queries (rows of e^{2q}) and NK steps, without the rests.
template <typename T, int NQ, int NK, bool kRefined>
__attribute__((noinline)) void compensated_tile(const FactoredV<T>& units, const T* q, int64_t ld, const T* const* k,
                                                T* out, int64_t out_ld) {
  constexpr int64_t w = width<T>, part = kTermsOfSum * w;
  Vec<T> total[NQ * NK];
  clear(total);
  auto numerator = [&](int64_t c, int i, Vec<T> e) __attribute__((always_inline)) {
    return at_most<T>(load(q + i * ld + c) * e - T(1), kMaxNumerator);
  };
  for (int64_t first = 0; first < units.size; first += part) {
    const int64_t end = min(first + part, units.size);
    int64_t c = first;
    Vec<T> acc[NQ * NK];
    clear(acc);
    for (; c + 2 * w <= end; c += 2 * w) {
      const Vec<T> v_sum = load(units.paired_v + c), v_difference = load(units.paired_v + c + w);
      for (int j = 0; j < NK; ++j) {
        const Vec<T> e1 = load(k[j] + c), e2 = load(k[j] + c + w);
        for (int i = 0; i < NQ; ++i) {
          const Vec<T> n1 = numerator(c, i, e1), n2 = numerator(c + w, i, e2), both = n1 + n2, g = n1 * n2 + both;
          acc[i * NK + j] += quotient<kRefined, T>(v_sum * g + v_difference * (n1 - n2), (g + T(4)) + both);
        }
      }
    }
    if (c < end) {
      const Vec<T> v = load(units.paired_v + c);
      for (int j = 0; j < NK; ++j) {
        const Vec<T> e = load(k[j] + c);
        for (int i = 0; i < NQ; ++i) {
          const Vec<T> n = numerator(c, i, e);
          acc[i * NK + j] += quotient<kRefined, T>(v * n, n + T(2));
        }
      }
    }
    for (int i = 0; i < NQ * NK; ++i) total[i] += acc[i];
  }
  sums<T, NQ * NK>(total,
                   [&](int i, T s) __attribute__((always_inline)) { out[i / NK * out_ld + i % NK] = units.unit * s; });
}

// Updates a running minimum and maximum with x. A NaN stays.
template <typename T>
ATTN_INLINE void widen(T x, T* least, T* most) {
  if (x < *least || x != x) *least = x;
  if (x > *most || x != x) *most = x;
}

// out[a * out_ld + b]: scores of NQ queries from i on and NK steps from j on, each in a form that is accurate for it.
// The score of a pair does not depend on its neighbours. exact(a, b): the score of query a and step b in the exact
// form.
template <typename T, int NQ, int NK, Reciprocals kThree, class Exact>
__attribute__((noinline)) void mixed_tile(const FactoredV<T>& units, const QueryRows<T>& q, int64_t i,
                                          const KeyRows<T>& k, int64_t j, T* out, int64_t out_ld, const Exact& exact) {
  T q_least = q.abs_max[i], q_most = q_least, k_least = k.abs_max[j], k_most = k_least;
  for (int a = 1; a < NQ; ++a) widen(q.abs_max[i + a], &q_least, &q_most);
  for (int b = 1; b < NK; ++b) widen(k.abs_max[j + b], &k_least, &k_most);
  const T least = q_least + k_least, most = q_most + k_most;
  auto bound = [&](int n) { return q.abs_max[i + n / NK] + k.abs_max[j + n % NK]; };
  auto compensated = [&](const T* const* keys, T* to, int64_t ld) {
    units.by_three([&](auto by) {  // the same for all strips
      constexpr bool kRefined = decltype(by)::value == Reciprocals::three_refined;
      compensated_tile<T, NQ, NK, kRefined>(units, q.plain + i * q.ld, q.ld, keys, to, ld);
    });
  };
  auto with_rests = [&](T* to, int64_t ld) {
    compensated(k.plain + j, to, ld);
    for (int n = 0; n < NQ * NK; ++n) to[n / NK * ld + n % NK] += q.rest[i + n / NK] + k.rest[j + n % NK];
  };
  const bool none_by_three = !units.factored || most < units.min_bound || least > kMaxBoundThree;
  if (none_by_three && units.fits_compensated(q_most, k_most) && units.fits_compensated(q_least, k_least)) {
    if (most < units.min_bound) return with_rests(out, out_ld);
    if (least >= units.min_bound) return compensated(k.e + j, out, out_ld);
  }
  enum Form { three, small, large, kForms };  // three units share a division; compensated with rests; without rests
  T scores[kForms][NQ * NK]{};
  int forms[NQ * NK];
  bool any[kForms + 1]{};
  for (int n = 0; n < NQ * NK; ++n) {
    forms[n] = units.fits_three(bound(n))                                              ? three
               : !units.fits_compensated(q.abs_max[i + n / NK], k.abs_max[j + n % NK]) ? kForms
               : bound(n) < units.min_bound                                            ? small
                                                                                       : large;
    any[forms[n]] = true;
  }
  if (any[three]) factored_tile<T, NQ, NK, kThree>(units, q.e + i * q.ld, q.ld, k.e + j, scores[three], NK);
  if (any[small]) with_rests(scores[small], NK);
  if (any[large]) compensated(k.e + j, scores[large], NK);
  for (int n = 0; n < NQ * NK; ++n)
    out[n / NK * out_ld + n % NK] = forms[n] == kForms ? exact(i + n / NK, j + n % NK) : scores[forms[n]][n];
}

}  // namespace ATTN_LEVEL
}  // namespace attn
