// One SIMD layer for every level of vectorisation.
//
// The vectors are GCC/Clang vector extensions: the same source becomes SSE2 or NEON (portable), AVX2 or AVX-512 code,
// depending on the target the including file has set (see level_*.cpp). Include it only from there, after defining
//   ATTN_LEVEL          namespace of this level: nothing compiled for one level may be linked into another
//   ATTN_VECTOR_BYTES   16, 32 or 64
// and outside of any namespace. No std:: templates in code of a level, for the same reason.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "types.h"

namespace attn {
namespace ATTN_LEVEL {

template <typename T>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int width = ATTN_VECTOR_BYTES / 4;
  typedef float Vec __attribute__((vector_size(ATTN_VECTOR_BYTES)));
  typedef int32_t Int __attribute__((vector_size(ATTN_VECTOR_BYTES)));
};

template <>
struct Simd<double> {
  static constexpr int width = ATTN_VECTOR_BYTES / 8;
  typedef double Vec __attribute__((vector_size(ATTN_VECTOR_BYTES)));
  typedef int64_t Int __attribute__((vector_size(ATTN_VECTOR_BYTES)));
};

template <typename T>
using Vec = typename Simd<T>::Vec;
template <typename T>
using IntVec = typename Simd<T>::Int;
template <typename T>
constexpr int width = Simd<T>::width;

#define ATTN_INLINE inline __attribute__((always_inline))

template <typename T>
ATTN_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

template <typename T>
ATTN_INLINE Vec<T> load(const T* p) {
  Vec<T> x;
  memcpy(&x, p, sizeof(x));
  return x;
}

template <typename T>
ATTN_INLINE void store(T* p, Vec<T> x) {
  memcpy(p, &x, sizeof(x));
}

// The first n < width elements of p, zeros after them. Reads nothing beyond p[n - 1].
template <typename T>
ATTN_INLINE Vec<T> load_part(const T* p, int64_t n) {
  Vec<T> x{};
  memcpy(&x, p, n * sizeof(T));
  return x;
}

template <typename T>
ATTN_INLINE void store_part(T* p, Vec<T> x, int64_t n) {
  memcpy(p, &x, n * sizeof(T));
}

// n may be a whole vector or more here.
template <typename T>
ATTN_INLINE Vec<T> load_upto(const T* p, int64_t n) {
  return n >= width<T> ? load(p) : load_part(p, n);
}

template <typename T>
ATTN_INLINE void store_upto(T* p, Vec<T> x, int64_t n) {
  if (n >= width<T>)
    store(p, x);
  else
    store_part(p, x, n);
}

template <typename T>
ATTN_INLINE IntVec<T> bits(Vec<T> x) {
  return (IntVec<T>)x;
}

template <typename T>
ATTN_INLINE Vec<T> absolute(Vec<T> x) {
  constexpr auto sign = sizeof(T) == 4 ? 0x7fffffffLL : 0x7fffffffffffffffLL;
  return (Vec<T>)(bits<T>(x) & (IntVec<T>{} + static_cast<decltype(IntVec<T>{}[0] + 0)>(sign)));
}

// NaN in a is passed over.
template <typename T>
ATTN_INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// Element i changes places with element i ^ n.
template <int n, class V, size_t... i>
ATTN_INLINE V exchange(V x, std::index_sequence<i...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(x, x, (i ^ n)...);
#else
  typedef decltype(x < x) Index;
  return __builtin_shuffle(x, Index{(i ^ n)...});
#endif
}

// combine over all elements, in the same order from run to run.
template <class V, class Combine, int n = sizeof(V) / sizeof(decltype(V{}[0] + 0)) / 2>
ATTN_INLINE auto reduce(V x, const Combine& combine) {
  if constexpr (n == 0) {
    return x[0];
  } else {
    constexpr int elements = sizeof(V) / sizeof(decltype(V{}[0] + 0));
    x = combine(x, exchange<n>(x, std::make_index_sequence<elements>()));
    return reduce<V, Combine, n / 2>(x, combine);
  }
}

template <typename T>
ATTN_INLINE T sum(Vec<T> x) {
  return reduce(x, [](Vec<T> a, Vec<T> b) __attribute__((always_inline)) { return a + b; });
}

template <typename T>
ATTN_INLINE T largest(Vec<T> x) {
  return reduce(x, [](Vec<T> a, Vec<T> b) __attribute__((always_inline)) { return a > b ? a : b; });
}

// Largest magnitude met, as bits: those of NaN are larger than those of Inf, and those larger than all others.
template <typename T>
ATTN_INLINE IntVec<T> larger_magnitude(IntVec<T> top, Vec<T> x) {
  const IntVec<T> magnitude = bits<T>(absolute<T>(x));
  return magnitude > top ? magnitude : top;
}

template <typename T>
ATTN_INLINE T largest_magnitude(IntVec<T> top) {
  const auto word = reduce(top, [](IntVec<T> a, IntVec<T> b) __attribute__((always_inline)) { return a > b ? a : b; });
  T result;
  memcpy(&result, &word, sizeof(T));
  return result;
}

// e^x for x in [-87.3, 88.7], to about 1 ulp (Cephes' expf: x = n ln 2 + r, polynomial in r). Outside that range the
// result is not meaningful; NaN stays NaN.
ATTN_INLINE Vec<float> exp_in_range(Vec<float> x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which lands in the low bits
  Vec<float> shifted = x * 1.44269504088896341f + magic;
  Vec<float> n = shifted - magic;
  Vec<float> r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec<float> p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // bits(magic) = 0x4b400000, so (bits << 23) + (127 << 23) is 2^n; a product, not a sum of bits, keeps NaN.
  IntVec<float> exponent = ((bits<float>(shifted) - 0x4b400000) << 23) + 0x3f800000;
  return p * (Vec<float>)exponent;
}

// e^x for x <= 0 or NaN; 0 below the smallest normal number.
ATTN_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  Vec<float> low = broadcast(-87.3365447f);
  Vec<float> result = exp_in_range(x < low ? low : x);
  return x < low ? Vec<float>{} : result;
}

// float64 is for checking gradients, not for speed: the library's functions, one element after the other.
ATTN_INLINE Vec<double> exp_in_range(Vec<double> x) {
  for (int i = 0; i < width<double>; ++i) x[i] = ::exp(x[i]);
  return x;
}

ATTN_INLINE Vec<double> exp_nonpositive(Vec<double> x) { return exp_in_range(x); }

// tanh to about 2 ulp, for every input: (1 - e) / (1 + e) with e = exp(-2|x|), a polynomial (Cephes' tanhf) where that
// cancels.
ATTN_INLINE Vec<float> tanh_any(Vec<float> x) {
  Vec<float> a = absolute<float>(x);
  Vec<float> e = exp_nonpositive(a * -2.0f);
  Vec<float> large = (1.0f - e) / (1.0f + e);
  Vec<float> s = x * x;
  Vec<float> p = broadcast(-5.70498872745e-3f);
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  Vec<float> small = (p * s) * x + x;
  IntVec<float> sign = bits<float>(x) & static_cast<int32_t>(0x80000000);
  Vec<float> signed_large = (Vec<float>)(bits<float>(large) | sign);
  return a < 0.625f ? small : signed_large;
}

ATTN_INLINE Vec<double> tanh_any(Vec<double> x) {
  for (int i = 0; i < width<double>; ++i) x[i] = ::tanh(x[i]);
  return x;
}

// Low precision: bits in, float out, and back with rounding to nearest even -------------------------------------------

typedef uint16_t Half16 __attribute__((vector_size(ATTN_VECTOR_BYTES / 2)));
typedef uint32_t Word32 __attribute__((vector_size(ATTN_VECTOR_BYTES)));

ATTN_INLINE Vec<float> from_bfloat16(Half16 h) { return (Vec<float>)(__builtin_convertvector(h, Word32) << 16); }

ATTN_INLINE Half16 to_bfloat16(Vec<float> x) {
  Word32 w = (Word32)x;
  Word32 rounded = (w + (0x7fffu + ((w >> 16) & 1u))) >> 16;
  Word32 quiet = (w >> 16) | 0x40u;
  return __builtin_convertvector((Word32)((w & 0x7fffffffu) > 0x7f800000u ? quiet : rounded), Half16);
}

ATTN_INLINE Vec<float> from_float16(Half16 h) {
  Word32 w = __builtin_convertvector(h, Word32);
  Word32 magnitude = (w & 0x7fffu) << 13;
  Vec<float> scaled = (Vec<float>)magnitude * 0x1p112f;  // exact, subnormal halves included
  Word32 special = (Word32)scaled | 0x7f800000u;
  Word32 result = magnitude >= 0x0f800000u ? special : (Word32)scaled;
  return (Vec<float>)(result | ((w & 0x8000u) << 16));
}

ATTN_INLINE Half16 to_float16(Vec<float> x) {
  Word32 w = (Word32)x;
  Word32 sign = (w >> 16) & 0x8000u;
  Word32 f = w & 0x7fffffffu;
  Word32 normal = (f + 0xc8000fffu + ((f >> 13) & 1u)) >> 13;       // exponent 127 -> 15, rounding included
  Word32 subnormal = (Word32)((Vec<float>)f + 0.5f) - 0x3f000000u;  // the addition rounds to multiples of 2^-24
  Word32 infinite = f > 0x7f800000u ? (Word32{} + 0x7e00u) : (Word32{} + 0x7c00u);
  Word32 result = f < 0x38800000u ? subnormal : normal;
  result = f >= 0x47800000u ? infinite : result;
  return __builtin_convertvector(result | sign, Half16);
}

}  // namespace ATTN_LEVEL
}  // namespace attn
