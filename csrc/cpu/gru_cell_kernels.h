// The elementwise part of a GRU step, in one pass along its rows. Part of a SIMD level: see simd.h.
#pragma once

#include "../gru_cell.h"
#include "lstm_cell_kernels.h"

namespace attn {
namespace ATTN_LEVEL {

template <typename T>
void gru_step(const GruStep& op) {
  for_each_task(op.B, 8 * op.H, [&](int64_t b, Scratch&) {
    const int64_t H = op.H;
    T *gates = row_of<T>(op.gates, b), *recurrent = row_of<T>(op.recurrent, b), *hidden = row_of<T>(op.hidden, b);
    const T *products = row_of<T>(op.products, b), *before = row_of<T>(op.before, b);
    const T* bias = static_cast<const T*>(op.bias.data);
    for (int64_t c = 0; c < H; c += width<T>) {
      const int64_t n = H - c;
      const auto product = [&](int64_t column) {
        const Vec<T> x = load_upto(products + column, n);
        return bias == nullptr ? x : x + load_upto(bias + column, n);
      };
      const Vec<T> r = sigmoid<T>(load_upto(gates + c, n) + product(c));
      const Vec<T> z = sigmoid<T>(load_upto(gates + H + c, n) + product(H + c));
      const Vec<T> own = product(2 * H + c), candidate = tanh_any(load_upto(gates + 2 * H + c, n) + r * own);
      const Vec<T> h = candidate + z * (load_upto(before + c, n) - candidate);
      store_upto(gates + c, r, n);
      store_upto(gates + H + c, z, n);
      store_upto(gates + 2 * H + c, candidate, n);
      store_upto(recurrent + c, own, n);
      store_upto(hidden + c, h, n);
      if (op.again.data != nullptr) store_upto(row_of<T>(op.again, b) + c, h, n);
    }
  });
}

template <typename T>
void gru_step_backward(const GruStepBackward& op) {
  for_each_task(op.B, 2 * op.H, [&](int64_t b, Scratch&) {
    const int64_t H = op.H;
    const T *gates = row_of<T>(op.gates, b), *before = row_of<T>(op.before, b);
    const T *recurrent = row_of<T>(op.recurrent, b), *dhidden = row_of<T>(op.dhidden, b);
    T *dbefore = row_of<T>(op.dbefore, b), *dgates = row_of<T>(op.dgates, b), *dproducts = row_of<T>(op.dproducts, b);
    for (int64_t c = 0; c < H; c += width<T>) {
      const int64_t n = H - c;
      const Vec<T> r = load_upto(gates + c, n), z = load_upto(gates + H + c, n);
      const Vec<T> candidate = load_upto(gates + 2 * H + c, n), dh = load_upto(dhidden + c, n);
      const Vec<T> dn = dh * (T(1) - z) * (T(1) - candidate * candidate);
      const Vec<T> dz = dh * (load_upto(before + c, n) - candidate) * z * (T(1) - z);
      const Vec<T> dr = dn * load_upto(recurrent + c, n) * r * (T(1) - r);
      store_upto(dgates + c, dr, n);
      store_upto(dgates + H + c, dz, n);
      store_upto(dgates + 2 * H + c, dn, n);
      store_upto(dproducts + c, dr, n);
      store_upto(dproducts + H + c, dz, n);
      store_upto(dproducts + 2 * H + c, dn * r, n);
      store_upto(dbefore + c, load_upto(dbefore + c, n) + dh * z, n);
    }
  });
}

}  // namespace ATTN_LEVEL
}  // namespace attn
