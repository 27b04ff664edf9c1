// Additive attention on the CPU: scores = v . tanh(query + keys + bias), softmax, context. Raw pointers and sizes, no
// torch.
#pragma once

#include "cpu/types.h"

namespace attn {

struct AdditiveScores {
  int64_t B, Tq, Tk, A;
  Array3 query;  // (B, Tq, A)
  Array3 keys;   // (B, Tk, A), dtype of query, like all that follows
  Array3 v;      // (1, 1, A)
  Array3 bias;   // (1, 1, A) or absent
};

struct AdditiveScoresForward : AdditiveScores {
  void* scores;  // (B, Tq, Tk) contiguous
};

struct AdditiveAttentionForward : AdditiveScores {
  int64_t D;
  Array3 values;  // (B, Tk, D)
  Attended attended;
  void* context;     // (B, Tq, D) contiguous
  void* alignments;  // (B, Tq, Tk) contiguous, or null
};

struct AdditiveScoresBackward : AdditiveScores {
  Array3 grad_scores;  // (B, Tq, Tk)
  void* dquery;        // (B, Tq, A) contiguous
  void* dkeys;         // (B, Tk, A) contiguous
  void* dv;            // (A,)
  void* dbias;         // (A,), or null
};

struct AdditiveAttentionBackward : AdditiveScores {
  int64_t D;
  Array3 values;  // (B, Tk, D)
  Attended attended;
  Array3 alignments;       // (B, Tq, Tk), what the forward returned
  Array3 grad_context;     // (B, Tq, D) or absent
  Array3 grad_alignments;  // (B, Tq, Tk) or absent
  void* dquery;            // (B, Tq, A) contiguous
  void* dkeys;             // (B, Tk, A) contiguous
  void* dvalues;           // (B, Tk, D) contiguous
  void* dv;                // (A,)
  void* dbias;             // (A,), or null
};

}  // namespace attn
