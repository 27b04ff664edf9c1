// Additive attention, backward. Part of a SIMD level: see simd.h; ../additive_math.h has the guards.
//
// With E = e^{2q} e^{2k}, dquery and dkeys are sums of 4 v g, g = ds (1 - tanh^2) / 4, and dv is the sum of ds tanh.
//
// Many queries, columnwise: g = ds / (E + 1/E + 2) and ds tanh = g (E - 1/E), where 1/E = e^{-2q} e^{-2k} is a product,
// too: a division and three multiplications for each pair. Few queries, rowwise: one exponential for each key is all
// there is time for; with r = 1 / (1 + E) and p = ds r, g = p (E r) and ds tanh = -2 (p - ds / 2). In neither does 1 -
// tanh^2 cancel where units are saturated.
//
// Nothing of size (B, Tq, Tk, A) is stored: the exponentials are made again. A task takes some units of one sentence,
// so that all sums over queries and steps stay within it.
#pragma once

#include "additive_attention_fwd.h"
#include "relu_attention_fwd.h"

namespace attn {
namespace ATTN_LEVEL {

#if ATTN_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kTileQueries = 7;  // their exponentials and sums fill 32 registers
#else
constexpr int kTileQueries = 4;  // and 16
#endif
constexpr int64_t kMaxRowwiseQueries = 7;  // with more, exponentials are worth storing for all steps: by columns

// The largest |x| of n elements; NaN if one is.
template <typename T>
ATTN_INLINE T largest_of(const T* x, int64_t n) {
  IntVec<T> abs_max{};
  int64_t i = 0;
  for (; i + width<T> <= n; i += width<T>) abs_max = larger_magnitude<T>(abs_max, load(x + i));
  if (i < n) abs_max = larger_magnitude<T>(abs_max, load_part(x + i, n - i));
  return largest_magnitude<T>(abs_max);
}

// Stores e^{2x}, e^{-2x}.
template <typename T>
ATTN_INLINE void store_both_exponentials(T* e, Vec<T> x) {
  if constexpr (sizeof(T) == 4) {
    Vec<T> up, down;
    exp_both_ways(x + x, &up, &down);
    store(e, up);
    store(e + width<T>, down);
  }
}

// What is particular to an activation f is a class like this one, with what a pair of query and step with score
// gradient ds adds, x = q + k: g, ds f'(x) up to a factor (of_unit), to dq and dk, and ds f(x) to dv.
// kRefined: by refined estimates of reciprocals, where they are faster than divisions (kernels.cpp).
template <typename T, bool kRefined>
struct TanhPair {
  static constexpr T kGain = 4;

  // The gradient of a unit of query or key, from the sum of g.
  ATTN_INLINE static Vec<T> of_unit(Vec<T> v, Vec<T> sum) { return kGain * v * sum; }

  // Of a row, for the sums by columns: two vectors, and whether they serve for the largest |q| and |k|.
  ATTN_INLINE static void keep(T* e, Vec<T> x) { store_both_exponentials(e, x); }
  ATTN_INLINE static bool fits_kept(T q, T k) {
    return sizeof(T) == 4 && q <= kMaxAbsExponential && k <= kMaxAbsExponential;
  }
  ATTN_INLINE void add_kept(Vec<T> q_up, Vec<T> q_down, Vec<T> k_up, Vec<T> k_down, T ds, Vec<T>& dq, Vec<T>& dk,
                            Vec<T>& dv) const {
    const Vec<T> up = at_most<T>(q_up * k_up, kMaxExponentialBackward);
    const Vec<T> down = at_most<T>(q_down * k_down, kMaxExponentialBackward);
    const Vec<T> ratio = quotient<kRefined, T>(broadcast(ds), (up + T(2)) + down);
    const Vec<T> g = kRefined ? rounded(ratio) : ratio;
    dq += g;
    dk += g;
    dv += g * (up - down);
  }

  // Of a row, for the sums by rows: one vector; returns the largest |x|, NaN if one is.
  template <class Row>
  ATTN_INLINE static T keep_row(int64_t size, T* e, const Row& row) {
    return exponentials(size, e, row);
  }
  ATTN_INLINE static bool fits_row(T q, T k) { return fits_kept(q, k); }
  ATTN_INLINE void add_row(Vec<T> q, Vec<T> k, T ds, Vec<T>& dq, Vec<T>& dk, Vec<T>& sum) const {
    const Vec<T> e = at_most<T>(q * k, kMaxExponentialBackward), x = quotient<kRefined, T>(broadcast(T(1)), T(1) + e);
    const Vec<T> pr = rounded(ds * x), g = rounded(pr * (e * x));
    dk += g;
    dq += g;
    sum += pr - T(0.5) * ds;  // each by itself: the two sums would be larger than what is left of them
  }
  ATTN_INLINE static Vec<T> dv_of_rows(Vec<T> sum) { return T(-2) * sum; }

  // By tanh itself.
  ATTN_INLINE void add(Vec<T> x, T ds, Vec<T>& dq, Vec<T>& dk, Vec<T>& dv) const {
    const Vec<T> t = tanh_any(x);
    const Vec<T> g = T(0.25) * ds * ((T(1) - t) * (T(1) + t));
    dq += g;
    dk += g;
    dv += ds * t;
  }
};

template <typename T, bool kLeaky>
struct ReluPair {
  T negative_slope;

  // 0 where no pair was in the slope: an infinite v would make NaN of it.
  ATTN_INLINE static Vec<T> of_unit(Vec<T> v, Vec<T> sum) {
    const Vec<T> zero{};
    return sum == zero ? zero : v * sum;
  }

  ATTN_INLINE static void keep(T* e, Vec<T> x) { store(e, x); }
  ATTN_INLINE static bool fits_kept(T, T) { return true; }
  ATTN_INLINE void add_kept(Vec<T> q, Vec<T>, Vec<T> k, Vec<T>, T ds, Vec<T>& dq, Vec<T>& dk, Vec<T>& dv) const {
    add(q + k, ds, dq, dk, dv);
  }

  template <class Row>
  ATTN_INLINE static T keep_row(int64_t size, T* e, const Row& row) {
    for (int64_t c = 0; c < size; c += width<T>) store(e + c, row(c));
    return T(0);
  }
  ATTN_INLINE static bool fits_row(T, T) { return true; }
  ATTN_INLINE void add_row(Vec<T> q, Vec<T> k, T ds, Vec<T>& dq, Vec<T>& dk, Vec<T>& sum) const {
    add(q + k, ds, dq, dk, sum);
  }
  ATTN_INLINE static Vec<T> dv_of_rows(Vec<T> sum) { return sum; }

  ATTN_INLINE void add(Vec<T> x, T ds, Vec<T>& dq, Vec<T>& dk, Vec<T>& dv) const {
    const Vec<T> all = broadcast(ds), zero{};
    // As of PyTorch, which lets the gradient of relu pass where x is NaN.
    const Vec<T> g = kLeaky ? (x > zero ? all : negative_slope * all) : (x <= zero ? zero : all);
    dq += g;
    dk += g;
    dv += ds * rectified<T, kLeaky>(x, negative_slope);
  }
};

// A block of columns of the queries or keys of a sentence: of vector u of row i, two vectors that Pair::keep makes
// (e^{2x}, e^{-2x} for tanh) and the gradient side by side.
template <typename T>
struct UnitColumns {
  int64_t n;
  T *cells, *abs_max;

  UnitColumns(int64_t n, int64_t vectors, Scratch& scratch)
      : n(n), cells(alloc<T>(scratch, vectors * n * 3 * width<T>)), abs_max(alloc<T>(scratch, n)) {}

  T* cell(int64_t i, int64_t u) const { return cells + (u * n + i) * 3 * width<T>; }
  T* gradient(int64_t i, int64_t u) const { return cell(i, u) + 2 * width<T>; }

  // Row i from that of the queries or keys, `columns` elements, to which bias is added unless it is null.
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

// Adds the gradients of NQ queries and n steps (cells of Columns, all in range) given ds[a * ld + j]. Returns the sum
// of ds tanh.
//
// The divider is busy all the time. Two queries could share a division, but the multiplications, or estimates of the
// reciprocal, that this takes turned out slower. Not inlined: its sums take all registers there are.
template <typename T, int NQ, class Pair>
__attribute__((noinline)) Vec<T> gradient_tile(Pair pair, T* q, T* k, int64_t n, const T* ds, int64_t ld) {
  constexpr int64_t w = width<T>, cell = 3 * w;
  Vec<T> up[NQ], down[NQ], dq[NQ], dv[2];  // two sums, so that one need not wait for the other
  clear(dq);
  clear(dv);
  for (int a = 0; a < NQ; ++a) {
    up[a] = load(q + a * cell);
    down[a] = load(q + a * cell + w);
  }
  for (int64_t j = 0; j < n; ++j, k += cell) {
    const Vec<T> k_up = load(k), k_down = load(k + w);
    Vec<T> dk = load(k + 2 * w);
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
ATTN_INLINE Vec<T> gradient_tile_of(int64_t count, Pair pair, T* q, T* k, int64_t n, const T* ds, int64_t ld) {
  if constexpr (NQ < kTileQueries) {
    if (count > NQ) return gradient_tile_of<T, NQ + 1>(count, pair, q, k, n, ds, ld);
  }
  return gradient_tile<T, NQ>(pair, q, k, n, ds, ld);
}

// The same for vector u of query i and the n steps in rows list[j] of the keys (j without a list), whatever their
// range. read_q(i, u) and read_k(j, u) are the queries and keys themselves.
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

// What the tasks of a backward share. Gradients of the scores are compact, (B, Tq, Tk); sums over sentences are left in
// parts, (B, A in whole vectors), to be added up in order.
template <typename T, class Pair>
struct BackwardParams {
  const VectorScores& op;
  const StridedView3& prepared;  // e^{2k} of all steps and what follows it, or absent
  Pair pair;
  const AttentionMask& attended;
  const StridedView3 &values, &grad_context;  // what the stages before read of a sentence; absent where there are none
  int64_t D;
  const FactoredV<T>& units;
  const T* dscores;
  void *dquery, *dkeys;  // each null where it is not needed
  T *dv_parts, *dbias_parts;

  // Vectors of units from c on, of one row of the queries (bias added) or keys.
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

  // Stores vector c of dquery[b, i], of sum g, and adds it to that of dbias; the sentence's query 0 comes first.
  ATTN_INLINE void write_dquery(int64_t b, int64_t i, int64_t c, Vec<T> sum) const {
    const Vec<T> g = Pair::of_unit(load(units.v + c), sum), zero{};
    store_as<T>(dquery, op.query.dtype, (b * op.Tq + i) * op.A + c, g, op.A - c);
    T* dbias = dbias_parts + b * units.size + c;
    store(dbias, (i == 0 ? zero : load(dbias)) + g);
  }
  // Prefetches the cache lines that are written when all tiles are done.
  ATTN_INLINE void prefetch_dquery(int64_t b, int64_t i, int64_t c) const {
    prefetch_to_write(static_cast<const char*>(dquery) + ((b * op.Tq + i) * op.A + c) * item_size(op.query.dtype));
  }
  ATTN_INLINE void prefetch_dkeys(int64_t b, int64_t j, int64_t c) const {
    prefetch_to_write(static_cast<const char*>(dkeys) + ((b * op.Tk + j) * op.A + c) * item_size(op.query.dtype));
  }
  ATTN_INLINE void write_dkeys(int64_t b, int64_t j, int64_t c, Vec<T> sum) const {
    const Vec<T> g = Pair::of_unit(load(units.v + c), sum);
    store_as<T>(dkeys, op.query.dtype, (b * op.Tk + j) * op.A + c, g, op.A - c);
  }
  // Prefetches what is read after the columns before `first` of sentence b, where a task has so many.
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

// Columnwise, for many queries: columns of a sentence, `vectors` vectors of units from `first` on. Prefetches what the
// next task reads.
template <typename T, class Pair>
void columnwise_task(const BackwardParams<T, Pair>& back, int64_t b, int64_t first, int64_t vectors, Scratch& scratch) {
  constexpr int64_t w = width<T>;
  const int64_t Tq = back.op.Tq, Tk = back.op.Tk;
  const bool per_query = back.attended.per_query;
  int32_t* list = alloc<int32_t>(scratch, Tk);
  int32_t* own = alloc<int32_t>(scratch, Tk);
  AttentionMask any = back.attended;  // a column holds every step; a query's own mask chooses among them
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

  const bool in_range = !per_query && Pair::fits_kept(largest_of(q.abs_max, Tq), largest_of(k.abs_max, n));
  const T* ds = back.dscores + b * Tq * Tk;
  const int64_t tiles = divide_up(Tq, kTileQueries);
  Prefetcher ahead = back.next(b, first + vectors * w, vectors * w);
  const int64_t share = ahead.share(vectors * tiles);
  for (int64_t u = 0; u < vectors; ++u) {
    Vec<T> dv{};
    for (int64_t row = 0; row < (back.dquery == nullptr ? 0 : Tq); ++row) back.prefetch_dquery(b, row, first + u * w);
    for (int64_t row = 0; row < (back.dkeys == nullptr ? 0 : Tk); ++row) back.prefetch_dkeys(b, row, first + u * w);
    if (in_range) {
      // Gradients of alignments near 0 are denormal, or become it over E.
      [[maybe_unused]] const DenormalsAreZero fast;
      // In tiles of about the same size: the smaller ones are slower.
      for (int64_t t = 0, i = 0; t < tiles; ++t) {
        const int64_t count = (Tq - i) / (tiles - t);
        ahead.issue(share);
        dv += gradient_tile_of<T>(count, back.pair, q.cell(i, u), k.cells + u * n * 3 * w, n, ds + i * Tk, Tk);
        i += count;
      }
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

// Rowwise: adds what NK steps (listed in steps, exponentials in ek) give to the sums dq (Tq, size) and dv (size) of a
// strip of units, and writes their dkeys to rows of `columns` elements. ds[i * Tk + r] is the gradient
// of the score of query i and step r. kKept: all of it in range of what is kept of rows, otherwise from the rows
// themselves. Without kKeys there are no dkeys. Prefetches what the next tile reads, rows of `item` bytes an element.
template <typename T, int NK, bool kKept, bool kKeys, class Pair>
ATTN_INLINE void rowwise_tile(const BackwardParams<T, Pair>& back, int64_t b, int64_t first, int64_t size, const T* eq,
                              const T* const* ek, const int32_t* steps, const T* ds, T* dq, T* dv, T* const* dkeys,
                              int64_t columns, bool stream, const char* const* next, int64_t item) {
  const int64_t Tq = back.op.Tq, Tk = back.op.Tk;
  for (int64_t c = 0; c < size; c += width<T>) {
    Vec<T> dk[NK], sum{}, dvc = load(dv + c);
    clear(dk);
    for (int r = 0; r < NK; ++r) prefetch(next[r] + c * item);
    for (int64_t i = 0; i < Tq; ++i) {
      Vec<T> dqi = load(dq + i * size + c);
      if constexpr (kKept) {
        const Vec<T> q = load(eq + i * size + c);
        for (int r = 0; r < NK; ++r) back.pair.add_row(q, load(ek[r] + c), ds[i * Tk + r], dqi, dk[r], sum);
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

// Rowwise, for few queries: memory bandwidth decides, so keys are read and dkeys, with kKeys, written in one pass along
// rows, with the sums in L1. The task has the units [first, first + size) of a sentence, in whole vectors.
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
  T* copies = alloc<T>(scratch, NK * columns);  // of rows that are converted
  T* addend_copy = extra ? alloc<T>(scratch, columns) : nullptr;
  memset(dq, 0, op.Tq * size * sizeof(T));
  memset(dv, 0, size * sizeof(T));
  T q_abs_max = 0;
  for (int64_t i = 0; i < op.Tq; ++i) {
    const T abs_max = Pair::keep_row(
        size, eq + i * size, [&](int64_t c) __attribute__((always_inline)) { return back.query(b, i, first + c); });
    if (q_abs_max == q_abs_max && !(abs_max <= q_abs_max)) q_abs_max = abs_max;  // NaN, once met, stays
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
      bool kept = true;
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
        const int64_t at = (b * op.Tk + list[j + r]) * op.A + first;
        if constexpr (kKeys) dkeys[r] = direct ? static_cast<T*>(back.dkeys) + at : copies + r * columns;
        next[r] = static_cast<const char*>(keys.data) +
                  (b * keys.stride[0] + list[min(j + kSteps + r, n - 1)] * keys.stride[1]) * item;
      }
      if (kept)
        rowwise_tile<T, kSteps, true, kKeys>(back, b, first, size, eq, e, list + j, ds + j, dq, dv, dkeys, columns,
                                             stream, next, item);
      else
        rowwise_tile<T, kSteps, false, kKeys>(back, b, first, size, eq, e, list + j, ds + j, dq, dv, dkeys, columns,
                                              stream, next, item);
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

// dquery, dv and dbias, and dkeys, where needed, from the compact gradients of the scores, (B, Tq, Tk), that the stages
// before make.
template <typename T, class Op, class Pair, class... Before>
void unit_gradients(const Op& op, const StridedView3& prepared, Pair pair, const AttentionMask& attended,
                    const StridedView3& values, const StridedView3& grad_context, int64_t D, const T* dscores,
                    const Before&... before) {
  constexpr int64_t w = width<T>;
  Scratch& call = thread_scratch();
  const FactoredV<T> units(op, call);
  T* dv_parts = alloc<T>(call, op.B * units.size);
  T* dbias_parts = alloc<T>(call, op.B * units.size);
  const BackwardParams<T, Pair> back{op,    prepared, pair,      attended, values,   grad_context, D,
                                     units, dscores,  op.dquery, op.dkeys, dv_parts, dbias_parts};
  const bool few = op.Tq <= kMaxRowwiseQueries && !attended.per_query;
  // Few queries: exponentials, sums and a tile of keys stay close to L1. Many: exponentials and sums of a sentence fill
  // a quarter of L2. Narrower strips where there are threads to feed.
  const int64_t unit_bytes = static_cast<int64_t>(sizeof(T)) * (few ? 2 * (op.Tq + 3) : 3 * (op.Tq + op.Tk));
  const int64_t in_cache = (few ? 3 << 14 : 1 << 18) / unit_bytes;
  const int64_t per_thread = divide_up(units.size * op.B, thread_count());
  const int64_t widest = max(4 * w, min(in_cache, per_thread));
  const int64_t even = divide_up(units.size, max(1, divide_up(units.size, widest)));  // all of about the same size
  const int64_t strip = max(w, padded<T>(even));
  const int64_t strips = divide_up(units.size, strip);
  auto run = [&](int64_t b, int64_t task, Scratch& scratch) {
    const int64_t first = task * strip, size = min(strip, units.size - first);
    if (few && op.dkeys != nullptr)
      rowwise_task<T, true>(back, b, first, size, scratch);
    else if (few)
      rowwise_task<T, false>(back, b, first, size, scratch);
    else
      columnwise_task(back, b, first, size / w, scratch);
  };
  for_each_sentence(op.B, before..., Stage{strips, op.Tq * op.Tk * strip, run});
  if (op.dquery == nullptr) return;
  for (int64_t c = 0; c < units.size; c += w) {
    Vec<T> v_sum{}, bias_sum{};
    for (int64_t b = 0; b < op.B; ++b) {
      v_sum += load(dv_parts + b * units.size + c);
      bias_sum += load(dbias_parts + b * units.size + c);
    }
    const Dtype dtype = op.wide ? native<T> : op.query.dtype;
    store_as<T>(op.dv, dtype, c, v_sum, op.A - c);
    if (op.dbias != nullptr) store_as<T>(op.dbias, dtype, c, bias_sum, op.A - c);
  }
}

template <typename T, class Op, class Pair, class Score>
void attention_gradients(const Op& op, const StridedView3& prepared, Pair pair,
                         void (*scores_kernel)(const ScoresForward<Score>&)) {
  Scratch& call = thread_scratch();
  ScratchScope scope(call);
  AttentionParams problem = params_of(op);
  T* weights = alloc<T>(call, op.B * op.Tq * op.Tk);
  T* dscores = alloc<T>(call, op.B * op.Tq * op.Tk);
  auto no_more = [](int64_t, int64_t, int64_t, const int32_t*, int64_t, const T*, Scratch&) {};
  // That of the values alone: a product with the alignments, compact.
  if (op.dquery == nullptr && op.dkeys == nullptr && op.dscore_bias == nullptr && op.dvalues != nullptr) {
    const auto compact = scores_backward(problem, op.alignments, {}, {}, weights, dscores, no_more);
    return for_each_sentence(op.B, compact, weighted_steps(problem, weights, op.grad_context, op.D, op.dvalues));
  }
  scores_again<T>(op, scores_kernel, call, problem);
  const auto scores =
      scores_backward(problem, op.alignments, op.grad_context, op.grad_alignments, weights, dscores, no_more);
  auto gradients = [&](const auto&... before) {
    unit_gradients<T>(op, prepared, pair, op.attended, op.values, op.grad_context, op.D, dscores, scores, before...);
  };
  if (op.dvalues == nullptr)
    gradients();
  else
    gradients(weighted_steps(problem, weights, op.grad_context, op.D, op.dvalues));
}

template <typename T, class Op, class Pair>
void scores_gradients(const Op& op, const StridedView3& prepared, Pair pair) {
  Scratch& call = thread_scratch();
  ScratchScope scope(call);
  T* dscores = alloc<T>(call, op.B * op.Tq * op.Tk);
  auto copy_row = [&](int64_t b, int64_t i, Scratch& scratch) {
    T* buffer = alloc<T>(scratch, op.Tk);
    memcpy(dscores + (b * op.Tq + i) * op.Tk, read_row(op.grad_scores, b, i, op.Tk, buffer), op.Tk * sizeof(T));
  };
  const StridedView3 none;
  unit_gradients<T>(op, prepared, pair, AttentionMask{}, none, none, 0, dscores, Stage{op.Tq, op.Tk, copy_row});
}

// f(TanhPair by divisions, or by refined estimates).
template <typename T, class F>
void by_reciprocals(const F& f) {
  if constexpr (sizeof(T) == 4 && kCanRefine)
    if (level().estimates) return f(TanhPair<T, true>{});
  f(TanhPair<T, false>{});
}

template <typename T>
void additive_attention_backward(const AdditiveAttentionBackward& op) {
  by_reciprocals<T>([&](auto pair) { attention_gradients<T>(op, op.prepared, pair, additive_scores<T>); });
}

template <typename T>
void additive_scores_backward(const AdditiveScoresBackward& op) {
  by_reciprocals<T>([&](auto pair) { scores_gradients<T>(op, op.prepared, pair); });
}

template <typename T>
void relu_attention_backward(const ReluAttentionBackward& op) {
  by_slope<T>(
      op, [&](auto leaky, T slope) { attention_gradients<T>(op, {}, ReluPair<T, leaky()>{slope}, relu_scores<T>); });
}

template <typename T>
void relu_scores_backward(const ReluScoresBackward& op) {
  by_slope<T>(op, [&](auto leaky, T slope) { scores_gradients<T>(op, {}, ReluPair<T, leaky()>{slope}); });
}

}  // namespace ATTN_LEVEL
}  // namespace attn
