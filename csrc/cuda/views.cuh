// The caller's arrays on the device: loads of single and vectorized elements with any strides, and the attended pairs.
#pragma once

#include "kernels.h"
#include "launch.h"

namespace attn {
namespace cuda {

// n contiguous elements, at most 16 bytes, which one instruction loads or stores.
template <typename T, int n>
struct alignas(n * sizeof(T)) Pack {
  T x[n];
};

template <int n>
struct Int {
  static constexpr int value = n;
};

template <typename T>
struct Type {
  using type = T;
};

// A score, or the policy of one, with extra added to its keys (VectorScores). It is a template parameter of kernels,
// so that those without extra spend nothing on it.
template <class Base>
struct WithExtra : Base {};

template <class>
constexpr bool kAddsExtra = false;
template <class Base>
constexpr bool kAddsExtra<WithExtra<Base>> = true;

ATTN_HOST_DEVICE bool finite(float x) { return x - x == 0; }
ATTN_HOST_DEVICE bool finite(double x) { return x - x == 0; }
ATTN_HOST_DEVICE bool finite(BFloat16 x) { return (x.bits & 0x7f80) != 0x7f80; }
ATTN_HOST_DEVICE bool finite(Float16 x) { return (x.bits & 0x7c00) != 0x7c00; }

// Attended pairs ------------------------------------------------------------------------------------------------------

// How many steps of sentence b may be attended, within [0, Tk].
ATTN_DEVICE std::int64_t attended_steps(const AttentionMask& attended, std::int64_t b, std::int64_t Tk) {
  if (attended.lengths == nullptr) return Tk;
  const std::int64_t i = b * attended.lengths_stride;
  const std::int64_t length = attended.lengths_are_64 ? static_cast<const std::int64_t*>(attended.lengths)[i]
                                                      : static_cast<const std::int32_t*>(attended.lengths)[i];
  return length < 0 ? 0 : length > Tk ? Tk : length;
}

// Whether the mask allows query i to attend step j; true without a mask.
ATTN_DEVICE bool mask_allows(const AttentionMask& attended, std::int64_t b, std::int64_t i, std::int64_t j) {
  const std::int64_t* stride = attended.mask_stride;
  return attended.mask == nullptr ||
         reinterpret_cast<const unsigned char*>(attended.mask)[b * stride[0] + i * stride[1] + j * stride[2]] != 0;
}

// The same pairs, with `per_query` set only if queries can differ: such masks are more expensive.
inline AttentionMask simplified(AttentionMask attended, std::int64_t Tq) {
  attended.per_query = attended.mask != nullptr && attended.per_query && Tq > 1 && attended.mask_stride[1] != 0;
  if (!attended.per_query) attended.mask_stride[1] = 0;
  return attended;
}

// Strided arrays ------------------------------------------------------------------------------------------------------

// An (n0, n1, n2) array of T. vectorized: 16 bytes along its last axis are aligned and contiguous.
template <typename T>
struct Strided {
  const T* data;
  std::int64_t stride[3];
  bool vectorized;
};

template <typename T>
Strided<T> strided(const StridedView3& a) {
  constexpr int n = kPer16Bytes<T>;
  const bool aligned = reinterpret_cast<std::uintptr_t>(a.data) % 16 == 0;
  return {static_cast<const T*>(a.data),
          {a.stride[0], a.stride[1], a.stride[2]},
          aligned && a.stride[2] == 1 && a.stride[0] % n == 0 && a.stride[1] % n == 0};
}

// x[e] = row[(u + e) * stride] for the units u + e below `units`, otherwise 0.
template <typename T>
ATTN_DEVICE void load_units(const T* row, std::int64_t stride, bool vectorized, std::int64_t u, std::int64_t units,
                            Wide<T>* x) {
  if (vectorized && u + kPer16Bytes<T> <= units) {
    load_16_bytes(row + u, x);
  } else {
#pragma unroll
    for (int e = 0; e < kPer16Bytes<T>; ++e) x[e] = u + e < units ? widen(row[(u + e) * stride]) : Wide<T>(0);
  }
}

// Calls f(Type<T>) with the type T of the dtype.
template <class F>
void with_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float32:
      return f(Type<float>());
    case Dtype::float64:
      return f(Type<double>());
    case Dtype::bfloat16:
      return f(Type<BFloat16>());
    case Dtype::float16:
      return f(Type<Float16>());
  }
}

}  // namespace cuda
}  // namespace attn
