// The elementwise part of a GRU step on the CPU, forward and backward: gates and state, without the matrix products.
// Raw pointers, no torch.
#pragma once

#include "lstm_cell.h"

namespace attn {

// h' = n + z (h - n), n = tanh(x W_n + b_n + r (h W_hn + b_hn)).
struct GruStep {
  int64_t B, H;
  Dtype dtype;         // float32 or float64, of all arrays
  RowsView gates;      // (B, 3 H), in: the products of r, z, n with x; out: the gates after the activation
  RowsView products;   // (B, 3 H), the products of h with the weights
  RowsView bias;       // (3 H,) in one row, added to the products, or absent
  RowsView before;     // h
  RowsView recurrent;  // out: h W_hn + b_hn
  RowsView hidden;     // out
  RowsView again;      // out: a second copy of hidden, or absent
};

struct GruStepBackward {
  int64_t B, H;
  Dtype dtype;
  RowsView dhidden;
  RowsView gates, before, recurrent;  // from the forward
  RowsView dbefore;            // in and out: the part of the gradient of h that does not pass through products is added
  RowsView dgates, dproducts;  // out: (B, 3 H), gradients of the gates before the activation
};

}  // namespace attn
