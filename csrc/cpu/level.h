// The kernels of one SIMD level as a table, for ATTN_LEVEL and ATTN_VECTOR_BYTES (see simd.h). Each level_*.cpp
// includes it once, under the compiler target of its level. ATTN_FLOAT64_LEVEL, where defined, is a lower level whose
// code for float64 is as good.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-tree-loop-distribute-patterns")  // keeps loops that clear a few vectors from becoming memset
#endif
#include "additive_attention_bwd.h"
#include "checksum_kernel.h"
#include "decode_kernels.h"
#include "dot_attention_kernels.h"
#include "gated_additive_bwd.h"
#include "gru_cell_kernels.h"
#include "lstm_cell_kernels.h"

namespace attn {
#if defined(ATTN_FLOAT64_LEVEL)
namespace ATTN_FLOAT64_LEVEL {
extern const Kernels kernels;
}
#endif

namespace ATTN_LEVEL {

extern const Kernels kernels;

template <class Op>
Dtype computed_in(const Op& op) {
  return op.query.dtype;
}
inline Dtype computed_in(const LstmStep& op) { return op.dtype; }
inline Dtype computed_in(const LstmStepBackward& op) { return op.dtype; }
inline Dtype computed_in(const GruStep& op) { return op.dtype; }
inline Dtype computed_in(const GruStepBackward& op) { return op.dtype; }
inline Dtype computed_in(const RowProducts& op) { return op.dtype; }
inline Dtype computed_in(const LikeliestTokens& op) { return op.dtype; }

#if defined(ATTN_FLOAT64_LEVEL)
template <class Op, void (*kFloat)(const Op&), void (*Kernels::*kDouble)(const Op&)>
void by_dtype(const Op& op) {
  computed_in(op) == Dtype::float64 ? (ATTN_FLOAT64_LEVEL::kernels.*kDouble)(op) : kFloat(op);
}
#define ATTN_BY_DTYPE(Op, kernel) by_dtype<Op, kernel<float>, &Kernels::kernel>
#else
template <class Op, void (*kFloat)(const Op&), void (*kDouble)(const Op&)>
void by_dtype(const Op& op) {
  computed_in(op) == Dtype::float64 ? kDouble(op) : kFloat(op);
}
#define ATTN_BY_DTYPE(Op, kernel) by_dtype<Op, kernel<float>, kernel<double>>
#endif

const Kernels kernels = {
    additive_prepare<float>,
    ATTN_BY_DTYPE(AdditiveScoresForward, additive_scores),
    ATTN_BY_DTYPE(AdditiveScoresBackward, additive_scores_backward),
    ATTN_BY_DTYPE(AdditiveAttentionForward, additive_attention),
    ATTN_BY_DTYPE(AdditiveAttentionBackward, additive_attention_backward),
    ATTN_BY_DTYPE(ReluScoresForward, relu_scores),
    ATTN_BY_DTYPE(ReluScoresBackward, relu_scores_backward),
    ATTN_BY_DTYPE(ReluAttentionForward, relu_attention),
    ATTN_BY_DTYPE(ReluAttentionBackward, relu_attention_backward),
    ATTN_BY_DTYPE(DotAttentionForward, dot_attention),
    ATTN_BY_DTYPE(DotAttentionBackward, dot_attention_backward),
    ATTN_BY_DTYPE(LstmStep, lstm_step),
    ATTN_BY_DTYPE(LstmStepBackward, lstm_step_backward),
    ATTN_BY_DTYPE(GruStep, gru_step),
    ATTN_BY_DTYPE(GruStepBackward, gru_step_backward),
    checksum,
    ATTN_BY_DTYPE(GatedAdditiveScoresForward, gated_additive_scores),
    ATTN_BY_DTYPE(GatedAdditiveScoresBackward, gated_additive_scores_backward),
    ATTN_BY_DTYPE(GatedAdditiveAttentionForward, gated_additive_attention),
    ATTN_BY_DTYPE(GatedAdditiveAttentionBackward, gated_additive_attention_backward),
    ATTN_BY_DTYPE(RowProducts, row_products),
    ATTN_BY_DTYPE(LikeliestTokens, likeliest_tokens),
};

}  // namespace ATTN_LEVEL
}  // namespace attn
