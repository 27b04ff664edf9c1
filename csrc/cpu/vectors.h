// Loads, stores, shuffles and reductions of vectors. Part of a SIMD level: see simd.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>  // for masked loads and stores and non-temporal stores, which vector extensions lack
#elif defined(ATTN_NEON)
#include <arm_neon.h>  // for estimates of reciprocals
#endif

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

// Sets vectors to zero one by one. For "= {}" GCC fills memory ("rep stos"), even if the vectors then are in registers.
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

// The first n < width elements of p, followed by zeros. Reads nothing beyond p[n - 1].
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

// A non-temporal store; p must be aligned to a vector. Call stream_end() before another thread may read the data.
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

// Prefetches the cache line of p. The hardware prefetches streams only within a page, and not from row to row.
template <class E>
ATTN_INLINE void prefetch(const E* p) {
  __builtin_prefetch(p, 0, 2);
}

// Prefetches the cache line at an address, which may be past the end of an array, into L1. For rows that may be in L2:
// otherwise they would be moved to L1 only when they are read.
ATTN_INLINE void prefetch_into_l1(uintptr_t address) {
  __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 3);
}

template <class E>
ATTN_INLINE void prefetch_into_l1(const E* p) {
  prefetch_into_l1(reinterpret_cast<uintptr_t>(p));
}

// Prefetches the cache line at an address, which may be past the end of an array, for a write.
ATTN_INLINE void prefetch_to_write(uintptr_t address) {
  __builtin_prefetch(reinterpret_cast<const void*>(address), 1, 2);
}

template <class E>
ATTN_INLINE void prefetch_to_write(const E* p) {
  prefetch_to_write(reinterpret_cast<uintptr_t>(p));
}

// During its lifetime, this thread treats denormal numbers as 0. On x86, each would cost a hundred cycles.
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

// Like load_part, but n may be a whole vector or more.
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

// Ignores a NaN in a.
template <typename T>
ATTN_INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// max(x, 0), NaN if x is NaN. Uses the max instruction: GCC 12 compiles a comparison and a selection to two
// instructions.
template <typename T>
ATTN_INLINE Vec<T> positive_part(Vec<T> x) {
  const Vec<T> zero{};
#if ATTN_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_maskz_max_ps(0xffff, (__m512)zero, (__m512)x);
#elif ATTN_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_max_ps((__m256)zero, (__m256)x);
#endif
  return zero > x ? zero : x;  // x if neither is larger
}

// min(x, most) for x that is not NaN and most > 0. Compares the bits as integers, which GCC 12 compiles to one
// instruction. Negative numbers are ordered differently, but all of them compare below `most`.
template <typename T>
ATTN_INLINE Vec<T> at_most(Vec<T> x, T most) {
  const IntVec<T> limit = bits<T>(broadcast(most)), a = bits<T>(x);
  return (Vec<T>)(a < limit ? a : limit);
}

// Element i of the result is element Places::at(i, elements of a) of a followed by b.
template <class Places, class V, size_t... i>
ATTN_INLINE V shuffle(V a, V b, std::index_sequence<i...>) {
  constexpr int n = sizeof...(i);
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, Places::at(i, n)...);
#else
  typedef decltype(a < a) Index;
  return __builtin_shuffle(a, b, Index{Places::at(i, n)...});
#endif
}

// Swaps element i with element i ^ distance.
template <int distance>
struct Exchanged {
  static constexpr int at(int i, int) { return i ^ distance; }
};

// Reduces each group of 2n elements with combine, always in the same order. Every element of the result holds the
// reduction of its group.
template <int n, class V, class Combine>
ATTN_INLINE V reduce_groups(V x, const Combine& combine) {
  if constexpr (n == 0) {
    return x;
  } else {
    constexpr int elements = sizeof(V) / sizeof(decltype(V{}[0] + 0));
    return reduce_groups<n / 2>(combine(x, shuffle<Exchanged<n>>(x, x, std::make_index_sequence<elements>())), combine);
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

// Selects the lower or upper half of each group of `group` elements of a and b. The groups of the result have half the
// size and alternate: even ones are from a, odd ones from b. Group i / half of the result is from group (i / half) / 2
// of a or b.
template <int group, bool upper>
struct Halves {
  static constexpr int half = group / 2;
  static constexpr int at(int i, int n) {
    return i / half / 2 * group + (upper ? half : 0) + i % half + (i / half % 2 ? n : 0);
  }
};

// Calls out(i, s) with the sum s of each x[i]. Adds in the same order as sum(), but with fewer shuffles.
template <typename T, int n, int group = width<T>, class Out>
ATTN_INLINE void sums(const Vec<T>* x, const Out& out, int first = 0) {
  if constexpr (n == 1) {  // x[0] holds the partial sums of width / group vectors
    const auto add = [](Vec<T> a, Vec<T> b) __attribute__((always_inline)) { return a + b; };
    const Vec<T> y = reduce_groups<group / 2>(x[0], add);
    alignas(ATTN_VECTOR_BYTES) T at[width<T>];  // extracting elements from a register is slower
    store(at, y);
    for (int i = 0; i < width<T> / group; ++i) out(first + i, at[i * group]);
  } else if constexpr (n > width<T> || (n & (n - 1)) != 0) {  // split into powers of 2
    constexpr int part = n > width<T> ? width<T> : n > 8 ? 8 : n > 4 ? 4 : 2;
    sums<T, part, group>(x, out, first);
    sums<T, n - part, group>(x + part, out, first + part);
  } else {
    const auto index = std::make_index_sequence<width<T>>();
    Vec<T> y[n / 2];
    for (int i = 0; i < n / 2; ++i)
      y[i] = shuffle<Halves<group, false>>(x[i], x[i + n / 2], index) +
             shuffle<Halves<group, true>>(x[i], x[i + n / 2], index);
    sums<T, n / 2, group / 2>(y, out, first);
  }
}

// The first (upper: second) half of a0 b0 a1 b1 ...
template <bool upper>
struct Interleaved {
  static constexpr int at(int i, int n) { return i / 2 + (upper ? n / 2 : 0) + (i % 2 ? n : 0); }
};

// Transposes a square of rows x. Each round of interleaving moves one bit from the row index to the column index.
template <typename T, int round = width<T>>
ATTN_INLINE void transpose(Vec<T>* x) {
  if constexpr (round > 1) {
    constexpr int w = width<T>;
    const auto index = std::make_index_sequence<w>();
    Vec<T> y[w];
    for (int i = 0; i < w / 2; ++i) {
      y[2 * i] = shuffle<Interleaved<false>>(x[i], x[i + w / 2], index);
      y[2 * i + 1] = shuffle<Interleaved<true>>(x[i], x[i + w / 2], index);
    }
    for (int i = 0; i < w; ++i) x[i] = y[i];
    transpose<T, round / 2>(x);
  }
}

template <typename T>
ATTN_INLINE T largest(Vec<T> x) {
  return reduce(x, [](Vec<T> a, Vec<T> b) __attribute__((always_inline)) { return a > b ? a : b; });
}

// A running maximum of |x|, as bits. The bits of NaN are larger than those of Inf, which are larger than all others.
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

}  // namespace ATTN_LEVEL
}  // namespace attn
