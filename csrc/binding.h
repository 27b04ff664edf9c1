// From an op on tensors to the kernel of a score: what every attention does around it.
#pragma once

#include <initializer_list>
#include <optional>
#include <tuple>

#include "attention.h"
#include "checks.h"

namespace attn {

inline Scores scores_of(const Tensor& query, const Tensor& keys) {
  STD_TORCH_CHECK(query.dim() == 3 && keys.dim() == 3, "query and keys must have 3 axes");
  const int64_t B = query.size(0), Tq = query.size(1), Tk = keys.size(1), A = query.size(2);
  const Dtype dtype = dtype_of(query, "query");
  return {B, Tq, Tk, A, array(query, "query", dtype, {B, Tq, A}), array(keys, "keys", dtype, {B, Tk, A})};
}

// An output of this shape if it is needed, otherwise an empty one.
inline Tensor output_if(bool needed, const Tensor& like, std::initializer_list<int64_t> shape) {
  return needed ? output(like, shape) : output(like, {0});
}

inline void* data_if(bool needed, Tensor& t) { return needed ? t.mutable_data_ptr() : nullptr; }

template <class Score>
std::tuple<Tensor, Tensor> attention_forward(void (*kernel)(const AttentionForward<Score>&), const Score& score,
                                             const Tensor& query, const Tensor& values,
                                             const std::optional<Tensor>& memory_lengths,
                                             const std::optional<Tensor>& mask, bool need_alignments) {
  STD_TORCH_CHECK(values.dim() == 3, "values must have 3 axes");
  const int64_t B = score.B, Tq = score.Tq, Tk = score.Tk, D = values.size(2);
  Tensor context = output(query, {B, Tq, D}), alignments = output_if(need_alignments, query, {B, Tq, Tk});
  if (B * Tq > 0)
    kernel({score, D, array(values, "values", score.query.dtype, {B, Tk, D}), attended(memory_lengths, mask, B, Tq, Tk),
            context.mutable_data_ptr(), data_if(need_alignments, alignments)});
  return {context, alignments};
}

// What follows the score among the arguments of the backward of an attention.
struct AttentionGradients {
  const Tensor &query, &keys, &values, &alignments;
  const std::optional<Tensor>&grad_context, &grad_alignments, &memory_lengths, &mask;
  bool need_query, need_memory;  // the gradients of the query and the score's own arguments; of keys and values
};

// Of query, keys and values. `own`: those of the score's own arguments, allocated, with `gradients` pointing to them.
template <class Score>
std::tuple<Tensor, Tensor, Tensor> attention_backward(void (*kernel)(const AttentionBackward<Score>&),
                                                      const Score& score, const AttentionGradients& of,
                                                      const typename Score::Gradients& gradients = {},
                                                      std::initializer_list<Tensor*> own = {}) {
  STD_TORCH_CHECK(of.values.dim() == 3, "values must have 3 axes");
  const int64_t B = score.B, Tq = score.Tq, Tk = score.Tk, D = of.values.size(2);
  const Dtype dtype = score.query.dtype;
  Tensor dquery = output_if(of.need_query, of.query, {B, Tq, score.A});
  Tensor dkeys = output_if(of.need_memory, of.keys, {B, Tk, score.A});
  Tensor dvalues = output_if(of.need_memory, of.values, {B, Tk, D});
  if (B * Tq * Tk == 0) {
    for (Tensor* t : {&dquery, &dkeys, &dvalues}) torch::stable::zero_(*t);
    for (Tensor* t : own) torch::stable::zero_(*t);
  } else if (of.need_query || of.need_memory) {
    kernel({score, gradients, D, array(of.values, "values", dtype, {B, Tk, D}),
            attended(of.memory_lengths, of.mask, B, Tq, Tk), array(of.alignments, "alignments", dtype, {B, Tq, Tk}),
            array(of.grad_context, "grad_context", dtype, {B, Tq, D}),
            array(of.grad_alignments, "grad_alignments", dtype, {B, Tq, Tk}), data_if(of.need_query, dquery),
            data_if(of.need_memory, dkeys), data_if(of.need_memory, dvalues)});
  }
  return {dquery, dkeys, dvalues};
}

}  // namespace attn
