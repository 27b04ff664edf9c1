// Calls the kernel of a score from an op on tensors: the checks and outputs that all attention ops share.
#pragma once

#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "activations.h"
#include "attention.h"
#include "checks.h"

namespace attn {

inline Scores scores_of(const Tensor& query, const Tensor& keys) {
  STD_TORCH_CHECK(query.dim() == 3 && keys.dim() == 3, "query and keys must have 3 axes");
  const int64_t B = query.size(0), Tq = query.size(1), Tk = keys.size(1), A = query.size(2);
  const Dtype dtype = dtype_of(query, "query");
  return {B, Tq, Tk, A, array(query, "query", dtype, {B, Tq, A}), array(keys, "keys", dtype, {B, Tk, A})};
}

inline AttentionMask attended(const std::optional<Tensor>& memory_lengths, const std::optional<Tensor>& mask,
                              const Scores& n) {
  AttentionMask a = attended(memory_lengths, mask, n.B, n.Tq / n.vectors, n.Tk);
  a.vectors = n.vectors;
  return a;
}

// A new output of this shape if it is needed, otherwise an empty tensor.
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
    kernel({score, D, array(values, "values", score.query.dtype, {B, Tk, D}), attended(memory_lengths, mask, score),
            context.mutable_data_ptr(), data_if(need_alignments, alignments)});
  return {context, alignments};
}

inline Activation activation_of(int64_t number) {
  STD_TORCH_CHECK(0 <= number && number < static_cast<int64_t>(Activation::count), "there is no such activation");
  return static_cast<Activation>(number);
}

inline ScalarType wide_type(Dtype dtype) { return dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float; }

// The option arguments of an attention op.
struct OptionArguments {
  const std::optional<Tensor>& score_bias;
  double dropout_p;
  int64_t normalizer;  // 0: softmax, 1: sigmoid
  double clip;         // 0 for none
  const std::optional<Tensor>& seed;

  AttentionOptions options(const Scores& n) const {
    return {array(score_bias, "score_bias", n.query.dtype, {n.B, n.Tq, n.Tk}), dropout_p, seed_or_0(), normalizer == 1,
            clip};
  }

  uint64_t seed_or_0() const {
    if (dropout_p == 0) return 0;
    STD_TORCH_CHECK(seed.has_value() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                    "seed must be one int64 with dropout");
    return static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
  }
};

// Returns context, alignments and the logarithm of the normaliser (log-sum-exp).
template <class Score>
std::tuple<Tensor, Tensor, Tensor> attention_forward(void (*kernel)(const AttentionForward<Score>&), const Score& score,
                                                     const OptionArguments& given, const Tensor& query,
                                                     const Tensor& values, const std::optional<Tensor>& memory_lengths,
                                                     const std::optional<Tensor>& mask, bool need_alignments) {
  STD_TORCH_CHECK(values.dim() == 3, "values must have 3 axes");
  const int64_t B = score.B, Tq = score.Tq, Tk = score.Tk, D = values.size(2);
  const AttentionOptions options = given.options(score);
  Tensor context = output(query, {B, Tq, D}), alignments = output_if(need_alignments, query, {B, Tq, Tk});
  Tensor log_total = output(query, {B, Tq}, wide_type(score.query.dtype));
  if (B * Tq > 0)
    kernel({score, D, array(values, "values", score.query.dtype, {B, Tk, D}), attended(memory_lengths, mask, score),
            context.mutable_data_ptr(), data_if(need_alignments, alignments), &options, log_total.mutable_data_ptr()});
  return {context, alignments, log_total};
}

inline Tensor dscore_bias_if(bool needed, const OptionArguments& given, const Scores& n, const Tensor& query) {
  return output_if(needed && given.score_bias.has_value(), query, {n.B, n.Tq, n.Tk});
}

// The arguments of the backward of an attention, except those of the score.
struct AttentionGradients {
  const Tensor &query, &keys, &values, &alignments;
  const std::optional<Tensor>&grad_context, &grad_alignments, &memory_lengths, &mask;
  bool need_query, need_keys, need_values;  // need_query includes the gradients of the score's own arguments
};

// Additional arguments of the backward of an attention with options.
struct OptionGradients {
  const OptionArguments& given;
  const Tensor& log_total;
  const std::optional<Tensor>& grad_log_total;
  Tensor* dscore_bias;  // empty if not needed
};

// Returns the gradients of query, keys and values. `own` holds the allocated gradients of the score's own arguments;
// `gradients` points to their data.
template <class Score>
std::tuple<Tensor, Tensor, Tensor> attention_backward(void (*kernel)(const AttentionBackward<Score>&),
                                                      const Score& score, const AttentionGradients& of,
                                                      const typename Score::Gradients& gradients = {},
                                                      std::initializer_list<Tensor*> own = {},
                                                      const OptionGradients* with = nullptr) {
  STD_TORCH_CHECK(of.values.dim() == 3, "values must have 3 axes");
  const int64_t B = score.B, Tq = score.Tq, Tk = score.Tk, D = of.values.size(2);
  const Dtype dtype = score.query.dtype;
  Tensor dquery = output_if(of.need_query, of.query, {B, Tq / score.vectors, score.A});
  Tensor dkeys = output_if(of.need_keys, of.keys, {B, Tk, score.A});
  Tensor dvalues = output_if(of.need_values, of.values, {B, Tk, D});
  if (B * Tq * Tk == 0) {
    for (Tensor* t : {&dquery, &dkeys, &dvalues}) torch::stable::zero_(*t);
    for (Tensor* t : own) torch::stable::zero_(*t);
    if (with != nullptr) torch::stable::zero_(*with->dscore_bias);
  } else if (of.need_query || of.need_keys || of.need_values) {
    AttentionOptions options;
    std::vector<Tensor> rows;  // keeps copies alive while the kernel runs
    const void *log_total = nullptr, *grad_log_total = nullptr;
    void* dscore_bias = nullptr;
    if (with != nullptr) {
      options = with->given.options(score);
      const ScalarType wide = wide_type(dtype);
      auto data = [&](const Tensor& t, const char* name) {
        check_shape(t, name, {B, Tq});
        STD_TORCH_CHECK(t.scalar_type() == wide, name, " must be float64 for float64, else float32");
        rows.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));  // a sum has a gradient of stride 0
        return rows.back().const_data_ptr();
      };
      log_total = data(with->log_total, "log_total");
      if (with->grad_log_total.has_value()) grad_log_total = data(*with->grad_log_total, "grad_log_total");
      if (with->dscore_bias->numel() > 0) dscore_bias = with->dscore_bias->mutable_data_ptr();
    }
    kernel({score, gradients, D, array(of.values, "values", dtype, {B, Tk, D}),
            attended(of.memory_lengths, of.mask, score), array(of.alignments, "alignments", dtype, {B, Tq, Tk}),
            array(of.grad_context, "grad_context", dtype, {B, Tq, D}),
            array(of.grad_alignments, "grad_alignments", dtype, {B, Tq, Tk}), data_if(of.need_query, dquery),
            data_if(of.need_keys, dkeys), data_if(of.need_values, dvalues), with == nullptr ? nullptr : &options,
            log_total, grad_log_total, dscore_bias});
  }
  return {dquery, dkeys, dvalues};
}

}  // namespace attn
