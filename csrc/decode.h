// What a search on the CPU computes besides cells and attention: products of few rows with a weight, and the likeliest
// tokens. Raw pointers, no torch.
#pragma once

#include "lstm_cell.h"

namespace attn {

constexpr int64_t kOutputsOfBlock = 32;

// A weight as products of few rows read it: rows of k elements or, of float32, the same numbers once more in blocks of
// kOutputsOfBlock rows, zeros after the last. A block has for each of the k columns the elements of its rows, or those
// rounded to bfloat16, two to a word: that of row j of a half in the lower bits, that of row j of the other in the upper.
// So memory is read in one stream, no sum goes across a vector, and a bit pattern becomes float32 by one instruction.
// The order is that of every SIMD level.
struct StreamedWeight {
  RowsView rows;                     // (n, k)
  const uint32_t* blocks = nullptr;  // (words_of_blocks(n, k, rounded),) or null
  bool rounded = false;
};

inline int64_t words_of_blocks(int64_t n, int64_t k, bool rounded) {
  return (n + kOutputsOfBlock - 1) / kOutputsOfBlock * kOutputsOfBlock * k / (rounded ? 2 : 1);
}

// Writes the blocks of a weight in float32.
struct WeightLayout {
  int64_t n, k;
  RowsView rows;  // (n, k)
  bool rounded;
  uint32_t* blocks;
};

// out_r = added_r + weight x_r for R rows, tanh of it if wanted.
struct RowProducts {
  int64_t R, n, k;
  Dtype dtype;               // float32 or float64, of all
  const void* const* x;      // R rows of k
  StreamedWeight weight;     // (n, k)
  const void* const* added;  // R rows of n, which may be those of out, or null
  void* const* out;          // R rows of n
  bool tanh;
};

// Of each of R rows of logits, weight x_r + bias, the `count` largest, best first and among equals the first first, as
// logarithms of their softmax. The logits themselves are nowhere as a whole.
struct LikeliestTokens {
  int64_t R, vocabulary, k, count;  // count is at most vocabulary
  Dtype dtype;                      // float32 or float64
  const void* const* x;             // R rows of k
  StreamedWeight weight;            // (vocabulary, k)
  const void* bias;                 // (vocabulary,) or null
  double* log_probabilities;        // out: (R, count); NaN where the softmax is
  int32_t* tokens;                  // out: (R, count)
};

}  // namespace attn
