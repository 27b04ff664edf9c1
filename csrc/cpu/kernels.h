// The CPU kernels by SIMD level, and the choice among them at run time.
#pragma once

#include "../additive_attention.h"
#include "../dot_attention.h"

namespace attn {

struct Kernels {
  void (*additive_prepare)(const AdditivePrepare&);
  void (*additive_scores)(const AdditiveScoresForward&);
  void (*additive_scores_backward)(const AdditiveScoresBackward&);
  void (*additive_attention)(const AdditiveAttentionForward&);
  void (*additive_attention_backward)(const AdditiveAttentionBackward&);
  void (*dot_attention)(const DotAttentionForward&);
  void (*dot_attention_backward)(const DotAttentionBackward&);
};

struct Level {
  const char* name;
  const Kernels* kernels;
};

// The best level of this CPU, or the one that the environment variable ATTN_KERNELS_SIMD names (portable, avx2,
// avx512).
const Level& level();

}  // namespace attn
