// The services of PyTorch that the kernels use: the current stream, and scratch memory from its allocator.
#include <cstring>
#include <stdexcept>

#include "../call.h"
#include "../out_of_memory.h"

#if !defined(ATTN_EMULATED)
#include <dlfcn.h>
#endif

namespace attn {
namespace {
thread_local CallContext* innermost = nullptr;
}  // namespace

namespace cuda {

extern const Kernels kernels;
void* current_stream();
void* scratch_bytes(int64_t bytes);

void* scratch_bytes(int64_t bytes) { return CallContext::current().scratch(bytes); }

#if defined(ATTN_EMULATED)
void* current_stream() { return nullptr; }
#else
// The function is in a library that a PyTorch without CUDA lacks. It is looked up at run time instead of linked, so the
// module can be loaded everywhere, and can report why it cannot run.
void* current_stream() {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr
                              : reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  if (function == nullptr) throw std::runtime_error("attn_kernels: this PyTorch has no CUDA streams");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(CallContext::current().device, &stream));
  return stream;
}
#endif

}  // namespace cuda

#if defined(ATTN_EMULATED)
int32_t CallContext::device_type() { return aoti_torch_device_type_cpu(); }
int32_t CallContext::device_index(const Tensor&) { return 0; }
CallContext::CallContext(const Tensor&) : device(0), outer_(innermost) { innermost = this; }
#else
int32_t CallContext::device_type() { return aoti_torch_device_type_cuda(); }
int32_t CallContext::device_index(const Tensor& like) { return like.get_device_index(); }
CallContext::CallContext(const Tensor& like) : device(device_index(like)), guard_(device), outer_(innermost) {
  innermost = this;
}
#endif

CallContext::~CallContext() { innermost = outer_; }
const Kernels& CallContext::kernels() const { return cuda::kernels; }

CallContext& CallContext::current() {
  if (innermost == nullptr) throw std::logic_error("attn_kernels: a kernel was launched outside of a call");
  return *innermost;
}

void* CallContext::scratch(int64_t bytes) {
  AtenTensorHandle handle = nullptr;
  const int64_t size[] = {bytes}, stride[] = {1};
  if (aoti_torch_empty_strided(1, size, stride, aoti_torch_dtype_uint8(), device_type(), device, &handle) != 0)
    out_of_memory(bytes);
  scratch_.push_back(Tensor(handle));
  void* memory = scratch_.back().mutable_data_ptr();
#if defined(ATTN_EMULATED)
  std::memset(memory, 0xff, static_cast<size_t>(bytes));  // NaN, to detect reads of uninitialised memory
#endif
  return memory;
}

}  // namespace attn
