// Additive attention on the CPU: scores = v . tanh(query + keys + bias), softmax, context. Raw pointers and sizes, no
// torch.
#pragma once

#include "types.h"

namespace attn {

struct AdditiveScores {
  int64_t B, Tq, Tk, A;
  Array3 query;     // (B, Tq, A)
  Array3 keys;      // (B, Tk, A), dtype of query, like all that follows
  Array3 v;         // (1, 1, A)
  Array3 bias;      // (1, 1, A) or absent
  Array3 prepared;  // what additive_prepare made of keys, float32 or bfloat16, or absent
};

// Prepared keys of a sentence, in float32 or bfloat16: a row of e^{2k} for each step, filled up with zeros so that
// every level may read whole vectors and that rows are aligned, then further rows with the largest |k| of each step
// (NaN where one is NaN) as float32.
struct PreparedSizes {
  int64_t columns, rows;

  PreparedSizes(int64_t units, int64_t steps, Dtype dtype) {
    const int64_t item = item_size(dtype), line = 64 / item;
    columns = (units + line - 1) / line * line;
    rows = columns == 0 ? 0 : steps + (steps * 4 + columns * item - 1) / (columns * item);
  }
};

struct AdditivePrepare {
  int64_t B, Tk, A;
  Array3 keys;     // (B, Tk, A), not float64
  Dtype dtype;     // of prepared: bfloat16 for keys in bfloat16, otherwise float32
  void* prepared;  // (B, rows, columns) contiguous: see PreparedSizes
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
  void* dkeys;             // (B, Tk, A) contiguous; it and dvalues may both be null
  void* dvalues;           // (B, Tk, D) contiguous
  void* dv;                // (A,)
  void* dbias;             // (A,), or null
};

}  // namespace attn
