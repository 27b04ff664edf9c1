// dot_attention: the op of attn_kernels/ops.py, for each backend (call.h).
#include "dot_attention.h"

#include <tuple>

#include "checks.h"

namespace attn {
namespace {

DotAttention dot(const Tensor& query, const Tensor& keys, const Tensor& values, double scale,
                 const std::optional<Tensor>& memory_lengths, const std::optional<Tensor>& mask) {
  STD_TORCH_CHECK(query.dim() == 3 && keys.dim() == 3 && values.dim() == 3, "query, keys and values must have 3 axes");
  const int64_t B = query.size(0), Tq = query.size(1), Tk = keys.size(1), A = query.size(2), D = values.size(2);
  const Dtype dtype = dtype_of(query, "query");
  return {B,
          Tq,
          Tk,
          A,
          D,
          array(query, "query", dtype, {B, Tq, A}),
          array(keys, "keys", dtype, {B, Tk, A}),
          array(values, "values", dtype, {B, Tk, D}),
          scale,
          attended(memory_lengths, mask, B, Tq, Tk)};
}

std::tuple<Tensor, Tensor> attention(Tensor query, Tensor keys, Tensor values, double scale,
                                     std::optional<Tensor> memory_lengths, std::optional<Tensor> mask,
                                     bool need_alignments) {
  const Call call(query);
  const DotAttention n = dot(query, keys, values, scale, memory_lengths, mask);
  Tensor context = output(query, {n.B, n.Tq, n.D});
  Tensor alignments = need_alignments ? output(query, {n.B, n.Tq, n.Tk}) : output(query, {0});
  if (n.B * n.Tq > 0)
    call.kernels().dot_attention(
        {n, context.mutable_data_ptr(), need_alignments ? alignments.mutable_data_ptr() : nullptr});
  return {context, alignments};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(std::optional<Tensor> grad_context,
                                                      std::optional<Tensor> grad_alignments, Tensor query, Tensor keys,
                                                      Tensor values, double scale, std::optional<Tensor> memory_lengths,
                                                      std::optional<Tensor> mask, Tensor alignments) {
  const Call call(query);
  const DotAttention n = dot(query, keys, values, scale, memory_lengths, mask);
  const Dtype dtype = n.query.dtype;
  Tensor dquery = output(query, {n.B, n.Tq, n.A}), dkeys = output(keys, {n.B, n.Tk, n.A});
  Tensor dvalues = output(values, {n.B, n.Tk, n.D});
  if (n.B * n.Tq * n.Tk == 0) {
    for (Tensor* t : {&dquery, &dkeys, &dvalues}) torch::stable::zero_(*t);
  } else {
    call.kernels().dot_attention_backward({n, array(alignments, "alignments", dtype, {n.B, n.Tq, n.Tk}),
                                           array(grad_context, "grad_context", dtype, {n.B, n.Tq, n.D}),
                                           array(grad_alignments, "grad_alignments", dtype, {n.B, n.Tq, n.Tk}),
                                           dquery.mutable_data_ptr(), dkeys.mutable_data_ptr(),
                                           dvalues.mutable_data_ptr()});
  }
  return {dquery, dkeys, dvalues};
}

// attention_backward without dkeys and dvalues.
Tensor query_backward(std::optional<Tensor> grad_context, std::optional<Tensor> grad_alignments, Tensor query,
                      Tensor keys, Tensor values, double scale, std::optional<Tensor> memory_lengths,
                      std::optional<Tensor> mask, Tensor alignments) {
  const Call call(query);
  const DotAttention n = dot(query, keys, values, scale, memory_lengths, mask);
  const Dtype dtype = n.query.dtype;
  Tensor dquery = output(query, {n.B, n.Tq, n.A});
  if (n.B * n.Tq * n.Tk == 0) {
    torch::stable::zero_(dquery);
  } else {
    call.kernels().dot_attention_backward({n, array(alignments, "alignments", dtype, {n.B, n.Tq, n.Tk}),
                                           array(grad_context, "grad_context", dtype, {n.B, n.Tq, n.D}),
                                           array(grad_alignments, "grad_alignments", dtype, {n.B, n.Tq, n.Tk}),
                                           dquery.mutable_data_ptr(), nullptr, nullptr});
  }
  return dquery;
}

}  // namespace
}  // namespace attn

STABLE_TORCH_LIBRARY_IMPL(attn_kernels, ATTN_DISPATCH_KEY, m) {
  m.impl(ATTN_OVERLOAD("dot_attention"), TORCH_BOX(&attn::attention));
  m.impl(ATTN_OVERLOAD("dot_attention_backward"), TORCH_BOX(&attn::attention_backward));
  m.impl(ATTN_OVERLOAD("dot_attention_query_backward"), TORCH_BOX(&attn::query_backward));
}
