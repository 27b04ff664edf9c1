// One SIMD layer for every level of vectorisation.
//
// The vectors are GCC/Clang vector extensions: the same source becomes SSE2 or NEON (portable), AVX2 or AVX-512 code,
// depending on the target the including file has set (see level_*.cpp). Include it only from there, after defining
//   ATTN_LEVEL          namespace of this level: nothing compiled for one level may be linked into another
//   ATTN_VECTOR_BYTES   16, 32 or 64
//   ATTN_BFLOAT16_DOT   where the target has vdpbf16ps, else not at all
//   ATTN_NEON           in the level of that name, else not at all
// and outside of any namespace. No std:: templates in code of a level, for the same reason.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>  // for what vector extensions cannot say: masked loads and stores, stores past the caches
#elif defined(ATTN_NEON)
#include <arm_neon.h>  // for estimates of reciprocals
#endif

#include "../types.h"

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

template <>
struct Simd<uint32_t> {
  static constexpr int width = ATTN_VECTOR_BYTES / 4;
  typedef uint32_t Vec __attribute__((vector_size(ATTN_VECTOR_BYTES)));
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

// Zeros, one by one: for "= {}" GCC fills memory ("rep stos") even where the vectors then live in registers.
template <class V, size_t... i>
ATTN_INLINE void clear(V* x, std::index_sequence<i...>) {
  ((x[i] = V{}), ...);
}

template <class V, int n>
ATTN_INLINE void clear(V (&x)[n]) {
  clear(x, std::make_index_sequence<n>());
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

template <typename T, size_t... i>
ATTN_INLINE IntVec<T> first_lanes(int64_t n, std::index_sequence<i...>) {
  const IntVec<T> lanes = {i...};
  return lanes < static_cast<decltype(IntVec<T>{}[0] + 0)>(n);
}

// A mask of the first n elements.
template <typename T>
ATTN_INLINE IntVec<T> first_lanes(int64_t n) {
  return first_lanes<T>(n, std::make_index_sequence<width<T>>());
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

#if ATTN_VECTOR_BYTES == 64
template <>
ATTN_INLINE Vec<float> load_part<float>(const float* p, int64_t n) {
  return (Vec<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}

template <>
ATTN_INLINE void store_part<float>(float* p, Vec<float> x, int64_t n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)x);
}
#elif ATTN_VECTOR_BYTES == 32
template <>
ATTN_INLINE Vec<float> load_part<float>(const float* p, int64_t n) {
  return (Vec<float>)_mm256_maskload_ps(p, (__m256i)first_lanes<float>(n));
}

template <>
ATTN_INLINE void store_part<float>(float* p, Vec<float> x, int64_t n) {
  _mm256_maskstore_ps(p, (__m256i)first_lanes<float>(n), (__m256)x);
}
#endif

// Stores past the caches, where p is aligned to a vector; call stream_end() before another thread may read it.
template <typename T>
ATTN_INLINE void store_stream(T* p, Vec<T> x) {
#if ATTN_VECTOR_BYTES == 64
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)x);
#elif ATTN_VECTOR_BYTES == 32
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)x);
#elif defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)x);
#else
  store(p, x);
#endif
}

// Asks for the line of p, which is read soon: the caches see streams within a page only, and rows end sooner or later.
template <class E>
ATTN_INLINE void prefetch(const E* p) {
  __builtin_prefetch(p, 0, 2);
}

// Asks for the line of p to be written soon.
template <class E>
ATTN_INLINE void prefetch_to_write(const E* p) {
  __builtin_prefetch(p, 1, 2);
}

// While it lives, this thread takes denormal numbers for 0, which on x86 would cost a hundred cycles each.
class DenormalsAreZero {
#if defined(__x86_64__)
 public:
  DenormalsAreZero() : before(_mm_getcsr()) { _mm_setcsr(before | 0x8040); }
  ~DenormalsAreZero() { _mm_setcsr(before); }

 private:
  const unsigned before;
#endif
};

ATTN_INLINE void stream_end() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
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

// Keeps a product out of multiply-adds: where multiplications are what fills the pipes, an addition of its own costs
// less.
template <class V>
ATTN_INLINE V rounded(V x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#endif
  return x;
}

// 1 / x to a relative error of 2^-14 at the cost of a multiplication, for normal numbers with normal reciprocals; where
// the target has no such instruction, a division.
#if ATTN_VECTOR_BYTES == 64
constexpr bool kHasEstimate = true;
ATTN_INLINE Vec<float> reciprocal_estimate(Vec<float> x) {
  return (Vec<float>)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);  // the form without a mask makes GCC 12 warn
}
#else
constexpr bool kHasEstimate = false;
ATTN_INLINE Vec<float> reciprocal_estimate(Vec<float> x) { return 1 / x; }
#endif
ATTN_INLINE Vec<double> reciprocal_estimate(Vec<double> x) { return 1 / x; }

// 1 / x to a rounding, for normal numbers with normal reciprocals (elsewhere it may be NaN): an estimate r, of which the
// error e = 1 - x r is known to all its digits. 1 / x = r (1 + e + e^2 + ...), as far as float32 can tell: a Newton step
// after an estimate of 14 bits, one more term after one of 11 (AVX2) or 8 (NEON).
#if ATTN_VECTOR_BYTES == 64
constexpr bool kCanRefine = true;
ATTN_INLINE Vec<float> refined_reciprocal(Vec<float> x) {
  const Vec<float> r = reciprocal_estimate(x), e = 1.0f - x * r;
  return r * e + r;
}
#elif ATTN_VECTOR_BYTES == 32 || defined(ATTN_NEON)
constexpr bool kCanRefine = true;
ATTN_INLINE Vec<float> refined_reciprocal(Vec<float> x) {
#if defined(ATTN_NEON)
  const Vec<float> r = (Vec<float>)vrecpeq_f32((float32x4_t)x), e = 1.0f - x * r;
#else
  const Vec<float> r = (Vec<float>)_mm256_rcp_ps((__m256)x), e = 1.0f - x * r;
#endif
  return r * (e * e + e) + r;
}
#else
constexpr bool kCanRefine = false;
ATTN_INLINE Vec<float> refined_reciprocal(Vec<float> x) { return 1.0f / x; }
#endif
ATTN_INLINE Vec<double> refined_reciprocal(Vec<double> x) { return 1.0 / x; }

// n / d, or the product with refined_reciprocal(d).
template <bool kRefined, typename T>
ATTN_INLINE Vec<T> quotient(Vec<T> n, Vec<T> d) {
  if constexpr (kRefined) return n * refined_reciprocal(d);
  return n / d;
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

// max(x, 0), NaN where x is NaN. The instruction for it, of which GCC 12 makes two of a comparison and a choice.
template <typename T>
ATTN_INLINE Vec<T> positive_part(Vec<T> x) {
  const Vec<T> zero{};
#if ATTN_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_maskz_max_ps(0xffff, (__m512)zero, (__m512)x);
#elif ATTN_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_max_ps((__m256)zero, (__m256)x);
#endif
  return zero > x ? zero : x;  // the second one where neither is larger
}

// min(x, most) for x that is no NaN. As integers, of which GCC 12 makes one instruction: negative numbers are in another
// order, and all below `most`, which is positive.
template <typename T>
ATTN_INLINE Vec<T> at_most(Vec<T> x, T most) {
  const IntVec<T> limit = bits<T>(broadcast(most)), a = bits<T>(x);
  return (Vec<T>)(a < limit ? a : limit);
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

// combine over each group of 2n elements, in the same order from run to run: every element of the result holds that of
// its group.
template <int n, class V, class Combine>
ATTN_INLINE V reduce_groups(V x, const Combine& combine) {
  if constexpr (n == 0) {
    return x;
  } else {
    constexpr int elements = sizeof(V) / sizeof(decltype(V{}[0] + 0));
    return reduce_groups<n / 2>(combine(x, exchange<n>(x, std::make_index_sequence<elements>())), combine);
  }
}

template <class V, class Combine>
ATTN_INLINE auto reduce(V x, const Combine& combine) {
  return reduce_groups<sizeof(V) / sizeof(decltype(V{}[0] + 0)) / 2>(x, combine)[0];
}

template <typename T>
ATTN_INLINE T sum(Vec<T> x) {
  return reduce(x, [](Vec<T> a, Vec<T> b) __attribute__((always_inline)) { return a + b; });
}

// Halves of groups of `group` elements: in the even groups of the result one half of each group of a, in the odd ones
// of b.
template <int group, bool upper, class V, size_t... i>
ATTN_INLINE V halves(V a, V b, std::index_sequence<i...>) {
  constexpr int n = sizeof...(i), half = group / 2;
  // Element i of the result: group i / half, which is group (i / half) / 2 of a or of b.
#define ATTN_HALVES static_cast<int>(i / half / 2 * group + (upper ? half : 0) + i % half + (i / half % 2 ? n : 0))...
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, ATTN_HALVES);
#else
  typedef decltype(a < a) Index;
  return __builtin_shuffle(a, b, Index{ATTN_HALVES});
#endif
#undef ATTN_HALVES
}

// out(i, s) for the sum s of each x[i], added up in the order of sum(), with fewer shuffles than one by one.
template <typename T, int n, int group = width<T>, class Out>
ATTN_INLINE void sums(const Vec<T>* x, const Out& out, int first = 0) {
  if constexpr (n == 1) {  // the sums of width / group vectors, side by side
    const auto add = [](Vec<T> a, Vec<T> b) __attribute__((always_inline)) { return a + b; };
    const Vec<T> y = reduce_groups<group / 2>(x[0], add);
    alignas(ATTN_VECTOR_BYTES) T at[width<T>];  // through memory: taking elements out of a register costs more
    store(at, y);
    for (int i = 0; i < width<T> / group; ++i) out(first + i, at[i * group]);
  } else if constexpr (n > width<T> || (n & (n - 1)) != 0) {  // in powers of 2
    constexpr int part = n > width<T> ? width<T> : n > 8 ? 8 : n > 4 ? 4 : 2;
    sums<T, part, group>(x, out, first);
    sums<T, n - part, group>(x + part, out, first + part);
  } else {
    const auto index = std::make_index_sequence<width<T>>();
    Vec<T> y[n / 2];
    for (int i = 0; i < n / 2; ++i)
      y[i] = halves<group, false>(x[i], x[i + n / 2], index) + halves<group, true>(x[i], x[i + n / 2], index);
    sums<T, n / 2, group / 2>(y, out, first);
  }
}

// The first (upper: second) half of a0 b0 a1 b1 ...
template <bool upper, class V, size_t... i>
ATTN_INLINE V interleave(V a, V b, std::index_sequence<i...>) {
  constexpr int n = sizeof...(i);
#define ATTN_INTERLEAVE static_cast<int>(i / 2 + (upper ? n / 2 : 0) + (i % 2 ? n : 0))...
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, ATTN_INTERLEAVE);
#else
  typedef decltype(a < a) Index;
  return __builtin_shuffle(a, b, Index{ATTN_INTERLEAVE});
#endif
#undef ATTN_INTERLEAVE
}

// The rows x of a square become its columns: with each round of interleaving one bit of the index changes sides.
template <typename T, int round = width<T>>
ATTN_INLINE void transpose(Vec<T>* x) {
  if constexpr (round > 1) {
    constexpr int w = width<T>;
    const auto index = std::make_index_sequence<w>();
    Vec<T> y[w];
    for (int i = 0; i < w / 2; ++i) {
      y[2 * i] = interleave<false>(x[i], x[i + w / 2], index);
      y[2 * i + 1] = interleave<true>(x[i], x[i + w / 2], index);
    }
    for (int i = 0; i < w; ++i) x[i] = y[i];
    transpose<T, round / 2>(x);
  }
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

#if ATTN_VECTOR_BYTES > 16 || defined(__aarch64__)
constexpr bool kHasMultiplyAdd = true;       // which rounds once
constexpr float kLn2Excess = 1.9046543e-9f;  // what reduce_range takes for ln 2, less ln 2
#else
constexpr bool kHasMultiplyAdd = false;
constexpr float kLn2Excess = 0.0f;
#endif

// x = r + n ln 2, |r| at most ln(2) / 2.
struct Reduced {
  Vec<float> r;
  IntVec<float> n;  // in the place of an exponent
};

ATTN_INLINE Reduced reduce_range(Vec<float> x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which lands in the low bits
  const Vec<float> shifted = x * 1.44269504088896341f + magic;
  const Vec<float> n = shifted - magic;
  const Vec<float> r = kHasMultiplyAdd ? x - n * 0.6931471805599453f : (x - n * 0.693359375f) + n * 2.12194440e-4f;
  return {r, bits<float>(shifted) << 23};  // the low bits of magic are 0
}

// e^x = p 2^n and p = 1 + r q for x in [-87.3, 88.7], p = e^r by a polynomial whose first two coefficients are exact, so
// that e^0 = 1; its other ones minimise the largest relative error: 1.0e-7 for degree 5, 3e-9 for degree 6 (before
// rounding).
struct Power {
  Vec<float> p, r, q;
  IntVec<float> n;  // 2^n in the exponent bits of p, to be added to them
};

template <int degree>
ATTN_INLINE Vec<float> third_term(Vec<float> r) {  // p with e^r = 1 + r + r^2 p
  Vec<float> q;
  if constexpr (degree == 5) {
    q = broadcast(0.008312501013278961f) * r + 0.041890330612659454f;
    q = q * r + 0.16667115688323975f;
    q = q * r + 0.499992311000824f;
  } else {
    q = broadcast(0.0013814540579915047f) * r + 0.00836874544620514f;
    q = q * r + 0.04166838899254799f;
    q = q * r + 0.1666652113199234f;
    q = q * r + 0.4999999403953552f;
  }
  return q;
}

template <int degree>
ATTN_INLINE Power power(Vec<float> x) {
  const auto [r, n] = reduce_range(x);
  const Vec<float> q = third_term<degree>(r) * r + 1.0f;
  return {q * r + 1.0f, r, q, n};
}

// e^x for x in [-87.3, 88.7], to 2 ulp at most. Outside of that range, and for NaN, the result is not meaningful.
ATTN_INLINE Vec<float> exp_in_range(Vec<float> x) {
  const Power e = power<5>(x);
  return (Vec<float>)(bits<float>(e.p) + e.n);
}

// e^x and e^-x for x in [-87.3, 87.3], to 2 ulp at most, for little more than one of them: cosh and sinh of the
// remainder by polynomials in its square with the least relative error (9e-8). Elsewhere, and for NaN, they are not
// meaningful.
ATTN_INLINE void exp_both_ways(Vec<float> x, Vec<float>* up, Vec<float>* down) {
  const Reduced a = reduce_range(x);
  const Vec<float> s = a.r * a.r;
  const Vec<float> even = (broadcast(0.04189852590624441f) * s + 0.49999143820590036f) * s + 1.0f;
  const Vec<float> odd = a.r * ((broadcast(0.008366535782549641f) * s + 0.16666543473326567f) * s + 1.0f);
  *up = (Vec<float>)(bits<float>(even + odd) + a.n);
  *down = (Vec<float>)(bits<float>(even - odd) - a.n);
}

// e^x for x <= 0 or NaN, to 1 ulp; 0 below the smallest normal number.
ATTN_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  const Vec<float> low = broadcast(-87.3365447f);
  const Power e = power<6>(x < low ? low : x);
  const Vec<float> result = e.p * (Vec<float>)(e.n + 0x3f800000);  // a product, not a sum of bits, keeps NaN
  return x < low ? Vec<float>{} : result;
}

// float64 is for checking gradients, not for speed: the library's functions, one element after the other.
ATTN_INLINE Vec<double> exp_in_range(Vec<double> x) {
  for (int i = 0; i < width<double>; ++i) x[i] = ::exp(x[i]);
  return x;
}

ATTN_INLINE Vec<double> exp_nonpositive(Vec<double> x) { return exp_in_range(x); }

// e^x - 1 for x <= 0 or NaN, to about 2 ulp, for it does not cancel near 0; and in *power_of_x, e^x where that is normal.
ATTN_INLINE Vec<float> expm1_nonpositive(Vec<float> x, Vec<float>* power_of_x = nullptr) {
  const Vec<float> low = broadcast(-87.3365447f);
  const Power e = power<6>(x < low ? low : x);
  const Vec<float> scale = (Vec<float>)(e.n + 0x3f800000);
  if (power_of_x != nullptr) *power_of_x = e.p * scale;
  return scale * (e.r * e.q) + (scale - 1.0f);
}

template <typename T>
ATTN_INLINE Vec<T> copy_sign(Vec<T> magnitude, Vec<T> x) {
  return (Vec<T>)(bits<T>(absolute<T>(magnitude)) | (bits<T>(x) ^ bits<T>(absolute<T>(x))));
}

// tanh to about 2 ulp, for every input: -e / (2 + e) with e = exp(-2|x|) - 1.
ATTN_INLINE Vec<float> tanh_any(Vec<float> x) {
  const Vec<float> e = expm1_nonpositive(absolute<float>(x) * -2.0f);
  return copy_sign<float>(e / (2.0f + e), x);
}

ATTN_INLINE Vec<double> tanh_any(Vec<double> x) {
  for (int i = 0; i < width<double>; ++i) x[i] = ::tanh(x[i]);
  return x;
}

// tanh(x) and, in *slope, its derivative, by one division: 4 e / (1 + e)^2, which does not cancel where tanh is close
// to 1.
ATTN_INLINE Vec<float> tanh_and_slope(Vec<float> x, Vec<float>* slope) {
  Vec<float> e;
  const Vec<float> e_minus_1 = expm1_nonpositive(absolute<float>(x) * -2.0f, &e), r = 1.0f / (2.0f + e_minus_1);
  *slope = (4.0f * e) * (r * r);
  return copy_sign<float>(e_minus_1 * r, x);
}

ATTN_INLINE Vec<double> tanh_and_slope(Vec<double> x, Vec<double>* slope) {
  const Vec<double> y = tanh_any(x);
  *slope = (1 - y) * (1 + y);
  return y;
}

// sigmoid(x) and, in *slope, its derivative, for every input; nothing cancels.
template <typename T>
ATTN_INLINE Vec<T> sigmoid_and_slope(Vec<T> x, Vec<T>* slope) {
  const Vec<T> e = exp_nonpositive(-absolute<T>(x)), high = T(1) / (T(1) + e), low = e * high, zero{};
  *slope = high * low;
  return x < zero ? low : high;
}

// tanh(x) sigmoid(g): one division.
ATTN_INLINE Vec<float> tanh_times_sigmoid(Vec<float> x, Vec<float> g) {
  const Vec<float> e = expm1_nonpositive(absolute<float>(x) * -2.0f), f = exp_nonpositive(-absolute<float>(g)), zero{};
  return copy_sign<float>(e * (g < zero ? f : zero + 1.0f) / ((2.0f + e) * (1.0f + f)), x);
}

// Low precision: bits in, float out, and back with rounding to nearest even -------------------------------------------

typedef uint16_t Half16 __attribute__((vector_size(ATTN_VECTOR_BYTES / 2)));
typedef uint16_t Word16 __attribute__((vector_size(ATTN_VECTOR_BYTES)));
typedef Vec<uint32_t> Word32;

// Of pairs of bfloat16, the first ones and the second ones.
ATTN_INLINE Vec<float> first_of_pairs(Word32 pairs) { return (Vec<float>)(pairs << 16); }
ATTN_INLINE Vec<float> second_of_pairs(Word32 pairs) { return (Vec<float>)(pairs & 0xffff0000u); }

ATTN_INLINE Vec<float> from_bfloat16(Half16 h) { return (Vec<float>)(__builtin_convertvector(h, Word32) << 16); }

// The bits of a bfloat16 in the upper half, anything in the lower.
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

#if ATTN_VECTOR_BYTES == 64
ATTN_INLINE Vec<float> from_float16(Half16 h) { return (Vec<float>)_mm512_cvtph_ps((__m256i)h); }
ATTN_INLINE Half16 to_float16(Vec<float> x) { return (Half16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
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
#endif

// Elements as they lie in memory: float, double, or one of these, which are computed with as float.
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

// A vector of elements, or the first n < width of one with zeros after them, in the type they are computed with.
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

// What products of rows of E are made of: E itself, or pairs of bfloat16, the first in the lower half.
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

// The first n elements, less than a vector, zeros after them.
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

// Whether rows of E are multiplied in pairs, as they are: the products are exact and summed in float32, but denormal
// factors and sums count as 0.
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

// f(pointer of the type of the elements of dtype), where T is what they are computed with.
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
