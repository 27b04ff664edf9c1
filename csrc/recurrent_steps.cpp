// recurrent_steps: the op of attn_kernels/recurrent_ops.py that runs one direction of a recurrent layer over a few
// sentences, all steps in one call. CPU only.
#include <algorithm>
#include <numeric>

#include "cell_step.h"
#include "rows.h"

namespace attn {
namespace {

// A tensor (B, S, columns) with contiguous rows.
template <typename T>
struct Steps {
  T* data;
  int64_t sentence, step, columns;

  Steps(const Tensor& t, const char* name, Dtype dtype, int64_t B, int64_t S, int64_t columns) : columns(columns) {
    check_shape(t, name, {B, S, columns});
    STD_TORCH_CHECK(dtype_of(t, name) == dtype, name, " does not have the dtype of gates");
    STD_TORCH_CHECK(t.stride(2) == 1 || columns <= 1, name, " must have contiguous rows");
    data = static_cast<T*>(t.mutable_data_ptr());
    sentence = t.stride(0);
    step = t.stride(1);
  }
  T* row(int64_t b, int64_t t) const { return data + b * sentence + t * step; }
};

// The order of sentences, the longest first: the sentences that have a given step are then the first ones.
std::vector<int64_t> by_length(const int64_t* lengths, int64_t B) {
  std::vector<int64_t> order(B);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  return order;
}

template <typename T>
Matrix<T> read(const RowsView& from, const std::vector<int64_t>& order, int64_t columns) {
  Matrix<T> to(static_cast<int64_t>(order.size()), columns);
  for (size_t r = 0; r < order.size(); ++r)
    std::copy_n(static_cast<const T*>(from.data) + order[r] * from.stride, columns, to.row(r));
  return to;
}

template <typename T>
void write(Matrix<T>& from, const std::vector<int64_t>& order, const RowsView& to) {
  for (size_t r = 0; r < order.size(); ++r)
    std::copy_n(from.row(r), from.columns, static_cast<T*>(to.data) + order[r] * to.stride);
}

template <typename T>
void run(const Kernels& kernels, const Steps<T>& gates, Weight weight, const T* bias, const int64_t* lengths, int64_t B,
         int64_t S, bool reverse, const RowsView& hidden, const RowsView& cell, const Steps<T>& out) {
  const int64_t H = out.columns;
  const bool is_lstm = cell.data != nullptr;
  const std::vector<int64_t> order = by_length(lengths, B);
  Matrix<T> hidden_now = read<T>(hidden, order, H), cell_now = is_lstm ? read<T>(cell, order, H) : Matrix<T>();
  CellStep<T> cells(kernels, is_lstm, H, B);
  const int64_t longest = lengths[order[0]];
  for (int64_t i = 0; i < longest; ++i) {
    const int64_t t = reverse ? longest - 1 - i : i;
    std::vector<void*> known;
    for (const int64_t b : order)
      if (t < lengths[b]) known.push_back(gates.row(b, t));
    const int64_t R = static_cast<int64_t>(known.size());
    cells.run(R, known, weight, bias, hidden_now, cell_now);
    for (int64_t r = 0; r < R; ++r) std::copy_n(hidden_now.row(r), H, out.row(order[r], t));
  }
  for (int64_t b = 0; b < B; ++b)
    for (int64_t t = lengths[b]; t < S; ++t) std::fill_n(out.row(b, t), H, T(0));
  write(hidden_now, order, hidden);
  if (is_lstm) write(cell_now, order, cell);
}

void recurrent_steps(Tensor gates, Tensor weight, std::optional<Tensor> bias, Tensor lengths, bool reverse,
                     Tensor hidden, std::optional<Tensor> cell, Tensor out) {
  STD_TORCH_CHECK(gates.dim() == 3 && hidden.dim() == 2, "gates must have 3 axes, hidden 2");
  const int64_t B = gates.size(0), S = gates.size(1), H = hidden.size(1), G = (cell.has_value() ? 4 : 3) * H;
  const Dtype dtype = dtype_of(gates, "gates");
  STD_TORCH_CHECK(dtype == Dtype::float32 || dtype == Dtype::float64, "gates must be float32 or float64");
  check_shape(lengths, "lengths", {B});
  STD_TORCH_CHECK(lengths.scalar_type() == ScalarType::Long && lengths.is_contiguous(),
                  "lengths must be contiguous int64");
  const int64_t* steps = static_cast<const int64_t*>(lengths.const_data_ptr());
  for (int64_t b = 0; b < B; ++b) STD_TORCH_CHECK(0 <= steps[b] && steps[b] <= S, "lengths must be in 0..S");
  if (bias.has_value()) {
    check_shape(*bias, "bias", {G});
    STD_TORCH_CHECK(dtype_of(*bias, "bias") == dtype && bias->is_contiguous(), "bias must be contiguous, as gates");
  }
  const void* bias_data = bias.has_value() ? bias->const_data_ptr() : nullptr;
  const RowsView of_weight = rows(weight, "weight", dtype, G, H), first = rows(hidden, "hidden", dtype, B, H);
  const RowsView first_cell = cell.has_value() ? rows(*cell, "cell", dtype, B, H) : RowsView{};
  auto run_as = [&](auto zero) {
    using T = decltype(zero);
    const Steps<T> known(gates, "gates", dtype, B, S, G), results(out, "out", dtype, B, S, H);
    if (B * H > 0)
      run<T>(CallContext(gates).kernels(), known, Weight(of_weight), static_cast<const T*>(bias_data), steps, B, S,
             reverse, first, first_cell, results);
  };
  dtype == Dtype::float64 ? run_as(0.0) : run_as(0.0f);
}

}  // namespace
}  // namespace attn

STABLE_TORCH_LIBRARY_IMPL(attn_kernels, ATTN_DISPATCH_KEY, m) {
  m.impl(ATTN_OVERLOAD("recurrent_steps"), TORCH_BOX(&attn::recurrent_steps));
}
