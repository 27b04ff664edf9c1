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
  if (n >= width<float>)
    memcpy(&h, p, sizeof(h));
  else
    memcpy(&h, p, n * 2);
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
    if (n >= width<T>)
      memcpy(static_cast<uint16_t*>(data) + at, &h, sizeof(h));
    else
      memcpy(static_cast<uint16_t*>(data) + at, &h, n * 2);
  }
}

// Row (b, i) of a: a pointer into it where it can be read as it is, otherwise its copy in buffer.
template <typename T>
const T* read_row(const Array3& a, int64_t b, int64_t i, int64_t n, T* buffer) {
  const int64_t at = b * a.stride[0] + i * a.stride[1];
  if (a.dtype == native<T> && (a.stride[2] == 1 || n == 1)) return static_cast<const T*>(a.data) + at;
  int64_t c = 0;
  if (a.stride[2] == 1)
    by_element<T>(a.dtype, [&](auto* element) {
      const auto* from = static_cast<decltype(element)>(a.data) + at;
      for (; c + width<T> <= n; c += width<T>) store(buffer + c, load_element(from + c));
    });
  for (; c < n; c += width<T>)
    store_upto(buffer + c, load_as<T>(a.data, a.dtype, at + c * a.stride[2], a.stride[2], n - c), n - c);
  return buffer;
}

// The columns of a from c on.
ATTN_INLINE Array3 columns_from(Array3 a, int64_t c) {
  a.data = static_cast<const char*>(a.data) + c * a.stride[2] * item_size(a.dtype);
  return a;
}

// Asks for row (b, i) of a, which is read soon.
ATTN_INLINE void prefetch_row(const Array3& a, int64_t b, int64_t i, int64_t n) {
  if (a.stride[2] != 1) return;
  const int64_t item = item_size(a.dtype);
  const char* row = static_cast<const char*>(a.data) + (b * a.stride[0] + i * a.stride[1]) * item;
  for (int64_t at = 0; at < n * item; at += 64) prefetch(row + at);
}

// What is read later, asked for bit by bit during arithmetic that leaves memory idle, so that it is in L2 by then. More
// than half of L2 would drive out itself.
class Ahead {
 public:
  // Columns [c, c + columns) of rows [0, n) of sentence b of a.
  void add(const Array3& a, int64_t b, int64_t n, int64_t c, int64_t columns) {
    const int64_t item = item_size(a.dtype), lines = n * divide_up(columns * item, kLine);
    if (a.stride[2] != 1 || lines <= 0 || count_ == kMost || (left_ + lines) * kLine > kHalfOfL2) return;
    const char* row = static_cast<const char*>(a.data) + (b * a.stride[0] + c) * item;
    blocks_[count_++] = {row, a.stride[1] * item, columns * item, n};
    left_ += lines;
  }

  // All that is left, in `times` calls.
  int64_t share(int64_t times) const { return divide_up(left_, larger(times, 1)); }

  void ask(int64_t lines) {
    while (lines > 0 && at_ < count_) {
      Block& block = blocks_[at_];
      for (; offset_ < block.bytes && lines > 0; offset_ += kLine, --lines) prefetch(block.row + offset_);
      if (offset_ < block.bytes) return;
      offset_ = 0;
      block.row += block.stride;
      if (--block.rows == 0) ++at_;
    }
  }

 private:
  static constexpr int kMost = 4;
  static constexpr int64_t kLine = 64, kHalfOfL2 = 1 << 19;
  struct Block {
    const char* row;
    int64_t stride, bytes, rows;
  };
  Block blocks_[kMost];
  int count_ = 0, at_ = 0;
  int64_t left_ = 0, offset_ = 0;
};

template <typename T>
void write_row(void* data, Dtype dtype, int64_t at, const T* row, int64_t n) {
  int64_t c = 0;
  by_element<T>(dtype, [&](auto* element) {
    using E = std::remove_cv_t<std::remove_pointer_t<decltype(element)>>;
    E* to = static_cast<E*>(data) + at;
    for (; c + width<T> <= n; c += width<T>) store_element(to + c, load(row + c));
  });
  if (c < n) store_as<T>(data, dtype, at + c, load_part(row + c, n - c), n - c);
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
    return read_rows(b, count, [&](int64_t i) __attribute__((always_inline)) -> int64_t { return list[i]; });
  }

  // Rows first..first + count of sentence b.
  const T* const* read(int64_t b, int64_t first, int64_t count) {
    return read_rows(b, count, [&](int64_t i) __attribute__((always_inline)) { return first + i; });
  }

 private:
  template <class Row>
  ATTN_INLINE const T* const* read_rows(int64_t b, int64_t count, const Row& row) {
    if (copies == nullptr) {
      const T* data = static_cast<const T*>(array.data) + b * array.stride[0];
      for (int64_t i = 0; i < count; ++i) rows[i] = data + row(i) * array.stride[1];
    } else {
      for (int64_t i = 0; i < count; ++i) rows[i] = read_row(array, b, row(i), n, copies + i * n);
    }
    return rows;
  }
};

// Whether rows of a may be multiplied in pairs, where kPairs<BFloat16>.
ATTN_INLINE bool in_pairs(const Array3& a) { return a.dtype == Dtype::bfloat16 && a.stride[2] == 1; }

// Listed rows of a sentence as they lie in memory, where the elements of a row lie side by side.
template <class E>
struct ListedRows {
  const E* data;
  int64_t stride;
  const int32_t* list;

  ListedRows(const Array3& a, int64_t b, const int32_t* list)
      : data(static_cast<const E*>(a.data) + b * a.stride[0]), stride(a.stride[1]), list(list) {}
  const E* operator[](int64_t j) const { return data + list[j] * stride; }
};

// Rows of a sentence from the first on, likewise.
template <class E>
struct StridedRows {
  const E* data;
  int64_t stride;

  StridedRows(const Array3& a, int64_t b, int64_t first)
      : data(static_cast<const E*>(a.data) + b * a.stride[0] + first * a.stride[1]), stride(a.stride[1]) {}
  const E* operator[](int64_t j) const { return data + j * stride; }
};

// Rows given by pointers.
template <class E>
struct PointedRows {
  const E* const* rows;

  const E* operator[](int64_t j) const { return rows[j]; }
};

// Walks --------------------------------------------------------------------------------------------------------------
//
// Where a row serves one query or few, memory decides the speed: rows are read in their own dtype and in order, a few
// of them for all queries before the next.

constexpr int kRowsAtOnce = 8;        // whose horizontal sums are taken together
constexpr int64_t kWorthPacking = 4;  // this many queries are not few
constexpr int64_t kMostWalked = 8;    // of sums over rows that are read once
constexpr int64_t kMostCombined = 8;  // rows that are added up in one walk along the result, unless it is short

// out[i * ld + j * step] = scale * x_i . rows[j] for nx rows x and `count` rows of n elements.
template <typename T, class Rows>
void dot_walk(const T* const* x, int64_t nx, const Rows& rows, int64_t count, int64_t n, T scale, T* out, int64_t ld,
              int64_t step = 1) {
  constexpr int64_t w = width<T>;
  // The products with NR rows from j on, summed up but for the last vector. Meanwhile the next rows are asked for.
  auto row_sums = [&](auto rows_at_once, const T* xi, int64_t j, Vec<T>* result) __attribute__((always_inline)) {
    constexpr int NR = decltype(rows_at_once)::value;
    Vec<T> acc[2][NR];
    clear(acc[0]);
    clear(acc[1]);
    decltype(rows[0]) row[NR], next[NR];
    for (int r = 0; r < NR; ++r) {
      row[r] = rows[j + r];
      next[r] = rows[smaller(j + NR + r, count - 1)];
    }
    auto add = [&](int set, int64_t c, auto load_row) __attribute__((always_inline)) {
      const Vec<T> xc = load_row(xi);
      for (int r = 0; r < NR; ++r) {
        acc[set][r] += xc * load_row(row[r]);
        prefetch(next[r] + c);
      }
    };
    int64_t c = 0;
    auto whole = [&](auto* p) __attribute__((always_inline)) { return load_element(p + c); };
    for (; c + 2 * w <= n; c += w) {
      add(0, c, whole);
      c += w;
      add(1, c, whole);
    }
    for (; c + w <= n; c += w) add(0, c, whole);
    if (c < n) add(0, c, [&](auto* p) __attribute__((always_inline)) { return load_element(p + c, n - c); });
    for (int r = 0; r < NR; ++r) result[r] = acc[0][r] + acc[1][r];
  };
  constexpr int kTogether = 2;
  int64_t j = 0;
  for (; j + kRowsAtOnce <= count; j += kRowsAtOnce)
    for (int64_t i = 0; i < nx; ++i) {
      Vec<T> acc[kRowsAtOnce];
      for (int r = 0; r < kRowsAtOnce; r += kTogether)
        row_sums(std::integral_constant<int, kTogether>(), x[i], j + r, acc + r);
      T* to = out + i * ld + j * step;
      sums<T, kRowsAtOnce>(acc, [&](int r, T s) __attribute__((always_inline)) { to[r * step] = scale * s; });
    }
  for (; j < count; ++j)
    for (int64_t i = 0; i < nx; ++i) {
      Vec<T> acc;
      row_sums(std::integral_constant<int, 1>(), x[i], j, &acc);
      out[i * ld + j * step] = scale * sum<T>(acc);
    }
}

// out (+)= sum_j weight[j * wj] * rows[j] for rows of n elements, NV vectors: the sums stay in registers, two of each
// so that the next row need not wait for the last.
template <typename T, int NV, class Rows>
ATTN_INLINE void weighted_narrow(T* out, const T* weight, int64_t wj, const Rows& rows, int64_t count, int64_t n,
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
    const int64_t left = smaller(w, n - u * w);
    const Vec<T> sum = acc[0][u] + acc[1][u];
    store_upto(out + u * w, add ? load_upto(out + u * w, left) + sum : sum, left);
  }
}

// out_i (+)= sum_j weight_i[j * wj] * rows[j] for `no` rows out and `count` rows of n elements; the sums stay in L1.
template <typename T, class Rows>
void weighted_walk(T* const* out, int64_t no, const T* const* weight, int64_t wj, const Rows& rows, int64_t count,
                   int64_t n, bool add) {
  constexpr int64_t w = width<T>;
  if (0 < n && n <= 4 * w) {
    for (int64_t i = 0; i < no; ++i) {
      if (n <= w)
        weighted_narrow<T, 1>(out[i], weight[i], wj, rows, count, n, add);
      else if (n <= 2 * w)
        weighted_narrow<T, 2>(out[i], weight[i], wj, rows, count, n, add);
      else if (n <= 3 * w)
        weighted_narrow<T, 3>(out[i], weight[i], wj, rows, count, n, add);
      else
        weighted_narrow<T, 4>(out[i], weight[i], wj, rows, count, n, add);
    }
    return;
  }
  int64_t j = 0;
  auto step = [&](auto rows_at_once) __attribute__((always_inline)) {
    constexpr int NY = decltype(rows_at_once)::value;
    for (; j + NY <= count; j += NY) {
      decltype(rows[0]) y[NY], next[NY];
      for (int r = 0; r < NY; ++r) {
        y[r] = rows[j + r];
        next[r] = rows[smaller(j + NY + r, count - 1)];
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
        const int64_t left = no - i;
        if (left == 1)
          add_rows(std::integral_constant<int, 1>(), is_first);
        else if (left == 2)
          add_rows(std::integral_constant<int, 2>(), is_first);
        else if (left == 3 || left == 5 || left == 6)
          add_rows(std::integral_constant<int, 3>(), is_first);
        else
          add_rows(std::integral_constant<int, 4>(), is_first);
      };
      if (no > 0) some(std::true_type());
      while (i < no) some(std::false_type());
    }
  };
  step(std::integral_constant<int, 4>());
  step(std::integral_constant<int, 1>());
}

// out = sum_i weight_i * y_i for NY rows y of n elements; stream: past the caches, where out is aligned to a vector.
template <typename T, int NY>
ATTN_INLINE void combine(T* out, const T* weight, int64_t wi, const T* const* y, int64_t n, bool stream) {
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

// The same for ny rows, 1 <= ny <= kMostCombined.
template <typename T, int NY = 1>
ATTN_INLINE void combine_few(T* out, const T* weight, int64_t wi, const T* const* y, int64_t ny, int64_t n,
                             bool stream) {
  if constexpr (NY < kMostCombined) {
    if (ny > NY) return combine_few<T, NY + 1>(out, weight, wi, y, ny, n, stream);
  }
  combine<T, NY>(out, weight, wi, y, n, stream);
}

// Whether rows of n elements from data on may be streamed, and are better streamed: an array of `bytes` will not be
// found in the caches by who reads it.
template <typename T>
ATTN_INLINE bool worth_streaming(const void* data, int64_t n, int64_t bytes) {
  return n % width<T> == 0 && reinterpret_cast<uintptr_t>(data) % ATTN_VECTOR_BYTES == 0 && bytes > last_cache_bytes();
}

// Products ------------------------------------------------------------------------------------------------------------

// Where rows serve many queries, arithmetic decides: a panel of kPanel columns of up to kPanelRows rows is packed, so
// that it lies in L1 whatever the strides, and products with it are summed in registers.
constexpr int kTileRows = ATTN_VECTOR_BYTES == 64 ? 6 : 4;
constexpr int kTileVectors = ATTN_VECTOR_BYTES == 64 ? 4 : 2;  // 24 sums in 32 registers, 8 in 16
template <typename T>
constexpr int64_t kPanel = kTileVectors * width<T>;
constexpr int64_t kPanelRows = 64;
constexpr int64_t kMostPaired = 2 * kPanelRows;  // rows in pairs, which take half the place
constexpr int64_t kMostQueries = 64;             // of one call

// out_i[c..c + n) (+)= sum_j weight_i[j * wj] * panel_j for NO rows of NV vectors, less only if !kWhole. F is float or
// double or, for the products of pairs, uint32_t: pairs of weights and of rows. Results are added up only where O is
// what is computed with.
template <class O, class F, int NO, int NV, bool kWhole>
ATTN_INLINE void panel_tile(O* const* out, int64_t c, int64_t n, const F* const* weight, int64_t wj, const F* panel,
                            int64_t rows, bool add) {
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

// Not inlined: the sums take all registers there are.
template <class O, class F, int NV, bool kWhole>
__attribute__((noinline)) void panel_tiles(O* const* out, int64_t no, int64_t c, int64_t n, const F* const* weight,
                                           int64_t wj, const F* panel, int64_t rows, bool add) {
  int64_t i = 0;
  auto tiles = [&](auto count) __attribute__((always_inline)) {
    constexpr int NO = decltype(count)::value;
    for (; i + NO <= no; i += NO) panel_tile<O, F, NO, NV, kWhole>(out + i, c, n, weight + i, wj, panel, rows, add);
  };
  tiles(std::integral_constant<int, kTileRows>());
  tiles(std::integral_constant<int, kTileRows / 2>());
  if constexpr (kTileRows > 4) tiles(std::integral_constant<int, 2>());
  tiles(std::integral_constant<int, 1>());
}

template <class O, class F>
ATTN_INLINE void panel_product(O* const* out, int64_t no, int64_t c, int64_t n, const F* const* weight, int64_t wj,
                               const F* panel, int64_t rows, bool add) {
  using T = Computed<O>;
  if (n == kPanel<T>)
    panel_tiles<O, F, kTileVectors, true>(out, no, c, n, weight, wj, panel, rows, add);
  else if (n > kPanel<T> / 2)
    panel_tiles<O, F, kTileVectors, false>(out, no, c, n, weight, wj, panel, rows, add);
  else if (n > width<T>)
    panel_tiles<O, F, kTileVectors / 2, false>(out, no, c, n, weight, wj, panel, rows, add);
  else
    panel_tiles<O, F, 1, false>(out, no, c, n, weight, wj, panel, rows, add);
}

// How many columns of a panel have to be there for products with n of them.
template <typename T>
ATTN_INLINE int64_t panel_columns(int64_t n) {
  return n > kPanel<T> / 2 ? kPanel<T> : n > width<T> ? kPanel<T> / 2 : width<T>;
}

// Up to a vector of the elements of a row, as they are computed with.
template <class E>
ATTN_INLINE Vec<Computed<E>> load_elements(const E* p, int64_t n) {
  return n >= width<Computed<E>> ? load_element(p) : load_element(p, n);
}

// Pairs of weights, for the products of pairs: factor[i][j * step] are the weights [i * wi + j2 * wj] of j2 = 2 j and 2
// j + 1, rounded to bfloat16 as in the formula in bfloat16. For at most kMostQueries rows i and kMostPaired steps; wi
// or wj is 1.
struct WeightPairs {
  alignas(64) uint32_t pairs[kMostQueries * kMostPaired / 2];
  const uint32_t* factor[kMostQueries];
  int64_t step;

  ATTN_INLINE void set(const float* weight, int64_t wi, int64_t wj, int64_t no, int64_t ny) {
    constexpr int64_t w = width<float>;
    step = wj == 1 ? 1 : kMostQueries;
    for (int64_t i = 0; i < no; ++i) {
      uint32_t* row = pairs + i * (wj == 1 ? kMostPaired / 2 : 1);
      factor[i] = row;
      for (int64_t j = 0; wj == 1 && j < ny; j += w) {
        const Half16 h = to_bfloat16(load_upto(weight + i * wi + j, ny - j));
        memcpy(row + j / 2, &h, sizeof(h));
      }
    }
    for (int64_t j = 0; wj != 1 && j < ny; j += 2)
      for (int64_t i = 0; i < no; i += w) {
        auto column = [&](int64_t j) __attribute__((always_inline)) {
          return j < ny ? round_to_bfloat16(load_upto(weight + i + j * wj, no - i)) : Word32{};
        };
        store(pairs + j / 2 * step + i, (column(j) >> 16) | (column(j + 1) & 0xffff0000u));
      }
  }
};

// How many rows of E may be multiplied with weights at once.
template <class E>
constexpr int64_t kMostRows = kPairs<E> ? kMostPaired : kPanelRows;

// out_i (+)= sum_j weight[i * wi + j * wj] * rows[j] for at most kMostQueries rows out and kMostRows<E> rows of n
// elements E, where wi or wj is 1; add: onto what out holds. Into rows of BFloat16 only where there are pairs, not too
// few rows out, and nothing to add to.
template <class O, typename T, class Rows>
void weighted_rows(O* const* out, int64_t no, const T* weight, int64_t wi, int64_t wj, const Rows& rows, int64_t ny,
                   int64_t n, bool add) {
  using E = std::remove_const_t<std::remove_pointer_t<decltype(rows[0])>>;
  constexpr int64_t w = width<T>;
  const T* weights[kMostQueries];
  for (int64_t i = 0; i < no; ++i) weights[i] = weight + i * wi;
  if constexpr (sizeof(O) == sizeof(T))
    if (no < kWorthPacking) return weighted_walk(out, no, weights, wj, rows, ny, n, add);
  if constexpr (kPairs<E>) {
    alignas(64) uint32_t panel[kMostPaired / 2 * kPanel<T>];
    WeightPairs pairs;
    pairs.set(weight, wi, wj, no, ny);
    for (int64_t c = 0; c < n; c += kPanel<T>) {
      const int64_t nc = smaller(kPanel<T>, n - c), needed = panel_columns<T>(nc);
      for (int64_t i = 0; i < no; ++i)
        for (int64_t u = 0; u < nc; u += 64 / static_cast<int64_t>(sizeof(O))) prefetch_to_write(out[i] + c + u);
      for (int64_t j = 0; j < ny; j += 2)
        for (int64_t u = 0; u < needed; u += 2 * w) {
          auto elements = [&](int64_t j) __attribute__((always_inline)) {
            const int64_t left = nc - u;
            const E* from = rows[j] + c + u;
            prefetch(rows[j] + smaller(c + kPanel<T> + u, n - 1));
            return (Word16)(left >= 2 * w ? load_factors(from) : load_factors(from, larger(left, 0)));
          };
          const Word16 even = elements(j), odd = j + 1 < ny ? elements(j + 1) : Word16{};
          uint32_t* to = panel + j / 2 * kPanel<T> + u;
          const auto index = std::make_index_sequence<2 * w>();
          store(to, (Word32)interleave<false>(even, odd, index));
          if (u + w < needed) store(to + w, (Word32)interleave<true>(even, odd, index));
        }
      panel_product(out, no, c, nc, pairs.factor, pairs.step, panel, divide_up(ny, 2), add);
    }
  } else {
    alignas(64) T panel[kPanelRows * kPanel<T>];
    for (int64_t c = 0; c < n; c += kPanel<T>) {
      const int64_t nc = smaller(kPanel<T>, n - c), needed = panel_columns<T>(nc);
      for (int64_t j = 0; j < ny; ++j) {
        const E* from = rows[j] + c;
        T* to = panel + j * kPanel<T>;
        for (int64_t u = 0; u < needed; u += w) {
          store(to + u, u < nc ? load_elements(from + u, nc - u) : Vec<T>{});
          prefetch(from + smaller(kPanel<T> + u, n - c - 1));
        }
      }
      panel_product(out, no, c, nc, weights, wj, panel, ny, add);
    }
  }
}

// out[i * ld + j] = scale * x_i . y_j for NX rows x and NY rows y of n elements. next: the rows after those of y.
template <typename T, class E, int NX, int NY>
ATTN_INLINE void dot_tile(const E* const* x, const E* const* y, const E* const* next, int64_t n, T scale, T* out,
                          int64_t ld) {
  constexpr int64_t w = width<T> * factor_size<E>;
  Vec<T> acc[NX * NY];
  clear(acc);
  auto step = [&](int64_t c, auto load_vector) __attribute__((always_inline)) {
    Vec<Factor<E>> yv[NY];
    for (int j = 0; j < NY; ++j) {
      yv[j] = load_vector(y[j] + c);
      prefetch(next[j] + c);
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

template <typename T, class E, int NX>
__attribute__((noinline)) void dot_tiles(const E* const* x, const E* const* y, int64_t ny, int64_t n, T scale, T* out,
                                         int64_t ld) {
  constexpr int NY = kTileVectors;
  int64_t j = 0;
  for (; j + NY <= ny; j += NY) dot_tile<T, E, NX, NY>(x, y + j, y + smaller(j + NY, ny - NY), n, scale, out + j, ld);
  for (; j < ny; ++j) dot_tile<T, E, NX, 1>(x, y + j, y + smaller(j + 1, ny - 1), n, scale, out + j, ld);
}

// out[i * ld + j] = scale * x_i . y_j for at most kMostQueries rows x and kPanelRows rows y of n elements, which are T
// or multiplied in pairs.
template <typename T, class E>
void dot_rows(const E* const* x, int64_t nx, const E* const* y, int64_t ny, int64_t n, T scale, T* out, int64_t ld) {
  constexpr int64_t w = width<T>;
  // Long rows: the sums across vectors cost less than packing. Those of pairs are as good as half as long, and faster
  // still.
  if (kPairs<E> || (n >= 16 * w && nx >= kWorthPacking)) {
    int64_t i = 0;
    for (; i + kTileRows <= nx; i += kTileRows) dot_tiles<T, E, kTileRows>(x + i, y, ny, n, scale, out + i * ld, ld);
    if constexpr (kTileRows > 4)
      for (; i + 4 <= nx; i += 4) dot_tiles<T, E, 4>(x + i, y, ny, n, scale, out + i * ld, ld);
    for (; i + 2 <= nx; i += 2) dot_tiles<T, E, 2>(x + i, y, ny, n, scale, out + i * ld, ld);
    for (; i < nx; ++i) dot_tiles<T, E, 1>(x + i, y, ny, n, scale, out + i * ld, ld);
    return;
  }
  if constexpr (!kPairs<E>) {
    if (nx < kWorthPacking || n == 0) return dot_walk(x, nx, PointedRows<T>{y}, ny, n, scale, out, ld);
    if (ny < kWorthPacking) return dot_walk(y, ny, PointedRows<T>{x}, nx, n, scale, out, 1, ld);
    alignas(64) T panel[kPanelRows * kPanel<T>];
    const T* weight[kMostQueries];
    T* rows[kMostQueries];
    for (int64_t j = 0; j < ny; j += kPanel<T>) {
      const int64_t nj = smaller(kPanel<T>, ny - j);
      for (int64_t i = 0; i < nx; ++i) rows[i] = out + i * ld + j;
      for (int64_t c = 0; c < n; c += kPanelRows) {
        const int64_t nc = smaller(kPanelRows, n - c);
        for (int64_t r = 0; r < nj; r += w) {  // y_j[c + a] to panel[a][j]; columns beyond nj repeat the last
          const T* row[w];
          for (int64_t i = 0; i < w; ++i) row[i] = y[j + smaller(r + i, nj - 1)] + c;
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
        for (int64_t i = 0; i < nx; ++i) weight[i] = x[i] + c;
        panel_product(rows, nx, 0, nj, weight, 1, panel, nc, c > 0);
      }
      if (scale != 1)
        for (int64_t i = 0; i < nx; ++i)
          for (int64_t u = 0; u < nj; u += w) store_upto(rows[i] + u, scale * load_upto(rows[i] + u, nj - u), nj - u);
    }
  }
}

}  // namespace ATTN_LEVEL
}  // namespace attn
