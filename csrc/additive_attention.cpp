// additive_scores and additive_attention: the ops of attn_kernels/ops.py, for each backend (call.h).
#include "additive_attention.h"

#include <tuple>

#include "checks.h"

namespace attn {
namespace {

// What additive_prepare returns for keys of this dtype.
Dtype prepared_dtype(Dtype keys) { return keys == Dtype::bfloat16 ? Dtype::bfloat16 : Dtype::float32; }

AdditiveScores additive(const Tensor& query, const Tensor& keys, const Tensor& v, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& prepared = std::nullopt) {
  STD_TORCH_CHECK(query.dim() == 3 && keys.dim() == 3, "query and keys must have 3 axes");
  const int64_t B = query.size(0), Tq = query.size(1), Tk = keys.size(1), A = query.size(2);
  const Dtype dtype = dtype_of(query, "query");
  const PreparedSizes sizes(A, Tk, prepared_dtype(dtype));
  const AdditiveScores op{B,
                          Tq,
                          Tk,
                          A,
                          array(query, "query", dtype, {B, Tq, A}),
                          array(keys, "keys", dtype, {B, Tk, A}),
                          array(v, "v", dtype, {A}),
                          array(bias, "bias", dtype, {A}),
                          array(prepared, "prepared", prepared_dtype(dtype), {B, sizes.rows, sizes.columns})};
  STD_TORCH_CHECK(!op.prepared || (op.prepared.stride[1] == sizes.columns && op.prepared.stride[2] == 1),
                  "prepared must be what additive_prepare returned");
  return op;
}

Tensor prepare(Tensor keys) {
  const Call call(keys);
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
  const Call call(query);
  AdditiveScoresForward op{additive(query, keys, v, bias), nullptr};
  Tensor out = output(query, {op.B, op.Tq, op.Tk});
  op.scores = out.mutable_data_ptr();
  if (op.B * op.Tq * op.Tk > 0) call.kernels().additive_scores(op);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> scores_backward(Tensor grad_scores, Tensor query, Tensor keys, Tensor v,
                                                           std::optional<Tensor> bias) {
  const Call call(query);
  const AdditiveScores sizes = additive(query, keys, v, bias);
  Tensor dquery = output(query, {sizes.B, sizes.Tq, sizes.A}), dkeys = output(keys, {sizes.B, sizes.Tk, sizes.A});
  Tensor dv = output(v, {sizes.A}), dbias = output(v, {bias.has_value() ? sizes.A : 0});
  if (sizes.B * sizes.Tq * sizes.Tk == 0) {
    for (Tensor* t : {&dquery, &dkeys, &dv, &dbias}) torch::stable::zero_(*t);
  } else {
    call.kernels().additive_scores_backward(
        {sizes, array(grad_scores, "grad_scores", sizes.query.dtype, {sizes.B, sizes.Tq, sizes.Tk}),
         dquery.mutable_data_ptr(), dkeys.mutable_data_ptr(), dv.mutable_data_ptr(),
         bias.has_value() ? dbias.mutable_data_ptr() : nullptr});
  }
  return {dquery, dkeys, dv, dbias};
}

std::tuple<Tensor, Tensor> attention(Tensor query, Tensor keys, Tensor values, Tensor v, std::optional<Tensor> bias,
                                     std::optional<Tensor> prepared, std::optional<Tensor> memory_lengths,
                                     std::optional<Tensor> mask, bool need_alignments) {
  const Call call(query);
  const AdditiveScores n = additive(query, keys, v, bias, prepared);
  STD_TORCH_CHECK(values.dim() == 3, "values must have 3 axes");
  const int64_t D = values.size(2);
  Tensor context = output(query, {n.B, n.Tq, D});
  Tensor alignments = need_alignments ? output(query, {n.B, n.Tq, n.Tk}) : output(query, {0});
  if (n.B * n.Tq > 0)
    call.kernels().additive_attention({n, D, array(values, "values", n.query.dtype, {n.B, n.Tk, D}),
                                       attended(memory_lengths, mask, n.B, n.Tq, n.Tk), context.mutable_data_ptr(),
                                       need_alignments ? alignments.mutable_data_ptr() : nullptr});
  return {context, alignments};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    std::optional<Tensor> grad_context, std::optional<Tensor> grad_alignments, Tensor query, Tensor keys, Tensor values,
    Tensor v, std::optional<Tensor> bias, std::optional<Tensor> prepared, std::optional<Tensor> memory_lengths,
    std::optional<Tensor> mask, Tensor alignments) {
  const Call call(query);
  const AdditiveScores n = additive(query, keys, v, bias, prepared);
  STD_TORCH_CHECK(values.dim() == 3, "values must have 3 axes");
  const int64_t D = values.size(2);
  const Dtype dtype = n.query.dtype;
  Tensor dquery = output(query, {n.B, n.Tq, n.A}), dkeys = output(keys, {n.B, n.Tk, n.A});
  Tensor dvalues = output(values, {n.B, n.Tk, D}), dv = output(v, {n.A});
  Tensor dbias = output(v, {bias.has_value() ? n.A : 0});
  if (n.B * n.Tq * n.Tk == 0) {
    for (Tensor* t : {&dquery, &dkeys, &dvalues, &dv, &dbias}) torch::stable::zero_(*t);
  } else {
    call.kernels().additive_attention_backward(
        {n, D, array(values, "values", dtype, {n.B, n.Tk, D}), attended(memory_lengths, mask, n.B, n.Tq, n.Tk),
         array(alignments, "alignments", dtype, {n.B, n.Tq, n.Tk}),
         array(grad_context, "grad_context", dtype, {n.B, n.Tq, D}),
         array(grad_alignments, "grad_alignments", dtype, {n.B, n.Tq, n.Tk}), dquery.mutable_data_ptr(),
         dkeys.mutable_data_ptr(), dvalues.mutable_data_ptr(), dv.mutable_data_ptr(),
         bias.has_value() ? dbias.mutable_data_ptr() : nullptr});
  }
  return {dquery, dkeys, dvalues, dv, dbias};
}

// attention_backward without dkeys and dvalues.
std::tuple<Tensor, Tensor, Tensor> query_backward(std::optional<Tensor> grad_context,
                                                  std::optional<Tensor> grad_alignments, Tensor query, Tensor keys,
                                                  Tensor values, Tensor v, std::optional<Tensor> bias,
                                                  std::optional<Tensor> prepared, std::optional<Tensor> memory_lengths,
                                                  std::optional<Tensor> mask, Tensor alignments) {
  const Call call(query);
  const AdditiveScores n = additive(query, keys, v, bias, prepared);
  STD_TORCH_CHECK(values.dim() == 3, "values must have 3 axes");
  const int64_t D = values.size(2);
  const Dtype dtype = n.query.dtype;
  Tensor dquery = output(query, {n.B, n.Tq, n.A}), dv = output(v, {n.A});
  Tensor dbias = output(v, {bias.has_value() ? n.A : 0});
  if (n.B * n.Tq * n.Tk == 0) {
    for (Tensor* t : {&dquery, &dv, &dbias}) torch::stable::zero_(*t);
  } else {
    call.kernels().additive_attention_backward(
        {n, D, array(values, "values", dtype, {n.B, n.Tk, D}), attended(memory_lengths, mask, n.B, n.Tq, n.Tk),
         array(alignments, "alignments", dtype, {n.B, n.Tq, n.Tk}),
         array(grad_context, "grad_context", dtype, {n.B, n.Tq, D}),
         array(grad_alignments, "grad_alignments", dtype, {n.B, n.Tq, n.Tk}), dquery.mutable_data_ptr(), nullptr,
         nullptr, dv.mutable_data_ptr(), bias.has_value() ? dbias.mutable_data_ptr() : nullptr});
  }
  return {dquery, dv, dbias};
}

}  // namespace
}  // namespace attn

STABLE_TORCH_LIBRARY_IMPL(attn_kernels, ATTN_DISPATCH_KEY, m) {
  m.impl(ATTN_OVERLOAD("additive_prepare"), TORCH_BOX(&attn::prepare));
  m.impl(ATTN_OVERLOAD("additive_scores"), TORCH_BOX(&attn::scores));
  m.impl(ATTN_OVERLOAD("additive_scores_backward"), TORCH_BOX(&attn::scores_backward));
  m.impl(ATTN_OVERLOAD("additive_attention"), TORCH_BOX(&attn::attention));
  m.impl(ATTN_OVERLOAD("additive_attention_backward"), TORCH_BOX(&attn::attention_backward));
  m.impl(ATTN_OVERLOAD("additive_attention_query_backward"), TORCH_BOX(&attn::query_backward));
}
