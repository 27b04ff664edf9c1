#include "kernels.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace attn {

namespace portable {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512bf16 {
extern const Kernels kernels;
}
#endif

namespace {

SimdLevels available_levels() {
  SimdLevels available{};
  auto add = [&](const char* name, const Kernels* kernels) { available.list[available.n++] = {name, kernels}; };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && __builtin_cpu_supports("avx512bf16")) add("avx512bf16", &avx512bf16::kernels);
  if (has_avx512) add("avx512", &avx512::kernels);
  if (has_avx2) add("avx2", &avx2::kernels);
#endif
  add("portable", &portable::kernels);
  return available;
}

const SimdLevel& find_level(const char* name, const char* asked_by) {
  std::string names;
  for (int i = 0; i < levels().n; ++i) {
    const SimdLevel& candidate = levels().list[i];
    if (std::strcmp(candidate.name, name) == 0) return candidate;
    names += std::string(names.empty() ? "" : ", ") + candidate.name;
  }
  throw std::invalid_argument(std::string(asked_by) + " must be one of " + names + " on this CPU, got '" + name + "'");
}

const SimdLevel& first_choice() {
  static const SimdLevel& chosen = []() -> const SimdLevel& {
    const char* wanted = std::getenv("ATTN_KERNELS_SIMD");
    return wanted == nullptr || *wanted == '\0' ? levels().list[0] : find_level(wanted, "ATTN_KERNELS_SIMD");
  }();
  return chosen;
}

// Levels are constants, so that their address is all that threads have to agree on.
std::atomic<const SimdLevel*>& in_use() {
  static std::atomic<const SimdLevel*> pointer{&first_choice()};
  return pointer;
}

}  // namespace

const SimdLevels& levels() {
  static const SimdLevels available = available_levels();
  return available;
}

const SimdLevel& level() { return *in_use().load(std::memory_order_relaxed); }

const SimdLevel& use_level(const char* name) {
  const SimdLevel& wanted = *name == '\0' ? first_choice() : find_level(name, "the SIMD level");
  return *in_use().exchange(&wanted, std::memory_order_relaxed);
}

}  // namespace attn
