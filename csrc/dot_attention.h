// Dot-product attention: scores = scale * query . keys.
#pragma once

#include "attention.h"

namespace attn {

struct DotScores : Scores {
  struct Gradients {};
  double scale;
};

using DotAttentionForward = AttentionForward<DotScores>;
using DotAttentionBackward = AttentionBackward<DotScores>;

}  // namespace attn
