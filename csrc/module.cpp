// The Python module attn_kernels._C. Importing it registers the CPU kernels of the ops (STABLE_TORCH_LIBRARY_IMPL in the
// other files); the only function tells how it was built.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/kernels.h"

namespace {

std::string compiler() {
#if defined(__clang__)
  return "Clang " + std::to_string(__clang_major__) + "." + std::to_string(__clang_minor__);
#elif defined(__GNUC__)
  return "GCC " __VERSION__;
#else
  return "unknown";
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["simd"] = attn::level().name;
  info["compiler"] = compiler();
  info["cxx"] = std::to_string(__cplusplus);
  info["torch"] = TORCH_BUILD_VERSION;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled CPU kernels of attn_kernels.";
  m.def("build_info", &build_info,
        "How the module was built (compiler, cxx, torch) and the SIMD level that this CPU uses (simd).");
  attn::level();  // a wrong ATTN_KERNELS_SIMD is an error of the import, not of the first call
}
