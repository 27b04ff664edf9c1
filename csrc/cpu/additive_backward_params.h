// Parameters that the tasks of the backward of scores with a score vector share. Part of a SIMD level: see simd.h.
#pragma once

#include "additive_pairs.h"

namespace attn {
namespace ATTN_LEVEL {

// Shared by the tasks of a backward. Gradients of the scores are compact, (B, Tq, Tk). Sums over sentences are stored
// as one part per sentence, (B, A in whole vectors), and summed later in a fixed order.
template <typename T, class Pair>
struct BackwardParams {
  const VectorScores& op;
  const StridedView3& prepared;  // prepared keys (see PreparedSizes), or absent
  Pair pair;
  const AttentionMask& attended;
  const StridedView3 &values, &grad_context;  // inputs of previous stages, for prefetching; absent if there are none
  int64_t D;
  const FactoredV<T>& units;
  const T* dscores;
  void *dquery, *dkeys;  // each null if it is not needed
  T *dv_parts, *dbias_parts;

  // The vector of units from c on of one row of the queries or keys.
  ATTN_INLINE Vec<T> read(const StridedView3& a, int64_t b, int64_t row, int64_t c) const {
    const int64_t at = b * a.stride[0] + row * a.stride[1] + c * a.stride[2];
    return load_as<T>(a.data, a.dtype, at, a.stride[2], op.A - c);
  }
  ATTN_INLINE Vec<T> query(int64_t b, int64_t i, int64_t c) const {
    return read(op.query, b, i, c) + load(units.bias + c);
  }
  ATTN_INLINE Vec<T> key(int64_t b, int64_t j, int64_t c) const {
    const Vec<T> key = read(op.keys, b, j, c);
    return op.extra ? key + read(op.extra, b, j, c) : key;
  }

  // Stores vector c of dquery[b, i], computed from the sum of g, and adds it to dbias. Query 0 must come first.
  ATTN_INLINE void write_dquery(int64_t b, int64_t i, int64_t c, Vec<T> sum) const {
    const Vec<T> g = Pair::of_unit(load(units.v + c), sum), zero{};
    store_as<T>(dquery, op.query.dtype, (b * op.Tq + i) * op.A + c, g, op.A - c);
    T* dbias = dbias_parts + b * units.size + c;
    store(dbias, (i == 0 ? zero : load(dbias)) + g);
  }
  ATTN_INLINE void write_dkeys(int64_t b, int64_t j, int64_t c, Vec<T> sum) const {
    const Vec<T> g = Pair::of_unit(load(units.v + c), sum);
    store_as<T>(dkeys, op.query.dtype, (b * op.Tk + j) * op.A + c, g, op.A - c);
  }
  // Prefetches the columns [first, first + columns) of dquery and dkeys, which are written after the last tile.
  Prefetcher outputs(int64_t b, int64_t first, int64_t columns) const {
    Prefetcher ahead;
    const Dtype dtype = op.query.dtype;
    if (dquery != nullptr) ahead.add({dquery, dtype, {op.Tq * op.A, op.A, 1}}, b, op.Tq, first, columns);
    if (dkeys != nullptr) ahead.add({dkeys, dtype, {op.Tk * op.A, op.A, 1}}, b, op.Tk, first, columns);
    return ahead;
  }
  // Prefetches the inputs of the next task: the columns from `first` on of sentence b, for tasks of `columns` columns.
  Prefetcher next(int64_t b, int64_t first, int64_t columns) const {
    Prefetcher ahead;
    const bool same = first < op.A;
    if (!same && ++b == op.B) return ahead;
    const int64_t c = same ? first : 0, steps = attended.length(b, op.Tk);
    if (!same && grad_context) {
      ahead.add(grad_context, b, op.Tq, 0, D);
      ahead.add(values, b, steps, 0, D);
    }
    ahead.add(op.query, b, op.Tq, c, min(columns, op.A - c));
    ahead.add(op.keys, b, steps, c, min(columns, op.A - c));
    if (op.extra) ahead.add(op.extra, b, steps, c, min(columns, op.A - c));
    return ahead;
  }
  ATTN_INLINE void write_dv(int64_t b, int64_t c, Vec<T> sum) const { store(dv_parts + b * units.size + c, sum); }
};

}  // namespace ATTN_LEVEL
}  // namespace attn
