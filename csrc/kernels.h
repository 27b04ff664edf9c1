// What a backend computes, as a table: the CPU has one for each SIMD level, CUDA devices have one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "additive_attention.h"
#include "decode.h"
#include "dot_attention.h"
#include "gru_cell.h"
#include "lstm_cell.h"

namespace attn {

struct Kernels {
  void (*additive_prepare)(const AdditivePrepare&);
  void (*additive_scores)(const AdditiveScoresForward&);
  void (*additive_scores_backward)(const AdditiveScoresBackward&);
  void (*additive_attention)(const AdditiveAttentionForward&);
  void (*additive_attention_backward)(const AdditiveAttentionBackward&);
  void (*relu_scores)(const ReluScoresForward&);
  void (*relu_scores_backward)(const ReluScoresBackward&);
  void (*relu_attention)(const ReluAttentionForward&);
  void (*relu_attention_backward)(const ReluAttentionBackward&);
  void (*dot_attention)(const DotAttentionForward&);
  void (*dot_attention_backward)(const DotAttentionBackward&);
  void (*lstm_step)(const LstmStep&);  // on the CPU only, like all that follow
  void (*lstm_step_backward)(const LstmStepBackward&);
  void (*gru_step)(const GruStep&);
  void (*gru_step_backward)(const GruStepBackward&);
  uint64_t (*checksum)(const void* data, size_t bytes);
  void (*gated_additive_scores)(const GatedAdditiveScoresForward&);
  void (*gated_additive_scores_backward)(const GatedAdditiveScoresBackward&);
  void (*gated_additive_attention)(const GatedAdditiveAttentionForward&);
  void (*gated_additive_attention_backward)(const GatedAdditiveAttentionBackward&);
  void (*row_products)(const RowProducts&);
  void (*likeliest_tokens)(const LikeliestTokens&);
};

}  // namespace attn
