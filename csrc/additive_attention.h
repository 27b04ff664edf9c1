// Scores with a score vector: v . tanh(query + keys + bias), additive attention, and other activations than tanh.
#pragma once

#include "activations.h"
#include "attention.h"

namespace attn {

// Where the gradients of the score's own arguments go.
struct VectorGradients {
  void* dv;           // (A,)
  void* dbias;        // (A,), or null
  bool wide = false;  // float, or double for float64, whatever the dtype of query: for sums of several calls; CPU only
};

struct VectorScores : Scores {
  using Gradients = VectorGradients;
  StridedView3 v;      // (1, 1, A)
  StridedView3 bias;   // (1, 1, A) or absent
  StridedView3 extra;  // (B, Tk, A), added to the keys, or absent: on the CPU only, without prepared keys
};

struct AdditiveScores : VectorScores {
  StridedView3 prepared;  // what additive_prepare made of keys, float32 or bfloat16, or absent
};

struct ActivatedScores : VectorScores {
  Activation activation;  // one of activations.h
  double negative_slope;  // of leaky_relu
};

struct GatedAdditiveGradients : VectorGradients {
  void* dgate;  // (B, Tk, A), or null
};

// For each row v_r of v, a row of scores of a query: v_r . (activation(query + keys + bias) * sigmoid(gate)).
struct GatedAdditiveScores : VectorScores {  // v: (1, vectors, A)
  using Gradients = GatedAdditiveGradients;  // dv: (vectors, A)
  StridedView3 gate;                         // (B, Tk, A) or absent
  Activation activation;
  double negative_slope;  // of leaky_relu
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
  StridedView3 keys;  // (B, Tk, A), not float64
  Dtype dtype;        // of prepared: bfloat16 for keys in bfloat16, otherwise float32
  void* prepared;     // (B, rows, columns) contiguous: see PreparedSizes
};

}  // namespace attn
