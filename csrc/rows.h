// The checks of tensors that the steps of recurrent cells read and write.
#pragma once

#include "checks.h"
#include "lstm_cell.h"

namespace attn {

// B rows of `columns` elements each, all of the dtype of the gates.
inline RowsView rows(const Tensor& t, const char* name, Dtype dtype, int64_t B, int64_t columns) {
  check_shape(t, name, {B, columns});
  STD_TORCH_CHECK(dtype_of(t, name) == dtype, name, " does not have the dtype of gates");
  STD_TORCH_CHECK(t.stride(1) == 1 || columns <= 1, name, " must have contiguous rows");
  return {t.mutable_data_ptr(), t.stride(0)};
}

}  // namespace attn
