// A step of LSTM or GRU cells for a few rows, on preallocated buffers. Searches (decoder_step.h) and encoders
// (recurrent_steps.cpp) use it.
#pragma once

#include <cstring>
#include <vector>

#include "decode.h"
#include "kernels.h"

namespace attn {

// A matrix that owns its memory.
template <typename T>
struct Matrix {
  int64_t columns = 0;
  std::vector<T> data;

  Matrix() = default;
  Matrix(int64_t rows, int64_t columns) : columns(columns), data(rows * columns) {}
  T* row(int64_t r) { return data.data() + r * columns; }
  RowsView view() { return {data.data(), columns}; }
};

// Pointers to the first `count` rows of a matrix: row_products takes such pointers.
template <typename T>
std::vector<void*> pointers(Matrix<T>& matrix, int64_t count) {
  std::vector<void*> rows(count);
  for (int64_t r = 0; r < count; ++r) rows[r] = matrix.row(r);
  return rows;
}

// A weight in the layout that row_products reads: its rows in place, or rounded blocks (decode.h).
class Weight {
 public:
  Weight() = default;
  explicit Weight(const RowsView& rows, const uint32_t* blocks = nullptr) : weight_{rows, blocks}, exists_(true) {}
  explicit operator bool() const { return exists_; }  // not by its pointer: a weight without columns has no memory
  const StreamedWeight& read() const { return weight_; }

 private:
  StreamedWeight weight_{};
  bool exists_ = false;
};

template <typename T>
constexpr Dtype dtype_as = sizeof(T) == 8 ? Dtype::float64 : Dtype::float32;

// out_r = added_r + weight x_r: see RowProducts.
template <typename T>
void multiply(const Kernels& kernels, int64_t R, int64_t n, int64_t k, const std::vector<void*>& x,
              const Weight& weight, const std::vector<void*>* added, const std::vector<void*>& out, bool tanh = false) {
  kernels.row_products(
      {R, n, k, dtype_as<T>, x.data(), weight.read(), added == nullptr ? nullptr : added->data(), out.data(), tanh});
}

// H units, G = 4 H gates of an LSTM or 3 H of a GRU, R rows.
template <typename T>
class CellStep {
 public:
  CellStep(const Kernels& kernels, bool is_lstm, int64_t units, int64_t most)
      : kernels_(kernels),
        is_lstm_(is_lstm),
        units_(units),
        gates_(most, (is_lstm ? 4 : 3) * units),
        products_(most, is_lstm ? 0 : 3 * units),
        scratch_(most, units) {}

  bool is_lstm() const { return is_lstm_; }
  int64_t units() const { return units_; }
  int64_t gates() const { return gates_.columns; }
  // A buffer (R, G) for the terms of the gates that are known before the step.
  std::vector<void*> buffer(int64_t R) { return pointers(gates_, R); }

  // added: (R, G), all terms of the gates but the product of weight (G, H) with the states; it may be the buffer. bias:
  // (G,), added to that product, of a GRU only, or null. hidden, cell: (R, H), updated in place; a GRU has no cell.
  void run(int64_t R, const std::vector<void*>& added, const Weight& weight, const T* bias, Matrix<T>& hidden,
           Matrix<T>& cell) {
    const std::vector<void*> gates = buffer(R), states = pointers(hidden, R);
    if (is_lstm_) {
      multiply<T>(kernels_, R, this->gates(), units_, states, weight, &added, gates);
      return kernels_.lstm_step(
          {R, units_, dtype_as<T>, gates_.view(), cell.view(), cell.view(), scratch_.view(), hidden.view(), {}});
    }
    for (int64_t r = 0; r < R; ++r)
      if (added[r] != gates[r]) std::memcpy(gates[r], added[r], this->gates() * sizeof(T));
    multiply<T>(kernels_, R, this->gates(), units_, states, weight, nullptr, pointers(products_, R));
    kernels_.gru_step({R,
                       units_,
                       dtype_as<T>,
                       gates_.view(),
                       products_.view(),
                       {const_cast<T*>(bias), 0},
                       hidden.view(),
                       scratch_.view(),
                       hidden.view(),
                       {}});
  }

 private:
  const Kernels& kernels_;
  const bool is_lstm_;
  const int64_t units_;
  Matrix<T> gates_, products_, scratch_;
};

}  // namespace attn
