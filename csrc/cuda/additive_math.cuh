// The arithmetic of a pair of query and step of additive attention: exponentials, the factored forms in which two or
// three units share a reciprocal, and tanh's slope. Their limits are those of ../additive_math.h. No memory access:
// everything here is unit-tested as plain C++.
//
// NaN needs no guard: it passes through the factored forms as through the formula.
#pragma once

#include "f32x2.cuh"

// after platform.cuh, which says what the device is
#include "../additive_math.h"

namespace attn {
namespace cuda {

// e^{2x} for |x| <= 43, to about one unit in the last place; anything beyond, but NaN for NaN.
//
// 2x = n ln 2 + f with n ln 2 in two parts, so that the error does not grow with x as that of 2^(2x log2 e) would.
ATTN_HOST_DEVICE float exp2x(float x) {
  constexpr float kRound = 12582912.0f;                        // 1.5 * 2^23: the sum has n in its last bits
  const float shifted = fmaf(x, 2.8853900817779268f, kRound);  // 2 / ln 2
  const float n = shifted - kRound;
  const float f = fmaf(n, -7.14303385e-07f, fmaf(n, -0.3465728759765625f, x));  // halves of ln 2: f is half of above
  float p = fmaf(64 * 0.00139561f, f, 32 * 0.00837513f);
  p = fmaf(p, f, 16 * 0.04166608f);
  p = fmaf(p, f, 8 * 0.16666415f);
  p = fmaf(p, f, 4 * 0.50000002f);
  p = fmaf(p, f, 2.0f);
  p = fmaf(p, f, 1.0f);
  return p * bit_cast<float>((bit_cast<std::uint32_t>(shifted) << 23) + 0x3f800000u);
}

// e, the number next to e^{2x}, for |x| <= 43, and r, with which e is e^{2 (x - r)} to the rounding of x: e^{2 f} - 1 is
// made to its own rounding, so that what the addition of 1 loses of it is known.
ATTN_HOST_DEVICE float exp2x_and_rest(float x, float* rest) {
  constexpr float kRound = 12582912.0f;
  const float shifted = fmaf(x, 2.8853900817779268f, kRound), n = shifted - kRound;
  const float f = fmaf(n, -7.14303385e-07f, fmaf(n, -0.3465728759765625f, x));
  float p = fmaf(0.08925756f, f, 0.26773155f);
  p = fmaf(p, f, 0.6666605f);
  p = fmaf(p, f, 1.3333235f);
  p = fmaf(p, f, 2.0f);
  const float less_1 = fmaf(p * f, f, f + f), mantissa = less_1 + 1.0f;
  *rest = (less_1 - (mantissa - 1.0f)) * (0.5f - f);  // over 2 e^{2 f}
  return mantissa * bit_cast<float>((bit_cast<std::uint32_t>(shifted) << 23) + 0x3f800000u);
}

// The same by the instruction for 2^y, which has an error of 2^-22, with what rounding takes from y given back: less
// than half of the instructions. NaN for NaN.
ATTN_HOST_DEVICE float quick_exp2x(float x) {
  const float y = x * 2.8853900817779268f;
  const float lost = fmaf(x, 2.8853900817779268f, -y) + x * 3.851926e-08f;  // of 2 x / ln 2
  const float e = exp2_approximately(y);
  return fmaf(e, lost * 0.6931472f, e);
}

// e^{2x} for low precision: the relative error is about (1 + |x|) 2^-22. 0 and Inf beyond the range, NaN for NaN.
ATTN_HOST_DEVICE float rough_exp2x(float x) { return exp2_approximately(x * 2.8853900817779268f); }

// Of an element of type T.
template <typename T>
ATTN_HOST_DEVICE float exp2x_of(float x) {
  return sizeof(T) == 4 ? exp2x(x) : rough_exp2x(x);
}

// (1 - tanh(x)^2) / 4 to a few units in the last place. That difference itself would have the error of a number near 1
// where tanh is near 1, and one large v lets it show.
template <typename W>
ATTN_HOST_DEVICE W quarter_slope_of_tanh(W x) {
  const W e = exp_of(-2 * fabs(x)), r = reciprocal(1 + e);
  return e * r * r;
}

// The larger magnitude, where NaN does not count: one instruction.
ATTN_HOST_DEVICE float larger_magnitude(float top, float x) { return fmaxf(top, fabsf(x)); }

// v1 tanh1 + v2 tanh2 + sum, of E = e k: e is e^{2q} of a query, ev the same times v of the unit, k is e^{2k}.
//
// E - 1 comes exact out of the multiply-add, and what is small stays small: the error is that of E, about 2^-24.
// 1 - 2 / (1 + E) would have that of the reciprocal of a number near 1 besides.
ATTN_HOST_DEVICE float add_two_units(float sum, float e1, float ev1, float v1, float k1, float e2, float ev2, float v2,
                                     float k2) {
  const float d1 = fmaf(e1, k1, 1.0f), d2 = fmaf(e2, k2, 1.0f);
  const float n1 = fmaf(ev1, k1, -v1), n2 = fmaf(ev2, k2, -v2);
  return fmaf(fmaf(n1, d2, n2 * d1), reciprocal(d1 * d2), sum);
}

// The bound from which on the form of two units is as accurate as the formula; infinity where it never is. norm2: of v,
// over the `units` it has.
template <typename T>
ATTN_HOST_DEVICE float min_abs_bound_two(float norm2, std::int64_t units) {
  if (!(norm2 <= kMaxAbsVTwo * kMaxAbsVTwo)) return INFINITY;
  return sizeof(T) == 2 ? 0.0f : min_abs_bound(norm2, units);
}

// Three units share a reciprocal, v folded in (many queries) ----------------------------------------------------------

// A power of two that is larger than x, for x in the normal range, and at most twice as large.
ATTN_HOST_DEVICE float power_of_two_above(float x) {
  return bit_cast<float>((bit_cast<std::uint32_t>(x) & 0x7f800000u) + 0x00800000u);
}

// total + 1 / d1 + 1 / d2 + 1 / d3, of float or F32x2<float>
template <typename V>
ATTN_HOST_DEVICE V add_three(V d1, V d2, V d3, V total) {
  const V product = d1 * d2;
  return multiply_add(multiply_add(d1 + d2, d3, product), reciprocal(product * d3), total);
}

// Compensated: two units share a reciprocal ----------------------------------------------------------------------------
//
// From the same exponentials, v folded in, tanh = n / (n + 2 / v) with n = (E - 1) / v. A multiply-add makes n with one
// rounding, so that nothing cancels in it; what the exponentials themselves were rounded by is added to a score for a
// row (exp2x_and_rest). For two units, d = n + 2 / v,
//
//   v1 n1 / d1 + v2 n2 / d2 = (n1 ((v1 + v2) n2 + 2 v1 / v2) + (2 v2 / v1) n2) / (d1 d2)
//
// where the sum in the numerator is at most three times as large in its terms as in itself.
struct UnitPair {
  float c1, c2;              // 1 / v, scaled
  float sum, first, second;  // v1 + v2, and the two quotients

  ATTN_HOST_DEVICE UnitPair(float c1, float c2, float v1, float v2)
      : c1(c1), c2(c2), sum(v1 + v2), first(2 * v1 * c2), second(2 * v2 * c1) {}
};

template <bool kClamped>
ATTN_HOST_DEVICE F32x2<float> numerator(F32x2<float> e, F32x2<float> k, float c) {
  F32x2<float> n = fused_multiply_add(e, k, F32x2<float>{-c, -c});
  if constexpr (kClamped) {
    n.x = fminf(fmaxf(n.x, -kMaxScaledNumerator), kMaxScaledNumerator);
    n.y = fminf(fmaxf(n.y, -kMaxScaledNumerator), kMaxScaledNumerator);
  }
  return n;
}

// total + v1 tanh1 + v2 tanh2 in parts of the scale of v. kClamped: whatever the products of the exponentials.
template <bool kClamped>
ATTN_HOST_DEVICE F32x2<float> add_compensated(const UnitPair& u, F32x2<float> e1, F32x2<float> k1, F32x2<float> e2,
                                              F32x2<float> k2, F32x2<float> total) {
  auto both = [](float x) { return F32x2<float>{x, x}; };
  const F32x2<float> n1 = numerator<kClamped>(e1, k1, u.c1), n2 = numerator<kClamped>(e2, k2, u.c2);
  const F32x2<float> d1 = n1 + both(2 * u.c1), d2 = n2 + both(2 * u.c2);
  const F32x2<float> top = multiply_add(n1, multiply_add(both(u.sum), n2, both(u.first)), both(u.second) * n2);
  return multiply_add(top, reciprocal(d1 * d2), total);
}

// total += x; what that rounds off is kept in `lost` for the next time.
template <typename W>
ATTN_HOST_DEVICE void add_exactly(W x, W& total, W& lost) {
#if defined(__CUDA_ARCH__)
  const W term = x - lost, sum = total + term;
#else
  volatile W term = x - lost, sum = total + term;  // nothing here may be simplified
#endif
  lost = fabs(static_cast<W>(sum)) < W(INFINITY) ? (sum - total) - term : W(0);
  total = sum;
}

}  // namespace cuda
}  // namespace attn
