// The parts of a search on the CPU besides cells and attention: products of a few rows with a weight, and the likeliest
// tokens. Raw pointers, no torch.
#pragma once

#include "lstm_cell.h"

namespace attn {

constexpr int64_t kOutputsOfBlock = 32;

// A weight in one of two layouts. The first is rows of k elements. The second, for float32 weights only, is rounded to
// bfloat16 and stored in blocks of kOutputsOfBlock rows; the last block is padded with zeros. For each of the k
// columns, a block has one word per two rows: row j in the lower half, row j + kOutputsOfBlock / 2 in the upper. Memory
// is then read as one stream, one instruction converts a half to float32, and no horizontal sums are needed. All SIMD
// levels use this order.
struct StreamedWeight {
  RowsView rows;                     // (n, k)
  const uint32_t* blocks = nullptr;  // (words_of_blocks(n, k),) or null
};

inline int64_t words_of_blocks(int64_t n, int64_t k) {
  return (n + kOutputsOfBlock - 1) / kOutputsOfBlock * (kOutputsOfBlock / 2) * k;
}

// Computes the blocks of a weight in float32.
struct RoundedBlocks {
  int64_t n, k;
  RowsView rows;     // (n, k)
  uint32_t* blocks;  // out
};

// out_r = added_r + weight x_r for R rows; with `tanh`, the tanh of that.
struct RowProducts {
  int64_t R, n, k;
  Dtype dtype;               // float32 or float64, of all
  const void* const* x;      // R rows of k
  StreamedWeight weight;     // (n, k)
  const void* const* added;  // R rows of n, or null; they may be the rows of out
  void* const* out;          // R rows of n
  bool tanh;
};

// The `count` largest of each of R rows of logits, weight x_r + bias, as logarithms of their softmax: the best first,
// equal ones in the order of tokens. The logits are never stored as a whole.
struct LikeliestTokens {
  int64_t R, vocabulary, k, count;  // count is at most vocabulary
  Dtype dtype;                      // float32 or float64
  const void* const* x;             // R rows of k
  StreamedWeight weight;            // (vocabulary, k)
  const void* bias;                 // (vocabulary,) or null
  double* log_probabilities;        // out: (R, count); NaN if the softmax is NaN
  int32_t* tokens;                  // out: (R, count)
};

}  // namespace attn
