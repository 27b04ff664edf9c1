// How decode.cu divides its work. Tests set the division themselves.
#pragma once

#include "kernels.h"
#include "launch.h"

namespace attn {
namespace cuda {

// The number n of blocks over which the steps of each sentence are split, and what combines their parts: either a
// cluster of n blocks (not for float64; at most 16, a power of two), or the block of the sentence that finishes last.
struct Splits {
  int64_t n;
  bool cluster;
};

Splits choose_splits(const Device& device, int64_t B, int64_t Tk, Dtype dtype);

void decode_attention(const AttentionForward<AdditiveScores>& op, const Splits& splits);
void decode_attention(const AttentionForward<ActivatedScores>& op, const Splits& splits);
void decode_attention(const AttentionForward<DotScores>& op, const Splits& splits);

}  // namespace cuda
}  // namespace attn
