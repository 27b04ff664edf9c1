// Products with rows that are read once (the GEMV family): with one query or few, memory decides the speed. Rows are
// read in their own dtype and in order, a few of them for all queries before the next. Part of a SIMD level: see
// simd.h.
#pragma once

#include "views.h"

namespace attn {
namespace ATTN_LEVEL {

constexpr int kRowsAtOnce = 8;           // whose horizontal sums are taken together
constexpr int64_t kMinPackedRows = 4;    // from this many rows on, packing the other factor pays (gemm.h)
constexpr int64_t kMaxStreamedRows = 8;  // up to this many sums, rows are streamed rather than packed
constexpr int64_t kMaxShortSumRows = 8;  // up to this many rows are summed in one pass along a long result

// How many rows after those that are read next are prefetched: where rows are short, the next ones would come too late.
template <class E>
ATTN_INLINE int64_t rows_ahead(const E*, int64_t n) {
  return n * static_cast<int64_t>(sizeof(E)) <= 512 ? 4 : 0;
}

// out[i * ld + j * step] = scale * x_i . rows[j] for x_rows rows x and `count` rows of n elements. X is T or, where rows
// are multiplied in pairs, BFloat16, as the elements of rows are then. near: see
// prefetch_near().
template <bool kNear = false, typename T, class X, class Rows>
void dot_streamed(const X* const* x, int64_t x_rows, const Rows& rows, int64_t count, int64_t n, T scale, T* out,
                  int64_t ld, int64_t step = 1) {
  constexpr int64_t w = width<T> * factor_size<X>;
  auto load_vector = [](auto* p, auto... left) __attribute__((always_inline)) {
    if constexpr (kPairs<X>)
      return load_factors(p, left...);
    else
      return load_element(p, left...);
  };
  const int64_t ahead = rows_ahead(decltype(rows[0])(nullptr), n);
  // The products with NR rows from j on, summed up but for the last vector. Prefetches the next rows.
  auto row_sums = [&](auto rows_at_once, const X* xi, int64_t j, Vec<T>* result) __attribute__((always_inline)) {
    constexpr int NR = decltype(rows_at_once)::value;
    Vec<T> acc[2][NR];
    clear(acc[0]);
    clear(acc[1]);
    decltype(rows[0]) row[NR], next[NR];
    for (int r = 0; r < NR; ++r) {
      row[r] = rows[j + r];
      next[r] = rows[min(j + NR + r + ahead, count - 1)];
    }
    auto add = [&](int set, int64_t c, auto load_row) __attribute__((always_inline)) {
      const auto xc = load_row(xi);
      for (int r = 0; r < NR; ++r) {
        acc[set][r] = add_product(acc[set][r], xc, load_row(row[r]));
        kNear ? prefetch_near(next[r] + c) : prefetch(next[r] + c);
      }
    };
    int64_t c = 0;
    auto whole = [&](auto* p) __attribute__((always_inline)) { return load_vector(p + c); };
    for (; c + 2 * w <= n; c += w) {
      add(0, c, whole);
      c += w;
      add(1, c, whole);
    }
    for (; c + w <= n; c += w) add(0, c, whole);
    if (c < n) add(0, c, [&](auto* p) __attribute__((always_inline)) { return load_vector(p + c, n - c); });
    for (int r = 0; r < NR; ++r) result[r] = acc[0][r] + acc[1][r];
  };
  constexpr int kRowsPerLoad = 2;
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

// out (+)= sum_j weight[j * wj] * rows[j] for rows of n elements, NV vectors: the sums stay in registers, two of each
// so that the next row need not wait for the last.
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

// out_i (+)= sum_j weight_i[j * wj] * rows[j] for out_rows rows out and `count` rows of n elements; the sums stay in
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
  // Columns whose sums lie apart until all rows are added: those of first elements of pairs of bfloat16, a vector, then
  // those of second ones, for a pair becomes two numbers faster than a vector of single elements does.
  using E = std::remove_const_t<std::remove_pointer_t<decltype(rows[0])>>;
  constexpr bool kInPairs = std::is_same_v<E, BFloat16>;
  const int64_t ahead = rows_ahead(static_cast<const E*>(nullptr), n);
  const int64_t in_pairs = kInPairs && !add ? n / (2 * w) * (2 * w) : 0;
  int64_t j = 0;
  auto step = [&](auto rows_at_once) __attribute__((always_inline)) {
    constexpr int NY = decltype(rows_at_once)::value;
    for (; j + NY <= count; j += NY) {
      decltype(rows[0]) y[NY], next[NY];
      for (int r = 0; r < NY; ++r) {
        y[r] = rows[j + r];
        next[r] = rows[min(j + NY + r + ahead, count - 1)];
      }
      const bool onto = add || j > 0;
      int64_t i = 0;
      // A vector of each row, once loaded, is added to NO sums.
      auto add_rows = [&](auto sums_at_once, auto is_first) __attribute__((always_inline)) {
        constexpr int NO = decltype(sums_at_once)::value;
        Vec<T> factor[NO][NY];
        for (int o = 0; o < NO; ++o)
          for (int r = 0; r < NY; ++r) factor[o][r] = broadcast(weight[i + o][(j + r) * wj]);
        int64_t c = 0;
        if constexpr (kInPairs)
          for (; c < in_pairs; c += 2 * w) {
            Vec<T> first[NY], second[NY];
            for (int r = 0; r < NY; ++r) {
              const Word32 pairs = load_factors(y[r] + c);
              first[r] = first_of_pairs(pairs);
              second[r] = second_of_pairs(pairs);
              if constexpr (decltype(is_first)::value) prefetch(next[r] + c);
            }
            for (int o = 0; o < NO; ++o) {
              T* to = out[i + o] + c;
              Vec<T> sum1 = onto ? load(to) : Vec<T>{}, sum2 = onto ? load(to + w) : Vec<T>{};
              for (int r = 0; r < NY; ++r) {
                sum1 += factor[o][r] * first[r];
                sum2 += factor[o][r] * second[r];
              }
              store(to, sum1);
              store(to + w, sum2);
            }
          }
        for (; c + w <= n; c += w) {
          Vec<T> x[NY];
          for (int r = 0; r < NY; ++r) {
            x[r] = load_element(y[r] + c);
            if constexpr (decltype(is_first)::value) prefetch(next[r] + c);
          }
          for (int o = 0; o < NO; ++o) {
            Vec<T> acc = onto ? load(out[i + o] + c) : Vec<T>{};
            for (int r = 0; r < NY; ++r) acc += factor[o][r] * x[r];
            store(out[i + o] + c, acc);
          }
        }
        if (c < n)
          for (int o = 0; o < NO; ++o) {
            Vec<T> acc = onto ? load_part(out[i + o] + c, n - c) : Vec<T>{};
            for (int r = 0; r < NY; ++r) acc += factor[o][r] * load_element(y[r] + c, n - c);
            store_part(out[i + o] + c, acc, n - c);
          }
        i += NO;
      };
      auto some = [&](auto is_first) __attribute__((always_inline)) {
        const int64_t left = out_rows - i;
        if (left == 1)
          add_rows(std::integral_constant<int, 1>(), is_first);
        else if (left == 2)
          add_rows(std::integral_constant<int, 2>(), is_first);
        else if (left == 3 || left == 5 || left == 6)
          add_rows(std::integral_constant<int, 3>(), is_first);
        else
          add_rows(std::integral_constant<int, 4>(), is_first);
      };
      if (out_rows > 0) some(std::true_type());
      while (i < out_rows) some(std::false_type());
    }
  };
  step(std::integral_constant<int, 4>());
  step(std::integral_constant<int, 1>());
  const auto index = std::make_index_sequence<w>();
  for (int64_t i = 0; count > 0 && i < out_rows; ++i)
    for (T* to = out[i]; to < out[i] + in_pairs; to += 2 * w) {
      const Vec<T> first = load(to), second = load(to + w);
      store(to, shuffle<Interleaved<false>>(first, second, index));
      store(to + w, shuffle<Interleaved<true>>(first, second, index));
    }
}

// out = sum_i weight_i * y_i for NY rows y of n elements; stream: past the caches, where out is aligned to a vector.
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
    for (; c + w <= n; c += w) store(out + c, vector(whole, c));
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

// Whether rows of n elements from data on can be, and are better, stored past the caches: an array of `bytes` is too
// large to be found there by its reader.
template <typename T>
ATTN_INLINE bool worth_streaming(const void* data, int64_t n, int64_t bytes) {
  return n % width<T> == 0 && reinterpret_cast<uintptr_t>(data) % ATTN_VECTOR_BYTES == 0 && bytes > last_cache_bytes();
}

}  // namespace ATTN_LEVEL
}  // namespace attn
