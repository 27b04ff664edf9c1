// The Python module attn_kernels._C_cuda. Importing it registers the CUDA kernels of the ops (STABLE_TORCH_LIBRARY_IMPL
// in the bindings). The import needs no GPU.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
#if defined(ATTN_EMULATED)
  info["emulated"] = true;
#else
  info["emulated"] = false;
  info["nvcc"] = ATTN_NVCC_VERSION;
  info["architectures"] = ATTN_CUDA_ARCHITECTURES;
#endif
  info["torch"] = TORCH_BUILD_VERSION;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "Compiled CUDA kernels of attn_kernels.";
  m.def("build_info", &build_info,
        "How the module was built: nvcc, architectures, torch; and whether it runs the kernels on the CPU instead, for "
        "tests (emulated).");
}
