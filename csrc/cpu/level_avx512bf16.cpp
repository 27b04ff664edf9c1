// AVX-512 (F, BW, DQ, VL) with products of bfloat16: Cooper Lake, Sapphire Rapids, Zen 4 and later.
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
#pragma clang attribute push(                                                                        \
    __attribute__((target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

#define ATTN_LEVEL avx512bf16
#define ATTN_VECTOR_BYTES 64
#define ATTN_BFLOAT16_DOT
#define ATTN_FLOAT64_LEVEL avx512
#include "level.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
