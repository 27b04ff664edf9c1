// Reading rows of the caller's arrays, whatever their dtype and strides. The dtype is a run-time value: rows are read
// once for many pairs, so that one kernel serves float32, bfloat16 and float16.
#pragma once

#include "arrays.cuh"

namespace attn {
namespace cuda {

template <typename W>
ATTN_DEVICE W element(const void* data, Dtype dtype, int64_t i) {
  if constexpr (sizeof(W) == 8) {
    return static_cast<const double*>(data)[i];
  } else {
    if (dtype == Dtype::float32) return static_cast<const float*>(data)[i];
    if (dtype == Dtype::bfloat16) return widen(static_cast<const BFloat16*>(data)[i]);
    return widen(static_cast<const Float16*>(data)[i]);
  }
}

template <typename W>
ATTN_DEVICE void store_element(void* data, Dtype dtype, int64_t i, W x) {
  if constexpr (sizeof(W) == 8) {
    static_cast<double*>(data)[i] = x;
  } else {
    if (dtype == Dtype::float32)
      static_cast<float*>(data)[i] = x;
    else if (dtype == Dtype::bfloat16)
      static_cast<BFloat16*>(data)[i] = narrow<BFloat16>(x);
    else
      static_cast<Float16*>(data)[i] = narrow<Float16>(x);
  }
}

// Positions within a row of scores are 32 bits in the kernels; offsets are 64.
inline void check_sizes(const AdditiveScores& op) {
  constexpr int64_t kMost = 0x7fffffff - 4096;
  if (op.Tq > kMost || op.Tk > kMost || op.A > kMost)
    throw std::runtime_error("attn_kernels: more than 2^31 queries, steps or units");
}

// Whether load_4 may read four units at once: rows are whole fours that lie side by side and aligned.
inline bool in_fours_of(const Array3& a, int64_t n) {
  const uintptr_t bytes = static_cast<uintptr_t>(4 * item_size(a.dtype));
  return n % 4 == 0 && a.stride[2] == 1 && a.stride[0] % 4 == 0 && a.stride[1] % 4 == 0 &&
         reinterpret_cast<uintptr_t>(a.data) % bytes == 0;
}

// x[0 .. 4) = the units u .. u + 3 of the row that starts at `offset`, as far as they are below n; zeros beyond.
template <typename W, bool kInFours>
ATTN_DEVICE void load_4(const Array3& a, int64_t offset, int64_t u, int64_t n, W* x) {
  if constexpr (kInFours && sizeof(W) == 4) {
    x[0] = x[1] = x[2] = x[3] = 0;
    if (u >= n) return;
    if (a.dtype == Dtype::float32) {
      load_16_bytes(static_cast<const float*>(a.data) + offset + u, reinterpret_cast<float*>(x));
      return;
    }
    const uint2 raw = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(a.data) + offset + u);
    uint16_t part[4];
    memcpy(part, &raw, 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = a.dtype == Dtype::bfloat16 ? widen(BFloat16{part[i]}) : widen(Float16{part[i]});
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = u + i < n ? element<W>(a.data, a.dtype, offset + (u + i) * a.stride[2]) : W(0);
  }
}

}  // namespace cuda
}  // namespace attn
