// The elementwise part of an LSTM step, in one pass along its rows. Part of a SIMD level: see simd.h.
#pragma once

#include "../lstm_cell.h"
#include "attention.h"

namespace attn {
namespace ATTN_LEVEL {

// 1 / (1 + e^-x) to a few ulp of its value, for every input.
template <typename T>
ATTN_INLINE Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> e = exp_nonpositive(-absolute<T>(x));
  const Vec<T> r = T(1) / (T(1) + e);
  return x < Vec<T>{} ? e * r : r;  // a NaN is in e, and so in r
}

template <typename T>
ATTN_INLINE T* row_of(const RowsView& rows, int64_t b) {
  return static_cast<T*>(rows.data) + b * rows.stride;
}

template <typename T>
void lstm_step(const LstmStep& op) {
  for_each_task(op.B, 8 * op.H, [&](int64_t b, Scratch&) {
    const int64_t H = op.H;
    T* gates = row_of<T>(op.gates, b);
    const T* cell = row_of<T>(op.cell, b);
    T *new_cell = row_of<T>(op.new_cell, b), *tanh = row_of<T>(op.tanh, b), *hidden = row_of<T>(op.hidden, b);
    for (int64_t c = 0; c < H; c += width<T>) {
      const int64_t n = H - c;
      const Vec<T> i = sigmoid<T>(load_upto(gates + c, n)), f = sigmoid<T>(load_upto(gates + H + c, n));
      const Vec<T> g = tanh_any(load_upto(gates + 2 * H + c, n)), o = sigmoid<T>(load_upto(gates + 3 * H + c, n));
      const Vec<T> state = f * load_upto(cell + c, n) + i * g, t = tanh_any(state), h = o * t;
      store_upto(gates + c, i, n);
      store_upto(gates + H + c, f, n);
      store_upto(gates + 2 * H + c, g, n);
      store_upto(gates + 3 * H + c, o, n);
      store_upto(new_cell + c, state, n);
      store_upto(tanh + c, t, n);
      store_upto(hidden + c, h, n);
      if (op.again.data != nullptr) store_upto(row_of<T>(op.again, b) + c, h, n);
    }
  });
}

template <typename T>
void lstm_step_backward(const LstmStepBackward& op) {
  for_each_task(op.B, 2 * op.H, [&](int64_t b, Scratch&) {
    const int64_t H = op.H;
    const T *gates = row_of<T>(op.gates, b), *cell = row_of<T>(op.cell, b), *tanh = row_of<T>(op.tanh, b);
    const T* dhidden = row_of<T>(op.dhidden, b);
    T *dcell = row_of<T>(op.dcell, b), *dgates = row_of<T>(op.dgates, b);
    for (int64_t c = 0; c < H; c += width<T>) {
      const int64_t n = H - c;
      const Vec<T> i = load_upto(gates + c, n), f = load_upto(gates + H + c, n);
      const Vec<T> g = load_upto(gates + 2 * H + c, n), o = load_upto(gates + 3 * H + c, n);
      const Vec<T> t = load_upto(tanh + c, n), dh = load_upto(dhidden + c, n);
      const Vec<T> dc = load_upto(dcell + c, n) + dh * o * (T(1) - t * t);
      store_upto(dgates + c, dc * g * i * (T(1) - i), n);
      store_upto(dgates + H + c, dc * load_upto(cell + c, n) * f * (T(1) - f), n);
      store_upto(dgates + 2 * H + c, dc * i * (T(1) - g * g), n);
      store_upto(dgates + 3 * H + c, dh * t * o * (T(1) - o), n);
      store_upto(dcell + c, dc * f, n);
    }
  });
}

}  // namespace ATTN_LEVEL
}  // namespace attn
