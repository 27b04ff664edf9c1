// Gated additive attention, forward: v_r . (activation(query + keys + bias) * sigmoid(gate)), for several score vectors
// v_r. Part of a SIMD level: see simd.h.
//
// The gated activations of a query and a block of steps are computed once, into L1, and multiplied with all score
// vectors (gemm.h). The sigmoid of the gate is computed once per step and tile of queries. With one query and one score
// vector, it is computed together with the activation.
#pragma once

#include "../additive_attention.h"
#include "activated_attention_fwd.h"
#include "attention.h"

namespace attn {
namespace ATTN_LEVEL {

// Each activation f has a class with these members: f(x), optionally with t f'(x) in *g.
template <typename T>
struct TanhUnit {
  ATTN_INLINE Vec<T> operator()(Vec<T> x) const { return tanh_any(x); }
  ATTN_INLINE Vec<T> operator()(Vec<T> x, Vec<T> t, Vec<T>* g) const {
    Vec<T> slope;
    const Vec<T> y = tanh_and_slope(x, &slope);
    *g = t * slope;
    return y;
  }
};

template <typename T>
struct SigmoidUnit {
  ATTN_INLINE Vec<T> operator()(Vec<T> x) const {
    Vec<T> slope;
    return sigmoid_and_slope<T>(x, &slope);
  }
  ATTN_INLINE Vec<T> operator()(Vec<T> x, Vec<T> t, Vec<T>* g) const {
    Vec<T> slope;
    const Vec<T> y = sigmoid_and_slope<T>(x, &slope);
    *g = t * slope;
    return y;
  }
};

// The same for an activation of ../activations.h.
template <typename T, class F>
struct PlainUnit {
  F f;

  ATTN_INLINE Vec<T> operator()(Vec<T> x) const { return f.value(x); }
  ATTN_INLINE Vec<T> operator()(Vec<T> x, Vec<T> t, Vec<T>* g) const {
    *g = f.gradient(x, t);
    return f.value(x);
  }
};

// f(x) sigmoid(gate) of an activation f.
template <typename T, class Unit>
ATTN_INLINE Vec<T> gated(const Unit& unit, Vec<T> x, Vec<T> gate) {
  if constexpr (std::is_same<Unit, TanhUnit<float>>::value) {
    return tanh_times_sigmoid(x, gate);
  } else {
    Vec<T> slope;
    return unit(x) * sigmoid_and_slope<T>(gate, &slope);
  }
}

template <typename T, class Body>
ATTN_INLINE void by_unit(const GatedAdditiveScores& op, const Body& body) {
  if (op.activation == Activation::tanh) return body(TanhUnit<T>{});
  if (op.activation == Activation::sigmoid) return body(SigmoidUnit<T>{});
  by_activation_of<T>(op, [&](auto f) { body(PlainUnit<T, decltype(f)>{f}); });
}

// Score vectors and bias, padded with zeros to whole vectors, and the number of steps of a block.
template <typename T>
struct GatedUnits {
  int64_t size;         // A in whole vectors
  const T **v, *bias;   // v: a pointer to each score vector
  const T* ones;        // replaces the gate if there is none
  int64_t block_steps;  // depends on A only, so that sums do not depend on the number of threads

  GatedUnits(const GatedAdditiveScores& op, Scratch& scratch) : size(padded<T>(op.A)) {
    T* rows = alloc<T>(scratch, (op.vectors + 2) * size);
    v = alloc<const T*>(scratch, op.vectors);
    bias = rows + op.vectors * size;
    ones = bias + size;
    for (int64_t c = 0; c < size; c += width<T>) {
      const Vec<T> zero{};
      auto read = [&](const StridedView3& a, int64_t row) {
        return load_as<T>(a.data, a.dtype, row * a.stride[1] + c * a.stride[2], a.stride[2], op.A - c);
      };
      for (int64_t r = 0; r < op.vectors; ++r) store(rows + r * size + c, read(op.v, r));
      store(rows + op.vectors * size + c, op.bias ? read(op.bias, 0) : zero);
      store(rows + (op.vectors + 1) * size + c, broadcast(T(1)));
    }
    for (int64_t r = 0; r < op.vectors; ++r) v[r] = rows + r * size;
    const int64_t in_cache = (1 << 14) / max(1, size * static_cast<int64_t>(sizeof(T)));
    block_steps = min(kPanelRows, max(1, in_cache / kRowsAtOnce) * kRowsAtOnce);
  }
};

// Row r of gates is sigmoid(gate[r]); row r of slopes, unless null, is its derivative.
template <typename T>
void gates_of_block(const T* const* gate, int64_t steps, int64_t columns, int64_t size, T* gates, T* slopes) {
  for (int64_t r = 0; r < steps; ++r)
    for (int64_t c = 0; c < columns; c += width<T>) {
      Vec<T> slope;
      store(gates + r * size + c, sigmoid_and_slope<T>(load_upto(gate[r] + c, columns - c), &slope));
      if (slopes != nullptr) store(slopes + r * size + c, slope);
    }
}

// hidden = activation(query + key) * gate for a block of steps, in rows of `size` elements. Rows of gates have the
// stride `gates_ld`.
template <typename T, class Unit>
__attribute__((noinline)) void hidden_rows(Unit unit, const T* query, const T* const* keys, const T* gates,
                                           int64_t gates_ld, int64_t steps, int64_t columns, int64_t size, T* hidden) {
  for (int64_t r = 0; r < steps; ++r) {
    const T *key = keys[r], *gate = gates + r * gates_ld;
    T* to = hidden + r * size;
    int64_t c = 0;
    for (; c + width<T> <= columns; c += width<T>)
      store(to + c, unit(load(query + c) + load(key + c)) * load(gate + c));
    if (c < columns) store(to + c, unit(load(query + c) + load_part(key + c, columns - c)) * load(gate + c));
  }
}

// The same, transposed: a row of kPanel steps for each of n units. gates: null without a gate.
template <typename T, class Unit>
__attribute__((noinline)) void hidden_columns(Unit unit, const T* query, const T* keys, const T* gates, int64_t n,
                                              int64_t steps, T* hidden) {
  for (int64_t a = 0; a < n; ++a)
    for (int64_t at = a * kPanel<T>, end = at + steps; at < end; at += width<T>) {
      const Vec<T> y = unit(query[a] + load(keys + at));
      store(hidden + at, gates == nullptr ? y : y * load(gates + at));
    }
}

// The score of one step.
template <typename T, class Unit>
__attribute__((noinline)) T gated_score(Unit unit, const T* query, const T* v, const T* key, const T* gate, int64_t n) {
  Vec<T> score{};
  int64_t c = 0;
  for (; c + width<T> <= n; c += width<T>)
    score += load(v + c) * gated<T>(unit, load(query + c) + load(key + c), load(gate + c));
  if (c < n)
    score += load(v + c) * gated<T>(unit, load(query + c) + load_part(key + c, n - c), load_part(gate + c, n - c));
  return sum<T>(score);
}

// panel[a * kPanel + j] = rows[j][c + a] for n <= kPanelRows units and `count` <= kPanel steps. Steps are padded to
// whole vectors by repeating the last step.
template <typename T>
void columns_of(const T* const* rows, int64_t count, int64_t c, int64_t n, T* panel) {
  constexpr int64_t w = width<T>;
  for (int64_t j = 0; j < count; j += w)
    for (int64_t a = 0; a < n; a += w) {
      Vec<T> square[w];
      for (int64_t i = 0; i < w; ++i) square[i] = load_upto(rows[min(j + i, count - 1)] + c + a, n - a);
      transpose<T>(square);
      for (int64_t i = 0; i < w; ++i) store(panel + (a + i) * kPanel<T> + j, square[i]);
    }
}

template <typename T>
struct GatedAdditiveScore {
  const GatedAdditiveScores& op;
  const GatedUnits<T>& units;

  struct Queries {
    int64_t first, n;  // rows of scores
    const T* rows;     // their queries, bias added
  };

  int64_t cost() const { return op.A; }

  Queries queries(int64_t b, int64_t first, int64_t n, Scratch& scratch) const {
    const int64_t begin = first / op.vectors, count = (first + n - 1) / op.vectors + 1 - begin;
    T* rows = alloc<T>(scratch, count * units.size);
    ScratchScope scope(scratch);
    T* buffer = alloc<T>(scratch, op.A);
    for (int64_t i = 0; i < count; ++i) {
      const T* row = read_row(op.query, b, begin + i, op.A, buffer);
      for (int64_t c = 0; c < units.size; c += width<T>)
        store(rows + i * units.size + c, load_upto(row + c, op.A - c) + load(units.bias + c));
    }
    return {first, n, rows};
  }

  void score_block(const Queries& q, int64_t b, const int32_t* list, int64_t n, T* out, int64_t ld,
                   Scratch& scratch) const {
    ScratchScope scope(scratch);
    if (op.vectors > 1)
      by_columns(q, b, list, n, out, ld, scratch);
    else if (op.gate && op.Tq == 1)
      one_query(q, b, list, n, out, scratch);
    else
      by_rows(q, b, list, n, out, ld, scratch);
  }

 private:
  // A single query, as in pooling: no activation is used twice, so none is stored.
  void one_query(const Queries& q, int64_t b, const int32_t* list, int64_t n, T* out, Scratch& scratch) const {
    RowBlock<T> keys(op.keys, op.A, kRowsAtOnce, scratch, op.extra), gates(op.gate, op.A, kRowsAtOnce, scratch);
    by_unit<T>(op, [&](auto unit) {
      for (int64_t j = 0; j < n; j += kRowsAtOnce) {
        const int64_t count = min(kRowsAtOnce, n - j);
        const T *const *k = keys.read(b, list + j, count), *const *g = gates.read(b, list + j, count);
        for (int64_t r = 0; r < count; ++r) out[j + r] = gated_score<T>(unit, q.rows, units.v[0], k[r], g[r], op.A);
      }
    });
  }

  // For one score vector: keys are read in order and used without a transposition.
  void by_rows(const Queries& q, int64_t b, const int32_t* list, int64_t n, T* out, int64_t ld,
               Scratch& scratch) const {
    const int64_t size = units.size, most = units.block_steps;
    RowBlock<T> keys(op.keys, op.A, most, scratch, op.extra), gates(op.gate ? op.gate : op.keys, op.A, most, scratch);
    T* gate = op.gate ? alloc<T>(scratch, most * size) : nullptr;
    T* hidden = alloc<T>(scratch, most * size);
    const T** rows = alloc<const T*>(scratch, most);
    for (int64_t r = 0; r < most; ++r) rows[r] = hidden + r * size;
    for (int64_t j = 0; j < n; j += most) {
      const int64_t count = min(most, n - j);
      const T* const* k = keys.read(b, list + j, count);
      if (op.gate) gates_of_block<T>(gates.read(b, list + j, count), count, op.A, size, gate, nullptr);
      for (int64_t i = 0; i < q.n; ++i) {
        by_unit<T>(op, [&](auto unit) {
          hidden_rows<T>(unit, q.rows + i * size, k, op.gate ? gate : units.ones, op.gate ? size : 0, count, op.A, size,
                         hidden);
        });
        dot_streamed(units.v, 1, PointedRows<T>{rows}, count, op.A, T(1), out + i * ld + j, ld);
      }
    }
  }

  // For several score vectors: steps are in the lanes of vectors. The activations then are the panel of a matrix
  // product with v, which needs no horizontal sums.
  void by_columns(const Queries& q, int64_t b, const int32_t* list, int64_t n, T* out, int64_t ld,
                  Scratch& scratch) const {
    const int64_t R = op.vectors, begin = q.first / R, end = (q.first + q.n - 1) / R + 1, most = kPanel<T>;
    RowBlock<T> keys(op.keys, op.A, most, scratch, op.extra), gates(op.gate ? op.gate : op.keys, op.A, most, scratch);
    T* key = alloc<T>(scratch, kPanelRows * most);
    T* gate = op.gate ? alloc<T>(scratch, kPanelRows * most) : nullptr;
    T* hidden = alloc<T>(scratch, kPanelRows * most);
    const T** v = alloc<const T*>(scratch, R);
    T** to = alloc<T*>(scratch, min(R, q.n));
    for (int64_t j = 0; j < n; j += most) {
      const int64_t count = min(most, n - j), steps = padded<T>(count);
      const T* const* k = keys.read(b, list + j, count);
      const T* const* g = op.gate ? gates.read(b, list + j, count) : nullptr;
      for (int64_t c = 0; c == 0 || c < op.A; c += kPanelRows) {
        const int64_t columns = min(kPanelRows, op.A - c);
        columns_of(k, count, c, columns, key);
        if (op.gate) {
          columns_of(g, count, c, columns, gate);
          for (int64_t a = 0; a < columns; ++a)
            for (int64_t u = 0; u < steps; u += width<T>) {
              Vec<T> slope;
              T* at = gate + a * most + u;
              store(at, sigmoid_and_slope<T>(load(at), &slope));
            }
        }
        for (int64_t r = 0; r < R; ++r) v[r] = units.v[r] + c;
        for (int64_t i = begin; i < end; ++i) {
          const int64_t first = max(i * R, q.first), last = min((i + 1) * R, q.first + q.n);
          by_unit<T>(op, [&](auto unit) {
            hidden_columns<T>(unit, q.rows + (i - begin) * units.size + c, key, gate, columns, steps, hidden);
          });
          for (int64_t row = first; row < last; ++row) to[row - first] = out + (row - q.first) * ld + j;
          gemm_panel(to, last - first, 0, count, v + (first - i * R), 1, hidden, columns, c > 0);
        }
      }
    }
  }
};

template <typename T, class Op>
void gated_additive_forward(const Op& op) {
  ScratchScope scope(thread_scratch());
  const GatedUnits<T> units(op, thread_scratch());
  forward<T>(op, GatedAdditiveScore<T>{op, units});
}

}  // namespace ATTN_LEVEL
}  // namespace attn
