// The elementwise part of an LSTM step on the CPU, forward and backward: gates, cell and state, without the matrix
// products. Raw pointers, no torch.
#pragma once

#include "types.h"

namespace attn {

// A (B, H) matrix, (B, 4 H) for gates, whose rows are contiguous.
struct RowsView {
  void* data = nullptr;
  int64_t stride = 0;  // in elements
};

struct LstmStep {
  int64_t B, H;
  Dtype dtype;        // float32 or float64, of all arrays
  RowsView gates;     // in: i, f, g, o before the activation; out: after it
  RowsView cell;      // in: the cell before the step
  RowsView new_cell;  // out
  RowsView tanh;      // out: tanh(new_cell)
  RowsView hidden;    // out
  RowsView again;     // out: a second copy of hidden, or absent
};

struct LstmStepBackward {
  int64_t B, H;
  Dtype dtype;
  RowsView dhidden;
  RowsView gates, cell, tanh;  // from the forward; cell: before the step
  RowsView dcell;              // in: gradient of the cell after the step; out: of the cell before it
  RowsView dgates;             // out: gradient of the gates before the activation
};

}  // namespace attn
