#include "kernels.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

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
#endif

namespace {

std::vector<Level> available_levels() {  // best first
  std::vector<Level> levels;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    levels.push_back({"avx512", &avx512::kernels});
  if (has_avx2) levels.push_back({"avx2", &avx2::kernels});
#endif
  levels.push_back({"portable", &portable::kernels});
  return levels;
}

Level choose_level() {
  const std::vector<Level> levels = available_levels();
  const char* wanted = std::getenv("ATTN_KERNELS_SIMD");
  if (wanted == nullptr || *wanted == '\0') return levels.front();
  std::string names;
  for (const Level& candidate : levels) {
    if (std::strcmp(candidate.name, wanted) == 0) return candidate;
    names += std::string(names.empty() ? "" : ", ") + candidate.name;
  }
  throw std::runtime_error("ATTN_KERNELS_SIMD must be one of " + names + " on this CPU, got " + wanted);
}

}  // namespace

const Level& level() {
  static const Level chosen = choose_level();
  return chosen;
}

}  // namespace attn
