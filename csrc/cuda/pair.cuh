// The arithmetic of a pair of query and step, and of softmax in parts. No memory access: everything here is unit-tested.
//
// tanh(q + k) = (E - 1) / (E + 1), E = e^{2q} e^{2k}: with exponentials made once per row, a pair costs a few
// multiply-adds and a share of a reciprocal for each hidden unit. Guards choose, for each step, this factored form or
// tanh itself:
//
//   largest |q| + |bias| + |k|        form
//   least_reach() .. kSharedReach     factored, two units share a reciprocal
//   anything else                     tanh itself
//
// NaN needs no guard: it passes through both forms as through the formula.
#pragma once

#include "platform.cuh"

namespace attn {
namespace cuda {

// Of |q| and of |k| by themselves, in the backward: a gradient times e^{2 reach} is in range up to 10^24, and so is one
// over 1 + e^{4 reach} down to 10^-10.
constexpr float kEachReach = 16.0f;
// e^{4 reach} times |v| is in range while |v| is at most kLargestV.
constexpr float kSharedReach = 20.0f, kLargestV = 1024.0f;

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

// The same by the instruction for 2^y, which has an error of 2^-22, with what rounding takes from y given back: less than
// half of the instructions. NaN for NaN.
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

// From which largest |q| + |k| on the factored form is as accurate as the formula wants; Inf where it never is.
// norm2: of v, over the `units` it has.
//
// It is off by about half an ulp of 1 for each unit, where tanh itself is off by an ulp of its value. That shows only
// where scores are sums of small tanh times a large v.
template <typename T>
ATTN_HOST_DEVICE float least_reach(float norm2, float units) {
  constexpr float kNever = INFINITY;
  if (!(norm2 <= kLargestV * kLargestV)) return kNever;
  if (sizeof(T) == 2 || norm2 <= 4.0f) return 0.0f;
  if (norm2 <= 64.0f) return 2.0f;
  return norm2 <= 1.3f * units ? 5.0f : kNever;
}

// Softmax in parts -----------------------------------------------------------------------------------------------------

// Of the attended scores of a part: the largest (-inf where there is none), and the sum of e^(score - largest), where
// -inf - -inf is 0, so that the sum is 0 only where nothing is attended.
template <typename W>
struct SoftmaxPart {
  W largest, sum;
};

// What an attended score adds to the sum of a part.
template <typename W>
ATTN_HOST_DEVICE W weight_of(W score, W largest) {
  return score == largest && score < 0 ? W(1) : exp_of(score - largest);
}

// What the weights of a part are to be multiplied with in a whole.
template <typename W>
ATTN_HOST_DEVICE W share(W part_largest, W largest) {
  return part_largest == -W(INFINITY) ? W(0) : exp_of(part_largest - largest);
}

// Both parts in one. The sums of parts with nothing but -inf count only if there is nothing else.
template <typename W>
ATTN_HOST_DEVICE SoftmaxPart<W> merge(SoftmaxPart<W> a, SoftmaxPart<W> b) {
  const W largest = fmax(a.largest, b.largest);
  if (largest == -W(INFINITY) && a.largest == a.largest && b.largest == b.largest) return {largest, a.sum + b.sum};
  return {largest, a.sum * share(a.largest, largest) + b.sum * share(b.largest, largest)};
}

// What turns weights of the whole into alignments: 0 where nothing is attended, NaN where all attended scores are -inf.
template <typename W>
ATTN_HOST_DEVICE W normaliser(SoftmaxPart<W> whole) {
  if (whole.sum == 0) return 0;
  return whole.largest == -W(INFINITY) ? W(NAN) : 1 / whole.sum;
}

}  // namespace cuda
}  // namespace attn
