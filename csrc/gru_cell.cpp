// gru_step: the ops of attn_kernels/recurrent_ops.py that GRU layers call on the CPU. They write into their arguments.
#include "gru_cell.h"

#include "rows.h"

namespace attn {
namespace {

RowsView bias_of(const std::optional<Tensor>& bias, Dtype dtype, int64_t columns) {
  if (!bias.has_value()) return {};
  check_shape(*bias, "bias", {columns});
  STD_TORCH_CHECK(dtype_of(*bias, "bias") == dtype, "bias does not have the dtype of gates");
  STD_TORCH_CHECK(bias->stride(0) == 1 || columns <= 1, "bias must be contiguous");
  return {bias->mutable_data_ptr(), 0};
}

void step(Tensor gates, Tensor products, std::optional<Tensor> bias, Tensor before, Tensor recurrent, Tensor hidden,
          std::optional<Tensor> again) {
  const Dtype dtype = dtype_of_gates(gates, 3);
  const int64_t B = gates.size(0), H = gates.size(1) / 3;
  const GruStep op{B,
                   H,
                   dtype,
                   rows(gates, "gates", dtype, B, 3 * H),
                   rows(products, "products", dtype, B, 3 * H),
                   bias_of(bias, dtype, 3 * H),
                   rows(before, "before", dtype, B, H),
                   rows(recurrent, "recurrent", dtype, B, H),
                   rows(hidden, "hidden", dtype, B, H),
                   again.has_value() ? rows(*again, "again", dtype, B, H) : RowsView{}};
  if (B * H > 0) CallContext(gates).kernels().gru_step(op);
}

void step_backward(Tensor dhidden, Tensor gates, Tensor before, Tensor recurrent, Tensor dbefore, Tensor dgates,
                   Tensor dproducts) {
  const Dtype dtype = dtype_of_gates(gates, 3);
  const int64_t B = gates.size(0), H = gates.size(1) / 3;
  const GruStepBackward op{B,
                           H,
                           dtype,
                           rows(dhidden, "dhidden", dtype, B, H),
                           rows(gates, "gates", dtype, B, 3 * H),
                           rows(before, "before", dtype, B, H),
                           rows(recurrent, "recurrent", dtype, B, H),
                           rows(dbefore, "dbefore", dtype, B, H),
                           rows(dgates, "dgates", dtype, B, 3 * H),
                           rows(dproducts, "dproducts", dtype, B, 3 * H)};
  if (B * H > 0) CallContext(gates).kernels().gru_step_backward(op);
}

}  // namespace
}  // namespace attn

STABLE_TORCH_LIBRARY_IMPL(attn_kernels, ATTN_DISPATCH_KEY, m) {
  m.impl(ATTN_OVERLOAD("gru_step"), TORCH_BOX(&attn::step));
  m.impl(ATTN_OVERLOAD("gru_step_backward"), TORCH_BOX(&attn::step_backward));
}
