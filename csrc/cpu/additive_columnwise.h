// The columnwise backward of scores with a score vector, for many queries: a task computes some units of all queries
// and steps of a sentence. Part of a SIMD level: see simd.h.
#pragma once

#include "additive_backward_params.h"

namespace attn {
namespace ATTN_LEVEL {

#if ATTN_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kTileQueries = 7;  // their exponentials and sums fill 32 registers
#else
constexpr int kTileQueries = 4;  // their exponentials and sums fill 16 registers
#endif

// The largest |x| of n elements; NaN if one is NaN.
template <typename T>
ATTN_INLINE T largest_of(const T* x, int64_t n) {
  IntVec<T> abs_max{};
  int64_t i = 0;
  for (; i + width<T> <= n; i += width<T>) abs_max = larger_magnitude<T>(abs_max, load(x + i));
  if (i < n) abs_max = larger_magnitude<T>(abs_max, load_part(x + i, n - i));
  return largest_magnitude<T>(abs_max);
}

// A block of columns of the queries or keys of a sentence. A cell, for vector u of row i, holds three adjacent vectors:
// the two that Pair::keep computes (exponentials of x and of -x for tanh), and the gradient.
template <typename T>
struct UnitColumns {
  int64_t n;
  T *cells, *abs_max;

  UnitColumns(int64_t n, int64_t vectors, Scratch& scratch)
      : n(n), cells(alloc<T>(scratch, vectors * n * 3 * width<T>)), abs_max(alloc<T>(scratch, n)) {}

  T* cell(int64_t i, int64_t u) const { return cells + (u * n + i) * 3 * width<T>; }
  T* gradient(int64_t i, int64_t u) const { return cell(i, u) + 2 * width<T>; }

  // Sets row i from a row of the queries or keys with `columns` elements. bias, unless null, is added.
  template <class Pair>
  ATTN_INLINE void set(int64_t i, const T* row, const T* bias, int64_t columns) {
    IntVec<T> most{};
    const Vec<T> zero{};
    for (int64_t u = 0, c = 0; c < columns; ++u, c += width<T>) {
      Vec<T> x = load_upto(row + c, columns - c);
      if (bias != nullptr) x += load(bias + c);
      T* e = cell(i, u);
      Pair::keep(e, x);
      store(e + 2 * width<T>, zero);
      most = larger_magnitude<T>(most, x);
    }
    abs_max[i] = largest_magnitude<T>(most);
  }
};

// Accumulates the gradients of NQ queries and n steps (cells of UnitColumns, all in range) from ds[a * ld + j]. Returns
// the sum of ds tanh. Prefetches the cache lines ahead[j].
//
// Where pairs are divided, divisions are the bottleneck. Two queries could share a division, but the additional
// multiplications turned out slower. Not inlined: its sums use all registers.
template <typename T, int NQ, class Pair>
__attribute__((noinline)) Vec<T> gradient_tile(Pair pair, T* q, T* k, int64_t n, const T* ds, int64_t ld,
                                               const char* const* ahead) {
  constexpr int64_t w = width<T>, cell = 3 * w;
  Vec<T> up[NQ], down[NQ], dq[NQ], dv[2];  // two independent sums hide the latency of an addition
  clear(dq);
  clear(dv);
  for (int a = 0; a < NQ; ++a) {
    up[a] = load(q + a * cell);
    down[a] = load(q + a * cell + w);
  }
  for (int64_t j = 0; j < n; ++j, k += cell) {
    const Vec<T> k_up = load(k), k_down = load(k + w);
    Vec<T> dk = load(k + 2 * w);
    prefetch(ahead[j]);
    for (int a = 0; a < NQ; ++a) pair.add_kept(up[a], down[a], k_up, k_down, ds[a * ld + j], dq[a], dk, dv[a % 2]);
    store(k + 2 * w, dk);
  }
  for (int a = 0; a < NQ; ++a) {
    T* to = q + a * cell + 2 * w;
    store(to, load(to) + dq[a]);
  }
  return dv[0] + dv[1];
}

// The same for `count` queries, at most kTileQueries.
template <typename T, int NQ = 1, class Pair>
ATTN_INLINE Vec<T> gradient_tile_of(int64_t count, Pair pair, T* q, T* k, int64_t n, const T* ds, int64_t ld,
                                    const char* const* ahead) {
  if constexpr (NQ < kTileQueries) {
    if (count > NQ) return gradient_tile_of<T, NQ + 1>(count, pair, q, k, n, ds, ld, ahead);
  }
  return gradient_tile<T, NQ>(pair, q, k, n, ds, ld, ahead);
}

// The same for vector u of query i and the n steps in rows list[j] of the keys (j without a list), without limits on
// their range. read_q(i, u) and read_k(j, u) return the original queries and keys.
template <typename T, class Pair, class ReadQ, class ReadK>
ATTN_INLINE Vec<T> gradient_row(Pair pair, const UnitColumns<T>& q, int64_t i, const UnitColumns<T>& k, int64_t u,
                                const int32_t* list, int64_t n, const T* ds, const ReadQ& read_q, const ReadK& read_k) {
  constexpr int64_t w = width<T>;
  T* cell = q.cell(i, u);
  const Vec<T> x = read_q(i, u), up = load(cell), down = load(cell + w);
  Vec<T> dq = load(cell + 2 * w), dv{};
  for (int64_t j = 0; j < n; ++j) {
    const int64_t row = list == nullptr ? j : list[j];
    T* step = k.cell(row, u);
    Vec<T> dk = load(step + 2 * w);
    if (Pair::fits_kept(q.abs_max[i], k.abs_max[row]))
      pair.add_kept(up, down, load(step), load(step + w), ds[j], dq, dk, dv);
    else
      pair.add(x + read_k(row, u), ds[j], dq, dk, dv);
    store(step + 2 * w, dk);
  }
  store(cell + 2 * w, dq);
  return dv;
}

// A columnwise task, for many queries: `vectors` vectors of units of a sentence from `first` on. Prefetches the inputs
// of the next task.
template <typename T, class Pair>
void columnwise_task(const BackwardParams<T, Pair>& back, int64_t b, int64_t first, int64_t vectors, Scratch& scratch) {
  constexpr int64_t w = width<T>;
  const int64_t Tq = back.op.Tq, Tk = back.op.Tk;
  const bool per_query = back.attended.per_query;
  int32_t* list = alloc<int32_t>(scratch, Tk);
  int32_t* own = alloc<int32_t>(scratch, Tk);
  AttentionMask any = back.attended;  // a column holds every step; the mask of each query is applied later
  if (per_query) any.mask = nullptr;
  const int64_t n = list_steps(any, b, 0, Tk, list);
  auto read_q = [&](int64_t i, int64_t u) __attribute__((always_inline)) { return back.query(b, i, first + u * w); };
  auto read_k = [&](int64_t j, int64_t u)
                    __attribute__((always_inline)) { return back.key(b, list[j], first + u * w); };
  UnitColumns<T> q(Tq, vectors, scratch), k(n, vectors, scratch);
  const StridedView3 queries = columns_from(back.op.query, first), keys = columns_from(back.op.keys, first);
  const StridedView3 extra = columns_from(back.op.extra, first);
  const int64_t columns = min(vectors * w, back.op.A - first);
  T* buffer = alloc<T>(scratch, columns);
  for (int64_t i = 0; i < Tq; ++i) {
    prefetch_row(queries, b, min(i + 1, Tq - 1), columns);
    q.template set<Pair>(i, read_row(queries, b, i, columns, buffer), back.units.bias + first, columns);
  }
  for (int64_t j = 0; j < n; ++j) {
    prefetch_row(keys, b, list[min(j + 1, n - 1)], columns);
    if (extra) prefetch_row(extra, b, list[min(j + 1, n - 1)], columns);
    k.template set<Pair>(j, read_sum(keys, extra, b, list[j], columns, buffer), nullptr, columns);
  }

  const T q_most = largest_of(q.abs_max, Tq), k_most = largest_of(k.abs_max, n);
  const bool in_range = !per_query && Pair::fits_kept(q_most, k_most);
  const T* ds = back.dscores + b * Tq * Tk;
  const int64_t tiles = divide_up(Tq, kTileQueries);
  Prefetcher ahead = back.next(b, first + vectors * w, vectors * w), outputs = back.outputs(b, first, columns);
  const int64_t share = ahead.share(vectors * tiles), share_of_outputs = outputs.share(vectors * tiles);
  const char** lines = alloc<const char*>(scratch, share + share_of_outputs + n);
  for (int64_t u = 0; u < vectors; ++u) {
    Vec<T> dv{};
    if (in_range) {
      // Gradients of alignments near 0 are denormal, or become denormal when divided by E.
      [[maybe_unused]] const DenormalsAreZero fast;
      auto add_tiles = [&](auto pair) {
        // Tiles of about equal size, as small tiles are slower.
        for (int64_t t = 0, i = 0; t < tiles; ++t) {
          const int64_t count = (Tq - i) / (tiles - t);
          int64_t taken = outputs.take(share_of_outputs, lines);
          taken += ahead.take(share, lines + taken);
          for (; taken > n; --taken) prefetch(lines[taken - 1]);
          for (; taken < n; ++taken) lines[taken] = reinterpret_cast<const char*>(lines);  // nothing more to prefetch
          dv += gradient_tile_of<T>(count, pair, q.cell(i, u), k.cells + u * n * 3 * w, n, ds + i * Tk, Tk, lines);
          i += count;
        }
      };
      if (Pair::fits_unclamped(q_most, k_most))
        add_tiles(back.pair.unclamped());
      else
        add_tiles(back.pair);
    } else {
      for (int64_t i = 0; i < Tq; ++i) {
        const int64_t count = per_query ? list_steps(back.attended, b, i, Tk, own) : n;
        dv += gradient_row(back.pair, q, i, k, u, per_query ? own : nullptr, count, ds + i * Tk, read_q, read_k);
      }
    }
    back.write_dv(b, first + u * w, dv);
  }
  for (int64_t i = 0; i < (back.dquery == nullptr ? 0 : Tq); ++i)
    for (int64_t u = 0; u < vectors; ++u) back.write_dquery(b, i, first + u * w, load(q.gradient(i, u)));
  if (back.dkeys == nullptr) return;
  for (int64_t j = 0, next = 0; j < Tk; ++j) {
    const bool listed = next < n && list[next] == j;
    const Vec<T> zero{};
    for (int64_t u = 0; u < vectors; ++u)
      back.write_dkeys(b, j, first + u * w, listed ? load(k.gradient(next, u)) : zero);
    next += listed;
  }
}

}  // namespace ATTN_LEVEL
}  // namespace attn
