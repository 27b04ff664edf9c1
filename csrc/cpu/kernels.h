// The CPU kernels by SIMD level, and the choice among them at run time.
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

// The levels that this CPU can run, best first. No std:: container: level_*.cpp include this (see simd.h).
struct SimdLevels {
  SimdLevel list[7];
  int n;
};
const SimdLevels& levels();

// The level in use. It is chosen once: the best one, or the one named by the environment variable ATTN_KERNELS_SIMD. Only
// use_level() changes it. A call of an op reads it once, and so runs on one level from beginning to end; the kernels of
// additive scores read `estimates` once.
const SimdLevel& level();

// Switches all later calls, on any thread, to the level of that name; "" restores the initial choice. Returns the
// previous level. Throws std::invalid_argument for an unknown name. It lets tests run all levels in one process.
const SimdLevel& use_level(const char* name);

}  // namespace attn
