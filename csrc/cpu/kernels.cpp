#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
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
#elif defined(__aarch64__)
namespace neon {
extern const Kernels kernels;
}
#endif

namespace {

// Whether a refined estimate of a reciprocal is faster than a division, both if three units share it and if each pair
// has its own. This is a table, not a measurement at run time: the results differ in their last bits, and must be the
// same in every run. docs/benchmarks.md has the cycles, and says which of them are measured.
#if defined(__x86_64__)
// 512 bits: a division takes 10 or 11 cycles on Intel. On AMD it takes 2.5 (Zen 5) or 6 (Zen 4), which other
// instructions hide. The estimate needs two units for multiply-adds of 512 bits. Intel's client processors have one, so
// divisions are faster there. 256 bits: a division takes 10 or 14 cycles on Intel processors before Skylake, and at
// most 5 elsewhere.
bool estimates_are_faster(bool avx512) {
  unsigned version = 0, b = 0, c = 0, d = 0;
  if (!__builtin_cpu_is("intel") || !__get_cpuid(1, &version, &b, &c, &d)) return false;
  const unsigned family = (version >> 8 & 15) + (version >> 20 & 255);
  const unsigned model = (version >> 4 & 15) | (version >> 12 & 0xf0);
  auto is_one_of = [&](std::initializer_list<unsigned> models) {
    return family == 6 && std::find(models.begin(), models.end(), model) != models.end();
  };
  if (avx512) return !is_one_of({0x66, 0x7d, 0x7e, 0x8c, 0x8d, 0xa7});  // clients: Cannon, Ice, Tiger, Rocket Lake
  return is_one_of({0x3c, 0x3f, 0x45, 0x46, 0x3d, 0x47, 0x4f, 0x56});   // Haswell and Broadwell
}
#elif defined(__aarch64__)
// Division is slow on Arm's own processors (Neoverse: 5 to 10 cycles), but not on those of Apple and Ampere.
bool estimates_are_faster() {
#if defined(__linux__)
  if ((getauxval(AT_HWCAP) & HWCAP_CPUID) == 0) return false;
  uint64_t main_id;
  asm("mrs %0, MIDR_EL1" : "=r"(main_id));  // Linux emulates this read in user mode
  return (main_id >> 24 & 255) == 'A';
#else
  return false;
#endif
}
#endif

SimdLevels available_levels() {
  SimdLevels available{};
  auto add = [&](const char* name, const Kernels* kernels, bool estimates = false) {
    available.list[available.n++] = {name, kernels, estimates};
  };
#if defined(__x86_64__) || defined(__aarch64__)
  auto add_both = [&](const char* name, const char* with_estimates, const Kernels* kernels, bool estimates_first) {
    for (const bool estimates : {estimates_first, !estimates_first})
      add(estimates ? with_estimates : name, kernels, estimates);
  };
#endif
#if defined(__x86_64__)
  __builtin_cpu_init();
  uint32_t a, b, c = 0, d;  // not every compiler supports the name f16c
  const bool has_f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") && has_f16c;
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool narrow = estimates_are_faster(false), wide = estimates_are_faster(true);
  if (has_avx512 && __builtin_cpu_supports("avx512bf16"))
    add_both("avx512bf16", "avx512bf16-estimate", &avx512bf16::kernels, wide);
  if (has_avx512) add_both("avx512", "avx512-estimate", &avx512::kernels, wide);
  if (has_avx2) add_both("avx2", "avx2-estimate", &avx2::kernels, narrow);
#elif defined(__aarch64__)
  add_both("neon", "neon-estimate", &neon::kernels, estimates_are_faster());
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

// Levels are constants, so threads need to share only the address of one.
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
