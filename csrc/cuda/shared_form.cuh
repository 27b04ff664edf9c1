// The shared form of additive scores: three units to a reciprocal, v folded in; where it may be used. The same as on
// the CPU (cpu/additive_attention_fwd.h), where the limits are derived.
#pragma once

#include "two.cuh"

namespace attn {
namespace cuda {

// With v scaled to at most 1, units smaller than 2^-24 dropped and d scaled by 2^-40, three denominators lie between
// 2^-40 and 2^(24 - 40) (1 + E), so their product is in range while 1 + E < 2^56.
constexpr float kThreeReach = 19.0f;  // largest |q| + |k|
constexpr float kSmallestUnit = 0x1p-24f, kUnitScale = 0x1p-40f;
constexpr float kDropped = 256.0f;  // the d of a unit that is dropped: 1 / d is 2^-48 of the largest

// From which |q| + |k| on the rounding of 1 - 2 / (1 + E) is no larger than that of the eager formula, for v with this
// sum of squares. Infinity where it never is; for NaN too.
ATTN_HOST_DEVICE float least_reach_of(float squares, int64_t units) {
  if (squares <= 4) return 0;
  if (squares <= 64) return 2;
  return squares <= 1.3f * static_cast<float>(units) ? 5.0f : INFINITY;
}

// A power of two that is larger than x, for x in the normal range, and at most twice as large.
ATTN_HOST_DEVICE float power_of_two_above(float x) {
  return bit_cast<float>((bit_cast<std::uint32_t>(x) & 0x7f800000u) + 0x00800000u);
}

// total + 1 / d1 + 1 / d2 + 1 / d3, of float or Two<float>
template <typename V>
ATTN_HOST_DEVICE V add_three(V d1, V d2, V d3, V total) {
  const V product = d1 * d2;
  return multiply_add(multiply_add(d1 + d2, d3, product), reciprocal(product * d3), total);
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
