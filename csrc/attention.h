// Attention ops as the kernels take them: a score, then softmax and context. Raw pointers and sizes, no torch.
#pragma once

#include "types.h"

namespace attn {

// What every score has. The struct of a score adds its own arguments, and a type Gradients of where theirs go.
struct Scores {
  int64_t B, Tq, Tk, A;
  StridedView3 query;   // (B, Tq / vectors, A)
  StridedView3 keys;    // (B, Tk, A), dtype of query, like all that follows
  int64_t vectors = 1;  // rows of scores of each query: Tq counts all of them, those of a query one after the other
};

// What an attention may have beyond its score, softmax and values.
struct AttentionOptions {
  StridedView3 score_bias;  // (B, Tq, Tk), added to the scores, or absent
  double dropout_p;         // how likely a weight is left out of the context; the others are larger by 1 / (1 - p)
  uint64_t seed;            // of dropout: see keeps()
  bool sigmoid;             // alignments are sigmoid(scores) over their sum
  double clip;              // C, of C tanh(score) in the place of the score, before score_bias; 0 for the score itself
};

// Whether a weight stays: a uniform number of 24 bits from seed and the number of the weight in (B, Tq, Tk), by
// SplitMix64 (Steele, Lea, Flood 2014). The same on every backend and in the backward.
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
  void* log_total = nullptr;       // with options: (B, Tq) contiguous, float, or double for float64: log of the sum of
                                   // e^scores or of sigmoid(scores)
  int64_t alignments_columns = 0;  // of the rows of alignments where those are longer than Tk: 0 is filled in; CPU only
};

// Outputs are contiguous. Those of the query and of the score's own arguments may all be null, or that of the keys, or
// of the values, which are needed together but on the CPU; one alone is null where it has no elements.
template <class Score>
struct AttentionBackward : Score, Score::Gradients {
  int64_t D;
  StridedView3 values;  // (B, Tk, D)
  AttentionMask attended;
  StridedView3 alignments;       // (B, Tq, Tk), what the forward returned
  StridedView3 grad_context;     // (B, Tq, D) or absent
  StridedView3 grad_alignments;  // (B, Tq, Tk) or absent
  void* dquery;                  // (B, Tq, A)
  void* dkeys;                   // (B, Tk, A)
  void* dvalues;                 // (B, Tk, D)
  const AttentionOptions* options = nullptr;
  const void* log_total = nullptr;       // with options: what the forward returned
  const void* grad_log_total = nullptr;  // (B, Tq) contiguous, or null
  void* dscore_bias = nullptr;           // (B, Tq, Tk), or null
};

// The scores alone, as an op of their own.
template <class Score>
struct ScoresForward : Score {
  void* scores;              // (B, Tq, Tk) contiguous
  bool wide = false;         // float, or double for float64, whatever the dtype of query; this and the next: CPU only
  AttentionMask attended{};  // of other steps the scores are 0
};

// Outputs as those of AttentionBackward.
template <class Score>
struct ScoresBackward : Score, Score::Gradients {
  StridedView3 grad_scores;  // (B, Tq, Tk)
  void* dquery;              // (B, Tq, A)
  void* dkeys;               // (B, Tk, A)
};

}  // namespace attn
