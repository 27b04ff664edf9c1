// The arguments of attention kernels: a score, then softmax and context. Raw pointers and sizes, no torch.
#pragma once

#include "types.h"

namespace attn {

// The arguments that all scores share. The struct of a score adds its own arguments, and a type Gradients with the
// outputs for their gradients.
struct Scores {
  int64_t B, Tq, Tk, A;
  StridedView3 query;   // (B, Tq / vectors, A)
  StridedView3 keys;    // (B, Tk, A); the dtype of query, like all arrays below
  int64_t vectors = 1;  // rows of scores per query, adjacent; Tq counts all rows
};

// Rarely used options of an attention.
struct AttentionOptions {
  StridedView3 score_bias;  // (B, Tq, Tk), added to the scores, or absent
  double dropout_p;         // probability that a weight is dropped; the others are scaled by 1 / (1 - p)
  uint64_t seed;            // of dropout: see keeps()
  bool sigmoid;             // alignments are sigmoid(scores), divided by their sum
  double clip;              // C: the score is replaced by C tanh(score), before score_bias; 0 for no clipping
};

// Whether dropout keeps a weight. A uniform 24-bit number decides, computed with SplitMix64 (Steele, Lea, Flood 2014)
// from the seed and the index of the weight in (B, Tq, Tk). It is the same on every backend and in the backward.
inline bool keeps(const AttentionOptions& options, uint64_t index) {
  uint64_t z = options.seed + (index + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  z ^= z >> 31;
  return static_cast<double>(z >> 40) >= options.dropout_p * 0x1p24;
}

template <class Score>
struct AttentionForward : Score {
  int64_t D;
  StridedView3 values;  // (B, Tk, D)
  AttentionMask attended;
  void* context;     // (B, Tq, D) contiguous
  void* alignments;  // (B, Tq, Tk) contiguous, or null
  const AttentionOptions* options = nullptr;
  void* log_total = nullptr;       // with options: (B, Tq) contiguous, float (double for float64): the logarithm of
                                   // the sum of e^scores or of sigmoid(scores)
  int64_t alignments_columns = 0;  // row length of alignments if larger than Tk; columns after Tk are zeroed; CPU only
};

// Outputs are contiguous. Outputs that are not needed are null: dquery together with all gradients of the score's own
// arguments; dkeys; dvalues. An output without elements is null, too.
template <class Score>
struct AttentionBackward : Score, Score::Gradients {
  int64_t D;
  StridedView3 values;  // (B, Tk, D)
  AttentionMask attended;
  StridedView3 alignments;       // (B, Tq, Tk), from the forward
  StridedView3 grad_context;     // (B, Tq, D) or absent
  StridedView3 grad_alignments;  // (B, Tq, Tk) or absent
  void* dquery;                  // (B, Tq, A)
  void* dkeys;                   // (B, Tk, A)
  void* dvalues;                 // (B, Tk, D)
  const AttentionOptions* options = nullptr;
  const void* log_total = nullptr;       // with options: from the forward
  const void* grad_log_total = nullptr;  // (B, Tq) contiguous, or null
  void* dscore_bias = nullptr;           // (B, Tq, Tk), or null
};

// The op that computes only the scores.
template <class Score>
struct ScoresForward : Score {
  void* scores;              // (B, Tq, Tk) contiguous
  bool wide = false;         // scores are float (double for float64) instead of the dtype of query; CPU only
  AttentionMask attended{};  // the scores of masked steps are 0; CPU only
};

// Outputs as in AttentionBackward.
template <class Score>
struct ScoresBackward : Score, Score::Gradients {
  StridedView3 grad_scores;  // (B, Tq, Tk)
  void* dquery;              // (B, Tq, A)
  void* dkeys;               // (B, Tk, A)
};

}  // namespace attn
