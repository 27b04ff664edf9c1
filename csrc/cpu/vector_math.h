// Functions of vectors: reciprocals, exponentials, tanh and sigmoid. Part of a SIMD level: see simd.h.
#pragma once

#include <cmath>

#include "vectors.h"

namespace attn {
namespace ATTN_LEVEL {

// Keeps the compiler from fusing a product into a multiply-add. If multiplications are the bottleneck, a separate
// addition is cheaper.
template <class V>
ATTN_INLINE V rounded(V x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#endif
  return x;
}

// 1 / x with a relative error of 2^-14 at the cost of a multiplication, for normal numbers with normal reciprocals. A
// division if the target has no such instruction.
#if ATTN_VECTOR_BYTES == 64
constexpr bool kHasEstimate = true;
ATTN_INLINE Vec<float> reciprocal_estimate(Vec<float> x) {
  return (Vec<float>)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);  // GCC 12 warns about the form without a mask
}
#else
constexpr bool kHasEstimate = false;
ATTN_INLINE Vec<float> reciprocal_estimate(Vec<float> x) { return 1 / x; }
#endif
ATTN_INLINE Vec<double> reciprocal_estimate(Vec<double> x) { return 1 / x; }

// 1 / x to within a rounding error, for normal numbers with normal reciprocals; otherwise it may be NaN. It refines an
// estimate r, whose error e = 1 - x r can be computed exactly: 1 / x = r (1 + e + e^2 + ...), up to the precision of
// float32. That is one Newton step after an estimate of 14 bits, and one more term after 11 (AVX2) or 8 bits (NEON).
#if ATTN_VECTOR_BYTES == 64
constexpr bool kCanRefine = true;
ATTN_INLINE Vec<float> refined_reciprocal(Vec<float> x) {
  const Vec<float> r = reciprocal_estimate(x), e = 1.0f - x * r;
  return r * e + r;
}
#elif ATTN_VECTOR_BYTES == 32 || defined(ATTN_NEON)
constexpr bool kCanRefine = true;
ATTN_INLINE Vec<float> refined_reciprocal(Vec<float> x) {
#if defined(ATTN_NEON)
  const Vec<float> r = (Vec<float>)vrecpeq_f32((float32x4_t)x), e = 1.0f - x * r;
#else
  const Vec<float> r = (Vec<float>)_mm256_rcp_ps((__m256)x), e = 1.0f - x * r;
#endif
  return r * (e * e + e) + r;
}
#else
constexpr bool kCanRefine = false;
ATTN_INLINE Vec<float> refined_reciprocal(Vec<float> x) { return 1.0f / x; }
#endif
ATTN_INLINE Vec<double> refined_reciprocal(Vec<double> x) { return 1.0 / x; }

// n / d, by a division or by a product with refined_reciprocal(d).
template <bool kRefined, typename T>
ATTN_INLINE Vec<T> quotient(Vec<T> n, Vec<T> d) {
  if constexpr (kRefined) return n * refined_reciprocal(d);
  return n / d;
}

#if ATTN_VECTOR_BYTES > 16 || defined(__aarch64__)
constexpr bool kHasMultiplyAdd = true;       // with a single rounding
constexpr float kLn2Excess = 1.9046543e-9f;  // the value of ln 2 in reduce_range, minus ln 2
#else
constexpr bool kHasMultiplyAdd = false;
constexpr float kLn2Excess = 0.0f;
#endif

// x = r + n ln 2, |r| at most ln(2) / 2.
struct Reduced {
  Vec<float> r;
  IntVec<float> n;  // shifted to the exponent bits
};

ATTN_INLINE Reduced reduce_range(Vec<float> x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits of the sum
  const Vec<float> shifted = x * 1.44269504088896341f + magic;
  const Vec<float> n = shifted - magic;
  const Vec<float> r = kHasMultiplyAdd ? x - n * 0.6931471805599453f : (x - n * 0.693359375f) + n * 2.12194440e-4f;
  return {r, bits<float>(shifted) << 23};  // the low bits of magic are 0
}

// e^x = p 2^n and p = 1 + r q for x in [-87.3, 88.7]. p = e^r is a polynomial. Its first two coefficients are exact, so
// e^0 = 1. The others minimise the largest relative error: 1.0e-7 for degree 5, 3e-9 for degree 6 (before rounding).
struct Power {
  Vec<float> p, r, q;
  IntVec<float> n;  // n in the exponent bits: added to the bits of p, it multiplies p by 2^n
};

template <int degree>
ATTN_INLINE Vec<float> third_term(Vec<float> r) {  // p with e^r = 1 + r + r^2 p
  Vec<float> q;
  if constexpr (degree == 5) {
    q = broadcast(0.008312501013278961f) * r + 0.041890330612659454f;
    q = q * r + 0.16667115688323975f;
    q = q * r + 0.499992311000824f;
  } else {
    q = broadcast(0.0013814540579915047f) * r + 0.00836874544620514f;
    q = q * r + 0.04166838899254799f;
    q = q * r + 0.1666652113199234f;
    q = q * r + 0.4999999403953552f;
  }
  return q;
}

// e^{2x} for x in [-43.6, 44.3]: equal to exp_in_range(x + x) to the last bit, without the addition. All numbers of the
// polynomial are scaled by powers of 2, so that it takes r / 2.
ATTN_INLINE Vec<float> exp_of_twice(Vec<float> x) {
  const float magic = 12582912.0f;
  const Vec<float> shifted = x * (2 * 1.44269504088896341f) + magic, n = shifted - magic;
  const Vec<float> r = kHasMultiplyAdd ? x - n * (0.5f * 0.6931471805599453f)
                                       : (x - n * (0.5f * 0.693359375f)) + n * (0.5f * 2.12194440e-4f);
  Vec<float> q = broadcast(32 * 0.008312501013278961f) * r + 16 * 0.041890330612659454f;
  q = q * r + 8 * 0.16667115688323975f;
  q = q * r + 4 * 0.499992311000824f;
  q = q * r + 2.0f;
  return (Vec<float>)(bits<float>(q * r + 1.0f) + (bits<float>(shifted) << 23));
}

template <int degree>
ATTN_INLINE Power power(Vec<float> x) {
  const auto [r, n] = reduce_range(x);
  const Vec<float> q = third_term<degree>(r) * r + 1.0f;
  return {q * r + 1.0f, r, q, n};
}

// e^x for x in [-87.3, 88.7], with an error of at most 2 ulp. Outside that range, and for NaN, the result is undefined.
ATTN_INLINE Vec<float> exp_in_range(Vec<float> x) {
  const Power e = power<5>(x);
  return (Vec<float>)(bits<float>(e.p) + e.n);
}

// e^x and e^-x for x in [-87.3, 87.3], each with an error of about an ulp, at little more than the cost of one. cosh
// and sinh of the remainder are polynomials in its square, with a relative error of 8e-9 before rounding. Outside that
// range, and for NaN, the results are undefined.
ATTN_INLINE void exp_both_ways(Vec<float> x, Vec<float>* up, Vec<float>* down) {
  const Reduced a = reduce_range(x);
  const Vec<float> s = a.r * a.r;
  const Vec<float> even = ((broadcast(1.0f / 720) * s + 1.0f / 24) * s + 0.5f) * s + 1.0f;
  const Vec<float> odd = a.r * ((broadcast(0.008366535782549641f) * s + 0.16666543473326567f) * s + 1.0f);
  *up = (Vec<float>)(bits<float>(even + odd) + a.n);
  *down = (Vec<float>)(bits<float>(even - odd) - a.n);
}

// e^x for x <= 0 or NaN, with an error of 1 ulp; 0 where e^x is below the smallest normal number.
ATTN_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  const Vec<float> low = broadcast(-87.3365447f);
  const Power e = power<6>(x < low ? low : x);
  const Vec<float> result = e.p * (Vec<float>)(e.n + 0x3f800000);  // a product keeps NaN, a sum of bits does not
  return x < low ? Vec<float>{} : result;
}

// float64 is for checking gradients, not for speed: it calls the functions of the C library for each element.
ATTN_INLINE Vec<double> exp_in_range(Vec<double> x) {
  for (int i = 0; i < width<double>; ++i) x[i] = ::exp(x[i]);
  return x;
}

ATTN_INLINE Vec<double> exp_nonpositive(Vec<double> x) { return exp_in_range(x); }

// e^x - 1 for x <= 0 or NaN, with an error of about 2 ulp: there is no cancellation near 0. *power_of_x, unless null,
// receives e^x, if that is a normal number.
ATTN_INLINE Vec<float> expm1_nonpositive(Vec<float> x, Vec<float>* power_of_x = nullptr) {
  const Vec<float> low = broadcast(-87.3365447f);
  const Power e = power<6>(x < low ? low : x);
  const Vec<float> scale = (Vec<float>)(e.n + 0x3f800000);
  if (power_of_x != nullptr) *power_of_x = e.p * scale;
  return scale * (e.r * e.q) + (scale - 1.0f);
}

template <typename T>
ATTN_INLINE Vec<T> copy_sign(Vec<T> magnitude, Vec<T> x) {
  return (Vec<T>)(bits<T>(absolute<T>(magnitude)) | (bits<T>(x) ^ bits<T>(absolute<T>(x))));
}

// tanh with an error of about 2 ulp, for every input: -e / (2 + e) with e = exp(-2|x|) - 1.
ATTN_INLINE Vec<float> tanh_any(Vec<float> x) {
  const Vec<float> e = expm1_nonpositive(absolute<float>(x) * -2.0f);
  return copy_sign<float>(e / (2.0f + e), x);
}

ATTN_INLINE Vec<double> tanh_any(Vec<double> x) {
  for (int i = 0; i < width<double>; ++i) x[i] = ::tanh(x[i]);
  return x;
}

// tanh(x) and, in *slope, its derivative, with one division. The derivative is 4 e / (1 + e)^2, which does not cancel
// if tanh is close to 1.
ATTN_INLINE Vec<float> tanh_and_slope(Vec<float> x, Vec<float>* slope) {
  Vec<float> e;
  const Vec<float> e_minus_1 = expm1_nonpositive(absolute<float>(x) * -2.0f, &e), r = 1.0f / (2.0f + e_minus_1);
  *slope = (4.0f * e) * (r * r);
  return copy_sign<float>(e_minus_1 * r, x);
}

ATTN_INLINE Vec<double> tanh_and_slope(Vec<double> x, Vec<double>* slope) {
  const Vec<double> y = tanh_any(x);
  *slope = (1 - y) * (1 + y);
  return y;
}

// sigmoid(x) and, in *slope, its derivative, for every input, without cancellation.
template <typename T>
ATTN_INLINE Vec<T> sigmoid_and_slope(Vec<T> x, Vec<T>* slope) {
  const Vec<T> e = exp_nonpositive(-absolute<T>(x)), high = T(1) / (T(1) + e), low = e * high, zero{};
  *slope = high * low;
  return x < zero ? low : high;
}

// tanh(x) sigmoid(g), with one division.
ATTN_INLINE Vec<float> tanh_times_sigmoid(Vec<float> x, Vec<float> g) {
  const Vec<float> e = expm1_nonpositive(absolute<float>(x) * -2.0f), f = exp_nonpositive(-absolute<float>(g)), zero{};
  return copy_sign<float>(e * (g < zero ? f : zero + 1.0f) / ((2.0f + e) * (1.0f + f)), x);
}

// The functions that the activations of ../activations.h use.
template <typename T>
struct VectorMath {
  using V = Vec<T>;
  using N = T;
  ATTN_INLINE static V positive_part(V x) { return ATTN_LEVEL::positive_part<T>(x); }
  ATTN_INLINE static V absolute(V x) { return ATTN_LEVEL::absolute<T>(x); }
};

}  // namespace ATTN_LEVEL
}  // namespace attn
