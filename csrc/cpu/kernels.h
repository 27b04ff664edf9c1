// The CPU kernels of each SIMD level, and the choice of a level at run time.
#pragma once

#include "../kernels.h"

namespace attn {

// A level whose instruction set has reciprocal estimates is listed twice, with the same kernels: "avx512" divides,
// "avx512-estimate" mostly refines an estimate instead (reciprocal() in simd.h).
struct SimdLevel {
  const char* name;
  const Kernels* kernels;
  bool estimates;
};

// The levels that this CPU can run, best first. Not a std:: container, since level_*.cpp include this file (see
// simd.h).
struct SimdLevels {
  SimdLevel list[7];
  int n;
};
const SimdLevels& levels();

// The level in use. It is chosen once: the best one, or the one named by the environment variable ATTN_KERNELS_SIMD.
// Only use_level() changes it. Each call of an op reads it once, so the whole call runs on one level. The kernels of
// additive scores also read `estimates` once.
const SimdLevel& level();

// Switches all later calls, on any thread, to the named level; "" restores the initial choice. Returns the previous
// level. Throws std::invalid_argument for an unknown name. With it, tests run all levels in one process.
const SimdLevel& use_level(const char* name);

}  // namespace attn
