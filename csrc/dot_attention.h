// Dot-product attention on the CPU: scores = scale * query . keys, softmax, context. Raw pointers and sizes, no torch.
#pragma once

#include "types.h"

namespace attn {

struct DotAttention {
  int64_t B, Tq, Tk, A, D;
  Array3 query;   // (B, Tq, A)
  Array3 keys;    // (B, Tk, A), dtype of query, like all that follows
  Array3 values;  // (B, Tk, D)
  double scale;
  Attended attended;
};

struct DotAttentionForward : DotAttention {
  void* context;     // (B, Tq, D) contiguous
  void* alignments;  // (B, Tq, Tk) contiguous, or null
};

struct DotAttentionBackward : DotAttention {
  Array3 alignments;       // (B, Tq, Tk), what the forward returned
  Array3 grad_context;     // (B, Tq, D) or absent
  Array3 grad_alignments;  // (B, Tq, Tk) or absent
  void* dquery;            // (B, Tq, A) contiguous
  void* dkeys;             // (B, Tk, A) contiguous; it and dvalues may both be null
  void* dvalues;           // (B, Tk, D) contiguous
};

}  // namespace attn
