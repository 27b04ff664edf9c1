// What is thrown where memory runs out. The shim of PyTorch's stable ABI tells that an allocation failed, but not how:
// attn_kernels/ops.py repeats one of that size, so that users see PyTorch's own error, of its own type.
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
