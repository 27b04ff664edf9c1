// AVX2 with FMA.
#if defined(__x86_64__)
// Everything shared between levels is included before the target changes, so that it is compiled for every CPU.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels.h"
#include "runtime.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif

#define ATTN_LEVEL avx2
#define ATTN_VECTOR_BYTES 32
#include "level.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
