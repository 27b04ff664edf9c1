// The rowwise backward of scores with a score vector, for few queries. Part of a SIMD level: see simd.h.
#pragma once

#include "additive_backward_params.h"

namespace attn {
namespace ATTN_LEVEL {

constexpr int64_t kMaxRowwiseQueries = 7;  // for more, storing the exponentials of all steps is faster: columnwise

// Adds the contributions of NK steps (listed in steps, exponentials in ek) to the sums dq (Tq, size) and dv (size) of a
// strip of units. With kKeys, writes their dkeys to rows of `columns` elements. ds[i * Tk + r] is the gradient of the
// score of query i and step r. kKept: all pairs are in the range of the stored values; otherwise they are computed from
// the original rows. pair: back.pair or its unclamped(). Prefetches the inputs of the next tile, rows with `item` bytes
// per element, and the next rows of dkeys.
template <typename T, int NK, bool kKept, bool kKeys, class Pair, class TilePair>
ATTN_INLINE void rowwise_tile(const BackwardParams<T, Pair>& back, TilePair pair, int64_t b, int64_t first,
                              int64_t size, const T* eq, const T* const* ek, const int32_t* steps, const T* ds, T* dq,
                              T* dv, T* const* dkeys, int64_t columns, bool stream, const char* const* next,
                              int64_t item) {
  const int64_t Tq = back.op.Tq, Tk = back.op.Tk;
  T half[kMaxRowwiseQueries];  // half the sum of each query's ds
  for (int64_t i = 0; i < Tq; ++i) {
    half[i] = 0;
    for (int r = 0; r < NK; ++r) half[i] += T(0.5) * ds[i * Tk + r];
  }
  for (int64_t c = 0; c < size; c += width<T>) {
    Vec<T> dk[NK], sum{}, dvc = load(dv + c);
    clear(dk);
    for (int r = 0; r < NK; ++r) prefetch(next[r] + c * item);
    if constexpr (kKeys)
      if (!stream)
        for (int r = 0; r < NK; ++r)
          prefetch_to_write(reinterpret_cast<uintptr_t>(dkeys[r] + c) + NK * back.op.A * sizeof(T));
    for (int64_t i = 0; i < Tq; ++i) {
      Vec<T> dqi = load(dq + i * size + c);
      if constexpr (kKept) {
        Vec<T> k[NK];
        for (int r = 0; r < NK; ++r) k[r] = load(ek[r] + c);
        pair.template add_rows<NK>(load(eq + i * size + c), k, ds + i * Tk, half[i], dqi, dk, sum);
      } else {
        const Vec<T> q = back.query(b, i, first + c);
        for (int r = 0; r < NK; ++r)
          back.pair.add(q + back.key(b, steps[r], first + c), ds[i * Tk + r], dqi, dk[r], dvc);
      }
      store(dq + i * size + c, dqi);
    }
    store(dv + c, kKept ? dvc + Pair::dv_of_rows(sum) : dvc);
    if constexpr (kKeys) {
      const Vec<T> v = load(back.units.v + first + c);
      for (int r = 0; r < NK; ++r) {
        if (stream)
          store_stream(dkeys[r] + c, Pair::of_unit(v, dk[r]));
        else
          store_upto(dkeys[r] + c, Pair::of_unit(v, dk[r]), columns - c);
      }
    }
  }
}

// A rowwise task: the units [first, first + size) of a sentence, in whole vectors. Few queries are memory-bound, so one
// pass along rows reads the keys and, with kKeys, writes dkeys. The sums stay in L1.
template <typename T, bool kKeys, class Pair>
void rowwise_task(const BackwardParams<T, Pair>& back, int64_t b, int64_t first, int64_t size, Scratch& scratch) {
  constexpr int NK = 4;
  constexpr int64_t w = width<T>;
  const VectorScores& op = back.op;
  int32_t* list = alloc<int32_t>(scratch, op.Tk);
  const int64_t n = list_steps(back.attended, b, 0, op.Tk, list);
  T* eq = alloc<T>(scratch, op.Tq * size);
  T* dq = alloc<T>(scratch, op.Tq * size);
  T* ek = alloc<T>(scratch, NK * size);
  T* dv = alloc<T>(scratch, size);
  const Dtype dtype = op.query.dtype;
  const bool direct = dtype == native<T>;
  const int64_t columns = min(size, op.A - first);
  const StridedView3 extra = columns_from(op.extra, first);
  T* copies = alloc<T>(scratch, NK * columns);  // converted rows
  T* addend_copy = extra ? alloc<T>(scratch, columns) : nullptr;
  memset(dq, 0, op.Tq * size * sizeof(T));
  memset(dv, 0, size * sizeof(T));
  T q_abs_max = 0;
  for (int64_t i = 0; i < op.Tq; ++i) {
    const T abs_max = Pair::keep_row(
        size, eq + i * size, [&](int64_t c) __attribute__((always_inline)) { return back.query(b, i, first + c); });
    if (q_abs_max == q_abs_max && !(abs_max <= q_abs_max)) q_abs_max = abs_max;  // a NaN stays
  }
  const bool prepared = back.prepared && back.prepared.dtype == native<T>;
  const float* step_abs_max = prepared ? prepared_abs_max(back.prepared, op.Tk, b) : nullptr;
  const StridedView3 keys = columns_from(prepared ? back.prepared : op.keys, first);
  const bool stream =
      kKeys && direct &&
      worth_streaming<T>(static_cast<const T*>(back.dkeys) + first, op.A, op.B * op.Tk * op.A * item_size(dtype)) &&
      columns % w == 0;
  const T* ds = back.dscores + b * op.Tq * op.Tk;
  const int64_t item = item_size(keys.dtype);
  int64_t j = 0;
  auto tiles = [&](auto steps) __attribute__((always_inline)) {
    constexpr int kSteps = decltype(steps)::value;
    for (; j + kSteps <= n; j += kSteps) {
      bool kept = true, unclamped = true;
      T* dkeys[kSteps];
      const T* e[kSteps];
      const char* next[kSteps];
      for (int r = 0; r < kSteps; ++r) {
        const T* row = read_row(keys, b, list[j + r], columns, copies);
        T k_abs_max = 0;
        if (prepared) {
          e[r] = row;
          k_abs_max = step_abs_max[list[j + r]];
        } else {
          const int64_t whole = columns / w * w;
          e[r] = ek + r * size;
          const auto keep = [&](const auto& vector) __attribute__((always_inline)) {
            k_abs_max = Pair::keep_row(size, ek + r * size, vector);
          };
          const auto load_of = [&](const T* x, int64_t c) __attribute__((always_inline)) {
            return c < whole ? load(x + c) : load_part(x + c, columns - c);
          };
          if (extra) {
            const T* addend = read_row(extra, b, list[j + r], columns, addend_copy);
            keep([&](int64_t c) __attribute__((always_inline)) { return load_of(row, c) + load_of(addend, c); });
          } else {
            keep([&](int64_t c) __attribute__((always_inline)) { return load_of(row, c); });
          }
        }
        kept = kept && Pair::fits_row(q_abs_max, k_abs_max);
        unclamped = unclamped && Pair::fits_row_unclamped(q_abs_max, k_abs_max);
        const int64_t at = (b * op.Tk + list[j + r]) * op.A + first;
        if constexpr (kKeys) dkeys[r] = direct ? static_cast<T*>(back.dkeys) + at : copies + r * columns;
        next[r] = static_cast<const char*>(keys.data) +
                  (b * keys.stride[0] + list[min(j + kSteps + r, n - 1)] * keys.stride[1]) * item;
      }
      auto tile = [&](auto pair, auto of_kept) __attribute__((always_inline)) {
        rowwise_tile<T, kSteps, decltype(of_kept)::value, kKeys>(back, pair, b, first, size, eq, e, list + j, ds + j,
                                                                 dq, dv, dkeys, columns, stream, next, item);
      };
      if (kept && unclamped)
        tile(back.pair.unclamped(), std::true_type());
      else if (kept)
        tile(back.pair, std::true_type());
      else
        tile(back.pair, std::false_type());
      if (kKeys && !direct)
        for (int r = 0; r < kSteps; ++r)
          write_row(back.dkeys, dtype, (b * op.Tk + list[j + r]) * op.A + first, dkeys[r], columns);
    }
  };
  tiles(std::integral_constant<int, NK>());
  tiles(std::integral_constant<int, 1>());
  if (stream) stream_end();

  for (int64_t step = 0, next = 0; kKeys && step < op.Tk; ++step) {
    if (next < n && list[next] == step)
      ++next;
    else
      fill_zero<T>(back.dkeys, (b * op.Tk + step) * op.A + first, columns, dtype);
  }
  for (int64_t i = 0; i < (back.dquery == nullptr ? 0 : op.Tq); ++i)
    for (int64_t c = 0; c < size; c += w) back.write_dquery(b, i, first + c, load(dq + i * size + c));
  for (int64_t c = 0; c < size; c += w) back.write_dv(b, first + c, load(dv + c));
}

}  // namespace ATTN_LEVEL
}  // namespace attn
