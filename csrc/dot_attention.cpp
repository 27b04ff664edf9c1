// dot_attention: the op of attn_kernels/ops.py, for each backend (call.h).
#include "dot_attention.h"

#include "binding.h"

namespace attn {
namespace {

std::tuple<Tensor, Tensor> attention(Tensor query, Tensor keys, Tensor values, double scale,
                                     std::optional<Tensor> memory_lengths, std::optional<Tensor> mask,
                                     bool need_alignments) {
  const CallContext call(query);
  return attention_forward(call.kernels().dot.attention, DotScores{scores_of(query, keys), scale}, query, values,
                           memory_lengths, mask, need_alignments);
}

std::tuple<Tensor, Tensor, Tensor> backward(std::optional<Tensor> grad_context, std::optional<Tensor> grad_alignments,
                                            Tensor query, Tensor keys, Tensor values, double scale,
                                            std::optional<Tensor> memory_lengths, std::optional<Tensor> mask,
                                            Tensor alignments, bool need_query, bool need_memory) {
  const CallContext call(query);
  return attention_backward(call.kernels().dot.attention_backward, DotScores{scores_of(query, keys), scale},
                            {query, keys, values, alignments, grad_context, grad_alignments, memory_lengths, mask,
                             need_query, need_memory, need_memory});
}

#if !defined(ATTN_CUDA)  // on the CPU only
std::tuple<Tensor, Tensor, Tensor> with_options(Tensor query, Tensor keys, Tensor values,
                                                std::optional<Tensor> score_bias, double scale, double dropout_p,
                                                int64_t normalizer, double clip, std::optional<Tensor> seed,
                                                std::optional<Tensor> memory_lengths, std::optional<Tensor> mask,
                                                bool need_alignments) {
  const CallContext call(query);
  return attention_forward(call.kernels().dot.attention, DotScores{scores_of(query, keys), scale},
                           {score_bias, dropout_p, normalizer, clip, seed}, query, values, memory_lengths, mask,
                           need_alignments);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> with_options_backward(
    std::optional<Tensor> grad_context, std::optional<Tensor> grad_alignments, std::optional<Tensor> grad_log_total,
    Tensor query, Tensor keys, Tensor values, std::optional<Tensor> score_bias, double scale, double dropout_p,
    int64_t normalizer, double clip, std::optional<Tensor> seed, std::optional<Tensor> memory_lengths,
    std::optional<Tensor> mask, Tensor alignments, Tensor log_total, bool need_query, bool need_memory) {
  const CallContext call(query);
  const DotScores score{scores_of(query, keys), scale};
  const OptionArguments given{score_bias, dropout_p, normalizer, clip, seed};
  Tensor dscore_bias = dscore_bias_if(need_query, given, score, query);
  const OptionGradients with{given, log_total, grad_log_total, &dscore_bias};
  auto [dquery, dkeys, dvalues] = attention_backward(call.kernels().dot.attention_backward, score,
                                                     {query, keys, values, alignments, grad_context, grad_alignments,
                                                      memory_lengths, mask, need_query, need_memory, need_memory},
                                                     {}, {}, &with);
  return {dquery, dkeys, dvalues, dscore_bias};
}
#endif

}  // namespace
}  // namespace attn

STABLE_TORCH_LIBRARY_IMPL(attn_kernels, ATTN_DISPATCH_KEY, m) {
  m.impl(ATTN_OVERLOAD("dot_attention"), TORCH_BOX(&attn::attention));
  m.impl(ATTN_OVERLOAD("dot_attention_backward"), TORCH_BOX(&attn::backward));
#if !defined(ATTN_CUDA)
  m.impl(ATTN_OVERLOAD("dot_attention_with_options"), TORCH_BOX(&attn::with_options));
  m.impl(ATTN_OVERLOAD("dot_attention_with_options_backward"), TORCH_BOX(&attn::with_options_backward));
#endif
}
