// The context of one call of an op, for the backend that a binding is compiled for: CUDA if ATTN_CUDA is defined,
// otherwise the CPU.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "types.h"
#if defined(ATTN_CUDA)
#include "cuda/call.h"
#else
#include "cpu/kernels.h"

namespace attn {

using torch::stable::Tensor;

class CallContext {
 public:
  static constexpr bool kOnHost = true;  // whether bindings can read the values of tensors
  static int32_t device_type() { return aoti_torch_device_type_cpu(); }
  static int32_t device_index(const Tensor&) { return 0; }

  explicit CallContext(const Tensor&) {}
  const Kernels& kernels() const { return *level().kernels; }
};

}  // namespace attn

#define ATTN_DISPATCH_KEY CPU
#define ATTN_OVERLOAD(op) op ".cpu"
#endif
