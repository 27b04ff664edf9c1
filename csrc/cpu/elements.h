// Element types in memory, and their conversion to and from vectors of the compute type, float or double. Part of a
// SIMD level: see simd.h.
#pragma once

#include "../types.h"
#include "vectors.h"

namespace attn {
namespace ATTN_LEVEL {

// Low precision: bits in, float out, and back with rounding to nearest even -------------------------------------------

typedef uint16_t Half16 __attribute__((vector_size(ATTN_VECTOR_BYTES / 2)));
typedef uint16_t Word16 __attribute__((vector_size(ATTN_VECTOR_BYTES)));
typedef Vec<uint32_t> Word32;

// The first or the second elements of pairs of bfloat16.
ATTN_INLINE Vec<float> first_of_pairs(Word32 pairs) { return (Vec<float>)(pairs << 16); }
ATTN_INLINE Vec<float> second_of_pairs(Word32 pairs) { return (Vec<float>)(pairs & 0xffff0000u); }

ATTN_INLINE Vec<float> from_bfloat16(Half16 h) { return (Vec<float>)(__builtin_convertvector(h, Word32) << 16); }

// The bits of the rounded bfloat16 are in the upper half of each word; the lower half is undefined.
ATTN_INLINE Word32 round_to_bfloat16(Vec<float> x) {
  Word32 w = (Word32)x;
  Word32 rounded = w + (0x7fffu + ((w >> 16) & 1u));
  Word32 quiet = w | 0x400000u;
  return (w & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
}

ATTN_INLINE Half16 to_bfloat16(Vec<float> x) {
#if defined(ATTN_BFLOAT16_DOT)
  return (Half16)_mm512_cvtneps_pbh((__m512)x);  // denormal numbers become 0
#else
  return __builtin_convertvector(round_to_bfloat16(x) >> 16, Half16);
#endif
}

// The intrinsics with a mask of all lanes compile to the same instructions. GCC 12 warns about those without a mask.
#if ATTN_VECTOR_BYTES == 64
ATTN_INLINE Vec<float> from_float16(Half16 h) { return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h); }
ATTN_INLINE Half16 to_float16(Vec<float> x) {
  return (Half16)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
}
#elif ATTN_VECTOR_BYTES == 32
ATTN_INLINE Vec<float> from_float16(Half16 h) { return (Vec<float>)_mm256_cvtph_ps((__m128i)h); }
ATTN_INLINE Half16 to_float16(Vec<float> x) { return (Half16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(ATTN_NEON)
ATTN_INLINE Vec<float> from_float16(Half16 h) { return (Vec<float>)vcvt_f32_f16((float16x4_t)h); }
ATTN_INLINE Half16 to_float16(Vec<float> x) { return (Half16)vcvt_f16_f32((float32x4_t)x); }
#else
ATTN_INLINE Vec<float> from_float16(Half16 h) {
  Word32 w = __builtin_convertvector(h, Word32);
  Word32 magnitude = (w & 0x7fffu) << 13;
  Vec<float> scaled = (Vec<float>)magnitude * 0x1p112f;  // exact, also for subnormal numbers
  Word32 special = (Word32)scaled | 0x7f800000u;
  Word32 result = magnitude >= 0x0f800000u ? special : (Word32)scaled;
  return (Vec<float>)(result | ((w & 0x8000u) << 16));
}

ATTN_INLINE Half16 to_float16(Vec<float> x) {
  Word32 w = (Word32)x;
  Word32 sign = (w >> 16) & 0x8000u;
  Word32 f = w & 0x7fffffffu;
  Word32 normal = (f + 0xc8000fffu + ((f >> 13) & 1u)) >> 13;       // exponent 127 -> 15, and rounding
  Word32 subnormal = (Word32)((Vec<float>)f + 0.5f) - 0x3f000000u;  // the addition rounds to multiples of 2^-24
  Word32 infinite = f > 0x7f800000u ? (Word32{} + 0x7e00u) : (Word32{} + 0x7c00u);
  Word32 result = f < 0x38800000u ? subnormal : normal;
  result = f >= 0x47800000u ? infinite : result;
  return __builtin_convertvector(result | sign, Half16);
}
#endif

// Element types in memory: float, double, or one of these, whose compute type is float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class E>
using Computed = std::conditional_t<sizeof(E) == 2, float, E>;

ATTN_INLINE Vec<float> widen(Half16 h, const BFloat16*) { return from_bfloat16(h); }
ATTN_INLINE Vec<float> widen(Half16 h, const Float16*) { return from_float16(h); }

// A vector of elements, or the first n < width elements followed by zeros, in the compute type.
template <class E>
ATTN_INLINE Vec<Computed<E>> load_element(const E* p) {
  if constexpr (sizeof(E) == 2) {
    Half16 h;
    memcpy(&h, p, sizeof(h));
    return widen(h, p);
  } else {
    return load(p);
  }
}

template <class E>
ATTN_INLINE Vec<Computed<E>> load_element(const E* p, int64_t n) {
  if constexpr (sizeof(E) == 2) {
    Half16 h{};
    memcpy(&h, p, n * sizeof(E));
    return widen(h, p);
  } else {
    return load_part(p, n);
  }
}

ATTN_INLINE Half16 narrow(Vec<float> x, const BFloat16*) { return to_bfloat16(x); }
ATTN_INLINE Half16 narrow(Vec<float> x, const Float16*) { return to_float16(x); }

template <class E>
ATTN_INLINE void store_element(E* p, Vec<Computed<E>> x) {
  if constexpr (sizeof(E) == 2) {
    const Half16 h = narrow(x, p);
    memcpy(p, &h, sizeof(h));
  } else {
    store(p, x);
  }
}

template <class E>
ATTN_INLINE void store_element(E* p, Vec<Computed<E>> x, int64_t n) {
  if constexpr (sizeof(E) == 2) {
    const Half16 h = narrow(x, p);
    memcpy(p, &h, n * sizeof(E));
  } else {
    store_part(p, x, n);
  }
}

// The operand type of products of rows of E: E itself, or a pair of bfloat16 with the first one in the lower half.
template <class E>
using Factor = std::conditional_t<std::is_same_v<E, BFloat16>, uint32_t, E>;
template <class E>
constexpr int64_t factor_size = sizeof(Factor<E>) / sizeof(E);

template <class E>
ATTN_INLINE Vec<Factor<E>> load_factors(const E* p) {
  Vec<Factor<E>> x;
  memcpy(&x, p, sizeof(x));
  return x;
}

// The first n elements, less than a vector, followed by zeros.
template <class E>
ATTN_INLINE Vec<Factor<E>> load_factors(const E* p, int64_t n) {
#if defined(ATTN_BFLOAT16_DOT)
  if constexpr (sizeof(E) == 2)
    return (Vec<Factor<E>>)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p);
  else
#endif
    return load_part(p, n);
}

ATTN_INLINE Vec<float> add_product(Vec<float> sum, Vec<float> a, Vec<float> b) { return sum + a * b; }
ATTN_INLINE Vec<double> add_product(Vec<double> sum, Vec<double> a, Vec<double> b) { return sum + a * b; }

// Whether rows of E are multiplied in pairs, without conversion. The products are exact and summed in float32, but
// denormal factors and sums are treated as 0.
#if defined(ATTN_BFLOAT16_DOT)
template <class E>
constexpr bool kPairs = std::is_same_v<E, BFloat16>;

ATTN_INLINE Vec<float> add_product(Vec<float> sum, Word32 a, Word32 b) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#else
template <class E>
constexpr bool kPairs = false;
#endif

// Calls f with a null pointer whose type is the element type of dtype. T is the compute type.
template <typename T, class F>
ATTN_INLINE auto by_element(Dtype dtype, const F& f) {
  if constexpr (sizeof(T) == 8) {
    return f(static_cast<const double*>(nullptr));
  } else {
    if (dtype == Dtype::bfloat16) return f(static_cast<const BFloat16*>(nullptr));
    if (dtype == Dtype::float16) return f(static_cast<const Float16*>(nullptr));
    return f(static_cast<const float*>(nullptr));
  }
}

}  // namespace ATTN_LEVEL
}  // namespace attn
