// The checks of tensors that the steps of recurrent cells read and write.
#pragma once

#include "checks.h"
#include "decode.h"

namespace attn {

// Of (B, count * H): each unit has so many gates.
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

// What lay_out_weight made of a weight (n, k); null of an empty tensor, for a weight that is read as it lies.
inline const uint32_t* blocks_of(const Tensor& t, const char* name, int64_t n, int64_t k, bool rounded) {
  if (t.numel() == 0) return nullptr;
  STD_TORCH_CHECK(
      dtype_of(t, name) == Dtype::float32 && t.is_contiguous() && t.numel() == words_of_blocks(n, k, rounded), name,
      " is laid out as another weight");
  return static_cast<const uint32_t*>(t.const_data_ptr());
}

}  // namespace attn
