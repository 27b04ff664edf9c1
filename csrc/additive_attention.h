// Scores with a score vector: v . f(query + keys + bias), with f = tanh (additive attention) or another activation.
#pragma once

#include "activations.h"
#include "attention.h"

namespace attn {

// Outputs for the gradients of the score's own arguments.
struct VectorGradients {
  void* dv;           // (A,)
  void* dbias;        // (A,), or null
  bool wide = false;  // outputs are float (double for float64) instead of the dtype of query; CPU only
};

struct VectorScores : Scores {
  using Gradients = VectorGradients;
  StridedView3 v;      // (1, 1, A)
  StridedView3 bias;   // (1, 1, A) or absent
  StridedView3 extra;  // (B, Tk, A), added to the keys, or absent; not allowed with prepared keys
};

struct AdditiveScores : VectorScores {
  StridedView3 prepared;  // result of additive_prepare for the keys, float32 or bfloat16, or absent
};

struct ActivatedScores : VectorScores {
  Activation activation;  // one of activations.h
  double negative_slope;  // of leaky_relu
};

struct GatedAdditiveGradients : VectorGradients {
  void* dgate;  // (B, Tk, A), or null
};

// Each query has one row of scores for each row v_r of v: v_r . (activation(query + keys + bias) * sigmoid(gate)).
struct GatedAdditiveScores : VectorScores {  // v: (1, vectors, A)
  using Gradients = GatedAdditiveGradients;  // dv: (vectors, A)
  StridedView3 gate;                         // (B, Tk, A) or absent
  Activation activation;
  double negative_slope;  // of leaky_relu
};

// The layout of the prepared keys of a sentence, in float32 or bfloat16. Each step has a row of e^{2k}, padded with
// zeros: rows are aligned, and every SIMD level can read whole vectors. The rows after these hold the largest |k| of
// each step as float32 (NaN if one is NaN).
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
