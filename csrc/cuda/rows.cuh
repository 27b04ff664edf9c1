// Reads rows of the caller's arrays, of any dtype and strides. The dtype is a run-time value: rows are read once for
// many pairs, so one kernel serves float32, bfloat16 and float16.
#pragma once

#include "views.cuh"

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

// In the kernels, positions within a row of scores have 32 bits, and offsets 64.
inline void check_sizes(const Scores& op) {
  constexpr int64_t kMax = 0x7fffffff - 4096;
  if (op.Tq > kMax || op.Tk > kMax || op.A > kMax)
    throw std::runtime_error("attn_kernels: more than 2^31 queries, steps or units");
}

// Whether four units may be read at once: rows are contiguous and aligned, and n is a multiple of four.
inline bool is_vectorized(const StridedView3& a, int64_t n) {
  const uintptr_t bytes = static_cast<uintptr_t>(4 * item_size(a.dtype));
  return n % 4 == 0 && a.stride[2] == 1 && a.stride[0] % 4 == 0 && a.stride[1] % 4 == 0 &&
         reinterpret_cast<uintptr_t>(a.data) % bytes == 0;
}

// Loads the units u .. u + 3 of the row that starts at `offset` into slot; zeros for units from n on. The slot is this
// thread's place in shared memory, for four W, aligned to 16 bytes. If vectorized, the copy is asynchronous and keeps
// the stored dtype; read_slot widens it after wait_for_copies().
template <typename W, bool kVectorized>
ATTN_DEVICE void fill_slot(const StridedView3& a, int64_t offset, int64_t u, int64_t n, W* slot) {
  if constexpr (kVectorized && sizeof(W) == 4) {
    const int item = a.dtype == Dtype::float32 ? 4 : 2;
    if (u < n)
      copy_async(slot, static_cast<const char*>(a.data) + (offset + u) * item, 4 * item);
    else
      vector_at<uint4>(slot) = uint4{0, 0, 0, 0};
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      slot[i] = u + i < n ? element<W>(a.data, a.dtype, offset + (u + i) * a.stride[2]) : W(0);
  }
}

// Widens four elements of a 16-bit dtype, two in each word.
template <typename W>
ATTN_DEVICE void widen_words(unsigned first, unsigned second, Dtype dtype, W* x) {
  const unsigned words[2] = {first, second};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint16_t bits = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
    x[i] = dtype == Dtype::bfloat16 ? widen(BFloat16{bits}) : widen(Float16{bits});
  }
}

template <typename W, bool kVectorized>
ATTN_DEVICE void read_slot(const W* slot, Dtype dtype, W* x) {
  if (kVectorized && sizeof(W) == 4 && dtype != Dtype::float32) {
    const uint4 raw = vector_at<uint4>(slot);
    widen_words(raw.x, raw.y, dtype, x);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i += kPer16Bytes<W>) load_16_bytes(slot + i, x + i);
  }
}

// Adds the units u .. u + 3 of the row that starts at `offset` to x; nothing for units from n on.
template <typename W, bool kVectorized>
ATTN_DEVICE void add_four(const StridedView3& a, int64_t offset, int64_t u, int64_t n, W* x) {
  W added[4] = {};
  if constexpr (kVectorized) {
    if (u < n) {
      if (a.dtype == Dtype::float32) {
        load_16_bytes(static_cast<const float*>(a.data) + offset + u, added);
      } else {
        const uint2 raw = vector_at<uint2>(static_cast<const uint16_t*>(a.data) + offset + u);
        widen_words(raw.x, raw.y, a.dtype, added);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (u + i < n) added[i] = element<W>(a.data, a.dtype, offset + (u + i) * a.stride[2]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] += added[i];
}

}  // namespace cuda
}  // namespace attn
