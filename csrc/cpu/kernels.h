// The CPU kernels by SIMD level, and the choice among them at run time.
#pragma once

#include "../kernels.h"

namespace attn {

// Where a level has estimates of reciprocals it is there twice, by the same kernels: "avx512" divides, "avx512-estimate"
// refines an estimate in the place of most divisions (reciprocal() in simd.h).
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

// The level in use. It is chosen once, the best or the one that the environment variable ATTN_KERNELS_SIMD names, and
// stays unless use_level() changes it. A call of an op asks once for the kernels, and so computes on one level from end
// to end; the kernels of additive scores ask once for `estimates`.
const SimdLevel& level();

// Makes every later call, on any thread, use the level of that name; "" is the first choice again. Returns the level
// that was in use. Throws std::invalid_argument for a name that is none of levels(). For tests: all levels in one
// process.
const SimdLevel& use_level(const char* name);

}  // namespace attn
