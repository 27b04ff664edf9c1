// Softmax in parts: what blocks compute of a row of scores apart, and how it is merged. No memory access: unit-tested as
// plain C++.
#pragma once

#include "platform.cuh"

namespace attn {
namespace cuda {

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
