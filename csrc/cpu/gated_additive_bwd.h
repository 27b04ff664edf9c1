// Gated additive attention, backward. Part of a SIMD level: see simd.h.
//
// With x = query + key + bias, s = sigmoid(gate), ds_r the gradients of the scores of a pair and t = sum_r ds_r v_r:
// dquery, dkeys += t s f'(x), dgate += t f(x) s (1 - s), dv_r += ds_r f(x) s. Nothing of size (B, Tq, Tk, A) is stored:
// f(x) s is recomputed, for a block of steps and one query at a time. t and dv_r are products of small matrices.
//
// A task computes a chunk of the steps of one sentence and some of its units. Chunks do not depend on the number of
// threads. Their partial sums of dquery and dv are stored, and summed in order afterwards.
#pragma once

#include "gated_additive_fwd.h"

namespace attn {
namespace ATTN_LEVEL {

// A stage before scores_backward that computes the products of grad_context and values, (B, Tq, Tk) compact. If there
// are fewer tiles of queries than threads, steps are divided among threads, too.
template <typename T>
auto products_by_steps(const AttentionParams& p, const StridedView3& grad_context, T* dscores) {
  const QueryTiles tiles(p.B, p.Tq, p.Tk, p.attended.per_query, p.attended.vectors);
  const int64_t cost = tiles.size * p.Tk * p.D, parts = tiles.parts(cost);
  auto run = [=, &p](int64_t b, int64_t task, Scratch& scratch) {
    const int64_t first = task / parts * tiles.size, nq = min(tiles.size, p.Tq - first);
    int32_t* list = alloc<int32_t>(scratch, p.Tk);
    const int64_t n = list_steps(p.attended, b, first, p.Tk, list);
    const Range steps(n, task % parts, parts, kPanelRows);
    if (steps.begin == steps.end) return;
    dot_listed(grad_context, first, nq, p.values, b, list + steps.begin, steps.end - steps.begin, p.D, T(1),
               dscores + (b * p.Tq + first) * p.Tk + steps.begin, p.Tk, scratch);
  };
  return Stage{grad_context ? tiles.per_sentence * parts : 0, cost / parts, run};
}

// Lists the steps in begin..end - 1 of sentence b that may be attended in row i of the scores, in order. *before: how
// many steps before `begin` may be attended.
inline int64_t list_steps_of(const AttentionMask& attended, int64_t b, int64_t i, int64_t steps, int64_t begin,
                             int64_t end, int32_t* list, int64_t* before) {
  const int64_t length = min(max(attended.length(b, steps), 0), steps);
  const bool* mask = attended.mask;
  if (mask != nullptr)
    mask += b * attended.mask_stride[0] + (attended.per_query ? i / attended.vectors * attended.mask_stride[1] : 0);
  *before = min(begin, length);
  if (mask != nullptr) {
    *before = 0;
    for (int64_t j = 0; j < min(begin, length); ++j) *before += mask[j * attended.mask_stride[2]];
  }
  int64_t n = 0;
  for (int64_t j = begin; j < min(end, length); ++j)
    if (mask == nullptr || mask[j * attended.mask_stride[2]]) list[n++] = static_cast<int32_t>(j);
  return n;
}

// One query and the steps of a block that it attends. Rows have `size` elements, in whole vectors; rows of keys and of
// the gradients of the memory have `columns` elements. For a single score vector v (kSingle), t and dv are computed
// from v and ds. For several, t is an input and hidden an output. Gradients of the memory are accumulated if `add`,
// otherwise overwritten.
template <typename T>
struct PairBlock {
  const T *query, *v, *ds;
  const T *const *keys, *const *gates, *const *slopes;
  const T* t;
  T* hidden;
  T *const *dkeys, *const *dgate;  // dgate: null without a gate
  T *dquery, *dv;
  int64_t steps, size, columns;
  bool add;
};

template <typename T, bool kSingle, class Unit>
__attribute__((noinline)) void gradient_of_pairs(Unit unit, const PairBlock<T>& p) {
  const int64_t w = width<T>;
  auto column = [&](int64_t c, auto whole) __attribute__((always_inline)) {
    constexpr bool kWhole = decltype(whole)::value;
    const int64_t left = p.columns - c;
    auto read = [&](const T* x) __attribute__((always_inline)) { return kWhole ? load(x) : load_part(x, left); };
    auto add_to = [&](T* to, Vec<T> x) __attribute__((always_inline)) {
      if (p.add) x += read(to);
      if constexpr (kWhole)
        store(to, x);
      else
        store_part(to, x, left);
    };
    const Vec<T> q = load(p.query + c), v = kSingle ? load(p.v + c) : q;
    Vec<T> dq{}, dv{};
    for (int64_t r = 0; r < p.steps; ++r) {
      const Vec<T> s = load(p.gates[r] + c), t = kSingle ? p.ds[r] * v : load(p.t + r * p.size + c);
      Vec<T> g;
      const Vec<T> y = unit(q + read(p.keys[r] + c), t * s, &g);
      dq += g;
      add_to(p.dkeys[r] + c, g);
      if constexpr (kSingle)
        dv += p.ds[r] * (y * s);
      else
        store(p.hidden + r * p.size + c, y * s);
      if (p.dgate != nullptr) add_to(p.dgate[r] + c, t * y * load(p.slopes[r] + c));
    }
    store(p.dquery + c, load(p.dquery + c) + dq);
    if constexpr (kSingle) store(p.dv + c, load(p.dv + c) + dv);
  };
  int64_t c = 0;
  for (; c + w <= p.columns; c += w) column(c, std::true_type());
  if (c < p.columns) column(c, std::false_type());
}

// Shared by the tasks of a backward. dscores: compact, (B, Tq, Tk). Parts: partial sums for each sentence and chunk, of
// dquery (queries, A in whole vectors) and of dv (vectors, A in whole vectors).
template <typename T>
struct GatedBackward {
  const GatedAdditiveScores& op;
  const AttentionMask& attended;
  const GatedUnits<T>& units;
  const T* dscores;
  void *dkeys, *dgate;  // each null if it is not needed
  T *dquery_parts, *dv_parts;
  int64_t queries, chunk, chunks;

  T* dquery_part(int64_t part, int64_t i) const { return dquery_parts + (part * queries + i) * units.size; }
  T* dv_part(int64_t part, int64_t r) const { return dv_parts + (part * op.vectors + r) * units.size; }
};

// A block of rows of dkeys or dgate: rows of the output itself if they can be written directly, otherwise a buffer of
// sums.
template <typename T>
struct GradientRows {
  void* out;
  Dtype dtype;
  bool direct;
  T *sums, **rows;

  GradientRows(void* out, Dtype dtype, bool once, int64_t steps, int64_t size, Scratch& scratch)
      : out(out), dtype(dtype), direct(out != nullptr && once && dtype == native<T>) {
    sums = direct ? nullptr : alloc<T>(scratch, steps * size);
    rows = alloc<T*>(scratch, steps);
  }

  // at(r): the offset of row r of the block in the output.
  template <class At>
  void start(int64_t steps, int64_t size, const At& at) {
    for (int64_t r = 0; r < steps; ++r) rows[r] = direct ? static_cast<T*>(out) + at(r) : sums + r * size;
  }
  template <class At>
  void finish(int64_t steps, int64_t columns, const At& at) {
    for (int64_t r = 0; r < (direct || out == nullptr ? 0 : steps); ++r) write_row(out, dtype, at(r), rows[r], columns);
  }
};

template <typename T, class Unit>
void gated_gradients(const GatedBackward<T>& back, Unit unit, int64_t b, int64_t chunk, int64_t first, int64_t size,
                     Scratch& scratch) {
  const GatedAdditiveScores& op = back.op;
  const int64_t R = op.vectors, Tk = op.Tk, part = b * back.chunks + chunk;
  const int64_t begin = chunk * back.chunk, end = min(begin + back.chunk, Tk), columns = min(size, op.A - first);
  const bool per_query = back.attended.per_query, has_gate = static_cast<bool>(op.gate);
  AttentionMask any = back.attended;  // a block has the steps of all queries; the mask of each query is applied later
  if (per_query) any.mask = nullptr;
  int32_t* list = alloc<int32_t>(scratch, back.chunk);
  int64_t* at = alloc<int64_t>(scratch, back.queries);  // how many steps query i attends before this block
  const int64_t n = list_steps_of(any, b, 0, Tk, begin, end, list, at);
  for (int64_t i = 0; i < back.queries; ++i) {
    at[i] = at[0];
    if (per_query) list_steps_of(back.attended, b, i * R, Tk, begin, begin, list, at + i);
  }
  T* query = alloc<T>(scratch, back.queries * size);
  T* buffer = alloc<T>(scratch, columns);
  for (int64_t i = 0; i < back.queries; ++i) {
    const T* row = read_row(columns_from(op.query, first), b, i, columns, buffer);
    for (int64_t c = 0; c < size; c += width<T>) {
      store(query + i * size + c, load_upto(row + c, columns - c) + load(back.units.bias + first + c));
      store(back.dquery_part(part, i) + first + c, Vec<T>{});
    }
  }
  for (int64_t r = 0; r < R; ++r) memset(back.dv_part(part, r) + first, 0, size * sizeof(T));

  const int64_t most = R == 1 ? kRowsAtOnce : back.units.block_steps;
  const StridedView3 all_keys = columns_from(op.keys, first),
                     all_gates = columns_from(has_gate ? op.gate : op.keys, first);
  RowBlock<T> keys(all_keys, columns, most, scratch, columns_from(op.extra, first)),
      gates(all_gates, columns, most, scratch);
  T* gate = alloc<T>(scratch, has_gate ? 2 * most * size : 0);
  T* slope = gate + most * size;
  T* t = alloc<T>(scratch, R > 1 ? 2 * most * size : 0);
  T* hidden = t + most * size;
  const bool once = back.queries == 1 && !per_query;
  GradientRows<T> dkeys(back.dkeys, op.query.dtype, once, most, size, scratch);
  GradientRows<T> dgate(back.dgate, op.query.dtype, once, most, size, scratch);
  auto pointers = [&] { return alloc<T*>(scratch, most); };
  // Rows of the block, and those rows that one query attends.
  T **gate_rows = pointers(), **slope_rows = pointers(), **t_rows = pointers(), **own_dkeys = pointers(),
    **own_dgate = pointers();
  const T **own_keys = alloc<const T*>(scratch, most), **own_gates = alloc<const T*>(scratch, most),
          **own_slopes = alloc<const T*>(scratch, most), **hidden_rows = alloc<const T*>(scratch, most);
  const T** v = alloc<const T*>(scratch, R);
  // Partial sums over a few queries and steps. They are added to the totals before they get so long that rounding
  // errors accumulate.
  T** dv = alloc<T*>(scratch, R);
  T* dv_sums = alloc<T>(scratch, R * size);
  memset(dv_sums, 0, R * size * sizeof(T));
  for (int64_t r = 0; r < R; ++r) {
    v[r] = back.units.v[r] + first;
    dv[r] = dv_sums + r * size;
  }
  int64_t terms = 0;
  auto add_up = [&] {
    for (int64_t r = 0; r < R; ++r)
      for (int64_t c = 0; c < size; c += width<T>) {
        T* all = back.dv_part(part, r) + first + c;
        store(all, load(all) + load(dv[r] + c));
      }
    memset(dv_sums, 0, R * size * sizeof(T));
    terms = 0;
  };
  for (int64_t r = 0; r < most; ++r) {
    gate_rows[r] = has_gate ? gate + r * size : const_cast<T*>(back.units.ones);
    slope_rows[r] = has_gate ? slope + r * size : nullptr;
    t_rows[r] = t + r * size;
    hidden_rows[r] = hidden + r * size;
  }
  for (int64_t j = 0; j < n; j += most) {
    const int64_t count = min(most, n - j);
    auto row_at = [&](int64_t r) { return (b * Tk + list[j + r]) * op.A + first; };
    const T* const* k = keys.read(b, list + j, count);
    if (has_gate) gates_of_block<T>(gates.read(b, list + j, count), count, columns, size, gate, slope);
    dkeys.start(count, size, row_at);
    if (has_gate) dgate.start(count, size, row_at);
    if (per_query) {
      memset(dkeys.sums, 0, count * size * sizeof(T));
      if (has_gate) memset(dgate.sums, 0, count * size * sizeof(T));
    }
    for (int64_t i = 0; i < back.queries; ++i) {
      const T* ds = back.dscores + (b * back.queries + i) * R * Tk + at[i];
      PairBlock<T> pairs{query + i * size,
                         v[0],
                         ds,
                         k,
                         gate_rows,
                         slope_rows,
                         t,
                         hidden,
                         dkeys.rows,
                         has_gate ? dgate.rows : nullptr,
                         back.dquery_part(part, i) + first,
                         dv[0],
                         count,
                         size,
                         columns,
                         per_query || i > 0};
      if (per_query) {
        const bool* mask = back.attended.mask + b * back.attended.mask_stride[0] + i * back.attended.mask_stride[1];
        int64_t own = 0;
        for (int64_t r = 0; r < count; ++r) {
          if (!mask[list[j + r] * back.attended.mask_stride[2]]) continue;
          own_keys[own] = k[r];
          own_gates[own] = gate_rows[r];
          own_slopes[own] = slope_rows[r];
          own_dkeys[own] = dkeys.rows[r];
          own_dgate[own++] = dgate.rows[r];
        }
        if (own == 0) continue;
        pairs.keys = own_keys;
        pairs.gates = own_gates;
        pairs.slopes = own_slopes;
        pairs.dkeys = own_dkeys;
        if (has_gate) pairs.dgate = own_dgate;
        pairs.steps = own;
      }
      at[i] += pairs.steps;
      if (terms++ == kTermsOfSum) add_up();
      if (R == 1) {
        gradient_of_pairs<T, true>(unit, pairs);
        continue;
      }
      for (int64_t r = 0; r < R; r += kPanelRows)
        gemm_nn(t_rows, pairs.steps, ds + r * Tk, 1, Tk, PointedRows<T>{v + r}, min(kPanelRows, R - r), size, r > 0);
      gradient_of_pairs<T, false>(unit, pairs);
      for (int64_t r = 0; r < R; r += kMaxQueries)
        gemm_nn(dv + r, min(kMaxQueries, R - r), ds + r * Tk, Tk, 1, PointedRows<T>{hidden_rows}, pairs.steps, size,
                true);
    }
    dkeys.finish(count, columns, row_at);
    if (has_gate) dgate.finish(count, columns, row_at);
  }
  add_up();
  for (int64_t step = begin, next = 0; step < end; ++step) {  // zeros for steps that no query attends
    if (next < n && list[next] == step) {
      ++next;
      continue;
    }
    for (void* out : {back.dkeys, back.dgate})
      if (out != nullptr) fill_zero<T>(out, (b * Tk + step) * op.A + first, columns, op.query.dtype);
  }
}

// Computes dquery, dv, dbias, dgate and dkeys, if needed, from the compact gradients of the scores, (B, Tq, Tk), that
// the stages `before` compute.
template <typename T, class Op, class... Before>
void gated_unit_gradients(const Op& op, const AttentionMask& attended, const T* dscores, const Before&... before) {
  constexpr int64_t w = width<T>;
  Scratch& call = thread_scratch();
  const GatedUnits<T> units(op, call);
  // Chunks are so long that the partial sums need less memory than the keys.
  const int64_t queries = op.Tq / op.vectors, chunk = min(op.Tk, max(1024, 4 * (queries + op.vectors)));
  const int64_t chunks = divide_up(op.Tk, chunk), parts = op.B * chunks;
  T* dquery_parts = alloc<T>(call, parts * queries * units.size);
  T* dv_parts = alloc<T>(call, parts * op.vectors * units.size);
  const GatedBackward<T> back{op,           attended, units,   dscores, op.dkeys, op.dgate,
                              dquery_parts, dv_parts, queries, chunk,   chunks};
  // A task has all units, unless more tasks are needed for the threads or the sums do not fit L2. From eight vectors
  // on, the order of summation does not depend on the width (streamed.h).
  const int64_t in_cache = (1 << 18) / static_cast<int64_t>(sizeof(T)) / (2 * (queries + op.vectors) + 8 * 8);
  const int64_t widest = max(8 * w, min(in_cache, divide_up(units.size * parts, thread_count())) / w * w);
  const int64_t strips = units.size == 0 ? 0 : max(1, units.size / widest);
  auto run = [&](int64_t b, int64_t task, Scratch& scratch) {
    const int64_t strip = task % strips, first = strip * widest;
    const int64_t size = strip + 1 == strips ? units.size - first : widest;
    by_unit<T>(op, [&](auto unit) { gated_gradients(back, unit, b, task / strips, first, size, scratch); });
  };
  for_each_sentence(op.B, before..., Stage{chunks * strips, op.Tq * chunk * min(widest, units.size), run});
  if (op.dquery == nullptr) return;
  for_each_task(units.size / w, parts * (queries + op.vectors) * w, [&](int64_t u, Scratch&) {
    const int64_t c = u * w;
    Vec<T> bias_sum{};
    for (int64_t b = 0; b < op.B; ++b) {
      Vec<T> of_sentence{};
      for (int64_t i = 0; i < queries; ++i) {
        Vec<T> sum{};
        for (int64_t part = b * chunks; part < (b + 1) * chunks; ++part) sum += load(back.dquery_part(part, i) + c);
        store_as<T>(op.dquery, op.query.dtype, (b * queries + i) * op.A + c, sum, op.A - c);
        of_sentence += sum;
      }
      bias_sum += of_sentence;
    }
    if (op.dbias != nullptr) store_as<T>(op.dbias, op.query.dtype, c, bias_sum, op.A - c);
    for (int64_t r = 0; r < op.vectors; ++r) {
      Vec<T> sum{};
      for (int64_t part = 0; part < parts; ++part) sum += load(back.dv_part(part, r) + c);
      store_as<T>(op.dv, op.query.dtype, r * op.A + c, sum, op.A - c);
    }
  });
}

template <typename T>
void gated_additive_backward(const AttentionBackward<GatedAdditiveScores>& op) {
  Scratch& call = thread_scratch();
  ScratchScope scope(call);
  AttentionParams problem = params_of(op);
  problem.has_products = static_cast<bool>(op.grad_context);
  scores_again<T>(op, gated_additive_forward<T, ScoresForward<GatedAdditiveScores>>, call, problem);
  T* weights = alloc<T>(call, op.B * op.Tq * op.Tk);
  T* dscores = alloc<T>(call, op.B * op.Tq * op.Tk);
  const auto products = products_by_steps(problem, op.grad_context, dscores);
  const auto scores = scores_backward(problem, op.alignments, op.grad_context, op.grad_alignments, weights, dscores,
                                      [](int64_t, int64_t, int64_t, const int32_t*, int64_t, const T*, Scratch&) {});
  if (op.dvalues == nullptr)
    gated_unit_gradients<T>(op, op.attended, dscores, products, scores);
  else
    gated_unit_gradients<T>(op, op.attended, dscores, products, scores,
                            weighted_steps(problem, weights, op.grad_context, op.D, op.dvalues));
}

template <typename T>
void gated_additive_backward(const ScoresBackward<GatedAdditiveScores>& op) {
  Scratch& call = thread_scratch();
  ScratchScope scope(call);
  T* dscores = alloc<T>(call, op.B * op.Tq * op.Tk);
  AttentionMask all;
  all.vectors = op.vectors;
  gated_unit_gradients<T>(op, all, dscores, compact_gradient(op, dscores));
}

}  // namespace ATTN_LEVEL
}  // namespace attn
