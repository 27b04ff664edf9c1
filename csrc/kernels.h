// The table of a backend's kernels: the CPU has one table per SIMD level, CUDA has one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "additive_attention.h"
#include "decode.h"
#include "dot_attention.h"
#include "gru_cell.h"
#include "lstm_cell.h"

namespace attn {

// The kernels of a score. scores and scores_backward are null for dot attention.
template <class Scores>
struct ScoreKernels {
  void (*scores)(const ScoresForward<Scores>&);
  void (*scores_backward)(const ScoresBackward<Scores>&);
  void (*attention)(const AttentionForward<Scores>&);
  void (*attention_backward)(const AttentionBackward<Scores>&);
};

struct Kernels {
  void (*additive_prepare)(const AdditivePrepare&);
  ScoreKernels<AdditiveScores> additive;
  ScoreKernels<ActivatedScores> activated;
  ScoreKernels<DotScores> dot;
  ScoreKernels<GatedAdditiveScores> gated_additive;  // CPU only, like all that follow
  void (*lstm_step)(const LstmStep&);
  void (*lstm_step_backward)(const LstmStepBackward&);
  void (*gru_step)(const GruStep&);
  void (*gru_step_backward)(const GruStepBackward&);
  uint64_t (*checksum)(const void* data, size_t bytes);
  void (*rounded_blocks)(const RoundedBlocks&);
  void (*row_products)(const RowProducts&);
  void (*likeliest_tokens)(const LikeliestTokens&);
};

}  // namespace attn
