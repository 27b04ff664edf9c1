// The exception for a failed allocation. The shim of PyTorch's stable ABI does not propagate PyTorch's error. So
// attn_kernels/ops.py repeats the allocation, and users see PyTorch's own error and type.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace attn {

[[noreturn]] inline void out_of_memory(int64_t bytes) {
  throw std::runtime_error("attn_kernels: not enough memory: you tried to allocate " + std::to_string(bytes) +
                           " bytes");
}

}  // namespace attn
