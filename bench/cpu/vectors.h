// Vectors of float32 for loops.c and scratch.c, as wide as the processor supports: vector extensions of GCC and Clang,
// and intrinsics where the extensions have no equivalent.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#define LANES (VECTOR_BYTES / 4)

#if defined(__has_builtin)
#if __has_builtin(__builtin_nontemporal_store)
#define STREAM_STORE(p, x) __builtin_nontemporal_store(x, (Floats*)(p))
#endif
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#define STREAM_END() _mm_sfence()
#else
#define STREAM_END()  // timed calls are long enough that the last lines do not matter
#endif
#if !defined(STREAM_STORE) && defined(__SSE2__)
#if VECTOR_BYTES == 64
#define STREAM_STORE(p, x) _mm512_stream_ps(p, (__m512)(x))
#elif VECTOR_BYTES == 32
#define STREAM_STORE(p, x) _mm256_stream_ps(p, (__m256)(x))
#else
#define STREAM_STORE(p, x) _mm_stream_ps(p, (__m128)(x))
#endif
#endif

// An estimate r of 1 / x, and its refinement r (1 + e + ...) as a series in the error e = 1 - x r. Processors without
// an estimate use a division.
#if VECTOR_BYTES == 64
#define ESTIMATE(x) (Floats) _mm512_maskz_rcp14_ps(0xffff, (__m512)(x))
#define SERIES(e) (e)
#elif VECTOR_BYTES == 32
#define ESTIMATE(x) (Floats) _mm256_rcp_ps((__m256)(x))
#elif defined(__SSE2__)
#define ESTIMATE(x) (Floats) _mm_rcp_ps((__m128)(x))
#elif defined(__aarch64__)
#include <arm_neon.h>
#define ESTIMATE(x) (Floats) vrecpeq_f32((float32x4_t)(x))
#else
#define ESTIMATE(x) (1.0f / (x))
#endif
#ifndef SERIES
#define SERIES(e) ((e) * (e) + (e))
#endif

typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));

// A compiler barrier: the compiler must reload values after it, and must not delay or remove stores before it.
#define BARRIER() __asm__ volatile("" ::: "memory")

static inline Floats load(const float* p) {
  Floats x;
  memcpy(&x, p, sizeof(x));
  return x;
}

static inline void store(float* p, Floats x) { memcpy(p, &x, sizeof(x)); }

static inline Floats refined_reciprocal(Floats x) {
  const Floats r = ESTIMATE(x), e = 1.0f - x * r;
  return r * SERIES(e) + r;
}

// e^{2x}, |2x| < 87: 2^n by its bits, 2^r by a polynomial for r in [-1/2, 1/2], to 1e-7 in addition to the rounding of
// the argument. The extra steps that give the kernels' version an error of an ulp are left out.
static inline Floats exponential(Floats x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which lands in the low bits
  const Floats shifted = x * 2.885390082f + magic;
  const Floats r = x * 2.885390082f - (shifted - magic);
  Floats p = r * 1.327647219e-3f + 9.675541616e-3f;
  p = p * r + 5.550713275e-2f;
  p = p * r + 2.402211972e-1f;
  p = p * r + 6.931469671e-1f;
  p = p * r + 1.000000072f;
  return (Floats)((Ints)p + ((Ints)shifted << 23));
}
