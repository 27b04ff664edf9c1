// What every attention op shares, whatever its score: softmax over the attended steps, context, and the way back from
// the gradients of context and alignments to those of scores and values. Part of a SIMD level: see simd.h.
//
// Padding is left out by listing the attended steps of a sentence: scores, weights and gradients are computed for the
// listed steps only ("compact" rows), so that nothing a padded step holds can reach a result.
#pragma once

#include "rows.h"

namespace attn {
namespace ATTN_LEVEL {

// Runs task(t, scratch) for t in [0, n); cost is the work of a task, in multiply-adds or the like.
template <class Task>
void for_each_task(int64_t n, int64_t cost, const Task& task) {
  constexpr int64_t kWorthAThread = 1 << 16;
  auto body = [](int64_t begin, int64_t end, void* context) {
    for (int64_t t = begin; t < end; ++t) {
      Scratch& scratch = thread_scratch();
      ScratchScope scope(scratch);
      (*static_cast<const Task*>(context))(t, scratch);
    }
  };
  parallel_for(n, larger(1, kWorthAThread / larger(cost, 1)), body, const_cast<Task*>(&task));
}

// How the queries of a sentence are cut into tasks: small enough that weights and projected queries stay in L2 and that
// there is a task for every thread, large enough that what is prepared per step serves many queries.
struct Chunks {
  int64_t size, per_sentence, tasks;

  Chunks(int64_t batch, int64_t queries, int64_t steps, bool per_query) {
    constexpr int64_t kMost = 64, kLeast = 4, kWeights = 1 << 17;
    size = smaller(kMost, larger(kLeast, kWeights / larger(steps, 1)));
    size = smaller(size, larger(1, divide_up(batch * queries, thread_count())));
    if (per_query) size = 1;  // each query has steps of its own
    per_sentence = divide_up(queries, size);
    tasks = batch * per_sentence;
  }
};

// p[0..n) = softmax(p[0..n)). p has room for whole vectors. n > 0.
template <typename T>
void softmax_row(T* p, int64_t n) {
  const T infinity = static_cast<T>(__builtin_inf());
  const int64_t end = padded<T>(n);
  for (int64_t j = n; j < end; ++j) p[j] = -infinity;
  Vec<T> top = broadcast(-infinity);
  for (int64_t j = 0; j < end; j += width<T>) top = maximum<T>(load(p + j), top);
  const T shift = largest<T>(top);
  Vec<T> total{};
  for (int64_t j = 0; j < end; j += width<T>) {
    Vec<T> e = exp_nonpositive(load(p + j) - shift);
    store(p + j, e);
    total += e;
  }
  const T factor = 1 / sum<T>(total);
  for (int64_t j = 0; j < end; j += width<T>) store(p + j, load(p + j) * factor);
}

template <typename T>
void fill_zero(void* data, int64_t at, int64_t n, Dtype dtype) {
  memset(static_cast<char*>(data) + at * item_size(dtype), 0, n * item_size(dtype));
}

// Row (.., Tk) of out from its compact form: the listed steps hold p, the others 0.
template <typename T>
void write_compact(void* out, Dtype dtype, int64_t at, int64_t steps, const int32_t* list, int64_t n, const T* p) {
  if (n == 0 || list[n - 1] == n - 1) {  // the first n steps
    write_row(out, dtype, at, p, n);
    return fill_zero<T>(out, at + n, steps - n, dtype);
  }
  fill_zero<T>(out, at, steps, dtype);
  for (int64_t j = 0; j < n; ++j) store_as<T>(out, dtype, at + list[j], broadcast(p[j]), 1);
}

constexpr int64_t kValueRows = 64;  // rows of values (or the like) read at a time

// out[0..no) = weights (row i at weight + i * ld) times the listed rows of array, written as dtype, `at` elements into
// data.
template <typename T>
void weighted_output(const Array3& array, int64_t b, const int32_t* list, int64_t n, int64_t columns, const T* weight,
                     int64_t ld, int64_t no, void* data, Dtype dtype, int64_t at, Scratch& scratch) {
  if (n == 0) return fill_zero<T>(data, at, no * columns, dtype);
  ScratchScope scope(scratch);
  const bool direct = dtype == native<T>;
  T* sums = direct ? static_cast<T*>(data) + at : take<T>(scratch, no * columns);
  T** out = take<T*>(scratch, no);
  for (int64_t i = 0; i < no; ++i) out[i] = sums + i * columns;
  RowBlock<T> block(array, columns, smaller(n, kValueRows), scratch);
  for (int64_t j = 0; j < n; j += kValueRows) {
    const int64_t count = smaller(n - j, kValueRows);
    weighted_rows(out, no, weight + j, ld, 1, block.read(b, list + j, count), count, columns, j > 0);
  }
  if (!direct)
    for (int64_t i = 0; i < no; ++i) write_row(data, dtype, at + i * columns, out[i], columns);
}

struct Problem {
  int64_t B, Tq, Tk, D;
  Dtype dtype;
  Array3 values;  // (B, Tk, D)
  Attended attended;
};

// Score: queries(b, first, n, scratch) prepares n queries; block(queries, b, list, n, out, ld, scratch) writes the
// scores of those queries and of the n listed steps; cost() is the work of a pair.
template <typename T, class Score>
void attention_forward(const Problem& p, void* context, void* alignments, const Score& score) {
  const Chunks chunks(p.B, p.Tq, p.Tk, p.attended.per_query);
  for_each_task(chunks.tasks, chunks.size * p.Tk * (score.cost() + p.D), [&](int64_t task, Scratch& scratch) {
    const int64_t b = task / chunks.per_sentence, first = task % chunks.per_sentence * chunks.size;
    const int64_t nq = smaller(chunks.size, p.Tq - first), row = b * p.Tq + first;
    int32_t* list = take<int32_t>(scratch, p.Tk);
    const int64_t n = list_steps(p.attended, b, first, p.Tk, list);
    const int64_t ld = padded<T>(n);
    T* weights = take<T>(scratch, nq * ld);
    if (n > 0) {
      ScratchScope scope(scratch);
      score.block(score.queries(b, first, nq, scratch), b, list, n, weights, ld, scratch);
      for (int64_t i = 0; i < nq; ++i) softmax_row(weights + i * ld, n);
    }
    weighted_output(p.values, b, list, n, p.D, weights, ld, nq, context, p.dtype, row * p.D, scratch);
    if (alignments != nullptr)
      for (int64_t i = 0; i < nq; ++i)
        write_compact(alignments, p.dtype, (row + i) * p.Tk, p.Tk, list, n, weights + i * ld);
  });
}

// Gradients of the scores, compact: row (b, i) of dscores and weights (B, Tq, Tk) holds the attended steps of query i.
// with_chunk(b, first, nq, list, n, dscores, scratch) runs on each chunk's rows while they are in cache.
template <typename T, class WithChunk>
void attention_backward(const Problem& p, const Array3& alignments, const Array3& grad_context,
                        const Array3& grad_alignments, T* weights, T* dscores, const WithChunk& with_chunk) {
  const Chunks chunks(p.B, p.Tq, p.Tk, p.attended.per_query);
  for_each_task(chunks.tasks, chunks.size * p.Tk * p.D, [&](int64_t task, Scratch& scratch) {
    const int64_t b = task / chunks.per_sentence, first = task % chunks.per_sentence * chunks.size;
    const int64_t nq = smaller(chunks.size, p.Tq - first), at = (b * p.Tq + first) * p.Tk;
    int32_t* list = take<int32_t>(scratch, p.Tk);
    T* row = take<T>(scratch, p.Tk);
    const int64_t n = list_steps(p.attended, b, first, p.Tk, list);
    T *w = weights + at, *ds = dscores + at;
    if (grad_context) {
      ScratchScope scope(scratch);
      RowBlock<T> dcontext(grad_context, p.D, nq, scratch), values(p.values, p.D, smaller(n, kValueRows), scratch);
      const T* const* dc = dcontext.read(b, first, nq);
      for (int64_t j = 0; j < n; j += kValueRows) {
        const int64_t count = smaller(n - j, kValueRows);
        dot_rows(dc, nq, values.read(b, list + j, count), count, p.D, T(1), ds + j, p.Tk);
      }
    } else {
      for (int64_t i = 0; i < nq; ++i) memset(ds + i * p.Tk, 0, n * sizeof(T));
    }
    for (int64_t i = 0; i < nq; ++i) {
      T *wi = w + i * p.Tk, *di = ds + i * p.Tk;
      const T* all = read_row(alignments, b, first + i, p.Tk, row);
      for (int64_t j = 0; j < n; ++j) wi[j] = all[list[j]];
      if (grad_alignments) {
        all = read_row(grad_alignments, b, first + i, p.Tk, row);
        for (int64_t j = 0; j < n; ++j) di[j] += all[list[j]];
      }
      Vec<T> total{};  // softmax Jacobian: ds = w (d - sum w d)
      for (int64_t j = 0; j < n; j += width<T>) total += load_upto(wi + j, n - j) * load_upto(di + j, n - j);
      const T delta = sum<T>(total);
      for (int64_t j = 0; j < n; ++j) di[j] = wi[j] * (di[j] - delta);
    }
    with_chunk(b, first, nq, list, n, ds, scratch);
  });
}

// out[b, j] = sum_i weights[b, i, j] * array[b, i] over the queries that attend step j, with compact weights (B, Tq,
// Tk); zero for steps that none attends. The gradient of values, and of the keys of a dot product.
template <typename T>
void weighted_steps(const Problem& p, const T* weights, const Array3& array, int64_t columns, void* out) {
  const bool per_query = p.attended.per_query;
  const int64_t strip = per_query ? 4 * width<T> : larger(columns, 1);
  const int64_t step_rows = per_query ? p.Tk : larger(1, smaller(kValueRows, divide_up(p.B * p.Tk, thread_count())));
  const int64_t row_tasks = divide_up(p.Tk, step_rows), strips = divide_up(columns, strip);
  for_each_task(p.B * row_tasks * strips, p.Tq * step_rows * strip, [&](int64_t task, Scratch& scratch) {
    const int64_t b = task / (row_tasks * strips), part = task / strips % row_tasks, c = task % strips * strip;
    const int64_t nc = smaller(strip, columns - c);
    int32_t* list = take<int32_t>(scratch, p.Tk);
    if (per_query) {  // a step may be padding for one query and not for another: add up pair by pair
      T* sums = take<T>(scratch, p.Tk * strip);
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
    // Steps [part * step_rows, ..) of the sentence: those in the list take the rows of weights they stand at there.
    const int64_t n = list_steps(p.attended, b, 0, p.Tk, list);
    const int64_t begin = part * step_rows, end = smaller(begin + step_rows, p.Tk);
    int64_t at = 0;
    while (at < n && list[at] < begin) ++at;
    int64_t count = 0;
    while (at + count < n && list[at + count] < end) ++count;
    T* sums = take<T>(scratch, larger(count, 1) * columns);
    T** rows = take<T*>(scratch, larger(count, 1));
    const bool direct = p.dtype == native<T>;
    for (int64_t j = 0, next = 0; j < end - begin; ++j) {
      const int64_t row = (b * p.Tk + begin + j) * columns;
      if (next < count && list[at + next] == begin + j) {
        rows[next] = direct ? static_cast<T*>(out) + row : sums + next * columns;
        ++next;
      } else {
        fill_zero<T>(out, row, columns, p.dtype);
      }
    }
    RowBlock<T> block(array, columns, smaller(p.Tq, kValueRows), scratch);
    for (int64_t i = 0; i < p.Tq; i += kValueRows) {
      const int64_t nq = smaller(kValueRows, p.Tq - i);
      const T* w = weights + (b * p.Tq + i) * p.Tk + at;
      weighted_rows(rows, count, w, 1, p.Tk, block.read(b, i, nq), nq, columns, i > 0);
    }
    if (!direct)
      for (int64_t j = 0; j < count; ++j)
        write_row(out, p.dtype, (b * p.Tk + list[at + j]) * columns, rows[j], columns);
  });
}

}  // namespace ATTN_LEVEL
}  // namespace attn
