// additive_scores and additive_attention: the ops of attn_kernels/ops.py, for each backend (call.h).
#include "additive_attention.h"

#include "binding.h"

namespace attn {
namespace {

// What additive_prepare returns for keys of this dtype.
Dtype prepared_dtype(Dtype keys) { return keys == Dtype::bfloat16 ? Dtype::bfloat16 : Dtype::float32; }

AdditiveScores additive(const Tensor& query, const Tensor& keys, const Tensor& v, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& prepared = std::nullopt) {
  const Scores n = scores_of(query, keys);
  const Dtype dtype = n.query.dtype;
  const PreparedSizes sizes(n.A, n.Tk, prepared_dtype(dtype));
  const AdditiveScores op{n, array(v, "v", dtype, {n.A}), array(bias, "bias", dtype, {n.A}),
                          array(prepared, "prepared", prepared_dtype(dtype), {n.B, sizes.rows, sizes.columns})};
  STD_TORCH_CHECK(!op.prepared || (op.prepared.stride[1] == sizes.columns && op.prepared.stride[2] == 1),
                  "prepared must be what additive_prepare returned");
  return op;
}

// The gradients of v and bias, where those are needed.
struct Own {
  Tensor dv, dbias;
  AdditiveGradients gradients;

  Own(const Tensor& v, bool has_bias, bool needed)
      : dv(output_if(needed, v, {v.size(0)})),
        dbias(output_if(needed && has_bias, v, {v.size(0)})),
        gradients{data_if(needed, dv), data_if(needed && has_bias, dbias)} {}
};

Tensor prepare(Tensor keys) {
  const CallContext call(keys);
  STD_TORCH_CHECK(keys.dim() == 3, "keys must have 3 axes");
  const int64_t B = keys.size(0), Tk = keys.size(1), A = keys.size(2);
  const Dtype dtype = dtype_of(keys, "keys");
  STD_TORCH_CHECK(dtype != Dtype::float64, "keys in float64 are not prepared");
  const PreparedSizes sizes(A, Tk, prepared_dtype(dtype));
  Tensor prepared = output(keys, {B, sizes.rows, sizes.columns},
                           prepared_dtype(dtype) == Dtype::bfloat16 ? ScalarType::BFloat16 : ScalarType::Float);
  if (B * Tk * A > 0)
    call.kernels().additive_prepare(
        {B, Tk, A, array(keys, "keys", dtype, {B, Tk, A}), prepared_dtype(dtype), prepared.mutable_data_ptr()});
  return prepared;
}

Tensor scores(Tensor query, Tensor keys, Tensor v, std::optional<Tensor> bias) {
  const CallContext call(query);
  AdditiveScoresForward op{additive(query, keys, v, bias), nullptr};
  Tensor out = output(query, {op.B, op.Tq, op.Tk});
  op.scores = out.mutable_data_ptr();
  if (op.B * op.Tq * op.Tk > 0) call.kernels().additive_scores(op);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> scores_backward(Tensor grad_scores, Tensor query, Tensor keys, Tensor v,
                                                           std::optional<Tensor> bias, bool need_query,
                                                           bool need_memory) {
  const CallContext call(query);
  const AdditiveScores n = additive(query, keys, v, bias);
  Own own(v, bias.has_value(), need_query);
  Tensor dquery = output_if(need_query, query, {n.B, n.Tq, n.A});
  Tensor dkeys = output_if(need_memory, keys, {n.B, n.Tk, n.A});
  if (n.B * n.Tq * n.Tk == 0) {
    for (Tensor* t : {&dquery, &dkeys, &own.dv, &own.dbias}) torch::stable::zero_(*t);
  } else if (need_query || need_memory) {
    call.kernels().additive_scores_backward({n, own.gradients,
                                             array(grad_scores, "grad_scores", n.query.dtype, {n.B, n.Tq, n.Tk}),
                                             data_if(need_query, dquery), data_if(need_memory, dkeys)});
  }
  return {dquery, dkeys, own.dv, own.dbias};
}

std::tuple<Tensor, Tensor> attention(Tensor query, Tensor keys, Tensor values, Tensor v, std::optional<Tensor> bias,
                                     std::optional<Tensor> prepared, std::optional<Tensor> memory_lengths,
                                     std::optional<Tensor> mask, bool need_alignments) {
  const CallContext call(query);
  return attention_forward(call.kernels().additive_attention, additive(query, keys, v, bias, prepared), query, values,
                           memory_lengths, mask, need_alignments);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    std::optional<Tensor> grad_context, std::optional<Tensor> grad_alignments, Tensor query, Tensor keys, Tensor values,
    Tensor v, std::optional<Tensor> bias, std::optional<Tensor> prepared, std::optional<Tensor> memory_lengths,
    std::optional<Tensor> mask, Tensor alignments, bool need_query, bool need_memory) {
  const CallContext call(query);
  const AdditiveScores score = additive(query, keys, v, bias, prepared);
  Own own(v, bias.has_value(), need_query);
  auto [dquery, dkeys, dvalues] = attention_backward(
      call.kernels().additive_attention_backward, score,
      {query, keys, values, alignments, grad_context, grad_alignments, memory_lengths, mask, need_query, need_memory},
      own.gradients, {&own.dv, &own.dbias});
  return {dquery, dkeys, dvalues, own.dv, own.dbias};
}

}  // namespace
}  // namespace attn

STABLE_TORCH_LIBRARY_IMPL(attn_kernels, ATTN_DISPATCH_KEY, m) {
  m.impl(ATTN_OVERLOAD("additive_prepare"), TORCH_BOX(&attn::prepare));
  m.impl(ATTN_OVERLOAD("additive_scores"), TORCH_BOX(&attn::scores));
  m.impl(ATTN_OVERLOAD("additive_scores_backward"), TORCH_BOX(&attn::scores_backward));
  m.impl(ATTN_OVERLOAD("additive_attention"), TORCH_BOX(&attn::attention));
  m.impl(ATTN_OVERLOAD("additive_attention_backward"), TORCH_BOX(&attn::backward));
}
