// Softmax as a policy: of a part of a row of scores, merged over parts, and finished, for decoding (decode.cu) as for many
// queries (softmax.cu), and its gradient. No access to global memory: unit-tested as plain C++.
#pragma once

#include "platform.cuh"

namespace attn {
namespace cuda {

template <typename W>
struct Softmax {
  // Of the attended scores of a part: the largest (-inf where there is none), and the sum of e^(score - largest), where
  // -inf - -inf is 0, so that the sum is 0 only where nothing is attended.
  struct Part {
    W largest, sum;
  };
  static constexpr int kPartSize = 2;

  ATTN_HOST_DEVICE static Part nothing() { return {-W(INFINITY), 0}; }

  // The weight of an attended score within a part.
  ATTN_HOST_DEVICE static W weight(W score, W largest) {
    return score == largest && score < 0 ? W(1) : exp_of(score - largest);
  }

  // By a warp: score(i) becomes its weight, 0 where not attends(i), for i < n. seen(i, x) is called with each score x.
  template <class Score, class Attends, class Seen>
  ATTN_DEVICE static Part part(int n, const Score& score, const Attends& attends, const Seen& seen) {
    const int lane = threadIdx.x % kWarp;
    W largest = -W(INFINITY), sum = 0;
#pragma unroll 1
    for (int i = lane; i < n; i += kWarp)
      if (attends(i)) largest = larger(largest, score(i));
    largest = warp_largest(largest);
#pragma unroll 1
    for (int i = lane; i < n; i += kWarp) {
      seen(i, score(i));
      const W x = attends(i) ? weight(score(i), largest) : W(0);
      score(i) = x;
      sum += x;
    }
    return {largest, warp_sum(sum)};
  }

  // What the weights of a part are to be multiplied with in a whole.
  ATTN_HOST_DEVICE static W share(W part_largest, W largest) {
    return part_largest == -W(INFINITY) ? W(0) : exp_of(part_largest - largest);
  }

  // Both parts in one. The sums of parts with nothing but -inf count only if there is nothing else.
  ATTN_HOST_DEVICE static Part merge(Part a, Part b) {
    const W largest = fmax(a.largest, b.largest);
    if (largest == -W(INFINITY) && a.largest == a.largest && b.largest == b.largest) return {largest, a.sum + b.sum};
    return {largest, a.sum * share(a.largest, largest) + b.sum * share(b.largest, largest)};
  }

  // What turns weights of the whole into alignments: 0 where nothing is attended, NaN where all attended scores are
  // -inf.
  ATTN_HOST_DEVICE static W finish(Part whole) {
    if (whole.sum == 0) return 0;
    return whole.largest == -W(INFINITY) ? W(NAN) : 1 / whole.sum;
  }

  // The alignment of an attended score, from what finish() has returned for the whole.
  ATTN_HOST_DEVICE static W alignment(W score, W largest, W finished) { return exp_of(score - largest) * finished; }

  // The gradient of a score is alignment * (g - mean), g that of the alignment. The mean of g is the sum of alignment * g
  // over that of alignments: 1, but for their rounding.
  ATTN_HOST_DEVICE static W mean(W products, W alignments) {
    return products / (alignments > W(1e-30) ? alignments : W(1e-30));  // 0 / 0 where nothing is attended
  }
  ATTN_HOST_DEVICE static W gradient(W alignment, W g, W mean) { return alignment * (g - mean); }
};

}  // namespace cuda
}  // namespace attn
