// Launches kernels on the current stream, with errors as exceptions. Also the device, stream and memory of a call.
#pragma once

#include "platform.cuh"

namespace attn {
namespace cuda {

// The current stream of the current device, a cudaStream_t. runtime.cpp gets it from PyTorch.
void* current_stream();

// Uninitialised device memory for this call. It is valid for all kernels that the call launches on its stream.
void* scratch_bytes(std::int64_t bytes);

template <typename T>
T* scratch(std::int64_t n) {
  return n > 0 ? static_cast<T*>(scratch_bytes(n * static_cast<std::int64_t>(sizeof(T)))) : nullptr;
}

struct Device {
  int multiprocessors;
  int capability;             // 90 for compute capability 9.0
  std::int64_t shared_bytes;  // most shared memory of a block
};
Device current_device();

struct Grid {
  std::int64_t blocks;
  int threads;
  std::int64_t shared_bytes = 0;
  int cluster = 1;  // blocks of a cluster
};

#if defined(ATTN_EMULATED)

inline Device current_device() { return {emulator::machine().multiprocessors, 90, emulator::shared_memory_limit()}; }

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, const Arguments&... arguments) {
  if (grid.blocks == 0) return;
  emulator::launch([&] { kernel(arguments...); }, static_cast<unsigned>(grid.blocks), grid.threads, grid.shared_bytes,
                   grid.cluster);
}

inline void clear(void* memory, std::int64_t bytes) { std::memset(memory, 0, bytes); }

#else

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("attn_kernels: ") + what + ": " + cudaGetErrorString(error));
}

// What a kernel may use without opting in: bytes of shared memory, and blocks of a cluster.
constexpr std::int64_t kPlainSharedBytes = 48 * 1024;
constexpr int kPlainCluster = 8;

// Opts a kernel in to the most shared memory and the largest clusters of the current device. It does so once per kernel
// and device, from any thread.
void allow_everything(const void* kernel);

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, const Arguments&... arguments) {
  if (grid.blocks == 0) return;
  if (grid.blocks > 0x7fffffff) throw std::runtime_error("attn_kernels: the call has too many tiles for one grid");
  if (grid.shared_bytes > kPlainSharedBytes || grid.cluster > kPlainCluster)
    allow_everything(reinterpret_cast<const void*>(kernel));
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = static_cast<cudaStream_t>(current_stream());
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "launch");
}

// Zeroes memory on the current stream.
inline void clear(void* memory, std::int64_t bytes) {
  check(cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(current_stream())), "clear");
}

#endif

}  // namespace cuda
}  // namespace attn
