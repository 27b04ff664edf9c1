// Matrix products (GEMM), for rows that many queries use. Such products are compute-bound. A panel of kPanel columns of
// up to kPanelRows rows is packed, so it fits L1 for any strides. Sums stay in registers. With few rows these functions
// call the faster products of streamed.h. Part of a SIMD level: see simd.h.
#pragma once

#include "streamed.h"

namespace attn {
namespace ATTN_LEVEL {

constexpr int kTileRows = ATTN_VECTOR_BYTES == 64 ? 6 : 4;
constexpr int kTileVectors = ATTN_VECTOR_BYTES == 64 ? 4 : 2;  // 24 sums in 32 registers, 8 in 16
template <typename T>
constexpr int64_t kPanel = kTileVectors * width<T>;
constexpr int64_t kPanelRows = 64;
constexpr int64_t kMaxPairedRows = 2 * kPanelRows;  // rows in pairs, which need half the memory
constexpr int64_t kMaxQueries = 64;                 // per call

// out_i[c..c + n) (+)= sum_j weight_i[j * wj] * panel_j for NO rows of NV vectors; n is less only if !kWhole. F is
// float or double or, for products of pairs, uint32_t: pairs of weights and of rows. Only if O is the compute type can
// results be added to out.
template <class O, class F, int NO, int NV, bool kWhole>
ATTN_INLINE void gemm_microkernel(O* const* out, int64_t c, int64_t n, const F* const* weight, int64_t wj,
                                  const F* panel, int64_t rows, bool add) {
  using T = Computed<O>;
  constexpr int64_t w = width<T>;
  Vec<T> acc[NO][NV];
  for (auto& row : acc) clear(row);
  const F* x[NO];
  for (int i = 0; i < NO; ++i) x[i] = weight[i];
  for (int64_t j = 0; j < rows; ++j) {
    Vec<F> y[NV];
    for (int u = 0; u < NV; ++u) y[u] = load(panel + j * kPanel<T> + u * w);
    for (int i = 0; i < NO; ++i) {
      const Vec<F> factor = broadcast(x[i][j * wj]);
      for (int u = 0; u < NV; ++u) acc[i][u] = add_product(acc[i][u], factor, y[u]);
    }
  }
  for (int i = 0; i < NO; ++i)
    for (int u = 0; u < NV; ++u) {
      O* to = out[i] + c + u * w;
      const int64_t left = n - u * w;
      if (kWhole || left >= w)
        store_element(to, add ? load_element(to) + acc[i][u] : acc[i][u]);
      else if (left > 0)
        store_element(to, add ? load_element(to, left) + acc[i][u] : acc[i][u], left);
    }
}

// Not inlined: the sums use all registers.
template <class O, class F, int NV, bool kWhole>
__attribute__((noinline)) void gemm_microkernels(O* const* out, int64_t out_rows, int64_t c, int64_t n,
                                                 const F* const* weight, int64_t wj, const F* panel, int64_t rows,
                                                 bool add) {
  int64_t i = 0;
  auto tiles = [&](auto count) __attribute__((always_inline)) {
    constexpr int NO = decltype(count)::value;
    for (; i + NO <= out_rows; i += NO)
      gemm_microkernel<O, F, NO, NV, kWhole>(out + i, c, n, weight + i, wj, panel, rows, add);
  };
  tiles(std::integral_constant<int, kTileRows>());
  tiles(std::integral_constant<int, kTileRows / 2>());
  if constexpr (kTileRows > 4) tiles(std::integral_constant<int, 2>());
  tiles(std::integral_constant<int, 1>());
}

template <class O, class F>
ATTN_INLINE void gemm_panel(O* const* out, int64_t out_rows, int64_t c, int64_t n, const F* const* weight, int64_t wj,
                            const F* panel, int64_t rows, bool add) {
  using T = Computed<O>;
  if (n == kPanel<T>)
    gemm_microkernels<O, F, kTileVectors, true>(out, out_rows, c, n, weight, wj, panel, rows, add);
  else if (n > kPanel<T> / 2)
    gemm_microkernels<O, F, kTileVectors, false>(out, out_rows, c, n, weight, wj, panel, rows, add);
  else if (n > width<T>)
    gemm_microkernels<O, F, kTileVectors / 2, false>(out, out_rows, c, n, weight, wj, panel, rows, add);
  else
    gemm_microkernels<O, F, 1, false>(out, out_rows, c, n, weight, wj, panel, rows, add);
}

// How many columns of a panel must be filled for products with n columns.
template <typename T>
ATTN_INLINE int64_t panel_columns(int64_t n) {
  return n > kPanel<T> / 2 ? kPanel<T> : n > width<T> ? kPanel<T> / 2 : width<T>;
}

// Up to a vector of elements of a row, in the compute type.
template <class E>
ATTN_INLINE Vec<Computed<E>> load_elements(const E* p, int64_t n) {
  return n >= width<Computed<E>> ? load_element(p) : load_element(p, n);
}

// Pairs of weights, for products of pairs: factor[i][j * step] holds the weights [i * wi + j2 * wj] of j2 = 2 j and
// 2 j + 1, rounded to bfloat16 as in the formula in bfloat16. For at most kMaxQueries rows i and kMaxPairedRows steps;
// wi or wj is 1.
struct WeightPairs {
  alignas(64) uint32_t pairs[kMaxQueries * kMaxPairedRows / 2];
  const uint32_t* factor[kMaxQueries];
  int64_t step;

  ATTN_INLINE void set(const float* weight, int64_t wi, int64_t wj, int64_t out_rows, int64_t y_rows) {
    constexpr int64_t w = width<float>;
    step = wj == 1 ? 1 : kMaxQueries;
    for (int64_t i = 0; i < out_rows; ++i) {
      uint32_t* row = pairs + i * (wj == 1 ? kMaxPairedRows / 2 : 1);
      factor[i] = row;
      for (int64_t j = 0; wj == 1 && j < y_rows; j += w) {
        const Half16 h = to_bfloat16(load_upto(weight + i * wi + j, y_rows - j));
        memcpy(row + j / 2, &h, sizeof(h));
      }
    }
    for (int64_t j = 0; wj != 1 && j < y_rows; j += 2)
      for (int64_t i = 0; i < out_rows; i += w) {
        auto column = [&](int64_t j) __attribute__((always_inline)) {
          return j < y_rows ? round_to_bfloat16(load_upto(weight + i + j * wj, out_rows - i)) : Word32{};
        };
        store(pairs + j / 2 * step + i, (column(j) >> 16) | (column(j + 1) & 0xffff0000u));
      }
  }
};

// How many rows of E one call may multiply with weights.
template <class E>
constexpr int64_t kMaxRows = kPairs<E> ? kMaxPairedRows : kPanelRows;

// Products with kMinPackedRows to kMaxUnpackedRows rows out read the other rows where they are: packing would take a
// third of the time, and sums in memory (weighted_sum_streamed) take a third longer. Elsewhere 0: there are not enough
// registers.
constexpr int64_t kMaxUnpackedRows = ATTN_VECTOR_BYTES == 64 ? 8 : 0;

// The number of rows out up to which rows are streamed.
template <class E>
constexpr int64_t kMaxStreamedRows = kPairs<E> || kMaxUnpackedRows == 0 ? 8 : kMinPackedRows - 1;

// out_i[c..c + n) (+)= sum_j weight_i[j * wj] * rows[j] for NO rows of NV vectors, as gemm_microkernel, with rows that
// are not packed.
template <typename T, int NO, int NV, bool kWhole, class Rows>
ATTN_INLINE void unpacked_microkernel(T* const* out, int64_t c, int64_t n, const T* const* weight, int64_t wj,
                                      const Rows& rows, int64_t y_rows, bool add) {
  constexpr int64_t w = width<T>;
  Vec<T> acc[NO][NV];
  for (auto& row : acc) clear(row);
  for (int64_t j = 0; j < y_rows; ++j) {
    const auto* from = rows[j] + c;
    Vec<T> y[NV];
    for (int u = 0; u < NV; ++u) {
      if constexpr (kWhole) {
        y[u] = load_element(from + u * w);
        prefetch(from + (NV + u) * w);
      } else {
        y[u] = u * w < n ? load_elements(from + u * w, n - u * w) : Vec<T>{};
      }
    }
    for (int i = 0; i < NO; ++i) {
      const Vec<T> factor = broadcast(weight[i][j * wj]);
      for (int u = 0; u < NV; ++u) acc[i][u] += factor * y[u];
    }
  }
  for (int i = 0; i < NO; ++i)
    for (int u = 0; u < NV; ++u) {
      T* to = out[i] + c + u * w;
      const int64_t left = min(w, n - u * w);
      if (kWhole)
        store(to, add ? load(to) + acc[i][u] : acc[i][u]);
      else if (left > 0)
        store_upto(to, add ? load_upto(to, left) + acc[i][u] : acc[i][u], left);
    }
}

// Not inlined: the sums use all registers.
template <typename T, int NO, class Rows>
__attribute__((noinline)) void unpacked_tiles(T* const* out, const T* const* weight, int64_t wj, const Rows& rows,
                                              int64_t y_rows, int64_t n, bool add) {
  constexpr int NV = NO <= kTileRows ? kTileVectors : kTileVectors - 1;  // at most 24 sums
  constexpr int64_t w = width<T>;
  int64_t c = 0;
  for (; c + NV * w <= n; c += NV * w)
    unpacked_microkernel<T, NO, NV, true>(out, c, NV * w, weight, wj, rows, y_rows, add);
  if (n - c > w)
    unpacked_microkernel<T, NO, NV, false>(out, c, n - c, weight, wj, rows, y_rows, add);
  else if (c < n)
    unpacked_microkernel<T, NO, 1, false>(out, c, n - c, weight, wj, rows, y_rows, add);
}

template <typename T, class Rows>
void gemm_nn_unpacked(T* const* out, int64_t out_rows, const T* const* weight, int64_t wj, const Rows& rows,
                      int64_t y_rows, int64_t n, bool add) {
  auto tiles = [&](auto count) __attribute__((always_inline)) {
    unpacked_tiles<T, decltype(count)::value>(out, weight, wj, rows, y_rows, n, add);
  };
  switch (out_rows) {
    case 4:
      return tiles(std::integral_constant<int, 4>());
    case 5:
      return tiles(std::integral_constant<int, 5>());
    case 6:
      return tiles(std::integral_constant<int, 6>());
    case 7:
      return tiles(std::integral_constant<int, 7>());
    default:
      return tiles(std::integral_constant<int, 8>());
  }
}

// out_i (+)= sum_j weight[i * wi + j * wj] * rows[j] for at most kMaxQueries rows out and kMaxRows<E> rows of n
// elements E, where wi or wj is 1. add: accumulate onto out. out may have BFloat16 rows only for products of pairs,
// with at least kMinPackedRows rows out, and without add.
template <class O, typename T, class Rows>
void gemm_nn(O* const* out, int64_t out_rows, const T* weight, int64_t wi, int64_t wj, const Rows& rows, int64_t y_rows,
             int64_t n, bool add) {
  using E = std::remove_const_t<std::remove_pointer_t<decltype(rows[0])>>;
  constexpr int64_t w = width<T>;
  const T* weights[kMaxQueries];
  for (int64_t i = 0; i < out_rows; ++i) weights[i] = weight + i * wi;
  if constexpr (sizeof(O) == sizeof(T))
    if (out_rows < kMinPackedRows) return weighted_sum_streamed(out, out_rows, weights, wj, rows, y_rows, n, add);
  if constexpr (sizeof(O) == sizeof(T) && !kPairs<E> && kMaxUnpackedRows > 0)
    if (out_rows <= kMaxUnpackedRows) return gemm_nn_unpacked(out, out_rows, weights, wj, rows, y_rows, n, add);
  if constexpr (kPairs<E>) {
    alignas(64) uint32_t panel[kMaxPairedRows / 2 * kPanel<T>];
    WeightPairs pairs;
    pairs.set(weight, wi, wj, out_rows, y_rows);
    for (int64_t c = 0; c < n; c += kPanel<T>) {
      const int64_t nc = min(kPanel<T>, n - c), needed = panel_columns<T>(nc);
      for (int64_t i = 0; i < out_rows; ++i)
        for (int64_t u = 0; u < nc; u += 64 / static_cast<int64_t>(sizeof(O))) prefetch_to_write(out[i] + c + u);
      for (int64_t j = 0; j < y_rows; j += 2)
        for (int64_t u = 0; u < needed; u += 2 * w) {
          auto elements = [&](int64_t j) __attribute__((always_inline)) {
            const int64_t left = nc - u;
            const E* from = rows[j] + c + u;
            prefetch(rows[j] + min(c + kPanel<T> + u, n - 1));
            return (Word16)(left >= 2 * w ? load_factors(from) : load_factors(from, max(left, 0)));
          };
          const Word16 even = elements(j), odd = j + 1 < y_rows ? elements(j + 1) : Word16{};
          uint32_t* to = panel + j / 2 * kPanel<T> + u;
          const auto index = std::make_index_sequence<2 * w>();
          store(to, (Word32)shuffle<Interleaved<false>>(even, odd, index));
          if (u + w < needed) store(to + w, (Word32)shuffle<Interleaved<true>>(even, odd, index));
        }
      gemm_panel(out, out_rows, c, nc, pairs.factor, pairs.step, panel, divide_up(y_rows, 2), add);
    }
  } else {
    alignas(64) T panel[kPanelRows * kPanel<T>];
    for (int64_t c = 0; c < n; c += kPanel<T>) {
      const int64_t nc = min(kPanel<T>, n - c), needed = panel_columns<T>(nc);
      for (int64_t j = 0; j < y_rows; ++j) {
        const E* from = rows[j] + c;
        T* to = panel + j * kPanel<T>;
        for (int64_t u = 0; u < needed; u += w) {
          store(to + u, u < nc ? load_elements(from + u, nc - u) : Vec<T>{});
          prefetch(from + min(kPanel<T> + u, n - c - 1));
        }
      }
      gemm_panel(out, out_rows, c, nc, weights, wj, panel, y_rows, add);
    }
  }
}

// out[i * ld + j] = scale * x_i . y_j for NX rows x and NY rows y of n elements. next: the rows after y, which are
// prefetched; with kNear, into L1.
template <typename T, class E, int NX, int NY, bool kNear>
ATTN_INLINE void dot_microkernel(const E* const* x, const E* const* y, const E* const* next, int64_t n, T scale, T* out,
                                 int64_t ld) {
  constexpr int64_t w = width<T> * factor_size<E>;
  Vec<T> acc[NX * NY];
  clear(acc);
  auto step = [&](int64_t c, auto load_vector) __attribute__((always_inline)) {
    Vec<Factor<E>> yv[NY];
    for (int j = 0; j < NY; ++j) {
      yv[j] = load_vector(y[j] + c);
      kNear ? prefetch_into_l1(next[j] + c) : prefetch(next[j] + c);
    }
    for (int i = 0; i < NX; ++i) {
      const Vec<Factor<E>> xv = load_vector(x[i] + c);
      for (int j = 0; j < NY; ++j) acc[i * NY + j] = add_product(acc[i * NY + j], xv, yv[j]);
    }
  };
  int64_t c = 0;
  for (; c + w <= n; c += w) step(c, [](const E* p) __attribute__((always_inline)) { return load_factors(p); });
  if (c < n) step(c, [&](const E* p) __attribute__((always_inline)) { return load_factors(p, n - c); });
  sums<T, NX * NY>(acc, [&](int i, T s) __attribute__((always_inline)) { out[i / NY * ld + i % NY] = scale * s; });
}

template <typename T, class E, int NX, bool kNear = false>
__attribute__((noinline)) void dot_microkernels(const E* const* x, const E* const* y, int64_t y_rows, int64_t n,
                                                T scale, T* out, int64_t ld) {
  constexpr int NY = kTileVectors;
  int64_t j = 0;
  for (; j + NY <= y_rows; j += NY)
    dot_microkernel<T, E, NX, NY, kNear>(x, y + j, y + min(j + NY, y_rows - NY), n, scale, out + j, ld);
  for (; j < y_rows; ++j)
    dot_microkernel<T, E, NX, 1, kNear>(x, y + j, y + min(j + 1, y_rows - 1), n, scale, out + j, ld);
}

// out[i * ld + j] = scale * x_i . y_j for at most kMaxQueries rows x and kPanelRows rows y of n elements. Elements are
// T, or are multiplied in pairs.
template <typename T, class E>
void gemm_nt(const E* const* x, int64_t x_rows, const E* const* y, int64_t y_rows, int64_t n, T scale, T* out,
             int64_t ld) {
  constexpr int64_t w = width<T>;
  // Long rows: horizontal sums cost less than packing. Rows of pairs have half as many vectors. For them this is faster
  // at any length.
  if (kPairs<E> || (n >= 16 * w && x_rows >= kMinPackedRows)) {
    int64_t i = 0;
    for (; i + kTileRows <= x_rows; i += kTileRows)
      dot_microkernels<T, E, kTileRows>(x + i, y, y_rows, n, scale, out + i * ld, ld);
    if constexpr (kTileRows > 4)
      for (; i + 4 <= x_rows; i += 4) dot_microkernels<T, E, 4>(x + i, y, y_rows, n, scale, out + i * ld, ld);
    for (; i + 2 <= x_rows; i += 2) dot_microkernels<T, E, 2>(x + i, y, y_rows, n, scale, out + i * ld, ld);
    for (; i < x_rows; ++i) dot_microkernels<T, E, 1>(x + i, y, y_rows, n, scale, out + i * ld, ld);
    return;
  }
  if constexpr (!kPairs<E>) {
    if (x_rows < kMinPackedRows || n == 0) return dot_streamed(x, x_rows, PointedRows<T>{y}, y_rows, n, scale, out, ld);
    if (y_rows < kMinPackedRows) return dot_streamed(y, y_rows, PointedRows<T>{x}, x_rows, n, scale, out, 1, ld);
    alignas(64) T panel[kPanelRows * kPanel<T>];
    const T* weight[kMaxQueries];
    T* rows[kMaxQueries];
    for (int64_t j = 0; j < y_rows; j += kPanel<T>) {
      const int64_t nj = min(kPanel<T>, y_rows - j);
      for (int64_t i = 0; i < x_rows; ++i) rows[i] = out + i * ld + j;
      for (int64_t c = 0; c < n; c += kPanelRows) {
        const int64_t nc = min(kPanelRows, n - c);
        for (int64_t r = 0; r < nj; r += w) {  // y_j[c + a] to panel[a][j]; columns beyond nj repeat the last
          const T* row[w];
          for (int64_t i = 0; i < w; ++i) row[i] = y[j + min(r + i, nj - 1)] + c;
          const int64_t ahead = c + 2 * kPanelRows <= n ? kPanelRows : 0;
          auto square = [&](int64_t a, auto load_vector) __attribute__((always_inline)) {
            Vec<T> x[w];
            for (int64_t i = 0; i < w; ++i) {
              x[i] = load_vector(row[i] + a);
              prefetch(row[i] + a + ahead);
            }
            transpose<T>(x);
            for (int64_t i = 0; i < w; ++i) store(panel + (a + i) * kPanel<T> + r, x[i]);
          };
          int64_t a = 0;
          for (; a + w <= nc; a += w) square(a, [](const T* p) __attribute__((always_inline)) { return load(p); });
          if (a < nc) square(a, [&](const T* p) __attribute__((always_inline)) { return load_part(p, nc - a); });
        }
        for (int64_t i = 0; i < x_rows; ++i) weight[i] = x[i] + c;
        gemm_panel(rows, x_rows, 0, nj, weight, 1, panel, nc, c > 0);
      }
      if (scale != 1)
        for (int64_t i = 0; i < x_rows; ++i)
          for (int64_t u = 0; u < nj; u += w) store_upto(rows[i] + u, scale * load_upto(rows[i] + u, nj - u), nj - u);
    }
  }
}

}  // namespace ATTN_LEVEL
}  // namespace attn
