// The Python module attn_kernels._C. Importing it registers the CPU kernels of the ops (STABLE_TORCH_LIBRARY_IMPL in
// the other files). Its functions report how it was built, and let tests choose the SIMD level.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/checksum.h"
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

std::vector<std::string> simd_levels() {
  std::vector<std::string> names;
  for (int i = 0; i < attn::levels().n; ++i) names.push_back(attn::levels().list[i].name);
  return names;
}

std::vector<uint64_t> checksums(uintptr_t data, size_t bytes, size_t pieces) {
  pybind11::gil_scoped_release release;
  std::vector<uint64_t> sums(pieces);
  attn::checksums(reinterpret_cast<const void*>(data), bytes, static_cast<int64_t>(pieces), sums.data());
  return sums;
}

std::string use_simd(const std::optional<std::string>& name) { return attn::use_level(name.value_or("").c_str()).name; }

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled CPU kernels of attn_kernels.";
  m.def("build_info", &build_info, "How the module was built (compiler, cxx, torch) and the SIMD level in use (simd).");
  m.def("simd_levels", &simd_levels, "The SIMD levels that this CPU can run, best first.");
  m.def("use_simd", &use_simd, pybind11::arg("name").none(true),
        "For tests: makes all later calls in this process use that SIMD level (None: the first choice again). Returns "
        "the name of the one that was in use.");
  m.def("checksums", &checksums, pybind11::arg("data"), pybind11::arg("bytes"), pybind11::arg("pieces"),
        "Of that many pieces, of so many bytes each, that begin at an address: 64 bits that change with their bytes.");
  attn::level();  // a wrong ATTN_KERNELS_SIMD fails at import, not at the first call
}
