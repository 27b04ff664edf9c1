// The interface of kernels to the device: CUDA, or the emulator of tests/cpp (ATTN_EMULATED), which runs the same
// kernels on the CPU. No torch here: nvcc compiles every .cu file without it.
//
// Host-device functions are also unit-tested as plain C++. Grids are one-dimensional, and shared memory is dynamic.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#if defined(ATTN_EMULATED)
#include "cuda_arithmetic.h"
#include "cuda_emulator.h"
#elif defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#error "for nvcc, or with ATTN_EMULATED for any C++ compiler"
#endif

#include "../types.h"

#define ATTN_DEVICE __device__ __forceinline__
#define ATTN_HOST_DEVICE __host__ __device__ __forceinline__

namespace attn {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Element types in memory ---------------------------------------------------------------------------------------

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

// The compute type.
template <typename T>
struct WideOf {
  using Type = float;
};
template <>
struct WideOf<double> {
  using Type = double;
};
template <typename T>
using Wide = typename WideOf<T>::Type;

template <typename To, typename From>
ATTN_HOST_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
#if defined(__CUDA_ARCH__)
  // Not memcpy for single numbers: it loses their alignment, and the compiler then splits the preceding load into
  // bytes.
  if constexpr (!std::is_array<From>::value) {
    union Bits {
      From from;
      To to;
    } bits{from};
    return bits.to;
  }
#endif
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

ATTN_HOST_DEVICE float widen(float x) { return x; }
ATTN_HOST_DEVICE double widen(double x) { return x; }
ATTN_HOST_DEVICE float widen(BFloat16 x) { return bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }
ATTN_HOST_DEVICE float widen(Float16 x) {
#if defined(ATTN_EMULATED)
  return static_cast<float>(bit_cast<_Float16>(x.bits));
#else
  return __half2float(bit_cast<__half>(x.bits));
#endif
}

// Rounds to nearest.
template <typename T>
ATTN_HOST_DEVICE T narrow(Wide<T> x);
template <>
ATTN_HOST_DEVICE float narrow<float>(float x) {
  return x;
}
template <>
ATTN_HOST_DEVICE double narrow<double>(double x) {
  return x;
}
template <>
ATTN_HOST_DEVICE BFloat16 narrow<BFloat16>(float x) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<std::uint16_t>(bits >> 16 | 0x40)};  // NaN
  return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
ATTN_HOST_DEVICE Float16 narrow<Float16>(float x) {
#if defined(ATTN_EMULATED)
  return {bit_cast<std::uint16_t>(static_cast<_Float16>(x))};
#else
  return {bit_cast<std::uint16_t>(__float2half_rn(x))};
#endif
}

// Elements per 16 bytes.
template <typename T>
constexpr int kPer16Bytes = 16 / sizeof(T);

// Elements 4 part .. 4 part + 3 of 16 bytes of elements, widened.
ATTN_DEVICE void widen_four(const uint4& raw, const float*, int, float* x) {
  x[0] = bit_cast<float>(raw.x), x[1] = bit_cast<float>(raw.y);
  x[2] = bit_cast<float>(raw.z), x[3] = bit_cast<float>(raw.w);
}
// The upper of two elements is a float once the low bits are cleared: one instruction, where the compiler would use
// two.
ATTN_DEVICE void widen_four(const uint4& raw, const BFloat16*, int part, float* x) {
  const unsigned low = part == 0 ? raw.x : raw.z, high = part == 0 ? raw.y : raw.w;
  x[0] = bit_cast<float>(low << 16), x[1] = bit_cast<float>(low & 0xffff0000u);
  x[2] = bit_cast<float>(high << 16), x[3] = bit_cast<float>(high & 0xffff0000u);
}
ATTN_DEVICE void widen_four(const uint4& raw, const Float16*, int part, float* x) {
  const unsigned low = part == 0 ? raw.x : raw.z, high = part == 0 ? raw.y : raw.w;
  x[0] = widen(Float16{static_cast<std::uint16_t>(low)}), x[1] = widen(Float16{static_cast<std::uint16_t>(low >> 16)});
  x[2] = widen(Float16{static_cast<std::uint16_t>(high)}),
  x[3] = widen(Float16{static_cast<std::uint16_t>(high >> 16)});
}

// x[0 .. 16 / sizeof(T)) of 16 bytes of T.
template <typename T>
ATTN_DEVICE void widen_16_bytes(const uint4& raw, Wide<T>* x) {
  if constexpr (sizeof(T) == 8) {
    memcpy(x, &raw, 16);
  } else {
#pragma unroll
    for (int part = 0; part < kPer16Bytes<T> / 4; ++part)
      widen_four(raw, static_cast<const T*>(nullptr), part, x + 4 * part);
  }
}

// The V at an address, which must be aligned to V. The hardware faults at other addresses, and so does the emulator.
template <typename V>
ATTN_DEVICE const V& vector_at(const void* address) {
#if defined(ATTN_EMULATED)
  emulator::check_aligned(address, alignof(V));
#endif
  return *static_cast<const V*>(address);
}
template <typename V>
ATTN_DEVICE V& vector_at(void* address) {
  return const_cast<V&>(vector_at<V>(static_cast<const void*>(address)));
}

// x[0 .. 16 / sizeof(T)) from an address aligned to 16 bytes.
template <typename T>
ATTN_DEVICE void load_16_bytes(const T* from, Wide<T>* x) {
  widen_16_bytes<T>(vector_at<uint4>(from), x);
}

// Instructions --------------------------------------------------------------------------------------------------------

// 1 / x with an error of one unit in the last place, 0 for subnormal results. The division operator takes several times
// as long.
ATTN_HOST_DEVICE float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#elif defined(ATTN_EMULATED)
  return emulator::rcp_approx_ftz(x);
#else
  return 1.0f / x;
#endif
}
ATTN_HOST_DEVICE double reciprocal(double x) { return 1.0 / x; }

// 2^x with a relative error of 2^-22; 0 for subnormal results.
ATTN_HOST_DEVICE float exp2_approximately(float x) {
#if defined(__CUDA_ARCH__)
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x));
  return e;
#elif defined(ATTN_EMULATED)
  return emulator::ex2_approx_ftz(x);
#else
  return exp2f(x);
#endif
}

// e^x and tanh(x), in float32 with an error of two units in the last place.
ATTN_HOST_DEVICE float exp_of(float x) {
#if defined(ATTN_EMULATED)
  return emulator::expf(x);
#else
  return expf(x);
#endif
}
ATTN_HOST_DEVICE double exp_of(double x) { return exp(x); }

ATTN_HOST_DEVICE float tanh_of(float x) {
#if defined(ATTN_EMULATED)
  return emulator::tanhf(x);
#else
  return tanhf(x);
#endif
}
ATTN_HOST_DEVICE double tanh_of(double x) { return tanh(x); }

template <typename T>
ATTN_DEVICE T warp_sum(T x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// The maximum; NaN counts as the largest.
template <typename T>
ATTN_HOST_DEVICE T larger(T a, T b) {
  return a > b || a != a ? a : b;
}

template <typename T>
ATTN_DEVICE T warp_largest(T x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = larger(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// The same with one instruction.
ATTN_HOST_DEVICE float larger_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
#else
  return larger(a, b);
#endif
}
ATTN_HOST_DEVICE double larger_or_nan(double a, double b) { return larger(a, b); }

ATTN_DEVICE char* shared_memory() {
#if defined(ATTN_EMULATED)
  return emulator::machine().now->shared;
#else
  extern __shared__ __align__(16) char memory[];
  return memory;
#endif
}

// Prefetches the cache line of an address.
ATTN_DEVICE void prefetch(const void* address) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

// Copies 16 or 8 bytes from global to shared memory asynchronously. The thread itself may read them after
// wait_for_copies(), other threads after an additional barrier.
ATTN_DEVICE void copy_async(void* to, const void* from, int bytes) {
#if defined(__CUDA_ARCH__)
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared), "l"(from) : "memory");
#elif defined(ATTN_EMULATED)
  emulator::check_aligned(to, static_cast<size_t>(bytes));
  emulator::check_aligned(from, static_cast<size_t>(bytes));
  memcpy(to, from, static_cast<size_t>(bytes));
#endif
}

ATTN_DEVICE void wait_for_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Clusters of blocks: compute capability 9.0 and later ----------------------------------------------------------------

// The rank of this block in its cluster.
ATTN_DEVICE int cluster_rank() {
#if defined(ATTN_EMULATED)
  return emulator::machine().now->rank;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}

// A barrier of all threads of a cluster, after which they see each other's shared memory.
ATTN_DEVICE void cluster_sync() {
#if defined(ATTN_EMULATED)
  emulator::wait_for(emulator::Wait::cluster);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Loads from the shared memory of block `rank` of the cluster. address: the same place in this block's shared memory.
ATTN_DEVICE float load_of_rank(const float* address, int rank) {
#if defined(ATTN_EMULATED)
  emulator::Machine& m = emulator::machine();
  const std::int64_t offset = reinterpret_cast<const char*>(address) - m.now->shared;
  return *reinterpret_cast<const float*>(m.fibers[rank * m.block_size.x].shared + offset);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned remote;
  const unsigned local = static_cast<unsigned>(__cvta_generic_to_shared(address));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
  float x;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(remote) : "memory");
  return x;
#else
  return *address;
#endif
}

ATTN_HOST_DEVICE constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
ATTN_HOST_DEVICE constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

}  // namespace cuda
}  // namespace attn
