// Additive attention without a tanh per pair. Part of a SIMD level: see simd.h.
//
// tanh(q + k) = 1 - 2 / (1 + E), E = e^{2q} e^{2k}, so that with exponentials made once per row a pair of query and step
// costs a multiply-add and a reciprocal for each hidden unit, and units or queries share reciprocals over a common
// denominator. Guards choose, for each tile of queries and each step, a form in which nothing overflows:
//
//   largest |q| + largest |k|   forward                          backward
//   <= kThree, kPair            three units share a division     two queries share a division
//   <= kSingle                  one division each                one division each
//   beyond, or NaN              tanh itself                      tanh itself
#pragma once

#include "../additive_attention.h"
#include "attention.h"

namespace attn {
namespace ATTN_LEVEL {

// Forward, with v folded in: v / (1 + E) = 1 / d, d = (1/v) + (e^{2q}/v) e^{2k}. With v scaled to at most 1, units smaller
// than 2^-24 dropped (they are below the rounding of the others) and d scaled by 2^-40, three denominators lie between
// 2^-40 and 2^(24 - 40) (1 + E), so their product is in range while 1 + E < 2^56.
constexpr float kThree = 19.0f;
constexpr float kSingle = 43.0f;     // e^{2q}, e^{2k} and their product are in range
constexpr float kPair = 21.5f;       // the product of two 1 + E is
constexpr double kSmallestUnit = 0x1p-24, kUnitScale = 0x1p-40;
// 1 - 2 / (1 + E) is off by an ulp of 1 where tanh itself is off by an ulp of its value. The difference counts only where
// scores are large: from this norm of v on, tanh itself is used.
constexpr double kLargestNorm = 4.0;

// v and bias as vectors that end in zeros, and what the factored form needs of v.
template <typename T>
struct Units {
  int64_t n, size;  // A, and A in whole vectors
  T *v, *bias;
  T *constant, *factor;  // d = constant + factor * e^{2q} e^{2k}
  T sum, scale;          // score = sum - scale * sum of 1 / d
  bool factored;

  Units(const AdditiveScores& op, Scratch& scratch) : n(op.A), size(padded<T>(op.A)) {
    v = take<T>(scratch, size);
    bias = take<T>(scratch, size);
    constant = take<T>(scratch, size);
    factor = take<T>(scratch, size);
    double top = 0, squares = 0, total = 0;
    for (int64_t c = 0; c < size; c += width<T>) {
      store(v + c, load_as<T>(op.v.data, op.v.dtype, c * op.v.stride[2], op.v.stride[2], n - c));
      Vec<T> zero{};
      store(bias + c, op.bias ? load_as<T>(op.bias.data, op.bias.dtype, c * op.bias.stride[2], op.bias.stride[2], n - c)
                              : zero);
    }
    for (int64_t a = 0; a < n; ++a) {
      const double x = v[a] < 0 ? -static_cast<double>(v[a]) : static_cast<double>(v[a]);
      if (!(x <= top)) top = x;
      squares += x * x;
    }
    // Not for NaN or Inf, nor for float64, which is there to be exact.
    factored = sizeof(T) == 4 && top > 1e-30 && squares <= kLargestNorm * kLargestNorm;
    if (!factored) return;
    int exponent;
    frexp(top, &exponent);
    const double unit = ldexp(1.0, exponent);
    for (int64_t a = 0; a < size; ++a) {
      const double x = a < n ? v[a] / unit : 0.0;
      const bool kept = x >= kSmallestUnit || x <= -kSmallestUnit;
      factor[a] = kept ? static_cast<T>(kUnitScale / x) : 0;
      constant[a] = kept ? factor[a] : 256;  // 1 / d is then 2^-48 of the largest
      if (kept) total += v[a];
    }
    sum = static_cast<T>(total);
    scale = static_cast<T>(2 * unit * kUnitScale);
  }
};

// Largest |x| of a row, NaN if an element is NaN or Inf; x and e^{2x} (meaningful up to kSingle) are left in raw and e.
template <typename T, class Row>
ATTN_INLINE T exponentials(int64_t size, const Row& row, T* raw, T* e) {
  Vec<T> top{}, check{};
  for (int64_t c = 0; c < size; c += width<T>) {
    const Vec<T> x = row(c);
    store(raw + c, x);
    if constexpr (sizeof(T) == 4) store(e + c, exp_in_range(x + x));
    top = maximum<T>(absolute<T>(x), top);
    check += x * T(0);
  }
  return largest<T>(top) + sum<T>(check);
}

template <typename T>
struct Projected {  // rows of queries (bias added) or keys
  int64_t ld;
  T *raw, *e, *top;  // (n, ld), (n, ld), (n)

  Projected(int64_t n, int64_t ld, Scratch& scratch) : ld(ld) {
    raw = take<T>(scratch, n * ld);
    e = take<T>(scratch, n * ld);
    top = take<T>(scratch, n);
  }
};

// score[i][j] of NQ queries and NK steps. kShare: three units share a division, otherwise one each.
template <typename T, int NQ, int NK, bool kShare>
ATTN_INLINE void factored_tile(const Units<T>& units, const T* q, const T* k, int64_t ld, T* out, int64_t out_ld) {
  constexpr int64_t w = width<T>;
  Vec<T> acc[NQ][NK] = {};
  auto denominator = [&](int64_t c, int i, int j) __attribute__((always_inline)) {
    return load(units.constant + c) + load(q + i * ld + c) * load(k + j * ld + c);
  };
  int64_t c = 0;
  if constexpr (kShare) {
    for (; c + 3 * w <= units.size; c += 3 * w)
      for (int i = 0; i < NQ; ++i)
        for (int j = 0; j < NK; ++j) {
          const Vec<T> d1 = denominator(c, i, j), d2 = denominator(c + w, i, j), d3 = denominator(c + 2 * w, i, j);
          const Vec<T> product = d1 * d2;
          acc[i][j] += ((d1 + d2) * d3 + product) / (product * d3);
        }
    for (; c + 2 * w <= units.size; c += 2 * w)
      for (int i = 0; i < NQ; ++i)
        for (int j = 0; j < NK; ++j) {
          const Vec<T> d1 = denominator(c, i, j), d2 = denominator(c + w, i, j);
          acc[i][j] += (d1 + d2) / (d1 * d2);
        }
  }
  for (; c < units.size; c += w)
    for (int i = 0; i < NQ; ++i)
      for (int j = 0; j < NK; ++j) acc[i][j] += T(1) / denominator(c, i, j);
  for (int i = 0; i < NQ; ++i)
    for (int j = 0; j < NK; ++j) out[i * out_ld + j] = units.sum - units.scale * sum<T>(acc[i][j]);
}

template <typename T>
T direct_score(const Units<T>& units, const T* q, const T* k) {
  Vec<T> acc{};
  int64_t c = 0;
  for (; c + width<T> <= units.n; c += width<T>) acc += load(units.v + c) * tanh_any(load(q + c) + load(k + c));
  if (c < units.n) {  // padding is 0 * tanh(0)
    acc += load(units.v + c) * tanh_any(load(q + c) + load(k + c));
  }
  return sum<T>(acc);
}

// Scores of NQ queries and NK steps, by the fastest form that is in range.
template <typename T, int NQ, int NK>
ATTN_INLINE void score_tile(const Units<T>& units, const Projected<T>& q, int64_t i, const Projected<T>& k, int64_t j, T* out,
                            int64_t out_ld) {
  const int64_t ld = q.ld;
  T top = 0;
  bool in_range = units.factored;
  for (int a = 0; a < NQ; ++a)
    for (int b = 0; b < NK; ++b) {
      top = q.top[i + a] + k.top[j + b];
      in_range = in_range && top <= kThree;
    }
  if (in_range) return factored_tile<T, NQ, NK, true>(units, q.e + i * ld, k.e + j * ld, ld, out, out_ld);
  for (int a = 0; a < NQ; ++a)
    for (int b = 0; b < NK; ++b) {
      T* to = out + a * out_ld + b;
      const T *qe = q.e + (i + a) * ld, *ke = k.e + (j + b) * ld;
      top = q.top[i + a] + k.top[j + b];
      if (units.factored && top <= kThree)
        factored_tile<T, 1, 1, true>(units, qe, ke, ld, to, out_ld);
      else if (units.factored && top <= kSingle)
        factored_tile<T, 1, 1, false>(units, qe, ke, ld, to, out_ld);
      else
        *to = direct_score(units, q.raw + (i + a) * ld, k.raw + (j + b) * ld);
    }
}

template <typename T, int NQ, int NK>
void score_strip(const Units<T>& units, const Projected<T>& q, int64_t i, const Projected<T>& k, int64_t n, T* out,
                 int64_t out_ld) {
  int64_t j = 0;
  for (; j + NK <= n; j += NK) score_tile<T, NQ, NK>(units, q, i, k, j, out + j, out_ld);
  for (; j < n; ++j) score_tile<T, NQ, 1>(units, q, i, k, j, out + j, out_ld);
}

template <typename T>
struct AdditiveScore {
  const AdditiveScores& op;
  const Units<T>& units;

  struct Queries {
    Projected<T> rows;
    int64_t n;
  };

  int64_t cost() const { return op.A; }

  Queries queries(int64_t b, int64_t first, int64_t n, Scratch& scratch) const {
    Queries q{Projected<T>(n, units.size, scratch), n};
    ScratchScope scope(scratch);
    T* buffer = take<T>(scratch, op.A);
    for (int64_t i = 0; i < n; ++i) {
      const T* row = read_row(op.query, b, first + i, op.A, buffer);
      T* e = q.rows.e + i * units.size;
      q.rows.top[i] = exponentials(
          units.size,
          [&](int64_t c) __attribute__((always_inline)) { return load_upto(row + c, op.A - c) + load(units.bias + c); },
          q.rows.raw + i * units.size, e);
      if (units.factored)
        for (int64_t c = 0; c < units.size; c += width<T>) store(e + c, load(e + c) * load(units.factor + c));
    }
    return q;
  }

  // The exponentials of a block of keys stay in L2 for many queries, in L1 for few.
  void block(const Queries& q, int64_t b, const int32_t* list, int64_t n, T* out, int64_t ld, Scratch& scratch) const {
    const int64_t row_bytes = 2 * units.size * static_cast<int64_t>(sizeof(T));
    const int64_t most = smaller(n, larger(4, (q.n > 2 ? 1 << 18 : 1 << 14) / larger(row_bytes, 1)));
    ScratchScope scope(scratch);
    Projected<T> k(most, units.size, scratch);
    T* buffer = take<T>(scratch, op.A);
    for (int64_t j = 0; j < n; j += most) {
      const int64_t count = smaller(most, n - j);
      for (int64_t r = 0; r < count; ++r) {
        const T* row = read_row(op.keys, b, list[j + r], op.A, buffer);
        k.top[r] = exponentials(
            units.size, [&](int64_t c) __attribute__((always_inline)) { return load_upto(row + c, op.A - c); },
            k.raw + r * units.size, k.e + r * units.size);
      }
      int64_t i = 0;
      for (; i + 4 <= q.n; i += 4) score_strip<T, 4, 2>(units, q.rows, i, k, count, out + i * ld + j, ld);
      for (; i < q.n; ++i) score_strip<T, 1, 4>(units, q.rows, i, k, count, out + i * ld + j, ld);
    }
  }
};

template <typename T>
void additive_attention(const AdditiveAttentionForward& op) {
  ScratchScope scope(thread_scratch());
  const Units<T> units(op, thread_scratch());
  const Problem problem{op.B, op.Tq, op.Tk, op.D, op.query.dtype, op.values, op.attended};
  attention_forward<T>(problem, op.context, op.alignments, AdditiveScore<T>{op, units});
}

template <typename T>
void additive_scores(const AdditiveScoresForward& op) {
  ScratchScope scope(thread_scratch());
  const Units<T> units(op, thread_scratch());
  const AdditiveScore<T> score{op, units};
  const Chunks chunks(op.B, op.Tq, op.Tk, false);
  for_each_task(chunks.tasks, chunks.size * op.Tk * op.A, [&](int64_t task, Scratch& scratch) {
    const int64_t b = task / chunks.per_sentence, first = task % chunks.per_sentence * chunks.size;
    const int64_t nq = smaller(chunks.size, op.Tq - first), ld = padded<T>(op.Tk);
    int32_t* list = take<int32_t>(scratch, op.Tk);
    list_steps(Attended{}, b, first, op.Tk, list);
    T* scores = take<T>(scratch, nq * ld);
    score.block(score.queries(b, first, nq, scratch), b, list, op.Tk, scores, ld, scratch);
    for (int64_t i = 0; i < nq; ++i)
      write_row(op.scores, op.query.dtype, (b * op.Tq + first + i) * op.Tk, scores + i * ld, op.Tk);
  });
}

// Backward -----------------------------------------------------------------------------------------------------------------
//
// With r = 1 / (1 + E) and p = ds r: 1 - tanh^2 = 4 r (1 - r), so g = p - p r gives dquery and dkeys as sums of 4 v g, and
// dv = sum(ds) - 2 sum(p). A task takes one sentence and a block of columns (hidden units): all sums over queries and steps
// then stay within it, and sums over sentences are added up in order at the end.

constexpr int kTileQueries = ATTN_VECTOR_BYTES == 64 ? 8 : 4;  // their exponentials and sums fill the registers
constexpr int kBlockVectors = 4;                               // vectors of units in a block of columns

// One vector of units: rows of width<T>, and what the guards need of each row.
template <typename T>
struct Column {
  T *raw, *e, *top, *gradient;

  Column(int64_t n, Scratch& scratch) {
    raw = take<T>(scratch, n * width<T>);
    e = take<T>(scratch, n * width<T>);
    gradient = take<T>(scratch, n * width<T>);
    top = take<T>(scratch, n);
  }

  void set(int64_t i, Vec<T> x) {
    top[i] = exponentials(width<T>, [&](int64_t) __attribute__((always_inline)) { return x; }, raw + i * width<T>,
                          e + i * width<T>);
    Vec<T> zero{};
    store(gradient + i * width<T>, zero);
  }
};

// Adds the gradients of NQ queries, from i on, and of n steps (list[j] of the column; j itself without a list) given
// ds[a * ld + j]. Returns the sum of p.
template <typename T, int NQ>
Vec<T> gradient_tile(const Column<T>& q, int64_t i, const Column<T>& k, const int32_t* list, int64_t n, const T* ds,
                     int64_t ld) {
  constexpr int64_t w = width<T>;
  Vec<T> eq[NQ], dq[NQ] = {}, total{};
  T top = q.top[i];
  for (int a = 0; a < NQ; ++a) {
    eq[a] = load(q.e + (i + a) * w);
    const T next = q.top[i + a];
    if (top == top && !(next <= top)) top = next;  // NaN, once met, stays: comparisons with it are false
  }
  for (int64_t j = 0; j < n; ++j) {
    const int64_t row = list == nullptr ? j : list[j];
    const T reach = top + k.top[row];
    Vec<T> dk = load(k.gradient + row * w);
    auto add = [&](int a, Vec<T> r) __attribute__((always_inline)) {
      const Vec<T> p = ds[a * ld + j] * r;
      const Vec<T> g = p - p * r;
      dq[a] += g;
      dk += g;
      total += p;
    };
    const Vec<T> ek = load(k.e + row * w);
    if (sizeof(T) == 4 && NQ % 2 == 0 && reach <= kPair) {
      for (int a = 0; a + 1 < NQ; a += 2) {
        const Vec<T> d1 = T(1) + eq[a] * ek, d2 = T(1) + eq[a + 1] * ek;
        const Vec<T> inverse = T(1) / (d1 * d2);
        add(a, inverse * d2);
        add(a + 1, inverse * d1);
      }
    } else if (sizeof(T) == 4 && reach <= kSingle) {
      for (int a = 0; a < NQ; ++a) add(a, T(1) / (T(1) + eq[a] * ek));
    } else {
      const Vec<T> x = load(k.raw + row * w);
      for (int a = 0; a < NQ; ++a) {
        const Vec<T> t = tanh_any(load(q.raw + (i + a) * w) + x);
        const Vec<T> p = ds[a * ld + j] * (T(0.5) * (T(1) - t));
        const Vec<T> g = p * (T(0.5) * (T(1) + t));
        dq[a] += g;
        dk += g;
        total += p;
      }
    }
    store(k.gradient + row * w, dk);
  }
  for (int a = 0; a < NQ; ++a) {
    T* to = q.gradient + (i + a) * w;
    store(to, load(to) + dq[a]);
  }
  return total;
}

// dquery, dkeys, dv and dbias from the compact gradients of the scores, (B, Tq, Tk).
template <typename T>
void units_backward(const AdditiveScores& op, const Attended& attended, const T* dscores, void* dquery, void* dkeys,
                    void* dv, void* dbias) {
  constexpr int64_t w = width<T>;
  Scratch& call = thread_scratch();
  const Units<T> units(op, call);
  const Dtype dtype = op.query.dtype;
  T* dv_parts = take<T>(call, op.B * units.size);  // by sentence, to be added up in order
  T* dbias_parts = take<T>(call, op.B * units.size);
  const int64_t blocks = divide_up(units.size, kBlockVectors * w);
  for_each_task(op.B * blocks, op.Tq * op.Tk * kBlockVectors * w, [&](int64_t task, Scratch& scratch) {
    const int64_t b = task / blocks, first = task % blocks * kBlockVectors * w;
    const int64_t vectors = smaller(kBlockVectors, (units.size - first) / w);
    int32_t* list = take<int32_t>(scratch, op.Tk);
    Attended any = attended;  // a column holds every step; a query's own mask chooses among them
    if (attended.per_query) any.mask = nullptr;
    const int64_t n = list_steps(any, b, 0, op.Tk, list);
    Column<T>* q = take<Column<T>>(scratch, vectors);
    Column<T>* k = take<Column<T>>(scratch, vectors);
    for (int64_t u = 0; u < vectors; ++u) {
      q[u] = Column<T>(op.Tq, scratch);
      k[u] = Column<T>(n, scratch);
    }
    auto read = [&](const Array3& a, int64_t row, int64_t c) __attribute__((always_inline)) {
      const int64_t at = b * a.stride[0] + row * a.stride[1] + c * a.stride[2];
      return load_as<T>(a.data, a.dtype, at, a.stride[2], op.A - c);
    };
    for (int64_t i = 0; i < op.Tq; ++i)
      for (int64_t u = 0; u < vectors; ++u) {
        const int64_t c = first + u * w;
        q[u].set(i, read(op.query, i, c) + load(units.bias + c));
      }
    for (int64_t j = 0; j < n; ++j)
      for (int64_t u = 0; u < vectors; ++u) k[u].set(j, read(op.keys, list[j], first + u * w));

    Vec<T> p[kBlockVectors] = {};
    T total = 0;
    const T* ds = dscores + b * op.Tq * op.Tk;
    int32_t* own = take<int32_t>(scratch, op.Tk);
    int64_t i = 0;
    if (!attended.per_query)
      for (; i + kTileQueries <= op.Tq; i += kTileQueries)
        for (int64_t u = 0; u < vectors; ++u)
          p[u] += gradient_tile<T, kTileQueries>(q[u], i, k[u], nullptr, n, ds + i * op.Tk, op.Tk);
    for (; i < op.Tq; ++i) {
      const int64_t count = attended.per_query ? list_steps(attended, b, i, op.Tk, own) : n;
      for (int64_t u = 0; u < vectors; ++u)
        p[u] += gradient_tile<T, 1>(q[u], i, k[u], attended.per_query ? own : nullptr, count, ds + i * op.Tk, op.Tk);
    }
    for (i = 0; i < op.Tq; ++i) {
      const int64_t count = attended.per_query ? list_steps(attended, b, i, op.Tk, own) : n;
      Vec<T> row{};
      for (int64_t j = 0; j < count; j += w) row += load_upto(ds + i * op.Tk + j, count - j);
      total += sum<T>(row);
    }
    for (int64_t u = 0; u < vectors; ++u) {
      const int64_t c = first + u * w;
      const Vec<T> v4 = T(4) * load(units.v + c);
      Vec<T> bias{};
      for (i = 0; i < op.Tq; ++i) {
        const Vec<T> g = v4 * load(q[u].gradient + i * w);
        bias += g;
        store_as<T>(dquery, dtype, (b * op.Tq + i) * op.A + c, g, op.A - c);
      }
      for (int64_t j = 0, next = 0; j < op.Tk; ++j) {
        Vec<T> g{};
        if (next < n && list[next] == j) g = v4 * load(k[u].gradient + next++ * w);
        store_as<T>(dkeys, dtype, (b * op.Tk + j) * op.A + c, g, op.A - c);
      }
      store(dv_parts + b * units.size + c, total - T(2) * p[u]);
      store(dbias_parts + b * units.size + c, bias);
    }
  });
  for (int64_t c = 0; c < units.size; c += w) {
    Vec<T> v_sum{}, bias_sum{};
    for (int64_t b = 0; b < op.B; ++b) {
      v_sum += load(dv_parts + b * units.size + c);
      bias_sum += load(dbias_parts + b * units.size + c);
    }
    store_as<T>(dv, dtype, c, v_sum, op.A - c);
    if (dbias != nullptr) store_as<T>(dbias, dtype, c, bias_sum, op.A - c);
  }
}

template <typename T>
void additive_attention_backward(const AdditiveAttentionBackward& op) {
  Scratch& call = thread_scratch();
  ScratchScope scope(call);
  const Problem problem{op.B, op.Tq, op.Tk, op.D, op.query.dtype, op.values, op.attended};
  T* weights = take<T>(call, op.B * op.Tq * op.Tk);
  T* dscores = take<T>(call, op.B * op.Tq * op.Tk);
  attention_backward(problem, op.alignments, op.grad_context, op.grad_alignments, weights, dscores,
                     [](int64_t, int64_t, int64_t, const int32_t*, int64_t, const T*, Scratch&) {});
  if (op.grad_context)
    weighted_steps(problem, weights, op.grad_context, op.D, op.dvalues);
  else
    fill_zero<T>(op.dvalues, 0, op.B * op.Tk * op.D, op.query.dtype);
  units_backward(op, op.attended, dscores, op.dquery, op.dkeys, op.dv, op.dbias);
}

template <typename T>
void additive_scores_backward(const AdditiveScoresBackward& op) {
  Scratch& call = thread_scratch();
  ScratchScope scope(call);
  T* dscores = take<T>(call, op.B * op.Tq * op.Tk);
  for_each_task(op.B * op.Tq, op.Tk, [&](int64_t task, Scratch& scratch) {
    T* buffer = take<T>(scratch, op.Tk);
    const T* row = read_row(op.grad_scores, task / op.Tq, task % op.Tq, op.Tk, buffer);
    memcpy(dscores + task * op.Tk, row, op.Tk * sizeof(T));
  });
  units_backward(op, Attended{}, dscores, op.dquery, op.dkeys, op.dv, op.dbias);
}

}  // namespace ATTN_LEVEL
}  // namespace attn
