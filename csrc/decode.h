// What a search on the CPU computes besides cells and attention: products of few rows with a weight, and the likeliest
// tokens. Raw pointers, no torch.
#pragma once

#include "lstm_cell.h"

namespace attn {

constexpr int64_t kOutputsOfBlock = 32;

// A weight as products of few rows read it: rows of k elements or, of float32, what these are rounded to in bfloat16, in
// blocks of kOutputsOfBlock rows, zeros after the last. For each of the k columns a block has a word for each two of its
// rows: that of row j in the lower half, that of row j + kOutputsOfBlock / 2 in the upper. So memory is read in one
// stream, a half becomes float32 by one instruction, and no sum goes across a vector. All SIMD levels have this order.
struct StreamedWeight {
  RowsView rows;                     // (n, k)
  const uint32_t* blocks = nullptr;  // (words_of_blocks(n, k),) or null
};

inline int64_t words_of_blocks(int64_t n, int64_t k) {
  return (n + kOutputsOfBlock - 1) / kOutputsOfBlock * (kOutputsOfBlock / 2) * k;
}

// Makes the blocks of a weight in float32.
struct RoundedBlocks {
  int64_t n, k;
  RowsView rows;     // (n, k)
  uint32_t* blocks;  // out
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
