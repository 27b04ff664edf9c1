// The context of one call of an op on a CUDA device. It makes that device current, and owns the scratch memory of the
// kernels. With ATTN_EMULATED the "device" is the CPU.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <vector>

#include "../kernels.h"

namespace attn {

using torch::stable::Tensor;

class CallContext {
 public:
#if defined(ATTN_EMULATED)
  static constexpr bool kOnHost = true;
#else
  static constexpr bool kOnHost = false;
#endif
  static int32_t device_type();
  static int32_t device_index(const Tensor& like);

  explicit CallContext(const Tensor& like);
  ~CallContext();
  CallContext(const CallContext&) = delete;
  const Kernels& kernels() const;

  // Memory that is freed at the end of the call. Kernels launched on its stream before then may still use it.
  void* scratch(int64_t bytes);
  static CallContext& current();

  const int32_t device;

 private:
#if !defined(ATTN_EMULATED)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  CallContext* const outer_;
  std::vector<Tensor> scratch_;
};

}  // namespace attn

#if defined(ATTN_EMULATED)
#define ATTN_DISPATCH_KEY CPU
#else
#define ATTN_DISPATCH_KEY CUDA
#endif
#define ATTN_OVERLOAD(op) op ".cuda"
