// Converts tensors to the arguments of kernels: checks shapes and dtypes, reads strides, allocates outputs. After a
// failure, attn_kernels/functional.py checks again in Python to raise a readable error.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

#include "call.h"
#include "out_of_memory.h"

namespace attn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
}

inline void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  bool fits = t.dim() == static_cast<int64_t>(shape.size());
  int64_t axis = 0;
  for (int64_t n : shape) fits = fits && t.size(axis++) == n;
  STD_TORCH_CHECK(fits, name, " does not have the shape that the other arguments ask for");
}

// t, of the given shape, as the last axes of a StridedView3. Missing leading axes have size 1.
inline StridedView3 array(const Tensor& t, const char* name, Dtype dtype, std::initializer_list<int64_t> shape) {
  check_shape(t, name, shape);
  STD_TORCH_CHECK(dtype_of(t, name) == dtype, name, " does not have the dtype that query asks for");
  StridedView3 a;
  a.data = t.const_data_ptr();
  a.dtype = dtype;
  const int64_t missing = 3 - t.dim();
  for (int64_t axis = missing; axis < 3; ++axis) a.stride[axis] = t.stride(axis - missing);
  return a;
}

inline StridedView3 array(const std::optional<Tensor>& t, const char* name, Dtype dtype,
                          std::initializer_list<int64_t> shape) {
  return t.has_value() ? array(*t, name, dtype, shape) : StridedView3{};
}

inline AttentionMask attended(const std::optional<Tensor>& memory_lengths, const std::optional<Tensor>& mask, int64_t B,
                              int64_t Tq, int64_t Tk) {
  AttentionMask a;
  if (memory_lengths.has_value()) {
    check_shape(*memory_lengths, "memory_lengths", {B});
    const ScalarType type = memory_lengths->scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, "memory_lengths must be int32 or int64");
    a.lengths = memory_lengths->const_data_ptr();
    a.lengths_are_64 = type == ScalarType::Long;
    a.lengths_stride = memory_lengths->stride(0);
    // Reading the lengths of a GPU tensor would synchronise with the device: CUDA kernels clamp them instead.
    for (int64_t b = 0; b < (CallContext::kOnHost ? B : 0); ++b) {
      const int64_t i = b * a.lengths_stride;
      const int64_t length =
          a.lengths_are_64 ? static_cast<const int64_t*>(a.lengths)[i] : static_cast<const int32_t*>(a.lengths)[i];
      STD_TORCH_CHECK(0 <= length && length <= Tk, "memory_lengths must be in 0..Tk");
    }
  }
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask must be bool");
    const bool has_queries = mask->dim() == 3;
    if (has_queries)
      check_shape(*mask, "mask", {B, Tq, Tk});
    else
      check_shape(*mask, "mask", {B, Tk});
    a.mask = static_cast<const bool*>(mask->const_data_ptr());
    a.mask_stride[0] = mask->stride(0);
    a.mask_stride[1] = has_queries ? mask->stride(1) : 0;
    a.mask_stride[2] = mask->stride(has_queries ? 2 : 1);
    a.per_query = has_queries && Tq > 1;
  }
  return a;
}

// A new contiguous tensor on the device of `like`. It calls the shim directly: torch::stable::new_empty goes through
// the dispatcher, which would take longer than the computation of a small call.
inline Tensor output(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  int32_t dtype = 0;
  int64_t item = 2;
  switch (type) {
    case ScalarType::Double:
      dtype = aoti_torch_dtype_float64();
      item = 8;
      break;
    case ScalarType::BFloat16:
      dtype = aoti_torch_dtype_bfloat16();
      break;
    case ScalarType::Half:
      dtype = aoti_torch_dtype_float16();
      break;
    default:
      dtype = aoti_torch_dtype_float32();
      item = 4;
  }
  int64_t strides[3], step = 1;
  const int64_t axes = static_cast<int64_t>(shape.size());
  for (int64_t axis = axes - 1; axis >= 0; --axis) {
    strides[axis] = step;
    step *= shape.begin()[axis] > 1 ? shape.begin()[axis] : 1;
  }
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(axes, shape.begin(), strides, dtype, CallContext::device_type(),
                               CallContext::device_index(like), &handle) != 0)
    out_of_memory(step * item);
  return Tensor(handle);
}

inline Tensor output(const Tensor& like, std::initializer_list<int64_t> shape) {
  return output(like, shape, like.scalar_type());
}

}  // namespace attn
