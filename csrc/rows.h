// Checks of the tensors that the steps of recurrent cells read and write.
#pragma once

#include "checks.h"
#include "lstm_cell.h"

namespace attn {

// Checks gates, (B, count * H), and returns their dtype. count: gates per unit.
inline Dtype dtype_of_gates(const Tensor& gates, int64_t count) {
  const Dtype dtype = dtype_of(gates, "gates");
  STD_TORCH_CHECK(dtype == Dtype::float32 || dtype == Dtype::float64, "gates must be float32 or float64");
  STD_TORCH_CHECK(gates.dim() == 2 && gates.size(1) % count == 0, "gates must have shape (B, ", count, " H)");
  return dtype;
}

// B rows of `columns` elements each, all of the dtype of the gates.
inline RowsView rows(const Tensor& t, const char* name, Dtype dtype, int64_t B, int64_t columns) {
  check_shape(t, name, {B, columns});
  STD_TORCH_CHECK(dtype_of(t, name) == dtype, name, " does not have the dtype of gates");
  STD_TORCH_CHECK(t.stride(1) == 1 || columns <= 1, name, " must have contiguous rows");
  return {t.mutable_data_ptr(), t.stride(0)};
}

}  // namespace attn
