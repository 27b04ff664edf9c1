// Pairs of numbers that are computed together. On compute capability 10.0 and later one instruction computes both,
// elsewhere each operation is done twice.
#pragma once

#include "platform.cuh"

namespace attn {
namespace cuda {

template <typename W>
struct F32x2 {
  W x, y;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
ATTN_DEVICE std::uint64_t packed(F32x2<float> a) {
  std::uint64_t bits;
  asm("mov.b64 %0, {%1, %2};" : "=l"(bits) : "f"(a.x), "f"(a.y));
  return bits;
}
ATTN_DEVICE F32x2<float> unpacked(std::uint64_t bits) {
  F32x2<float> a;
  asm("mov.b64 {%0, %1}, %2;" : "=f"(a.x), "=f"(a.y) : "l"(bits));
  return a;
}
#endif

// a b + c
ATTN_HOST_DEVICE float multiply_add(float a, float b, float c) { return a * b + c; }
template <typename W>
ATTN_HOST_DEVICE F32x2<W> multiply_add(F32x2<W> a, F32x2<W> b, F32x2<W> c) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  if constexpr (sizeof(W) == 4) {
    std::uint64_t r;
    asm("fma.rn.f32x2 %0, %1, %2, %3;" : "=l"(r) : "l"(packed(a)), "l"(packed(b)), "l"(packed(c)));
    return unpacked(r);
  }
#endif
  return {a.x * b.x + c.x, a.y * b.y + c.y};
}

// The same, but always with a single rounding. Above, the compiler may or may not fuse.
ATTN_HOST_DEVICE F32x2<float> fused_multiply_add(F32x2<float> a, F32x2<float> b, F32x2<float> c) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return multiply_add(a, b, c);
#else
  return {fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y)};
#endif
}

template <typename W>
ATTN_HOST_DEVICE F32x2<W> operator*(F32x2<W> a, F32x2<W> b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  if constexpr (sizeof(W) == 4) {
    std::uint64_t r;
    asm("mul.rn.f32x2 %0, %1, %2;" : "=l"(r) : "l"(packed(a)), "l"(packed(b)));
    return unpacked(r);
  }
#endif
  return {a.x * b.x, a.y * b.y};
}

template <typename W>
ATTN_HOST_DEVICE F32x2<W> operator+(F32x2<W> a, F32x2<W> b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  if constexpr (sizeof(W) == 4) {
    std::uint64_t r;
    asm("add.rn.f32x2 %0, %1, %2;" : "=l"(r) : "l"(packed(a)), "l"(packed(b)));
    return unpacked(r);
  }
#endif
  return {a.x + b.x, a.y + b.y};
}

template <typename W>
ATTN_HOST_DEVICE F32x2<W> reciprocal(F32x2<W> a) {
  return {reciprocal(a.x), reciprocal(a.y)};
}

}  // namespace cuda
}  // namespace attn
