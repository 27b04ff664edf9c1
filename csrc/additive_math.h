// The factored form of additive scores, and the limits within which it may be used. The constants of its guards are
// defined here once for all backends. The CPU and CUDA kernels include this header.
// attn_kernels/triton/additive_math.py repeats the constants, and a test compares the two.
//
//   tanh(q + k) = 1 - 2 / (1 + E) = (E - 1) / (E + 1),   E = e^{2q} e^{2k}
//
// The exponentials are computed once per row. A pair then costs a few multiply-adds and a share of a division per
// hidden unit. The guards compare two quantities with the limits below:
//
//   bound    largest |q| (and |bias|) of a query + largest |k| of a step: no |q + k| of the pair is larger
//   norm2    the sum of the squares of v
//
// A pair outside the limits is computed by another form that is accurate there. A pair with NaN is computed by tanh
// itself (the "exact" form).
#pragma once

#include <cmath>
#include <cstdint>

// Always inlined: a SIMD level must not call the code of another level.
#if defined(__CUDACC__) || defined(ATTN_EMULATED)
#define ATTN_GUARD __host__ __device__ __forceinline__
#else
#define ATTN_GUARD inline __attribute__((always_inline))
#endif

namespace attn {

// Largest bound -------------------------------------------------------------------------------------------------------

// Three units share a division, with v folded in: v / (1 + E) = 1 / d with d = 1 / v + (e^{2q} / v) e^{2k}. v is scaled
// to at most 1. Units with |v| below 2^-24 of the largest are dropped. d is scaled by 2^-40. So d lies between 2^-40
// and 2^(24 - 40) (1 + E), and a product of three is in range while 1 + E < 2^56, which is e^{38.8}.
constexpr float kMaxBoundThree = 19.0f;
// Two units share a division, each (E - 1) / (E + 1): e^{4 bound} |v| is in range while |v| is at most kMaxAbsVTwo.
constexpr float kMaxBoundTwo = 20.0f;
// Each unit has its own division, or an estimate of it: e^{2q}, e^{2k} and their product are in range.
constexpr float kMaxBoundOne = 43.0f;
// A limit on |q| and on |k|, each by itself: e^{2q}, e^{-2q}, e^{2k} and e^{-2k} are normal numbers. Their product E
// may overflow: the CPU clamps it, in the forward to kMaxNumerator, in the backward to kMaxExponentialBackward.
constexpr float kMaxAbsExponential = 43.0f;
// Forward on the CPU (cpu/additive_compensated.h): E - 1 is clamped to this. (E - 1) / (E + 1) rounds to 1 there, and
// E^2 is in range.
constexpr float kMaxNumerator = 0x1p30f;
// Forward on GPUs, compensated form: the same numbers as where three units share a division, with the same scale, so d
// is 2^-40 to 2^-16 (1 + E). Two units share a reciprocal: d1 d2 is at most 2^-32 (1 + E)^2. With e^{4 bound} = 2^139
// that is at most 2^107.
constexpr float kMaxBoundUnclamped = 24.0f;
// Beyond that bound, the scaled (E - 1) / v is clamped to kMaxScaledNumerator. tanh is 1 long before: scaled, 2 / v is
// at most 2^-15. kMaxAbsClamped limits |q| and |k|, each by itself: e^{-2 |q|} / v and e^{-2 |k|}, each scaled by
// 2^-20, are normal numbers.
constexpr float kMaxScaledNumerator = 0x1p20f;
constexpr float kMaxAbsClamped = 36.0f;
// Backward: E and 1/E are clamped to this in g = ds / (E + 1/E + 2). 1 - tanh^2 is below 2^-76 there. With a larger
// limit, g would be denormal for ds as small as 2^-48, and g (E - 1/E) inexact.
constexpr float kMaxExponentialBackward = 0x1p78f;
// The largest bound below which no E or 1/E exceeds that limit, so that none has to be clamped.
constexpr float kMaxBoundUnclampedBackward = 27.0f;
// Backward on GPUs, a limit on |q| and on |k|, each by itself: a gradient times e^{2 |q|} is in range for gradients up
// to 10^24, and a gradient over 1 + e^{4 kMaxAbsBackward} for gradients down to 10^-10.
constexpr float kMaxAbsBackward = 16.0f;

// The score vector ----------------------------------------------------------------------------------------------------

// The largest |v| for which kMaxBoundTwo holds.
constexpr float kMaxAbsVTwo = 1024.0f;
// Between these limits of the largest |v|, quotients by it are normal numbers, and so are sums over all units.
constexpr float kMinAbsMaxV = 1e-30f, kMaxAbsMaxV = 1e30f;
// With v folded in, units with smaller |v|, relative to the power of two above the largest |v|, are dropped: each is
// below the rounding of the largest. The sum of all dropped units must be below it, too.
constexpr float kMinRelativeV = 0x1p-24f;
// The scale of d. The smallest product of three, 2^-120, is in range with it.
constexpr float kDenominatorScale = 0x1p-40f;
// On GPUs, the rows of queries and those of steps are each scaled by this; the product is kDenominatorScale.
constexpr float kDenominatorScaleOfRow = 0x1p-20f;
// d of a dropped unit: its 1 / d is 2^-48 of the 1 / d of the largest unit.
constexpr float kDroppedDenominator = 256.0f;

// Smallest bound ------------------------------------------------------------------------------------------------------

// The error of 1 - 2 / (1 + E) is an ulp of 1, while the error of tanh itself is an ulp of its value. The difference
// matters only if scores are sums of small tanh times a large v. Measured against the formula in float32 (A = 4 to
// 2048, inputs of standard deviation 0.01 to 3, norms of v up to 64), the error is no larger than the formula's
//   for any input     if the norm of v is at most 2,
//   from bound 2 on   if it is at most 8,
//   from bound 5 on   if it is at most the norm of a standard normal v (its square is about A).
constexpr float kNorm2OfAnyBound = 4.0f;
constexpr float kNorm2OfSmallBound = 64.0f, kSmallBound = 2.0f;
constexpr float kNorm2PerUnitOfMediumBound = 1.3f, kMediumBound = 5.0f;
// From bound 10 on, the error is no larger for any v of 256 units or more. Trained models have such v. Measured with
// norms up to 64 times the norm of a standard normal v, single units that outweigh the others, and standard deviations
// of 1.5 to 12, the error was half of the allowed one.
constexpr float kLargeBound = 10.0f;
constexpr int64_t kMinUnitsOfLargeBound = 256;

// The smallest bound from which the factored form is as accurate as the formula; infinity if it never is.
ATTN_GUARD float min_abs_bound(float norm2, int64_t units) {
  if (norm2 <= kNorm2OfAnyBound) return 0.0f;
  if (norm2 <= kNorm2OfSmallBound) return kSmallBound;
  if (norm2 <= kNorm2PerUnitOfMediumBound * static_cast<float>(units)) return kMediumBound;
  return units >= kMinUnitsOfLargeBound ? kLargeBound : INFINITY;
}

// In low precision the CPU may estimate 1 / d, with a relative error of at most 2^-14. These are the smallest bounds
// from which the resulting error is at most half of what the tests allow (A = 4 to 2048, inputs of standard deviation
// 0.003 to 3, norms of v up to 64).
constexpr float kMinBoundEstimateBFloat16 = 0.0625f, kMinBoundEstimateFloat16 = 0.25f;

}  // namespace attn
