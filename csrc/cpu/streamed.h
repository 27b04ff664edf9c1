// Products with rows that are read once (the GEMV family). With one or a few queries they are memory-bound. Rows are
// read in order and in their own dtype, and each group of rows is used for all queries before the next group is read.
// Part of a SIMD level: see simd.h.
#pragma once

#include "views.h"

namespace attn {
namespace ATTN_LEVEL {

constexpr int kRowsAtOnce = 8;           // rows whose horizontal sums are computed together
constexpr int64_t kMinPackedRows = 4;    // from this many rows on, packing the other factor is faster (gemm.h)
constexpr int64_t kMaxShortSumRows = 8;  // at most this many rows are summed in one pass along a long result

// The prefetch distance in bytes, from the rows [j, j + at_once) that are being read. It leads to the next rows or, if
// rows are short and the next ones would arrive too late, to rows a few further on. Rows that would evict each other
// from L1 are prefetched a short distance ahead within themselves. All rows share one distance, since there are not
// enough registers for pointers to the next rows. If steps are masked, the distance is a guess.
template <class Rows>
ATTN_INLINE int64_t distance_ahead(const Rows& rows, int64_t j, int64_t at_once, int64_t count, int64_t n) {
  constexpr int64_t kLeast = 1 << 11, kMost = 1 << 14;
  const int64_t bytes = at_once * n * static_cast<int64_t>(sizeof(*rows[0]));
  if (bytes > kMost) return kLeast;
  const int64_t next = min(j + at_once + (bytes < kLeast ? 4 : 0), count - 1);
  return reinterpret_cast<intptr_t>(rows[next]) - reinterpret_cast<intptr_t>(rows[j]);
}

// Prefetches the memory `distance` bytes after elements [c, c + n) of a row, a few vectors at most.
template <class E>
ATTN_INLINE void prefetch_ahead(const E* row, int64_t c, int64_t n, int64_t distance) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(E));
  for (int64_t u = 0; u < n; u += line) prefetch_into_l1(reinterpret_cast<uintptr_t>(row + c + u) + distance);
}

// out[i * ld + j * step] = scale * x_i . rows[j] for x_rows rows x and `count` rows of n elements. X is T or, if
// elements are multiplied in pairs, BFloat16; the elements of rows then are BFloat16, too.
template <typename T, class X, class Rows>
void dot_streamed(const X* const* x, int64_t x_rows, const Rows& rows, int64_t count, int64_t n, T scale, T* out,
                  int64_t ld, int64_t step = 1) {
  constexpr int64_t w = width<T> * factor_size<X>;
  auto load_vector = [](auto* p, auto... left) __attribute__((always_inline)) {
    if constexpr (kPairs<X>)
      return load_factors(p, left...);
    else
      return load_element(p, left...);
  };
  // The products with NR rows from j on, each as a vector of partial sums. Prefetches the next rows.
  auto row_sums = [&](auto rows_at_once, const X* xi, int64_t j, Vec<T>* result) __attribute__((always_inline)) {
    constexpr int NR = decltype(rows_at_once)::value;
    Vec<T> acc[2][NR];
    clear(acc[0]);
    clear(acc[1]);
    decltype(rows[0]) row[NR];
    for (int r = 0; r < NR; ++r) row[r] = rows[j + r];
    const int64_t distance = distance_ahead(rows, j, NR, count, n);
    auto add = [&](int set, auto load_row) __attribute__((always_inline)) {
      const auto xc = load_row(xi);
      for (int r = 0; r < NR; ++r) acc[set][r] = add_product(acc[set][r], xc, load_row(row[r]));
    };
    auto prefetch_next = [&](int64_t c, int64_t columns) __attribute__((always_inline)) {
      for (int r = 0; r < NR; ++r) prefetch_ahead(row[r], c, columns, distance);
    };
    int64_t c = 0;
    auto whole = [&](auto* p) __attribute__((always_inline)) { return load_vector(p + c); };
    for (; c + 2 * w <= n; c += w) {
      prefetch_next(c, 2 * w);
      add(0, whole);
      c += w;
      add(1, whole);
    }
    if (c < n) prefetch_next(c, w);
    for (; c + w <= n; c += w) add(0, whole);
    if (c < n) add(0, [&](auto* p) __attribute__((always_inline)) { return load_vector(p + c, n - c); });
    for (int r = 0; r < NR; ++r) result[r] = acc[0][r] + acc[1][r];
  };
  constexpr int kRowsPerLoad = ATTN_VECTOR_BYTES == 64 ? 4 : 2;  // two sums per row, in 32 or 16 registers
  int64_t j = 0;
  for (; j + kRowsAtOnce <= count; j += kRowsAtOnce)
    for (int64_t i = 0; i < x_rows; ++i) {
      Vec<T> acc[kRowsAtOnce];
      for (int r = 0; r < kRowsAtOnce; r += kRowsPerLoad)
        row_sums(std::integral_constant<int, kRowsPerLoad>(), x[i], j + r, acc + r);
      T* to = out + i * ld + j * step;
      sums<T, kRowsAtOnce>(acc, [&](int r, T s) __attribute__((always_inline)) { to[r * step] = scale * s; });
    }
  for (; j < count; ++j)
    for (int64_t i = 0; i < x_rows; ++i) {
      Vec<T> acc;
      row_sums(std::integral_constant<int, 1>(), x[i], j, &acc);
      out[i * ld + j * step] = scale * sum<T>(acc);
    }
}

// out (+)= sum_j weight[j * wj] * rows[j] for rows of n elements, NV vectors. The sums stay in registers. There are two
// of each, so that consecutive rows are independent.
template <typename T, int NV, class Rows>
ATTN_INLINE void weighted_sum_narrow(T* out, const T* weight, int64_t wj, const Rows& rows, int64_t count, int64_t n,
                                     bool add) {
  constexpr int64_t w = width<T>;
  const int64_t last = n - (NV - 1) * w;  // elements of the last vector
  Vec<T> acc[2][NV];
  for (auto& set : acc) clear(set);
  auto row = [&](int64_t j, int set) __attribute__((always_inline)) {
    const auto* y = rows[j];
    const T factor = weight[j * wj];
    for (int u = 0; u + 1 < NV; ++u) acc[set][u] += factor * load_element(y + u * w);
    const auto* end = y + (NV - 1) * w;
    acc[set][NV - 1] += factor * (last == w ? load_element(end) : load_element(end, last));
  };
  int64_t j = 0;
  for (; j + 2 <= count; j += 2) {
    row(j, 0);
    row(j + 1, 1);
  }
  if (j < count) row(j, 0);
  for (int u = 0; u < NV; ++u) {
    const int64_t left = min(w, n - u * w);
    const Vec<T> sum = acc[0][u] + acc[1][u];
    store_upto(out + u * w, add ? load_upto(out + u * w, left) + sum : sum, left);
  }
}

// to_o += sum_r weight_o[r * wj] * y_r for NO rows `to` and NY rows y of n elements. For rows of bfloat16, the sums of
// the first `in_pairs` columns are stored separately: a vector of sums of the first elements of pairs, then a vector of
// sums of the second elements. Splitting pairs is faster than widening single elements. distance: the prefetch
// distance; 0 prefetches nothing more than what is read.
// Not inlined: the pointers use all registers.
template <typename T, int NO, int NY, class E>
__attribute__((noinline)) void add_weighted_rows(T* const* out, const T* const* weight, int64_t j, int64_t wj,
                                                 const E* const* rows, int64_t n, int64_t in_pairs, int64_t distance) {
  constexpr int64_t w = width<T>;
  Vec<T> factor[NO][NY];
  T* to[NO];
  for (int o = 0; o < NO; ++o) {
    to[o] = out[o];
    for (int r = 0; r < NY; ++r) factor[o][r] = broadcast(weight[o][(j + r) * wj]);
  }
  const E* y[NY];
  for (int r = 0; r < NY; ++r) y[r] = rows[r];
  auto prefetch_next = [&](int64_t c) __attribute__((always_inline)) {
    for (int r = 0; r < NY; ++r) prefetch_ahead(y[r], c, 2 * w, distance);
  };
  int64_t c = 0;
  if constexpr (std::is_same_v<E, BFloat16>)
    for (; c < in_pairs; c += 2 * w) {
      prefetch_next(c);
      Vec<T> first[NY], second[NY];
      for (int r = 0; r < NY; ++r) {
        const Word32 pairs = load_factors(y[r] + c);
        first[r] = first_of_pairs(pairs);
        second[r] = second_of_pairs(pairs);
      }
      for (int o = 0; o < NO; ++o) {
        Vec<T> sum1 = load(to[o] + c), sum2 = load(to[o] + c + w);
        for (int r = 0; r < NY; ++r) {
          sum1 += factor[o][r] * first[r];
          sum2 += factor[o][r] * second[r];
        }
        store(to[o] + c, sum1);
        store(to[o] + c + w, sum2);
      }
    }
  auto vector = [&](int64_t c) __attribute__((always_inline)) {
    Vec<T> x[NY];
    for (int r = 0; r < NY; ++r) x[r] = load_element(y[r] + c);
    for (int o = 0; o < NO; ++o) {
      Vec<T> sum = load(to[o] + c);
      for (int r = 0; r < NY; ++r) sum += factor[o][r] * x[r];
      store(to[o] + c, sum);
    }
  };
  for (; c + 2 * w <= n; c += 2 * w) {
    prefetch_next(c);
    vector(c);
    vector(c + w);
  }
  if (c < n) prefetch_next(c);
  for (; c + w <= n; c += w) vector(c);
  if (c < n)
    for (int o = 0; o < NO; ++o) {
      Vec<T> sum = load_part(to[o] + c, n - c);
      for (int r = 0; r < NY; ++r) sum += factor[o][r] * load_element(y[r] + c, n - c);
      store_part(to[o] + c, sum, n - c);
    }
}

// out_i (+)= sum_j weight_i[j * wj] * rows[j] for out_rows rows out and `count` rows of n elements. The sums stay in
// L1.
template <typename T, class Rows>
void weighted_sum_streamed(T* const* out, int64_t out_rows, const T* const* weight, int64_t wj, const Rows& rows,
                           int64_t count, int64_t n, bool add) {
  constexpr int64_t w = width<T>;
  if (0 < n && n <= 4 * w) {
    for (int64_t i = 0; i < out_rows; ++i) {
      if (n <= w)
        weighted_sum_narrow<T, 1>(out[i], weight[i], wj, rows, count, n, add);
      else if (n <= 2 * w)
        weighted_sum_narrow<T, 2>(out[i], weight[i], wj, rows, count, n, add);
      else if (n <= 3 * w)
        weighted_sum_narrow<T, 3>(out[i], weight[i], wj, rows, count, n, add);
      else
        weighted_sum_narrow<T, 4>(out[i], weight[i], wj, rows, count, n, add);
    }
    return;
  }
  using E = std::remove_const_t<std::remove_pointer_t<decltype(rows[0])>>;
  const int64_t in_pairs = std::is_same_v<E, BFloat16> && !add ? n / (2 * w) * (2 * w) : 0;
  for (int64_t i = 0; !add && i < out_rows; ++i) memset(out[i], 0, n * sizeof(T));
  int64_t j = 0;
  auto step = [&](auto rows_at_once) __attribute__((always_inline)) {
    constexpr int NY = decltype(rows_at_once)::value;
    for (; j + NY <= count; j += NY) {
      const E* y[NY];
      for (int r = 0; r < NY; ++r) y[r] = rows[j + r];
      int64_t distance = distance_ahead(rows, j, NY, count, n);
      // Each loaded vector of a row is added to several sums.
      int64_t i = 0;
      while (i < out_rows) {
        const int64_t left = out_rows - i;
        auto add_to = [&](auto sums_at_once) __attribute__((always_inline)) {
          constexpr int NO = decltype(sums_at_once)::value;
          add_weighted_rows<T, NO, NY>(out + i, weight + i, j, wj, y, n, in_pairs, distance);
          i += NO;
          distance = 0;  // already prefetched
        };
        if (left == 1)
          add_to(std::integral_constant<int, 1>());
        else if (left == 2)
          add_to(std::integral_constant<int, 2>());
        else if (left == 3 || left == 5 || left == 6)
          add_to(std::integral_constant<int, 3>());
        else
          add_to(std::integral_constant<int, 4>());
      }
    }
  };
  if (out_rows == 1 && n * static_cast<int64_t>(sizeof(E)) <= 2048)
    step(std::integral_constant<int, ATTN_VECTOR_BYTES == 64 ? 8 : 4>());
  step(std::integral_constant<int, 4>());
  step(std::integral_constant<int, 1>());
  const auto index = std::make_index_sequence<w>();
  for (int64_t i = 0; i < out_rows; ++i)
    for (T* to = out[i]; to < out[i] + in_pairs; to += 2 * w) {
      const Vec<T> first = load(to), second = load(to + w);
      store(to, shuffle<Interleaved<false>>(first, second, index));
      store(to + w, shuffle<Interleaved<true>>(first, second, index));
    }
}

constexpr int64_t kWriteAhead = 2048;  // bytes from where rows are written to where they are prefetched for it

// out = sum_i weight_i * y_i for NY rows y of n elements. stream: use non-temporal stores; out must be aligned then.
template <typename T, int NY>
ATTN_INLINE void weighted_sum_fixed(T* out, const T* weight, int64_t wi, const T* const* y, int64_t n, bool stream) {
  constexpr int64_t w = width<T>;
  Vec<T> factor[NY];
  for (int i = 0; i < NY; ++i) factor[i] = broadcast(weight[i * wi]);
  auto vector = [&](auto load_vector, int64_t c) __attribute__((always_inline)) {
    Vec<T> acc = factor[0] * load_vector(y[0] + c);
    for (int i = 1; i < NY; ++i) acc += factor[i] * load_vector(y[i] + c);
    return acc;
  };
  auto whole = [](const T* p) __attribute__((always_inline)) { return load(p); };
  int64_t c = 0;
  if (stream)
    for (; c + w <= n; c += w) store_stream(out + c, vector(whole, c));
  else
    for (; c + w <= n; c += w) {
      prefetch_to_write(reinterpret_cast<uintptr_t>(out + c) + kWriteAhead);
      store(out + c, vector(whole, c));
    }
  if (c < n)
    store_part(out + c, vector([&](const T* p) __attribute__((always_inline)) { return load_part(p, n - c); }, c),
               n - c);
}

// The same for y_rows rows, 1 <= y_rows <= kMaxShortSumRows.
template <typename T, int NY = 1>
ATTN_INLINE void weighted_sum_short(T* out, const T* weight, int64_t wi, const T* const* y, int64_t y_rows, int64_t n,
                                    bool stream) {
  if constexpr (NY < kMaxShortSumRows) {
    if (y_rows > NY) return weighted_sum_short<T, NY + 1>(out, weight, wi, y, y_rows, n, stream);
  }
  weighted_sum_fixed<T, NY>(out, weight, wi, y, n, stream);
}

// Whether rows of n elements at data can use non-temporal stores, and should: an array of `bytes` is too large to be
// still in a cache when it is read.
template <typename T>
ATTN_INLINE bool worth_streaming(const void* data, int64_t n, int64_t bytes) {
  return n % width<T> == 0 && reinterpret_cast<uintptr_t>(data) % ATTN_VECTOR_BYTES == 0 && bytes > last_cache_bytes();
}

}  // namespace ATTN_LEVEL
}  // namespace attn
