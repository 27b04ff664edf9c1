// Calls the kernels of scores with a score vector, v . f(query + keys + bias), from ops on tensors.
#pragma once

#include "additive_attention.h"
#include "binding.h"
#include "kernels.h"

namespace attn {

inline VectorScores with_vector(const Tensor& query, const Tensor& keys, const Tensor& v,
                                const std::optional<Tensor>& bias, const std::optional<Tensor>& extra = std::nullopt) {
  const Scores n = scores_of(query, keys);
  const Dtype dtype = n.query.dtype;
  return {n, array(v, "v", dtype, {n.A}), array(bias, "bias", dtype, {n.A}),
          array(extra, "extra", dtype, {n.B, n.Tk, n.A})};
}

// The dtype of the result of additive_prepare for keys of this dtype.
inline Dtype prepared_dtype(Dtype keys) { return keys == Dtype::bfloat16 ? Dtype::bfloat16 : Dtype::float32; }

// One class per score: its kernels, and the struct of its arguments.
struct Additive {
  static constexpr auto kKernels = &Kernels::additive;

  static AdditiveScores of(const VectorScores& n, const std::optional<Tensor>& prepared = std::nullopt) {
    const Dtype dtype = prepared_dtype(n.query.dtype);
    const PreparedSizes sizes(n.A, n.Tk, dtype);
    const AdditiveScores op{n, array(prepared, "prepared", dtype, {n.B, sizes.rows, sizes.columns})};
    STD_TORCH_CHECK(!op.prepared || (op.prepared.stride[1] == sizes.columns && op.prepared.stride[2] == 1),
                    "prepared must be what additive_prepare returned");
    return op;
  }
};

struct Activated {
  static constexpr auto kKernels = &Kernels::activated;

  static ActivatedScores of(const VectorScores& n, int64_t activation, double negative_slope) {
    const Activation kind = activation_of(activation);
    STD_TORCH_CHECK(kind == Activation::relu || kind == Activation::leaky_relu,
                    "activation must be the number of relu or leaky_relu, got ", activation);
    return {n, kind, negative_slope};
  }
};

}  // namespace attn
