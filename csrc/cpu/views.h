// Rows of arrays of any dtype and strides, read as contiguous rows of the compute type (float; double for float64).
// Part of a SIMD level: see simd.h.
#pragma once

#include "runtime.h"
#include "simd.h"

namespace attn {
namespace ATTN_LEVEL {

template <typename T>
ATTN_INLINE T* alloc(Scratch& scratch, int64_t n) {
  return static_cast<T*>(scratch.alloc(n * static_cast<int64_t>(sizeof(T))));
}

ATTN_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
ATTN_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
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

// Loads n elements, at most a vector, of data from element `at` on, with a stride.
template <typename T>
ATTN_INLINE Vec<T> load_as(const void* data, Dtype dtype, int64_t at, int64_t stride, int64_t n) {
  n = min(n, width<T>);
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
  return Vec<T>{};  // float64 arrays are not mixed with other dtypes
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

// Row (b, i) of a: a pointer into the array if it is contiguous and of type T, otherwise a converted copy in buffer.
template <typename T>
const T* read_row(const StridedView3& a, int64_t b, int64_t i, int64_t n, T* buffer) {
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

// The same for the sum of two arrays; the second may be absent.
template <typename T>
const T* read_sum(const StridedView3& a, const StridedView3& addend, int64_t b, int64_t i, int64_t n, T* buffer) {
  const T* row = read_row(a, b, i, n, buffer);
  if (!addend) return row;
  const int64_t at = b * addend.stride[0] + i * addend.stride[1], stride = addend.stride[2];
  for (int64_t c = 0; c < n; c += width<T>) {
    const Vec<T> x = load_as<T>(addend.data, addend.dtype, at + c * stride, stride, n - c);
    store_upto(buffer + c, load_upto(row + c, n - c) + x, n - c);
  }
  return buffer;
}

// The view of the columns of a from c on; a may be absent.
ATTN_INLINE StridedView3 columns_from(StridedView3 a, int64_t c) {
  if (!a) return a;
  a.data = static_cast<const char*>(a.data) + c * a.stride[2] * item_size(a.dtype);
  return a;
}

// Prefetches row (b, i) of a.
ATTN_INLINE void prefetch_row(const StridedView3& a, int64_t b, int64_t i, int64_t n) {
  if (a.stride[2] != 1) return;
  const int64_t item = item_size(a.dtype);
  const char* row = static_cast<const char*>(a.data) + (b * a.stride[0] + i * a.stride[1]) * item;
  for (int64_t at = 0; at < n * item; at += 64) prefetch(row + at);
}

// Spreads prefetches of the next task's inputs over compute-bound work; at most half of L2, since more would evict
// itself.
class Prefetcher {
 public:
  // Columns [c, c + columns) of rows [0, n) of sentence b of a.
  void add(const StridedView3& a, int64_t b, int64_t n, int64_t c, int64_t columns) {
    const int64_t item = item_size(a.dtype), lines = n * divide_up(columns * item, kLine);
    if (a.stride[2] != 1 || lines <= 0 || count_ == kMost || (left_ + lines) * kLine > kHalfOfL2) return;
    const char* row = static_cast<const char*>(a.data) + (b * a.stride[0] + c) * item;
    blocks_[count_++] = {row, a.stride[1] * item, columns * item, n};
    left_ += lines;
  }

  // How many cache lines each of `times` calls of issue() must prefetch to finish.
  int64_t share(int64_t times) const { return divide_up(left_, max(times, 1)); }

  void issue(int64_t lines) {
    for_next(lines, [](const char* line) __attribute__((always_inline)) { prefetch(line); });
  }

  // Writes the addresses of the next `lines` cache lines to list, for a loop that prefetches one per iteration: many
  // prefetches in a row would wait for each other. Returns how many there are.
  int64_t take(int64_t lines, const char** list) {
    int64_t n = 0;
    for_next(lines, [&](const char* line) __attribute__((always_inline)) { list[n++] = line; });
    return n;
  }

 private:
  template <class Use>
  ATTN_INLINE void for_next(int64_t lines, const Use& use) {
    while (lines > 0 && at_ < count_) {
      Block& block = blocks_[at_];
      for (; offset_ < block.bytes && lines > 0; offset_ += kLine, --lines) use(block.row + offset_);
      if (offset_ < block.bytes) return;
      offset_ = 0;
      block.row += block.stride;
      if (--block.rows == 0) ++at_;
    }
  }

  static constexpr int kMost = 5;
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

// Lists the steps that may be attended in row i of the scores of sentence b, in order. A mask that queries share
// applies to every row.
ATTN_INLINE int64_t list_steps(const AttentionMask& attended, int64_t b, int64_t i, int64_t steps, int32_t* list) {
  const int64_t length = min(max(attended.length(b, steps), 0), steps);
  const bool* mask = attended.mask;
  int64_t n = 0;
  if (mask == nullptr) {
    for (; n < length; ++n) list[n] = static_cast<int32_t>(n);
    return n;
  }
  mask += b * attended.mask_stride[0] + (attended.per_query ? i / attended.vectors * attended.mask_stride[1] : 0);
  for (int64_t j = 0; j < length; ++j)
    if (mask[j * attended.mask_stride[2]]) list[n++] = static_cast<int32_t>(j);
  return n;
}

// A block of rows of one array, or of the sum of two, as pointers. Scratch memory for copies of at most `capacity` rows
// is allocated once.
template <typename T>
struct RowBlock {
  const StridedView3& array;
  const StridedView3 addend;
  int64_t n;
  T* copies;
  const T** rows;

  RowBlock(const StridedView3& array, int64_t n, int64_t capacity, Scratch& scratch, const StridedView3& addend = {})
      : array(array), addend(addend), n(n) {
    const bool direct = !addend && array.dtype == native<T> && (array.stride[2] == 1 || n == 1);
    copies = direct ? nullptr : alloc<T>(scratch, capacity * n);
    rows = alloc<const T*>(scratch, capacity);
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
      for (int64_t i = 0; i < count; ++i) rows[i] = read_sum(array, addend, b, row(i), n, copies + i * n);
    }
    return rows;
  }
};

// Whether rows of a can be multiplied in pairs, provided that kPairs<BFloat16>.
ATTN_INLINE bool is_bfloat16_rows(const StridedView3& a) { return a.dtype == Dtype::bfloat16 && a.stride[2] == 1; }

// Listed rows of a sentence, read in place; the elements of a row must be contiguous.
template <class E>
struct ListedRows {
  const E* data;
  int64_t stride;
  const int32_t* list;

  ListedRows(const StridedView3& a, int64_t b, const int32_t* list)
      : data(static_cast<const E*>(a.data) + b * a.stride[0]), stride(a.stride[1]), list(list) {}
  const E* operator[](int64_t j) const { return data + list[j] * stride; }
};

// Consecutive rows of a sentence, read in place, too.
template <class E>
struct StridedRows {
  const E* data;
  int64_t stride;

  StridedRows(const StridedView3& a, int64_t b, int64_t first)
      : data(static_cast<const E*>(a.data) + b * a.stride[0] + first * a.stride[1]), stride(a.stride[1]) {}
  const E* operator[](int64_t j) const { return data + j * stride; }
};

// Rows given by pointers.
template <class E>
struct PointedRows {
  const E* const* rows;

  const E* operator[](int64_t j) const { return rows[j]; }
};

}  // namespace ATTN_LEVEL
}  // namespace attn
