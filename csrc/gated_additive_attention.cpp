// The ops of attn_kernels/ops.py for additive attention with a gate or several score vectors, on the CPU (call.h).
#include "additive_attention.h"
#include "binding.h"

namespace attn {
namespace {

// v: (vectors, A). Each query has `vectors` adjacent rows of scores.
GatedAdditiveScores gated(const Tensor& query, const Tensor& keys, const Tensor& v, const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& gate, const std::optional<Tensor>& extra, int64_t activation,
                          double negative_slope) {
  STD_TORCH_CHECK(v.dim() == 2 && v.size(0) > 0, "v must have 2 axes, and a row");
  Scores n = scores_of(query, keys);
  n.vectors = v.size(0);
  n.Tq *= n.vectors;
  const Dtype dtype = n.query.dtype;
  return {{n, array(v, "v", dtype, {n.vectors, n.A}), array(bias, "bias", dtype, {n.A}),
           array(extra, "extra", dtype, {n.B, n.Tk, n.A})},
          array(gate, "gate", dtype, {n.B, n.Tk, n.A}),
          activation_of(activation),
          negative_slope};
}

// The gradients of v, bias and gate, if they are needed.
struct Own {
  Tensor dv, dbias, dgate;
  GatedAdditiveGradients gradients;

  Own(const GatedAdditiveScores& n, const Tensor& v, bool has_bias, bool has_gate, bool needed)
      : dv(output_if(needed, v, {n.vectors, n.A})),
        dbias(output_if(needed && has_bias, v, {n.A})),
        dgate(output_if(needed && has_gate, v, {n.B, n.Tk, n.A})),
        gradients{{data_if(needed, dv), data_if(needed && has_bias, dbias)}, data_if(needed && has_gate, dgate)} {}
};

Tensor scores(Tensor query, Tensor keys, Tensor v, std::optional<Tensor> bias, std::optional<Tensor> gate,
              std::optional<Tensor> extra, int64_t activation, double negative_slope) {
  const CallContext call(query);
  const GatedAdditiveScores n = gated(query, keys, v, bias, gate, extra, activation, negative_slope);
  Tensor out = output(query, {n.B, n.Tq, n.Tk});
  if (n.B * n.Tq * n.Tk > 0) call.kernels().gated_additive.scores({n, out.mutable_data_ptr()});
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> scores_backward(
    Tensor grad_scores, Tensor query, Tensor keys, Tensor v, std::optional<Tensor> bias, std::optional<Tensor> gate,
    std::optional<Tensor> extra, int64_t activation, double negative_slope, bool need_query, bool need_memory) {
  const CallContext call(query);
  const GatedAdditiveScores n = gated(query, keys, v, bias, gate, extra, activation, negative_slope);
  Own own(n, v, bias.has_value(), gate.has_value(), need_query);
  Tensor dquery = output_if(need_query, query, {n.B, n.Tq / n.vectors, n.A});
  Tensor dkeys = output_if(need_memory, keys, {n.B, n.Tk, n.A});
  if (n.B * n.Tq * n.Tk == 0) {
    for (Tensor* t : {&dquery, &dkeys, &own.dv, &own.dbias, &own.dgate}) torch::stable::zero_(*t);
  } else if (need_query || need_memory) {
    call.kernels().gated_additive.scores_backward({n, own.gradients,
                                                   array(grad_scores, "grad_scores", n.query.dtype, {n.B, n.Tq, n.Tk}),
                                                   data_if(need_query, dquery), data_if(need_memory, dkeys)});
  }
  return {dquery, dkeys, own.dv, own.dbias, own.dgate};
}

std::tuple<Tensor, Tensor, Tensor> attention(Tensor query, Tensor keys, Tensor values, Tensor v,
                                             std::optional<Tensor> bias, std::optional<Tensor> gate,
                                             std::optional<Tensor> score_bias, std::optional<Tensor> extra,
                                             int64_t activation, double negative_slope, double dropout_p,
                                             int64_t normalizer, double clip, std::optional<Tensor> seed,
                                             std::optional<Tensor> memory_lengths, std::optional<Tensor> mask,
                                             bool need_alignments) {
  const CallContext call(query);
  return attention_forward(
      call.kernels().gated_additive.attention, gated(query, keys, v, bias, gate, extra, activation, negative_slope),
      {score_bias, dropout_p, normalizer, clip, seed}, query, values, memory_lengths, mask, need_alignments);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    std::optional<Tensor> grad_context, std::optional<Tensor> grad_alignments, std::optional<Tensor> grad_log_total,
    Tensor query, Tensor keys, Tensor values, Tensor v, std::optional<Tensor> bias, std::optional<Tensor> gate,
    std::optional<Tensor> score_bias, std::optional<Tensor> extra, int64_t activation, double negative_slope,
    double dropout_p, int64_t normalizer, double clip, std::optional<Tensor> seed, std::optional<Tensor> memory_lengths,
    std::optional<Tensor> mask, Tensor alignments, Tensor log_total, bool need_query, bool need_memory) {
  const CallContext call(query);
  const GatedAdditiveScores n = gated(query, keys, v, bias, gate, extra, activation, negative_slope);
  const OptionArguments given{score_bias, dropout_p, normalizer, clip, seed};
  Own own(n, v, bias.has_value(), gate.has_value(), need_query);
  Tensor dscore_bias = dscore_bias_if(need_query, given, n, query);
  const OptionGradients with{given, log_total, grad_log_total, &dscore_bias};
  auto [dquery, dkeys, dvalues] = attention_backward(call.kernels().gated_additive.attention_backward, n,
                                                     {query, keys, values, alignments, grad_context, grad_alignments,
                                                      memory_lengths, mask, need_query, need_memory, need_memory},
                                                     own.gradients, {&own.dv, &own.dbias, &own.dgate}, &with);
  return {dquery, dkeys, dvalues, own.dv, own.dbias, own.dgate, dscore_bias};
}

}  // namespace
}  // namespace attn

STABLE_TORCH_LIBRARY_IMPL(attn_kernels, ATTN_DISPATCH_KEY, m) {
  m.impl(ATTN_OVERLOAD("gated_additive_scores"), TORCH_BOX(&attn::scores));
  m.impl(ATTN_OVERLOAD("gated_additive_scores_backward"), TORCH_BOX(&attn::scores_backward));
  m.impl(ATTN_OVERLOAD("gated_additive_attention"), TORCH_BOX(&attn::attention));
  m.impl(ATTN_OVERLOAD("gated_additive_attention_backward"), TORCH_BOX(&attn::backward));
}
