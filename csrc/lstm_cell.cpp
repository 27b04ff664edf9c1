// lstm_step: the ops of attn_kernels/recurrent_ops.py that the decoder's loop calls on the CPU. They write into their
// arguments.
#include "lstm_cell.h"

#include "rows.h"

namespace attn {
namespace {

void step(Tensor gates, Tensor cell, Tensor new_cell, Tensor tanh, Tensor hidden, std::optional<Tensor> again) {
  const Dtype dtype = dtype_of_gates(gates, 4);
  const int64_t B = gates.size(0), H = gates.size(1) / 4;
  const LstmStep op{B,
                    H,
                    dtype,
                    rows(gates, "gates", dtype, B, 4 * H),
                    rows(cell, "cell", dtype, B, H),
                    rows(new_cell, "new_cell", dtype, B, H),
                    rows(tanh, "tanh", dtype, B, H),
                    rows(hidden, "hidden", dtype, B, H),
                    again.has_value() ? rows(*again, "again", dtype, B, H) : RowsView{}};
  if (B * H > 0) CallContext(gates).kernels().lstm_step(op);
}

void step_backward(Tensor dhidden, Tensor gates, Tensor cell, Tensor tanh, Tensor dcell, Tensor dgates) {
  const Dtype dtype = dtype_of_gates(gates, 4);
  const int64_t B = gates.size(0), H = gates.size(1) / 4;
  const LstmStepBackward op{B,
                            H,
                            dtype,
                            rows(dhidden, "dhidden", dtype, B, H),
                            rows(gates, "gates", dtype, B, 4 * H),
                            rows(cell, "cell", dtype, B, H),
                            rows(tanh, "tanh", dtype, B, H),
                            rows(dcell, "dcell", dtype, B, H),
                            rows(dgates, "dgates", dtype, B, 4 * H)};
  if (B * H > 0) CallContext(gates).kernels().lstm_step_backward(op);
}

}  // namespace
}  // namespace attn

STABLE_TORCH_LIBRARY_IMPL(attn_kernels, ATTN_DISPATCH_KEY, m) {
  m.impl(ATTN_OVERLOAD("lstm_step"), TORCH_BOX(&attn::step));
  m.impl(ATTN_OVERLOAD("lstm_step_backward"), TORCH_BOX(&attn::step_backward));
}
