// The factored form of additive scores, and where it may be used: every number of its guards, once for all backends.
// The CPU and CUDA kernels include this header; attn_kernels/triton/additive_math.py has the same numbers, and a test
// compares them.
//
//   tanh(q + k) = 1 - 2 / (1 + E) = (E - 1) / (E + 1),   E = e^{2q} e^{2k}
//
// With the exponentials computed once per row, a pair costs a few multiply-adds and a share of a division per hidden
// unit. The guards compare two quantities with the limits below:
//
//   bound    largest |q| (and |bias|) of a query + largest |k| of a step: no |q + k| of the pair is larger
//   norm2    the sum of the squares of v
//
// A pair outside of the limits takes a form that is right there, and one with NaN tanh itself ("exact").
#pragma once

#include <cmath>
#include <cstdint>

// Always inlined: a SIMD level must not call the code of another one.
#if defined(__CUDACC__) || defined(ATTN_EMULATED)
#define ATTN_GUARD __host__ __device__ __forceinline__
#else
#define ATTN_GUARD inline __attribute__((always_inline))
#endif

namespace attn {

// Largest bound -------------------------------------------------------------------------------------------------------

// Three units share a division, v folded in: v / (1 + E) = 1 / d with d = 1 / v + (e^{2q} / v) e^{2k}. v is scaled to
// at most 1, |v| below 2^-24 of the largest are dropped, and d is scaled by 2^-40: d lies between 2^-40 and 2^(24 - 40)
// (1 + E), and a product of three is in range while 1 + E < 2^56, which is e^{38.8}.
constexpr float kMaxBoundThree = 19.0f;
// Two units share a division, each (E - 1) / (E + 1): e^{4 bound} |v| is in range while |v| is at most kMaxAbsVTwo.
constexpr float kMaxBoundTwo = 20.0f;
// A division, or an estimate of it, for each unit: e^{2q}, e^{2k} and their product are in range.
constexpr float kMaxBoundOne = 43.0f;
// For |q| and |k| by themselves: e^{2q}, e^{-2q} and those of k are normal numbers. Their product E need not be, where
// it is kept at most at the next two (on the CPU).
constexpr float kMaxAbsExponential = 43.0f;
// Forward on the CPU, cpu/additive_compensated.h: of E - 1. From there on (E - 1) / (E + 1) is 1, and E^2 is in range.
constexpr float kMaxNumerator = 0x1p30f;
// Forward on GPUs, compensated: the numbers are those of the form of three, scaled as they are, so that d is 2^-40 to
// 2^-16 (1 + E). Two share a reciprocal: d1 d2 is at most 2^-32 (1 + E)^2, which e^{4 bound} = 2^139 lets grow to 2^107.
constexpr float kMaxBoundUnclamped = 24.0f;
// Beyond, (E - 1) / v is clamped, which the first of these is far from where tanh is not 1: 2 / v is 2^-15 at most. Of
// |q| and |k| by themselves: e^{-2 |q|} / v and e^{-2 |k|}, each scaled by 2^-20, are normal numbers.
constexpr float kMaxScaledNumerator = 0x1p20f;
constexpr float kMaxAbsClamped = 36.0f;
// Backward, of E and 1/E: g = ds / (E + 1/E + 2), and from there on 1 - tanh^2 is below 2^-76. Beyond, for ds as
// small as 2^-48, g would be denormal and g (E - 1/E) inexact.
constexpr float kMaxExponentialBackward = 0x1p78f;
// Backward on GPUs, for |q| and |k| by themselves: a gradient times e^{2 |q|} is in range up to 10^24, and a gradient
// over 1 + e^{4 kMaxAbsBackward} down to 10^-10.
constexpr float kMaxAbsBackward = 16.0f;

// The score vector ----------------------------------------------------------------------------------------------------

// Largest |v| with kMaxBoundTwo.
constexpr float kMaxAbsVTwo = 1024.0f;
// Between these the largest |v| and what is divided by it are normal numbers, sums over all units included.
constexpr float kMinAbsMaxV = 1e-30f, kMaxAbsMaxV = 1e30f;
// v folded in: smaller units, relative to the power of two above the largest, are below its rounding and are dropped.
// That holds for each of them; all of them together must be below it, too.
constexpr float kMinRelativeV = 0x1p-24f;
// The scale of d: with it the least product of three, 2^-120, is in range.
constexpr float kDenominatorScale = 0x1p-40f;
// Of which queries and steps have one each, on GPUs.
constexpr float kDenominatorScaleOfRow = 0x1p-20f;
// d of a unit that is dropped: 1 / d is 2^-48 of that of the largest unit.
constexpr float kDroppedDenominator = 256.0f;

// Smallest bound ------------------------------------------------------------------------------------------------------

// 1 - 2 / (1 + E) is off by an ulp of 1, where tanh itself is off by an ulp of its value. That shows only where scores
// are sums of small tanh times a large v. Measured against the formula in float32 (A = 4 to 2048, inputs of standard
// deviation 0.01 to 3, norms of v up to 64), the error is no larger
//   for any input     while the norm of v is at most 2,
//   from bound 2 on   while it is at most 8,
//   from bound 5 on   while it is at most that of a standard normal v (its square about A).
constexpr float kNorm2OfAnyBound = 4.0f;
constexpr float kNorm2OfSmallBound = 64.0f, kSmallBound = 2.0f;
constexpr float kNorm2PerUnitOfMediumBound = 1.3f, kMediumBound = 5.0f;
// From bound 10 on it is no larger for any v of 256 units or more: trained models have such (norms up to 64 times that
// of a standard normal v and single units that outweigh the others, standard deviations 1.5 to 12: half the error
// allowed).
constexpr float kLargeBound = 10.0f;
constexpr int64_t kMinUnitsOfLargeBound = 256;

// The bound from which on the factored form is as accurate as the formula; infinity where it never is.
ATTN_GUARD float min_abs_bound(float norm2, int64_t units) {
  if (norm2 <= kNorm2OfAnyBound) return 0.0f;
  if (norm2 <= kNorm2OfSmallBound) return kSmallBound;
  if (norm2 <= kNorm2PerUnitOfMediumBound * static_cast<float>(units)) return kMediumBound;
  return units >= kMinUnitsOfLargeBound ? kLargeBound : INFINITY;
}

// Estimates of 1 / d, off by at most 2^-14, in low precision on the CPU: the smallest bound from which the error that
// the tests allow is twice what they give (A = 4 to 2048, inputs of standard deviation 0.003 to 3, norms of v up to
// 64).
constexpr float kMinBoundEstimateBFloat16 = 0.0625f, kMinBoundEstimateFloat16 = 0.25f;

}  // namespace attn
