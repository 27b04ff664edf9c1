// The types that kernels take instead of tensors: raw pointers with sizes and strides, no torch.
#pragma once

#include <cstdint>

namespace attn {

enum class Dtype : int { float32, float64, bfloat16, float16 };

inline int64_t item_size(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// A read-only (n0, n1, n2) array with strides in elements; data is null for an absent optional array.
struct StridedView3 {
  const void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t stride[3] = {0, 0, 0};

  explicit operator bool() const { return data != nullptr; }
};

// Which steps may be attended: lengths (B,) and mask (B, 1 or Tq, Tk), each optional; both must allow a step.
struct AttentionMask {
  const void* lengths = nullptr;  // int32 or int64
  bool lengths_are_64 = false;
  int64_t lengths_stride = 0;
  const bool* mask = nullptr;
  int64_t mask_stride[3] = {0, 0, 0};
  bool per_query = false;  // the mask has a row for each query
  int64_t vectors = 1;     // rows of scores per query: see Scores

  int64_t length(int64_t b, int64_t steps) const {
    if (lengths == nullptr) return steps;
    const int64_t i = b * lengths_stride;
    return lengths_are_64 ? static_cast<const int64_t*>(lengths)[i] : static_cast<const int32_t*>(lengths)[i];
  }
};

}  // namespace attn
