// The part that all attention ops share, independent of the score. Forward: normalisation over the attended steps, and
// context. Backward: the gradients of scores and values from the gradients of context and alignments. Part of a SIMD
// level: see simd.h.
//
// Padding is skipped: a list holds the attended steps of a sentence. Scores, weights and gradients are computed for the
// listed steps only ("compact" rows), so values in padding cannot reach a result.
#pragma once

#include "softmax.h"
#include "tasks.h"

namespace attn {
namespace ATTN_LEVEL {

// Vectors of terms per partial sum. In a longer sum, a large term would absorb the last bits of more small terms.
constexpr int64_t kTermsOfSum = 48;

template <typename T>
void fill_zero(void* data, int64_t at, int64_t n, Dtype dtype) {
  memset(static_cast<char*>(data) + at * item_size(dtype), 0, n * item_size(dtype));
}

// Expands a compact row p to a row (Tk,) of out: the elements of p at the listed steps, 0 elsewhere.
template <typename T>
void write_compact(void* out, Dtype dtype, int64_t at, int64_t steps, const int32_t* list, int64_t n, const T* p) {
  if (n == 0 || list[n - 1] == n - 1) {  // the list is exactly the first n steps
    write_row(out, dtype, at, p, n);
    if (n < steps) fill_zero<T>(out, at + n, steps - n, dtype);
    return;
  }
  fill_zero<T>(out, at, steps, dtype);
  for (int64_t j = 0; j < n; ++j) store_as<T>(out, dtype, at + list[j], broadcast(p[j]), 1);
}

// out = weights (row i at weight + i * ld) times the listed rows of array, for a range of columns. out is stored as
// dtype into data (.., out_columns), starting at row `row`.
template <typename T>
void weighted_output(const StridedView3& array, int64_t b, const int32_t* list, int64_t n, const T* weight, int64_t ld,
                     int64_t out_rows, const Range& columns, void* data, Dtype dtype, int64_t row, int64_t out_columns,
                     Scratch& scratch) {
  const int64_t nc = columns.end - columns.begin, at = row * out_columns + columns.begin;
  if (n == 0 || nc == 0) {
    for (int64_t i = 0; i < out_rows; ++i) fill_zero<T>(data, at + i * out_columns, nc, dtype);
    return;
  }
  ScratchScope scope(scratch);
  const StridedView3 strip = columns_from(array, columns.begin);
  if constexpr (sizeof(T) == 4 && kPairs<BFloat16>) {
    if (is_bfloat16_rows(array) && kMinPackedRows <= out_rows && n <= kMaxPairedRows) {  // one call: no sums to keep
      BFloat16** out = alloc<BFloat16*>(scratch, out_rows);
      for (int64_t i = 0; i < out_rows; ++i) out[i] = static_cast<BFloat16*>(data) + at + i * out_columns;
      return gemm_nn(out, out_rows, weight, ld, 1, ListedRows<BFloat16>(strip, b, list), n, nc, false);
    }
  }
  const bool direct = dtype == native<T>;
  T* sums = direct ? static_cast<T*>(data) + at : alloc<T>(scratch, out_rows * nc);
  const int64_t sums_ld = direct ? out_columns : nc;
  T** out = alloc<T*>(scratch, out_rows);
  const T** weights = alloc<const T*>(scratch, out_rows);
  for (int64_t i = 0; i < out_rows; ++i) {
    out[i] = sums + i * sums_ld;
    weights[i] = weight + i * ld;
  }
  auto sum_of = [&](int64_t first, int64_t count) {  // sums the listed steps [first, first + count) into out
    const int32_t* steps = list + first;
    if (strip.stride[2] == 1)
      return by_element<T>(strip.dtype, [&](auto* element) {
        using E = std::remove_cv_t<std::remove_pointer_t<decltype(element)>>;
        if (out_rows <= kMaxStreamedRows<E>)
          return weighted_sum_streamed(out, out_rows, weights, 1, ListedRows<E>(strip, b, steps), count, nc, false);
        for (int64_t j = 0; j < count; j += kMaxRows<E>)
          gemm_nn(out, out_rows, weight + first + j, ld, 1, ListedRows<E>(strip, b, steps + j),
                  min(count - j, kMaxRows<E>), nc, j > 0);
      });
    ScratchScope scope(scratch);
    RowBlock<T> block(strip, nc, min(count, kPanelRows), scratch);
    for (int64_t j = 0; j < count; j += kPanelRows) {
      const int64_t rows = min(count - j, kPanelRows);
      gemm_nn(out, out_rows, weight + first + j, ld, 1, PointedRows<T>{block.read(b, steps + j, rows)}, rows, nc,
              j > 0);
    }
  };
  sum_of(0, min(n, kMaxSummedSteps));
  if (n > kMaxSummedSteps) {
    T* part = alloc<T>(scratch, out_rows * nc);
    for (int64_t i = 0; i < out_rows; ++i) out[i] = part + i * nc;
    for (int64_t first = kMaxSummedSteps; first < n; first += kMaxSummedSteps) {
      for (int64_t i = 0; i < out_rows; ++i) weights[i] = weight + i * ld + first;
      sum_of(first, min(n - first, kMaxSummedSteps));
      for (int64_t i = 0; i < out_rows; ++i)
        for (int64_t c = 0; c < nc; ++c) sums[i * sums_ld + c] += part[i * nc + c];
    }
  }
  if (!direct)
    for (int64_t i = 0; i < out_rows; ++i) write_row(data, dtype, at + i * out_columns, sums + i * sums_ld, nc);
}

// out[i * ld + j] = scale * x[b, first + i] . y[b, list[j]], for at most kMaxQueries rows of x. Rows have `columns`
// elements.
template <typename T>
void dot_listed(const StridedView3& x, int64_t first, int64_t x_rows, const StridedView3& y, int64_t b,
                const int32_t* list, int64_t n, int64_t columns, T scale, T* out, int64_t ld, Scratch& scratch) {
  ScratchScope scope(scratch);
  if constexpr (sizeof(T) == 4 && kPairs<BFloat16>) {
    if (is_bfloat16_rows(x) && is_bfloat16_rows(y)) {
      const StridedRows<BFloat16> queries(x, b, first);
      const ListedRows<BFloat16> steps(y, b, list);
      const BFloat16 *rows[kMaxQueries], *block[kPanelRows];
      for (int64_t i = 0; i < x_rows; ++i) rows[i] = queries[i];
      if (x_rows < kMinPackedRows) return dot_streamed(rows, x_rows, steps, n, columns, scale, out, ld);
      for (int64_t j = 0; j < n; j += kPanelRows) {
        const int64_t count = min(n - j, kPanelRows);
        for (int64_t r = 0; r < count; ++r) block[r] = steps[j + r];
        gemm_nt(rows, x_rows, block, count, columns, scale, out + j, ld);
      }
      return;
    }
  }
  const T* const* rows = RowBlock<T>(x, columns, x_rows, scratch).read(b, first, x_rows);
  if (x_rows < kMinPackedRows && y.stride[2] == 1)
    return by_element<T>(y.dtype, [&](auto* element) {
      using E = std::remove_cv_t<std::remove_pointer_t<decltype(element)>>;
      dot_streamed(rows, x_rows, ListedRows<E>(y, b, list), n, columns, scale, out, ld);
    });
  RowBlock<T> block(y, columns, min(n, kPanelRows), scratch);
  for (int64_t j = 0; j < n; j += kPanelRows) {
    const int64_t count = min(n - j, kPanelRows);
    gemm_nt(rows, x_rows, block.read(b, list + j, count), count, columns, scale, out + j, ld);
  }
}

struct AttentionParams {
  int64_t B, Tq, Tk, D;
  Dtype dtype;
  StridedView3 values;  // (B, Tk, D)
  AttentionMask attended;
  // Null without options: see ../attention.h.
  const AttentionOptions* options = nullptr;
  void* log_total = nullptr;              // output of the forward
  const void* known_log_total = nullptr;  // backward
  const void* scores = nullptr;           // backward with a clip: (B, Tq, Tk) in T, scores of all pairs before the clip
  const void* grad_log_total = nullptr;
  void* dscore_bias = nullptr;
  int64_t alignments_columns = 0;  // forward
  bool has_products = false;       // backward: dscores already hold the products of grad_context and values
};

template <class Score>
AttentionParams params_of(const AttentionForward<Score>& op) {
  AttentionParams p{op.B, op.Tq, op.Tk, op.D, op.query.dtype, op.values, op.attended, op.options, op.log_total};
  p.alignments_columns = max(op.alignments_columns, op.Tk);
  return p;
}

template <class Score>
AttentionParams params_of(const AttentionBackward<Score>& op) {
  return {op.B,       op.Tq,   op.Tk,        op.D,    op.query.dtype,    op.values,     op.attended,
          op.options, nullptr, op.log_total, nullptr, op.grad_log_total, op.dscore_bias};
}

template <typename T>
ATTN_INLINE T log_sigmoid(T x) {
  const double y = x;
  return static_cast<T>(y < 0 ? y - log1p(exp(y)) : -log1p(exp(-y)));
}

// w = C tanh(w).
template <typename T>
void clip_scores(const AttentionOptions& options, int64_t n, T* w) {
  const T most = static_cast<T>(options.clip);
  for (int64_t j = 0; j < n; j += width<T>) store_upto(w + j, most * tanh_any(load_upto(w + j, n - j)), n - j);
}

// Converts the scores w of the n listed steps into alignments in place, with options. row: b Tq + i. Returns the
// logarithm of the normaliser.
template <typename T, class Normaliser>
T normalise_with_options(const AttentionParams& p, int64_t row, const int32_t* list, int64_t n, T* w,
                         Scratch& scratch) {
  const T infinity = static_cast<T>(__builtin_inf());
  if (n == 0) return -infinity;
  if (p.options->clip != 0) clip_scores(*p.options, n, w);
  if (p.options->score_bias) {
    ScratchScope scope(scratch);
    const T* bias = read_row(p.options->score_bias, row / p.Tq, row % p.Tq, p.Tk, alloc<T>(scratch, p.Tk));
    for (int64_t j = 0; j < n; ++j) w[j] += bias[list[j]];
  }
  // sigmoid(s) divided by its sum is the softmax of log sigmoid(s), which does not underflow.
  if (p.options->sigmoid)
    for (int64_t j = 0; j < n; ++j) w[j] = log_sigmoid(w[j]);
  T top = -infinity;
  int64_t at = 0;
  for (int64_t j = 0; j < n; ++j)
    if (w[j] > top) top = w[j], at = j;
  Normaliser::row(w, n);
  return static_cast<T>(static_cast<double>(top) - log(static_cast<double>(w[at])));
}

// Applies dropout to the alignments of the n listed steps, or to their gradients.
template <typename T>
void drop(const AttentionParams& p, int64_t row, const int32_t* list, int64_t n, T* w) {
  if (p.options->dropout_p == 0) return;
  const T factor = static_cast<T>(1 / (1 - p.options->dropout_p));
  for (int64_t j = 0; j < n; ++j)
    w[j] = keeps(*p.options, static_cast<uint64_t>(row * p.Tk + list[j])) ? w[j] * factor : T(0);
}

// Interface of Score: queries(b, first, n, scratch) prepares n queries; score_block(queries, b, list, n, out, ld,
// scratch) writes the scores of these queries and the n listed steps; cost() is the work per pair.
//
// With fewer tasks than threads, each task is split: its scores by steps, its contexts by columns. No sum is split, so
// results do not depend on the number of threads.
template <typename T, class Normaliser = Softmax, class Score>
void attention_forward(const AttentionParams& p, void* context, void* alignments, const Score& score) {
  const QueryTiles tiles(p.B, p.Tq, p.Tk, p.attended.per_query, p.attended.vectors);
  const int64_t cost = tiles.size * p.Tk * (score.cost() + p.D), parts = tiles.parts(cost);
  const int64_t ld = padded<T>(p.Tk), weights_size = tiles.size * ld;
  auto write_scores = [&](int64_t task, const int32_t* list, const Range& steps, T* weights, Scratch& scratch) {
    if (steps.begin == steps.end) return;
    ScratchScope scope(scratch);
    const int64_t b = tiles.sentence(task);
    score.score_block(score.queries(b, tiles.first(task), tiles.count(task), scratch), b, list + steps.begin,
                      steps.end - steps.begin, weights + steps.begin, ld, scratch);
  };
  auto normalise = [&](int64_t task, const int32_t* list, int64_t n, T* weights, Scratch& scratch) {
    const int64_t row = tiles.sentence(task) * p.Tq + tiles.first(task);
    for (int64_t i = 0; i < tiles.count(task); ++i) {
      T* w = weights + i * ld;
      if (p.options != nullptr)
        static_cast<T*>(p.log_total)[row + i] = normalise_with_options<T, Normaliser>(p, row + i, list, n, w, scratch);
      else if (n > 0)
        Normaliser::row(w, n);
      if (alignments != nullptr) {
        const int64_t columns = p.alignments_columns;
        write_compact(alignments, p.dtype, (row + i) * columns, columns, list, n, w);
      }
      if (p.options != nullptr) drop(p, row + i, list, n, w);
    }
  };
  auto write_context = [&](int64_t task, const int32_t* list, int64_t n, const T* weights, const Range& columns,
                           Scratch& scratch) {
    const int64_t b = tiles.sentence(task);
    weighted_output(p.values, b, list, n, weights, ld, tiles.count(task), columns, context, p.dtype,
                    b * p.Tq + tiles.first(task), p.D, scratch);
  };
  if (parts == 1)
    return for_each_task(tiles.tasks, cost, [&](int64_t task, Scratch& scratch) {
      int32_t* list = alloc<int32_t>(scratch, p.Tk);
      T* weights = alloc<T>(scratch, weights_size);
      const int64_t n = list_steps(p.attended, tiles.sentence(task), tiles.first(task), p.Tk, list);
      write_scores(task, list, Range(n, 0, 1, 1), weights, scratch);
      normalise(task, list, n, weights, scratch);
      write_context(task, list, n, weights, Range(p.D, 0, 1, 1), scratch);
    });
  Scratch& call = thread_scratch();
  ScratchScope scope(call);
  int32_t* lists = alloc<int32_t>(call, tiles.tasks * p.Tk);
  int64_t* n = alloc<int64_t>(call, tiles.tasks);
  T* weights = alloc<T>(call, tiles.tasks * weights_size);
  for (int64_t task = 0; task < tiles.tasks; ++task)
    n[task] = list_steps(p.attended, tiles.sentence(task), tiles.first(task), p.Tk, lists + task * p.Tk);
  const int64_t part_cost = cost / parts;
  for_each_task(tiles.tasks * parts, part_cost, [&](int64_t t, Scratch& scratch) {
    const int64_t task = t / parts;
    write_scores(task, lists + task * p.Tk, Range(n[task], t % parts, parts, kRowsAtOnce),
                 weights + task * weights_size, scratch);
  });
  for_each_task(tiles.tasks, tiles.size * p.Tk, [&](int64_t task, Scratch& scratch) {
    normalise(task, lists + task * p.Tk, n[task], weights + task * weights_size, scratch);
  });
  for_each_task(tiles.tasks * parts, part_cost, [&](int64_t t, Scratch& scratch) {
    const int64_t task = t / parts;
    write_context(task, lists + task * p.Tk, n[task], weights + task * weights_size,
                  Range(p.D, t % parts, parts, 4 * width<T>), scratch);
  });
}

// Applies the options to the gradients di of the scores of a row, and dropout to its alignments, which then are the
// weights of the context.
template <typename T>
void gradient_with_options(const AttentionParams& p, int64_t row, const int32_t* list, int64_t n, T* weights, T* di) {
  const T total = static_cast<const T*>(p.known_log_total)[row];
  if (p.grad_log_total != nullptr) {
    const T grad = static_cast<const T*>(p.grad_log_total)[row];
    for (int64_t j = 0; j < n; ++j) di[j] += weights[j] * grad;
  }
  if (p.options->sigmoid) {
    const T sum = static_cast<T>(exp(static_cast<double>(total)));
    for (int64_t j = 0; j < n; ++j) di[j] *= 1 - weights[j] * sum;  // the derivative of log sigmoid
  }
  if (p.dscore_bias != nullptr) write_compact(p.dscore_bias, p.dtype, row * p.Tk, p.Tk, list, n, di);
  if (p.scores != nullptr) {
    const T *scores = static_cast<const T*>(p.scores) + row * p.Tk, most = static_cast<T>(p.options->clip);
    for (int64_t j = 0; j < n; j += width<T>) {
      Vec<T> x{}, slope;
      for (int64_t r = 0; r < min(width<T>, n - j); ++r) x[r] = scores[list[j + r]];
      tanh_and_slope(x, &slope);
      // Beyond 20 the derivative is 0, as in the formula in float64. A tiny nonzero derivative times an infinite key
      // would be infinity, where the formula gives 0 times infinity, NaN.
      const Vec<T> derivative = absolute<T>(x) > T(20) ? Vec<T>{} : most * slope;
      store_upto(di + j, load_upto(di + j, n - j) * derivative, n - j);
    }
  }
  drop(p, row, list, n, weights);
}

// Gradients of the scores, compact: row (b, i) of dscores and weights (B, Tq, Tk) holds the attended steps of query i.
// with_tile(b, first, nq, list, n, dscores, scratch) runs on each tile's rows while they are in cache.
template <typename T, class Normaliser = Softmax, class WithTile>
auto scores_backward(const AttentionParams& p, const StridedView3& alignments, const StridedView3& grad_context,
                     const StridedView3& grad_alignments, T* weights, T* dscores, WithTile with_tile) {
  const QueryTiles tiles(p.B, p.Tq, p.Tk, p.attended.per_query, p.attended.vectors);
  auto run = [=, &p](int64_t b, int64_t chunk, Scratch& scratch) {
    const int64_t first = chunk * tiles.size;
    const int64_t nq = min(tiles.size, p.Tq - first), at = (b * p.Tq + first) * p.Tk;
    int32_t* list = alloc<int32_t>(scratch, p.Tk);
    T* row = alloc<T>(scratch, p.Tk);
    const int64_t n = list_steps(p.attended, b, first, p.Tk, list);
    T *w = weights + at, *ds = dscores + at;
    if (grad_context && !p.has_products) {
      dot_listed(grad_context, first, nq, p.values, b, list, n, p.D, T(1), ds, p.Tk, scratch);
    } else if (!grad_context) {
      for (int64_t i = 0; i < nq; ++i) memset(ds + i * p.Tk, 0, n * sizeof(T));
    }
    for (int64_t i = 0; i < nq; ++i) {
      T *wi = w + i * p.Tk, *di = ds + i * p.Tk;
      const bool from_first = n == 0 || list[n - 1] == n - 1;  // the list is exactly the first n steps
      const T* all = read_row(alignments, b, first + i, p.Tk, row);
      if (from_first)
        memcpy(wi, all, n * sizeof(T));
      else
        for (int64_t j = 0; j < n; ++j) wi[j] = all[list[j]];
      const int64_t at_row = b * p.Tq + first + i;
      if (p.options != nullptr) drop(p, at_row, list, n, di);
      if (grad_alignments) {
        all = read_row(grad_alignments, b, first + i, p.Tk, row);
        for (int64_t j = 0; j < n; ++j) di[j] += all[list[j]];
      }
      Normaliser::gradient(wi, di, n);
      if (p.options != nullptr) gradient_with_options(p, at_row, list, n, wi, di);
    }
    with_tile(b, first, nq, list, n, ds, scratch);
  };
  return Stage{tiles.per_sentence, tiles.size * p.Tk * p.D, run};
}

// The forward of an op: attention, or the scores of all pairs.
template <typename T, class Scores, class Score>
void forward(const AttentionForward<Scores>& op, const Score& score) {
  const AttentionParams problem = params_of(op);
  attention_forward<T>(problem, op.context, op.alignments, score);
}

template <typename T, class Scores, class Score>
void forward(const ScoresForward<Scores>& op, const Score& score) {
  const QueryTiles tiles(op.B, op.Tq, op.Tk, op.attended.per_query, op.vectors);
  const Dtype to = op.wide ? native<T> : op.query.dtype;
  for_each_task(tiles.tasks, tiles.size * op.Tk * op.A, [&](int64_t task, Scratch& scratch) {
    const int64_t b = task / tiles.per_sentence, first = task % tiles.per_sentence * tiles.size;
    const int64_t nq = min(tiles.size, op.Tq - first), ld = padded<T>(op.Tk);
    int32_t* list = alloc<int32_t>(scratch, op.Tk);
    const int64_t n = list_steps(op.attended, b, first, op.Tk, list);
    T* scores = alloc<T>(scratch, nq * ld);
    if (n > 0) score.score_block(score.queries(b, first, nq, scratch), b, list, n, scores, ld, scratch);
    for (int64_t i = 0; i < nq; ++i)
      write_compact(op.scores, to, (b * op.Tq + first + i) * op.Tk, op.Tk, list, n, scores + i * ld);
  });
}

// Recomputes the scores for the backward of an attention that clips them, and sets p.scores. Clipped scores cannot be
// recovered from alignments of 16 bits, and 1 - tanh^2 cannot be computed accurately from a score close to the clip.
// kernel computes the scores of the attended steps, in the same tiles as the forward: values in padding must not change
// the form that a tile is computed in.
template <typename T, class Scores>
void scores_again(const AttentionBackward<Scores>& op, void (*kernel)(const ScoresForward<Scores>&), Scratch& call,
                  AttentionParams& p) {
  if (p.options == nullptr || p.options->clip == 0) return;
  T* scores = alloc<T>(call, p.B * p.Tq * p.Tk);
  kernel({static_cast<const Scores&>(op), scores, true, op.attended});
  p.scores = scores;
}

// A stage that copies the given gradients of the scores, of an op that returns scores, to dscores (B, Tq, Tk) in T.
template <typename T, class Op>
auto compact_gradient(const Op& op, T* dscores) {
  auto copy_row = [&op, dscores](int64_t b, int64_t i, Scratch& scratch) {
    T* buffer = alloc<T>(scratch, op.Tk);
    memcpy(dscores + (b * op.Tq + i) * op.Tk, read_row(op.grad_scores, b, i, op.Tk, buffer), op.Tk * sizeof(T));
  };
  return Stage{op.Tq, op.Tk, copy_row};
}

// out[b, j] = sum_i weights[b, i, j] * array[b, i] over the queries that attend step j, with compact weights (B, Tq,
// Tk). It is zero for steps that no query attends, and for all steps if array is absent. It computes the gradient of
// values, and the gradient of the keys of dot attention.
template <typename T>
auto weighted_steps(const AttentionParams& p, const T* weights, const StridedView3& array, int64_t columns, void* out) {
  const bool per_query = p.attended.per_query;
  const int64_t strip = per_query ? 4 * width<T> : max(columns, 1);
  const int64_t step_rows = per_query ? p.Tk : max(1, min(kPanelRows, divide_up(p.B * p.Tk, thread_count())));
  const int64_t row_tasks = divide_up(p.Tk, step_rows), strips = divide_up(columns, strip);
  auto run = [=, &p](int64_t b, int64_t task, Scratch& scratch) {
    const int64_t part = task / strips, c = task % strips * strip;
    const int64_t nc = min(strip, columns - c);
    if (!array) {
      for (int64_t j = part * step_rows; j < min((part + 1) * step_rows, p.Tk); ++j)
        fill_zero<T>(out, (b * p.Tk + j) * columns + c, nc, p.dtype);
      return;
    }
    int32_t* list = alloc<int32_t>(scratch, p.Tk);
    if (per_query) {  // a step may be padding for one query only: accumulate pair by pair
      T* sums = alloc<T>(scratch, p.Tk * strip);
      memset(sums, 0, p.Tk * strip * sizeof(T));
      for (int64_t i = 0; i < p.Tq; ++i) {
        const int64_t n = list_steps(p.attended, b, i, p.Tk, list);
        const T* w = weights + (b * p.Tq + i) * p.Tk;
        for (int64_t u = 0; u < nc; u += width<T>) {
          const int64_t at = b * array.stride[0] + i * array.stride[1] + (c + u) * array.stride[2];
          const Vec<T> x = load_as<T>(array.data, array.dtype, at, array.stride[2], nc - u);
          for (int64_t j = 0; j < n; ++j) {
            T* sum = sums + list[j] * strip + u;
            store(sum, load(sum) + w[j] * x);
          }
        }
      }
      for (int64_t j = 0; j < p.Tk; ++j) write_row(out, p.dtype, (b * p.Tk + j) * columns + c, sums + j * strip, nc);
      return;
    }
    // Steps [part * step_rows, ..) of the sentence. A step's row of weights is given by its position in the list.
    const int64_t begin = part * step_rows, end = min(begin + step_rows, p.Tk);
    int64_t at = 0, count = 0;
    if (p.attended.mask == nullptr) {  // lists the steps of this part only
      const int64_t n = min(max(p.attended.length(b, p.Tk), 0), p.Tk);
      at = min(begin, n);
      count = min(end, n) - at;
      for (int64_t j = at; j < at + count; ++j) list[j] = static_cast<int32_t>(j);
    } else {
      const int64_t n = list_steps(p.attended, b, 0, p.Tk, list);
      while (at < n && list[at] < begin) ++at;
      while (at + count < n && list[at + count] < end) ++count;
    }
    auto set_rows = [&](auto** rows, auto* first, const auto& index) {
      for (int64_t j = 0, next = 0; j < end - begin; ++j) {
        const int64_t row = b * p.Tk + begin + j;
        if (next < count && list[at + next] == begin + j) {
          rows[next] = first + index(row, next) * columns;
          ++next;
        } else {
          fill_zero<T>(out, row * columns, columns, p.dtype);
        }
      }
      return rows;
    };
    auto in_out = [](int64_t row, int64_t) { return row; };
    const T* factors = weights + b * p.Tq * p.Tk + at;
    if constexpr (sizeof(T) == 4 && kPairs<BFloat16>) {
      if (is_bfloat16_rows(array) && kMinPackedRows <= count && kMaxShortSumRows < p.Tq && p.Tq <= kMaxPairedRows) {
        BFloat16** rows = set_rows(alloc<BFloat16*>(scratch, count), static_cast<BFloat16*>(out), in_out);
        const StridedRows<BFloat16> y(array, b, 0);
        return gemm_nn(rows, count, factors, 1, p.Tk, y, p.Tq, columns, false);
      }
    }
    const bool direct = p.dtype == native<T>;
    T** rows = alloc<T*>(scratch, max(count, 1));
    if (direct)
      set_rows(rows, static_cast<T*>(out), in_out);
    else
      set_rows(rows, alloc<T>(scratch, max(count, 1) * columns), [](int64_t, int64_t next) { return next; });
    RowBlock<T> block(array, columns, min(p.Tq, kPanelRows), scratch);
    if (p.Tq <= (columns >= kPanel<T> ? kMaxShortSumRows : kMinPackedRows - 1)) {
      const T* const* y = block.read(b, int64_t{0}, p.Tq);
      const bool stream = direct && worth_streaming<T>(out, columns, p.B * p.Tk * columns * item_size(p.dtype));
      for (int64_t j = 0; j < count; ++j) {
        T* row = rows[direct ? j : 0];  // one buffer for all rows that are converted: it stays in L1
        weighted_sum_short(row, factors + j, p.Tk, y, p.Tq, columns, stream);
        if (!direct) write_row(out, p.dtype, (b * p.Tk + list[at + j]) * columns, row, columns);
      }
      if (stream) stream_end();
    } else {
      auto add_queries = [&](int64_t i, int64_t nq, const auto& y) {
        gemm_nn(rows, count, factors + i * p.Tk, 1, p.Tk, y, nq, columns, i > 0);
      };
      int64_t i = 0;
      if constexpr (sizeof(T) == 4 && kPairs<BFloat16>)
        for (; is_bfloat16_rows(array) && i < p.Tq; i += kMaxPairedRows)
          add_queries(i, min(kMaxPairedRows, p.Tq - i), StridedRows<BFloat16>(array, b, i));
      for (; i < p.Tq; i += kPanelRows) {
        const int64_t nq = min(kPanelRows, p.Tq - i);
        add_queries(i, nq, PointedRows<T>{block.read(b, i, nq)});
      }
      if (!direct)
        for (int64_t j = 0; j < count; ++j)
          write_row(out, p.dtype, (b * p.Tk + list[at + j]) * columns, rows[j], columns);
    }
  };
  return Stage{row_tasks * strips, p.Tq * step_rows * strip, run};
}

}  // namespace ATTN_LEVEL
}  // namespace attn
