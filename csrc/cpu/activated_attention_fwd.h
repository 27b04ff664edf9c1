// v . f(query + keys + bias), forward, with an activation f of ../activations.h. Part of a SIMD level: see simd.h.
//
// Pairs share no computation: with relu, each hidden unit costs an addition, a maximum and a multiply-add, exact for
// all inputs. A tile of queries and steps keeps its sums in registers.
#pragma once

#include <type_traits>

#include "../additive_attention.h"
#include "attention.h"

#define ATTN_ACTIVATION ATTN_INLINE
#include "../activations.h"

namespace attn {
namespace ATTN_LEVEL {

// Calls body with the activation of an op.
template <typename T, class Op, class Body>
ATTN_INLINE void by_activation_of(const Op& op, const Body& body) {
  by_activation<VectorMath<T>>(op.activation, op.negative_slope, body);
}

template <typename T, class F>
struct ActivatedScore {
  const ActivatedScores& op;
  F f;
  const T *v, *bias;  // in whole vectors

  static constexpr int kSteps = ATTN_VECTOR_BYTES == 64 ? 4 : 2;  // steps of a tile, which has up to four queries

  struct Queries {
    int64_t first, n;
    const T* rows;  // (n, A in whole vectors), bias added
  };

  int64_t cost() const { return op.A; }

  Queries queries(int64_t b, int64_t first, int64_t n, Scratch& scratch) const {
    const int64_t size = padded<T>(op.A);
    T* rows = alloc<T>(scratch, n * size);
    ScratchScope scope(scratch);
    T* buffer = alloc<T>(scratch, op.A);
    for (int64_t i = 0; i < n; ++i) {
      const T* row = read_row(op.query, b, first + i, op.A, buffer);
      for (int64_t c = 0; c < size; c += width<T>)
        store(rows + i * size + c, load_upto(row + c, op.A - c) + load(bias + c));
    }
    return {first, n, rows};
  }

  void score_block(const Queries& q, int64_t b, const int32_t* list, int64_t n, T* out, int64_t ld,
                   Scratch& scratch) const {
    ScratchScope scope(scratch);
    // The block size: a block of keys fits L2 for many queries, L1 for few. A single query reads rows once and in
    // order; then only the sums of keys and extra are copied.
    const int64_t row_bytes = op.A * static_cast<int64_t>(sizeof(T));
    const bool large = q.n > 4 || (q.n == 1 && !op.extra);
    const int64_t most = min(n, max(2 * kSteps, (large ? 1 << 18 : 1 << 14) / max(row_bytes, 1)));
    RowBlock<T> block(op.keys, op.A, most, scratch, op.extra);
    for (int64_t j = 0; j < n; j += most) {
      const int64_t count = min(most, n - j);
      const T* const* keys = block.read(b, list + j, count);
      int64_t i = 0;
      for (; i + 4 <= q.n; i += 4) strip<4>(q, i, keys, count, out + i * ld + j, ld);
      for (; i + 2 <= q.n; i += 2) strip<2>(q, i, keys, count, out + i * ld + j, ld);
      for (; i < q.n; ++i) strip<1>(q, i, keys, count, out + i * ld + j, ld);
    }
  }

 private:
  template <int NQ>
  void strip(const Queries& q, int64_t i, const T* const* keys, int64_t n, T* out, int64_t ld) const {
    const T* rows = q.rows + i * padded<T>(op.A);
    int64_t j = 0;
    for (; j + kSteps <= n; j += kSteps)
      tile<NQ, kSteps>(rows, keys + j, keys + min(j + kSteps, n - kSteps), out + j, ld);
    for (; j < n; ++j) tile<NQ, 1>(rows, keys + j, keys + j, out + j, ld);
  }

  // next: the rows to prefetch, for a single query, which is memory-bound.
  template <int NQ, int NK>
  ATTN_INLINE void tile(const T* q, const T* const* keys, const T* const* next, T* out, int64_t ld) const {
    constexpr int64_t w = width<T>;
    const int64_t size = padded<T>(op.A), whole = op.A / w * w;
    int64_t c = 0;
    // Partial sums of as many terms as one sum may have (kTermsOfSum).
    for (bool first = true; first || c < size; first = false) {
      Vec<T> acc[NQ * NK];
      clear(acc);
      auto add = [&](auto key) __attribute__((always_inline)) {
        const Vec<T> vc = load(v + c);
        for (int b = 0; b < NK; ++b) {
          const Vec<T> k = key(b);
          for (int a = 0; a < NQ; ++a) acc[a * NK + b] += vc * f.value(load(q + a * size + c) + k);
        }
      };
      for (const int64_t end = min(whole, c + kTermsOfSum * w); c < end; c += w)
        add([&](int b) __attribute__((always_inline)) {
          if constexpr (NQ == 1) prefetch(next[b] + c);
          return load(keys[b] + c);
        });
      if (c == whole && c < size) {
        add([&](int b) __attribute__((always_inline)) { return load_part(keys[b] + c, op.A - c); });
        c += w;
      }
      sums<T, NQ * NK>(acc, [&](int i, T s) __attribute__((always_inline)) {
        T* to = out + i / NK * ld + i % NK;
        *to = first ? s : *to + s;
      });
    }
  }
};

template <typename T, class Op>
void activated_forward(const Op& op) {
  ScratchScope scope(thread_scratch());
  const int64_t size = padded<T>(op.A);
  T *v = alloc<T>(thread_scratch(), size), *bias = alloc<T>(thread_scratch(), size);
  for (int64_t c = 0; c < size; c += width<T>) {
    const Vec<T> zero{};
    store(v + c, load_as<T>(op.v.data, op.v.dtype, c * op.v.stride[2], op.v.stride[2], op.A - c));
    store(bias + c,
          op.bias ? load_as<T>(op.bias.data, op.bias.dtype, c * op.bias.stride[2], op.bias.stride[2], op.A - c) : zero);
  }
  by_activation_of<T>(op, [&](auto f) { forward<T>(op, ActivatedScore<T, decltype(f)>{op, f, v, bias}); });
}

}  // namespace ATTN_LEVEL
}  // namespace attn
