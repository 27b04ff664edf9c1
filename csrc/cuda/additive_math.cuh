// The arithmetic of a pair of query and step of additive attention: exponentials, the factored forms in which two or
// three units share a reciprocal, and the slope of tanh. ../additive_math.h has the limits. There is no memory access:
// everything here is unit-tested as plain C++.
//
// NaN needs no guard: it propagates through the factored forms as through the formula.
#pragma once

#include "f32x2.cuh"

// after platform.cuh, which defines the device
#include "../additive_math.h"

namespace attn {
namespace cuda {

// e^{2x} for |x| <= 43, with an error of about one unit in the last place. NaN for NaN; undefined for other x.
//
// 2x = n ln 2 + f, with n ln 2 in two parts. So the error does not grow with x, as the error of 2^(2x log2 e) would.
ATTN_HOST_DEVICE float exp2x(float x) {
  constexpr float kRound = 12582912.0f;                        // 1.5 * 2^23: the sum has n in its low bits
  const float shifted = fmaf(x, 2.8853900817779268f, kRound);  // 2 / ln 2
  const float n = shifted - kRound;
  const float f = fmaf(n, -7.14303385e-07f, fmaf(n, -0.3465728759765625f, x));  // with ln 2 / 2: half of the f above
  float p = fmaf(64 * 0.00139561f, f, 32 * 0.00837513f);
  p = fmaf(p, f, 16 * 0.04166608f);
  p = fmaf(p, f, 8 * 0.16666415f);
  p = fmaf(p, f, 4 * 0.50000002f);
  p = fmaf(p, f, 2.0f);
  p = fmaf(p, f, 1.0f);
  return p * bit_cast<float>((bit_cast<std::uint32_t>(shifted) << 23) + 0x3f800000u);
}

// Returns e, the float32 nearest to e^{2x}, for |x| <= 43, and sets *rest to r with e = e^{2 (x - r)} up to the
// rounding of x. e^{2 f} - 1 is accurate to its own rounding, so the error of adding 1 is known.
ATTN_HOST_DEVICE float exp2x_and_rest(float x, float* rest) {
  constexpr float kRound = 12582912.0f;
  const float shifted = fmaf(x, 2.8853900817779268f, kRound), n = shifted - kRound;
  const float f = fmaf(n, -7.14303385e-07f, fmaf(n, -0.3465728759765625f, x));
  float p = fmaf(0.08925756f, f, 0.26773155f);
  p = fmaf(p, f, 0.6666605f);
  p = fmaf(p, f, 1.3333235f);
  p = fmaf(p, f, 2.0f);
  const float less_1 = fmaf(p * f, f, f + f), mantissa = less_1 + 1.0f;
  *rest = (less_1 - (mantissa - 1.0f)) * (0.5f - f);  // about the same as a division by 2 e^{2 f}
  return mantissa * bit_cast<float>((bit_cast<std::uint32_t>(shifted) << 23) + 0x3f800000u);
}

// e^{2x} by the instruction for 2^y, which has an error of 2^-22, corrected for the rounding of y. It takes less than
// half of the instructions. NaN for NaN.
ATTN_HOST_DEVICE float quick_exp2x(float x) {
  const float y = x * 2.8853900817779268f;
  const float lost = fmaf(x, 2.8853900817779268f, -y) + x * 3.851926e-08f;  // the rounding error of 2 x / ln 2
  const float e = exp2_approximately(y);
  return fmaf(e, lost * 0.6931472f, e);
}

// e^{2x} for low precision: the relative error is about (1 + |x|) 2^-22. 0 and Inf beyond the range, NaN for NaN.
ATTN_HOST_DEVICE float rough_exp2x(float x) { return exp2_approximately(x * 2.8853900817779268f); }

// e^{2x} for an element of type T.
template <typename T>
ATTN_HOST_DEVICE float exp2x_of(float x) {
  return sizeof(T) == 4 ? exp2x(x) : rough_exp2x(x);
}

// (1 - tanh(x)^2) / 4 with an error of a few units in the last place. If tanh is near 1, computing the difference
// directly would have the error of a number near 1, which a single large v amplifies.
template <typename W>
ATTN_HOST_DEVICE W quarter_slope_of_tanh(W x) {
  const W e = exp_of(-2 * fabs(x)), r = reciprocal(1 + e);
  return e * r * r;
}

// The larger magnitude, ignoring NaN: one instruction.
ATTN_HOST_DEVICE float larger_magnitude(float top, float x) { return fmaxf(top, fabsf(x)); }

// What rounding to `product` lost of (e + lost) factor.
ATTN_HOST_DEVICE float lost_of_product(float e, float lost, float factor, float product) {
  return fmaf(lost, factor, fmaf(e, factor, -product));
}

// v1 tanh1 + v2 tanh2 + sum, with E = e k: e is e^{2q} of a query, ev is v e^{2q}, k is e^{2k}.
//
// The multiply-add computes E - 1 with one rounding, and small values stay small. So the only error is that of E, about
// 2^-24. 1 - 2 / (1 + E) would add the error of the reciprocal of a number near 1. If the rests of ev and k are added
// to the score (exp2x_and_rest), this is a compensated form: the error of a unit is a few roundings of its tanh.
ATTN_HOST_DEVICE float add_two_units(float sum, float e1, float ev1, float v1, float k1, float e2, float ev2, float v2,
                                     float k2) {
  const float d1 = fmaf(e1, k1, 1.0f), d2 = fmaf(e2, k2, 1.0f);
  const float n1 = fmaf(ev1, k1, -v1), n2 = fmaf(ev2, k2, -v2);
  return fmaf(fmaf(n1, d2, n2 * d1), reciprocal(d1 * d2), sum);
}

// The smallest bound from which the form of two units is as accurate as the formula; infinity if it never is. norm2:
// the sum of the squares of v over its `units`.
template <typename T>
ATTN_HOST_DEVICE float min_abs_bound_two(float norm2, std::int64_t units) {
  if (!(norm2 <= kMaxAbsVTwo * kMaxAbsVTwo)) return INFINITY;
  return sizeof(T) == 2 ? 0.0f : min_abs_bound(norm2, units);
}

// The largest bound for which e^{4 bound} |v| is in range, also with larger v. NaN or -infinity if v has such elements.
ATTN_HOST_DEVICE float max_bound_two(float norm2) {
  constexpr float kLargest = kMaxAbsVTwo * kMaxAbsVTwo;
  return norm2 <= kLargest ? kMaxBoundTwo : kMaxBoundTwo - 0.125f * logf(norm2 / kLargest);
}

// Three units share a reciprocal, v folded in (many queries) ----------------------------------------------------------

// A power of two that is larger than x, for x in the normal range, and at most twice as large.
ATTN_HOST_DEVICE float power_of_two_above(float x) {
  return bit_cast<float>((bit_cast<std::uint32_t>(x) & 0x7f800000u) + 0x00800000u);
}

// total + 1 / d1 + 1 / d2 + 1 / d3, for float or F32x2<float>
template <typename V>
ATTN_HOST_DEVICE V add_three(V d1, V d2, V d3, V total) {
  const V product = d1 * d2;
  return multiply_add(multiply_add(d1 + d2, d3, product), reciprocal(product * d3), total);
}

// Compensated: two units share a reciprocal ---------------------------------------------------------------------------
//
// From the same exponentials, with v folded in, tanh = n / (n + 2 / v) with n = (E - 1) / v. A multiply-add computes n
// with one rounding, so there is no cancellation. The rounding errors of the exponentials are added to a score once per
// row (exp2x_and_rest). For two units, d = n + 2 / v,
//
//   v1 n1 / d1 + v2 n2 / d2 = (n1 ((v1 + v2) n2 + 2 v1 / v2) + (2 v2 / v1) n2) / (d1 d2)
//
// where the terms of the sum in the numerator are at most three times as large as the sum.
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

// total + v1 tanh1 + v2 tanh2, in units of the scale of v. kClamped: valid for any products of the exponentials.
template <bool kClamped>
ATTN_HOST_DEVICE F32x2<float> add_compensated(const UnitPair& u, F32x2<float> e1, F32x2<float> k1, F32x2<float> e2,
                                              F32x2<float> k2, F32x2<float> total) {
  auto both = [](float x) { return F32x2<float>{x, x}; };
  const F32x2<float> n1 = numerator<kClamped>(e1, k1, u.c1), n2 = numerator<kClamped>(e2, k2, u.c2);
  const F32x2<float> d1 = n1 + both(2 * u.c1), d2 = n2 + both(2 * u.c2);
  const F32x2<float> top = multiply_add(n1, multiply_add(both(u.sum), n2, both(u.first)), both(u.second) * n2);
  return multiply_add(top, reciprocal(d1 * d2), total);
}

// total += x with Kahan compensation: `lost` carries the rounding error to the next addition.
template <typename W>
ATTN_HOST_DEVICE void add_exactly(W x, W& total, W& lost) {
#if defined(__CUDA_ARCH__)
  const W term = x - lost, sum = total + term;
#else
  volatile W term = x - lost, sum = total + term;  // volatile: the compiler must not simplify this
#endif
  lost = fabs(static_cast<W>(sum)) < W(INFINITY) ? (sum - total) - term : W(0);
  total = sum;
}

}  // namespace cuda
}  // namespace attn
