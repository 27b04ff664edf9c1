// What a GRU step computes besides its products, on the CPU: gates and state, and back. Raw pointers, no torch.
#pragma once

#include "lstm_cell.h"

namespace attn {

// h' = n + z (h - n), n = tanh(x W_n + b_n + r (h W_hn + b_hn)).
struct GruStep {
  int64_t B, H;
  Dtype dtype;         // float32 or float64, of all
  RowsView gates;      // (B, 3 H), in: r, z, n, the parts with x, before their functions; out: after
  RowsView products;   // (B, 3 H), of h with the weights
  RowsView bias;       // (3 H,) in one row, is added to the products, or absent
  RowsView before;     // h
  RowsView recurrent;  // out: h W_hn + b_hn
  RowsView hidden;     // out
  RowsView again;      // out: hidden once more, or absent
};

struct GruStepBackward {
  int64_t B, H;
  Dtype dtype;
  RowsView dhidden;
  RowsView gates, before, recurrent;  // of the forward
  RowsView dbefore;                   // in and out: that of h is added, but for the part through the products
  RowsView dgates, dproducts;         // out: (B, 3 H), of the gates before their functions
};

}  // namespace attn
