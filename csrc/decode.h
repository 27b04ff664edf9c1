// What a search on the CPU computes besides cells and attention: products of few rows with a weight, and the likeliest
// tokens. Raw pointers, no torch.
#pragma once

#include "lstm_cell.h"

namespace attn {

// A weight as products of few rows read it: rows of k elements or, of float32, what these are rounded to in bfloat16.
// Pairs of those are words, in an order that is the SIMD level's own: see decode_kernels.h.
struct StreamedWeight {
  RowsView rows;              // (n, k)
  uint32_t* pairs = nullptr;  // (n, pair_words(k)), aligned to 64 bytes, or null
  bool pack = false;          // this call writes the pairs first
};

inline int64_t pair_words(int64_t k) { return (k + 31) / 32 * 16; }

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
