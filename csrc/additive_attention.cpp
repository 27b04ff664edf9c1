// The ops of attn_kernels/ops.py with a score vector, for each backend (call.h).
#include "additive_attention.h"

#include "vector_binding.h"

namespace attn {
namespace {

// The gradients of v and bias, if they are needed.
struct Own {
  Tensor dv, dbias;
  VectorGradients gradients;

  Own(const Tensor& v, bool has_bias, bool needed)
      : dv(output_if(needed, v, {v.size(0)})),
        dbias(output_if(needed && has_bias, v, {v.size(0)})),
        gradients{data_if(needed, dv), data_if(needed && has_bias, dbias)} {}
};

template <class Score>
Tensor scores_forward(void (*kernel)(const ScoresForward<Score>&), const Score& score, const Tensor& query) {
  Tensor out = output(query, {score.B, score.Tq, score.Tk});
  if (score.B * score.Tq * score.Tk > 0) kernel({score, out.mutable_data_ptr()});
  return out;
}

template <class Score>
std::tuple<Tensor, Tensor, Tensor, Tensor> scores_gradients(void (*kernel)(const ScoresBackward<Score>&),
                                                            const Score& score, const Tensor& grad_scores,
                                                            const Tensor& query, const Tensor& keys, const Tensor& v,
                                                            bool need_query, bool need_memory) {
  Own own(v, static_cast<bool>(score.bias), need_query);
  Tensor dquery = output_if(need_query, query, {score.B, score.Tq, score.A});
  Tensor dkeys = output_if(need_memory, keys, {score.B, score.Tk, score.A});
  if (score.B * score.Tq * score.Tk == 0) {
    for (Tensor* t : {&dquery, &dkeys, &own.dv, &own.dbias}) torch::stable::zero_(*t);
  } else if (need_query || need_memory) {
    kernel({score, own.gradients, array(grad_scores, "grad_scores", score.query.dtype, {score.B, score.Tq, score.Tk}),
            data_if(need_query, dquery), data_if(need_memory, dkeys)});
  }
  return {dquery, dkeys, own.dv, own.dbias};
}

template <class Score>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_gradients(void (*kernel)(const AttentionBackward<Score>&),
                                                                       const Score& score, const AttentionGradients& of,
                                                                       const Tensor& v) {
  Own own(v, static_cast<bool>(score.bias), of.need_query);
  auto [dquery, dkeys, dvalues] = attention_backward(kernel, score, of, own.gradients, {&own.dv, &own.dbias});
  return {dquery, dkeys, dvalues, own.dv, own.dbias};
}

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

#if !defined(ATTN_CUDA)  // on the CPU only
template <class Score>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gradients_with_options(
    void (*kernel)(const AttentionBackward<Score>&), const Score& score, const AttentionGradients& of, const Tensor& v,
    const OptionArguments& given, const Tensor& log_total, const std::optional<Tensor>& grad_log_total) {
  Own own(v, static_cast<bool>(score.bias), of.need_query);
  Tensor dscore_bias = dscore_bias_if(of.need_query, given, score, of.query);
  const OptionGradients with{given, log_total, grad_log_total, &dscore_bias};
  auto [dquery, dkeys, dvalues] = attention_backward(kernel, score, of, own.gradients, {&own.dv, &own.dbias}, &with);
  return {dquery, dkeys, dvalues, own.dv, own.dbias, dscore_bias};
}
#endif

// The ops of a score S, Additive or Activated. Own: the types of the op's arguments after v and bias.
template <class S, class... Own>
struct VectorOps {
  static Tensor scores(Tensor query, Tensor keys, Tensor v, std::optional<Tensor> bias, Own... own) {
    const CallContext call(query);
    return scores_forward((call.kernels().*S::kKernels).scores, S::of(with_vector(query, keys, v, bias), own...),
                          query);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> scores_backward(Tensor grad_scores, Tensor query, Tensor keys,
                                                                    Tensor v, std::optional<Tensor> bias, Own... own,
                                                                    bool need_query, bool need_memory) {
    const CallContext call(query);
    return scores_gradients((call.kernels().*S::kKernels).scores_backward,
                            S::of(with_vector(query, keys, v, bias), own...), grad_scores, query, keys, v, need_query,
                            need_memory);
  }

  static std::tuple<Tensor, Tensor> attention(Tensor query, Tensor keys, Tensor values, Tensor v,
                                              std::optional<Tensor> bias, Own... own,
                                              std::optional<Tensor> memory_lengths, std::optional<Tensor> mask,
                                              bool need_alignments) {
    const CallContext call(query);
    return attention_forward((call.kernels().*S::kKernels).attention, S::of(with_vector(query, keys, v, bias), own...),
                             query, values, memory_lengths, mask, need_alignments);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
      std::optional<Tensor> grad_context, std::optional<Tensor> grad_alignments, Tensor query, Tensor keys,
      Tensor values, Tensor v, std::optional<Tensor> bias, Own... own, std::optional<Tensor> memory_lengths,
      std::optional<Tensor> mask, Tensor alignments, bool need_query, bool need_memory) {
    const CallContext call(query);
    return attention_gradients((call.kernels().*S::kKernels).attention_backward,
                               S::of(with_vector(query, keys, v, bias), own...),
                               {query, keys, values, alignments, grad_context, grad_alignments, memory_lengths, mask,
                                need_query, need_memory, need_memory},
                               v);
  }

  // With `extra` added to the keys: dkeys, the gradient of the sum, is also the gradient of extra.
  static std::tuple<Tensor, Tensor> with_extra(Tensor query, Tensor keys, Tensor values, Tensor v,
                                               std::optional<Tensor> bias, Tensor extra, Own... own,
                                               std::optional<Tensor> memory_lengths, std::optional<Tensor> mask,
                                               bool need_alignments) {
    const CallContext call(query);
    return attention_forward((call.kernels().*S::kKernels).attention,
                             S::of(with_vector(query, keys, v, bias, extra), own...), query, values, memory_lengths,
                             mask, need_alignments);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> with_extra_backward(
      std::optional<Tensor> grad_context, std::optional<Tensor> grad_alignments, Tensor query, Tensor keys,
      Tensor values, Tensor v, std::optional<Tensor> bias, Tensor extra, Own... own,
      std::optional<Tensor> memory_lengths, std::optional<Tensor> mask, Tensor alignments, bool need_query,
      bool need_keys, bool need_values) {
    const CallContext call(query);
    return attention_gradients((call.kernels().*S::kKernels).attention_backward,
                               S::of(with_vector(query, keys, v, bias, extra), own...),
                               {query, keys, values, alignments, grad_context, grad_alignments, memory_lengths, mask,
                                need_query, need_keys, need_values},
                               v);
  }

#if !defined(ATTN_CUDA)  // on the CPU only
  static std::tuple<Tensor, Tensor, Tensor> with_options(Tensor query, Tensor keys, Tensor values, Tensor v,
                                                         std::optional<Tensor> bias, std::optional<Tensor> score_bias,
                                                         std::optional<Tensor> extra, Own... own, double dropout_p,
                                                         int64_t normalizer, double clip, std::optional<Tensor> seed,
                                                         std::optional<Tensor> memory_lengths,
                                                         std::optional<Tensor> mask, bool need_alignments) {
    const CallContext call(query);
    return attention_forward(
        (call.kernels().*S::kKernels).attention, S::of(with_vector(query, keys, v, bias, extra), own...),
        {score_bias, dropout_p, normalizer, clip, seed}, query, values, memory_lengths, mask, need_alignments);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> with_options_backward(
      std::optional<Tensor> grad_context, std::optional<Tensor> grad_alignments, std::optional<Tensor> grad_log_total,
      Tensor query, Tensor keys, Tensor values, Tensor v, std::optional<Tensor> bias, std::optional<Tensor> score_bias,
      std::optional<Tensor> extra, Own... own, double dropout_p, int64_t normalizer, double clip,
      std::optional<Tensor> seed, std::optional<Tensor> memory_lengths, std::optional<Tensor> mask, Tensor alignments,
      Tensor log_total, bool need_query, bool need_memory) {
    const CallContext call(query);
    return gradients_with_options((call.kernels().*S::kKernels).attention_backward,
                                  S::of(with_vector(query, keys, v, bias, extra), own...),
                                  {query, keys, values, alignments, grad_context, grad_alignments, memory_lengths, mask,
                                   need_query, need_memory, need_memory},
                                  v, {score_bias, dropout_p, normalizer, clip, seed}, log_total, grad_log_total);
  }
#endif
};

using AdditiveOps = VectorOps<Additive>;
using PreparedOps = VectorOps<Additive, std::optional<Tensor>>;  // with prepared keys
using ActivatedOps = VectorOps<Activated, int64_t, double>;

}  // namespace
}  // namespace attn

STABLE_TORCH_LIBRARY_IMPL(attn_kernels, ATTN_DISPATCH_KEY, m) {
  m.impl(ATTN_OVERLOAD("additive_prepare"), TORCH_BOX(&attn::prepare));
  m.impl(ATTN_OVERLOAD("additive_scores"), TORCH_BOX(&attn::AdditiveOps::scores));
  m.impl(ATTN_OVERLOAD("additive_scores_backward"), TORCH_BOX(&attn::AdditiveOps::scores_backward));
  m.impl(ATTN_OVERLOAD("additive_attention"), TORCH_BOX(&attn::PreparedOps::attention));
  m.impl(ATTN_OVERLOAD("additive_attention_backward"), TORCH_BOX(&attn::PreparedOps::backward));
  m.impl(ATTN_OVERLOAD("activated_scores"), TORCH_BOX(&attn::ActivatedOps::scores));
  m.impl(ATTN_OVERLOAD("activated_scores_backward"), TORCH_BOX(&attn::ActivatedOps::scores_backward));
  m.impl(ATTN_OVERLOAD("activated_attention"), TORCH_BOX(&attn::ActivatedOps::attention));
  m.impl(ATTN_OVERLOAD("activated_attention_backward"), TORCH_BOX(&attn::ActivatedOps::backward));
  m.impl(ATTN_OVERLOAD("additive_attention_with_extra"), TORCH_BOX(&attn::AdditiveOps::with_extra));
  m.impl(ATTN_OVERLOAD("additive_attention_with_extra_backward"), TORCH_BOX(&attn::AdditiveOps::with_extra_backward));
  m.impl(ATTN_OVERLOAD("activated_attention_with_extra"), TORCH_BOX(&attn::ActivatedOps::with_extra));
  m.impl(ATTN_OVERLOAD("activated_attention_with_extra_backward"), TORCH_BOX(&attn::ActivatedOps::with_extra_backward));
#if !defined(ATTN_CUDA)
  m.impl(ATTN_OVERLOAD("additive_attention_with_options"), TORCH_BOX(&attn::AdditiveOps::with_options));
  m.impl(ATTN_OVERLOAD("additive_attention_with_options_backward"),
         TORCH_BOX(&attn::AdditiveOps::with_options_backward));
  m.impl(ATTN_OVERLOAD("activated_attention_with_options"), TORCH_BOX(&attn::ActivatedOps::with_options));
  m.impl(ATTN_OVERLOAD("activated_attention_with_options_backward"),
         TORCH_BOX(&attn::ActivatedOps::with_options_backward));
#endif
}
