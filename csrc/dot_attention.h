// Dot-product attention: scores = scale * query . keys.
#pragma once

#include "attention.h"

namespace attn {

struct DotScores : Scores {
  struct Gradients {};
  double scale;
};

}  // namespace attn
