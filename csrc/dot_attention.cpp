// dot_attention: the op of attn_kernels/ops.py, for each backend (call.h).
#include "dot_attention.h"

#include "binding.h"

namespace attn {
namespace {

std::tuple<Tensor, Tensor> attention(Tensor query, Tensor keys, Tensor values, double scale,
                                     std::optional<Tensor> memory_lengths, std::optional<Tensor> mask,
                                     bool need_alignments) {
  const CallContext call(query);
  return attention_forward(call.kernels().dot_attention, DotScores{scores_of(query, keys), scale}, query, values,
                           memory_lengths, mask, need_alignments);
}

std::tuple<Tensor, Tensor, Tensor> backward(std::optional<Tensor> grad_context, std::optional<Tensor> grad_alignments,
                                            Tensor query, Tensor keys, Tensor values, double scale,
                                            std::optional<Tensor> memory_lengths, std::optional<Tensor> mask,
                                            Tensor alignments, bool need_query, bool need_memory) {
  const CallContext call(query);
  return attention_backward(
      call.kernels().dot_attention_backward, DotScores{scores_of(query, keys), scale},
      {query, keys, values, alignments, grad_context, grad_alignments, memory_lengths, mask, need_query, need_memory});
}

}  // namespace
}  // namespace attn

STABLE_TORCH_LIBRARY_IMPL(attn_kernels, ATTN_DISPATCH_KEY, m) {
  m.impl(ATTN_OVERLOAD("dot_attention"), TORCH_BOX(&attn::attention));
  m.impl(ATTN_OVERLOAD("dot_attention_backward"), TORCH_BOX(&attn::backward));
}
