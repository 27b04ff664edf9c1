// Softmax as a policy, for decoding (decode.cu) and for many queries (softmax.cu): partial softmax over a part of a row
// of scores, merging of parts, the final alignments, and the gradient. It does not access global memory, so it is
// unit-tested as plain C++.
#pragma once

#include "platform.cuh"

namespace attn {
namespace cuda {

template <typename W>
struct Softmax {
  // The largest attended score of a part (-inf if there is none), and the sum of e^(score - largest). -inf - -inf
  // counts as 0, so the sum is 0 only if nothing is attended.
  struct Part {
    W largest, sum;
  };
  static constexpr int kPartSize = 2;

  ATTN_HOST_DEVICE static Part nothing() { return {-W(INFINITY), 0}; }

  // The weight of an attended score within a part.
  ATTN_HOST_DEVICE static W weight(W score, W largest) {
    return score == largest && score < 0 ? W(1) : exp_of(score - largest);
  }

  // Computed by a warp, for i < n: replaces score(i) by its weight, 0 if not attends(i). Calls seen(i, x) with each
  // score x.
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

  // The factor of a part's weights within the whole row.
  ATTN_HOST_DEVICE static W share(W part_largest, W largest) {
    return part_largest == -W(INFINITY) ? W(0) : exp_of(part_largest - largest);
  }

  // Merges two parts. The sum of a part with only -inf counts only if the other part has only -inf, too.
  ATTN_HOST_DEVICE static Part merge(Part a, Part b) {
    const W largest = fmax(a.largest, b.largest);
    if (largest == -W(INFINITY) && a.largest == a.largest && b.largest == b.largest) return {largest, a.sum + b.sum};
    return {largest, a.sum * share(a.largest, largest) + b.sum * share(b.largest, largest)};
  }

  // The factor from weights of the whole row to alignments: 0 if nothing is attended, NaN if all attended scores are
  // -inf.
  ATTN_HOST_DEVICE static W finish(Part whole) {
    if (whole.sum == 0) return 0;
    return whole.largest == -W(INFINITY) ? W(NAN) : 1 / whole.sum;
  }

  // The alignment of an attended score. finished: the result of finish() for the whole row.
  ATTN_HOST_DEVICE static W alignment(W score, W largest, W finished) { return exp_of(score - largest) * finished; }

  // The gradient of a score is alignment * (g - mean), where g is the gradient of the alignment. The mean of g is the
  // sum of alignment * g divided by the sum of alignments, which is 1 up to rounding.
  ATTN_HOST_DEVICE static W mean(W products, W alignments) {
    return products / (alignments > W(1e-30) ? alignments : W(1e-30));  // avoids 0 / 0 if nothing is attended
  }
  ATTN_HOST_DEVICE static W gradient(W alignment, W g, W mean) { return alignment * (g - mean); }
};

}  // namespace cuda
}  // namespace attn
