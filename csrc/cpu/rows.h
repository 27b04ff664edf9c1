// Rows of arrays, whatever their dtype and strides, as contiguous rows of the compute type (float; double for float64),
// and the register-blocked products of rows. Part of a SIMD level: see simd.h.
#pragma once

#include "runtime.h"
#include "simd.h"

namespace attn {
namespace ATTN_LEVEL {

template <typename T>
ATTN_INLINE T* take(Scratch& scratch, int64_t n) {
  return static_cast<T*>(scratch.take(n * static_cast<int64_t>(sizeof(T))));
}

ATTN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
ATTN_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
ATTN_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
template <typename T>
ATTN_INLINE int64_t padded(int64_t n) {
  return divide_up(n, width<T>) * width<T>;
}

template <typename T>
constexpr Dtype native = sizeof(T) == 8 ? Dtype::float64 : Dtype::float32;

ATTN_INLINE Vec<float> load_low(const uint16_t* p, int64_t n, Dtype dtype) {
  Half16 h{};
  memcpy(&h, p, smaller(n, width<float>) * 2);
  return dtype == Dtype::bfloat16 ? from_bfloat16(h) : from_float16(h);
}

// Up to a vector of consecutive elements of data, from element `at` on, where they lie `stride` apart.
template <typename T>
ATTN_INLINE Vec<T> load_as(const void* data, Dtype dtype, int64_t at, int64_t stride, int64_t n) {
  n = smaller(n, width<T>);
  if (dtype == native<T>) {
    const T* p = static_cast<const T*>(data) + at;
    if (stride == 1) return load_upto(p, n);
    Vec<T> x{};
    for (int64_t i = 0; i < n; ++i) x[i] = p[i * stride];
    return x;
  }
  if constexpr (sizeof(T) == 4) {
    const uint16_t* p = static_cast<const uint16_t*>(data) + at;
    if (stride == 1) return load_low(p, n, dtype);
    uint16_t gathered[width<float>];
    for (int64_t i = 0; i < n; ++i) gathered[i] = p[i * stride];
    return load_low(gathered, n, dtype);
  }
  return Vec<T>{};  // float64 arrays come with float64 arrays only
}

// Stores the first n elements (a whole vector if n is larger) as dtype, from element `at` of data on.
template <typename T>
ATTN_INLINE void store_as(void* data, Dtype dtype, int64_t at, Vec<T> x, int64_t n) {
  if (dtype == native<T>) return store_upto(static_cast<T*>(data) + at, x, n);
  if constexpr (sizeof(T) == 4) {
    Half16 h = dtype == Dtype::bfloat16 ? to_bfloat16(x) : to_float16(x);
    memcpy(static_cast<uint16_t*>(data) + at, &h, smaller(n, width<float>) * 2);
  }
}

// Row (b, i) of a: a pointer into it where it can be read as it is, otherwise its copy in buffer.
template <typename T>
const T* read_row(const Array3& a, int64_t b, int64_t i, int64_t n, T* buffer) {
  const int64_t at = b * a.stride[0] + i * a.stride[1];
  if (a.dtype == native<T> && (a.stride[2] == 1 || n == 1)) return static_cast<const T*>(a.data) + at;
  for (int64_t c = 0; c < n; c += width<T>)
    store_upto(buffer + c, load_as<T>(a.data, a.dtype, at + c * a.stride[2], a.stride[2], n - c), n - c);
  return buffer;
}

template <typename T>
void write_row(void* data, Dtype dtype, int64_t at, const T* row, int64_t n) {
  for (int64_t c = 0; c < n; c += width<T>) store_as<T>(data, dtype, at + c, load_upto(row + c, n - c), n - c);
}

// The steps that may be attended by query i of sentence b (by any query, where the mask is shared), in order.
ATTN_INLINE int64_t list_steps(const Attended& attended, int64_t b, int64_t i, int64_t steps, int32_t* list) {
  const int64_t length = smaller(larger(attended.length(b, steps), 0), steps);
  const bool* mask = attended.mask;
  int64_t n = 0;
  if (mask == nullptr) {
    for (; n < length; ++n) list[n] = static_cast<int32_t>(n);
    return n;
  }
  mask += b * attended.mask_stride[0] + (attended.per_query ? i * attended.mask_stride[1] : 0);
  for (int64_t j = 0; j < length; ++j)
    if (mask[j * attended.mask_stride[2]]) list[n++] = static_cast<int32_t>(j);
  return n;
}

// A block of rows of one array, as pointers. Copies live in scratch taken once, for at most `capacity` rows.
template <typename T>
struct RowBlock {
  const Array3& array;
  int64_t n;
  T* copies;
  const T** rows;

  RowBlock(const Array3& array, int64_t n, int64_t capacity, Scratch& scratch) : array(array), n(n) {
    const bool direct = array.dtype == native<T> && (array.stride[2] == 1 || n == 1);
    copies = direct ? nullptr : take<T>(scratch, capacity * n);
    rows = take<const T*>(scratch, capacity);
  }

  // Rows list[0..count) of sentence b.
  const T* const* read(int64_t b, const int32_t* list, int64_t count) {
    for (int64_t i = 0; i < count; ++i) rows[i] = read_row(array, b, list[i], n, copies + i * n);
    return rows;
  }

  // Rows first..first + count of sentence b.
  const T* const* read(int64_t b, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) rows[i] = read_row(array, b, first + i, n, copies + i * n);
    return rows;
  }
};

// Products ------------------------------------------------------------------------------------------------------------

// out[i * ld + j] = scale * x_i . y_j for NX rows x and NY rows y of n elements.
template <typename T, int NX, int NY>
ATTN_INLINE void dot_tile(const T* const* x, const T* const* y, int64_t n, T scale, T* out, int64_t ld) {
  Vec<T> acc[NX][NY] = {};
  auto step = [&](int64_t c, auto load_vector) __attribute__((always_inline)) {
    Vec<T> yv[NY];
    for (int j = 0; j < NY; ++j) yv[j] = load_vector(y[j] + c);
    for (int i = 0; i < NX; ++i) {
      Vec<T> xv = load_vector(x[i] + c);
      for (int j = 0; j < NY; ++j) acc[i][j] += xv * yv[j];
    }
  };
  int64_t c = 0;
  for (; c + width<T> <= n; c += width<T>) step(c, [](const T* p) __attribute__((always_inline)) { return load(p); });
  if (c < n) step(c, [&](const T* p) __attribute__((always_inline)) { return load_part(p, n - c); });
  for (int i = 0; i < NX; ++i)
    for (int j = 0; j < NY; ++j) out[i * ld + j] = scale * sum<T>(acc[i][j]);
}

constexpr int dot_columns = ATTN_VECTOR_BYTES == 64 ? 4 : 2;  // 16 accumulators in 32 registers, 8 in 16

// out[i * ld + j] = scale * x_i . y_j for all nx rows x and ny rows y.
template <typename T>
void dot_rows(const T* const* x, int64_t nx, const T* const* y, int64_t ny, int64_t n, T scale, T* out, int64_t ld) {
  int64_t i = 0;
  for (; i + 4 <= nx; i += 4) {
    int64_t j = 0;
    for (; j + dot_columns <= ny; j += dot_columns)
      dot_tile<T, 4, dot_columns>(x + i, y + j, n, scale, out + i * ld + j, ld);
    for (; j < ny; ++j) dot_tile<T, 4, 1>(x + i, y + j, n, scale, out + i * ld + j, ld);
  }
  for (; i < nx; ++i) {
    int64_t j = 0;
    for (; j + dot_columns <= ny; j += dot_columns)
      dot_tile<T, 1, dot_columns>(x + i, y + j, n, scale, out + i * ld + j, ld);
    for (; j < ny; ++j) dot_tile<T, 1, 1>(x + i, y + j, n, scale, out + i * ld + j, ld);
  }
}

// out_i[c..] (+)= sum_j weight[i * wi + j * wj] * y_j[c..] for NO rows out and NV vectors (or one part of a vector: n <
// width).
template <typename T, int NO, int NV>
ATTN_INLINE void weighted_tile(T* const* out, const T* weight, int64_t wi, int64_t wj, const T* const* y, int64_t ny,
                               int64_t c, int64_t n, bool add) {
  Vec<T> acc[NO][NV];
  for (int i = 0; i < NO; ++i)
    for (int u = 0; u < NV; ++u) acc[i][u] = add ? load_upto(out[i] + c + u * width<T>, n) : Vec<T>{};
  for (int64_t j = 0; j < ny; ++j) {
    Vec<T> yv[NV];
    for (int u = 0; u < NV; ++u) yv[u] = load_upto(y[j] + c + u * width<T>, n);
    for (int i = 0; i < NO; ++i) {
      const T w = weight[i * wi + j * wj];
      for (int u = 0; u < NV; ++u) acc[i][u] += w * yv[u];
    }
  }
  for (int i = 0; i < NO; ++i)
    for (int u = 0; u < NV; ++u) store_upto(out[i] + c + u * width<T>, acc[i][u], n);
}

template <typename T, int NO>
ATTN_INLINE void weighted_strip(T* const* out, const T* weight, int64_t wi, int64_t wj, const T* const* y, int64_t ny,
                                int64_t n, bool add) {
  constexpr int64_t w = width<T>;
  constexpr int wide = ATTN_VECTOR_BYTES == 64 ? 4 : 2;
  int64_t c = 0;
  for (; c + wide * w <= n; c += wide * w) weighted_tile<T, NO, wide>(out, weight, wi, wj, y, ny, c, w, add);
  for (; c + w <= n; c += w) weighted_tile<T, NO, 1>(out, weight, wi, wj, y, ny, c, w, add);
  if (c < n) weighted_tile<T, NO, 1>(out, weight, wi, wj, y, ny, c, n - c, add);
}

// out (+)= the sum over NY rows y of weight[j * wj] * y_j, in one walk along the rows.
template <typename T, int NY>
ATTN_INLINE void weighted_walk(T* out, const T* weight, int64_t wj, const T* const* y, int64_t n, bool add) {
  Vec<T> w[NY];
  for (int j = 0; j < NY; ++j) w[j] = broadcast(weight[j * wj]);
  for (int64_t c = 0; c < n; c += width<T>) {
    Vec<T> acc = add ? load_upto(out + c, n - c) : Vec<T>{};
    for (int j = 0; j < NY; ++j) acc += w[j] * load_upto(y[j] + c, n - c);
    store_upto(out + c, acc, n - c);
  }
}

// out_i (+)= sum_j weight[i * wi + j * wj] * y_j, rows of n elements; add: onto what out holds.
template <typename T>
void weighted_rows(T* const* out, int64_t no, const T* weight, int64_t wi, int64_t wj, const T* const* y, int64_t ny,
                   int64_t n, bool add) {
  int64_t i = 0;
  for (; i + 4 <= no; i += 4) weighted_strip<T, 4>(out + i, weight + i * wi, wi, wj, y, ny, n, add);
  for (; i < no; ++i) {  // memory decides the speed of a single row: sums in L1, rows read from end to end
    const T* w = weight + i * wi;
    int64_t j = 0;
    for (; j + 4 <= ny; j += 4) weighted_walk<T, 4>(out[i], w + j * wj, wj, y + j, n, add || j > 0);
    for (; j < ny; ++j) weighted_walk<T, 1>(out[i], w + j * wj, wj, y + j, n, add || j > 0);
  }
}

}  // namespace ATTN_LEVEL
}  // namespace attn
