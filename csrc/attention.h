// Attention ops as the kernels take them: a score, then softmax and context. Raw pointers and sizes, no torch.
#pragma once

#include "types.h"

namespace attn {

// What every score has. The struct of a score adds its own arguments, and a type Gradients of where theirs go.
struct Scores {
  int64_t B, Tq, Tk, A;
  StridedView3 query;  // (B, Tq, A)
  StridedView3 keys;   // (B, Tk, A), dtype of query, like all that follows
};

template <class Score>
struct AttentionForward : Score {
  int64_t D;
  StridedView3 values;  // (B, Tk, D)
  AttentionMask attended;
  void* context;     // (B, Tq, D) contiguous
  void* alignments;  // (B, Tq, Tk) contiguous, or null
};

// Outputs are contiguous. Those of the query and of the score's own arguments may all be null, or those of the memory;
// one alone is null where it has no elements.
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
};

}  // namespace attn
