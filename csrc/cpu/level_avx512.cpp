// AVX-512 (F, BW, DQ, VL).
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
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl")
#endif

#define ATTN_LEVEL avx512
#define ATTN_VECTOR_BYTES 64
#include "level.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
