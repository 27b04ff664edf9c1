// The kernels of one SIMD level as a table, for ATTN_LEVEL and ATTN_VECTOR_BYTES (see simd.h). Each level_*.cpp
// includes it once, under the compiler target of its level.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-tree-loop-distribute-patterns")  // keeps loops that clear a few vectors from becoming memset
#endif
#include "additive_attention_bwd.h"
#include "dot_attention_kernels.h"

namespace attn {
namespace ATTN_LEVEL {

extern const Kernels kernels;

template <class Op, void (*kFloat)(const Op&), void (*kDouble)(const Op&)>
void by_dtype(const Op& op) {
  op.query.dtype == Dtype::float64 ? kDouble(op) : kFloat(op);
}

const Kernels kernels = {
    additive_prepare<float>,
    by_dtype<AdditiveScoresForward, additive_scores<float>, additive_scores<double>>,
    by_dtype<AdditiveScoresBackward, additive_scores_backward<float>, additive_scores_backward<double>>,
    by_dtype<AdditiveAttentionForward, additive_attention<float>, additive_attention<double>>,
    by_dtype<AdditiveAttentionBackward, additive_attention_backward<float>, additive_attention_backward<double>>,
    by_dtype<DotAttentionForward, dot_attention<float>, dot_attention<double>>,
    by_dtype<DotAttentionBackward, dot_attention_backward<float>, dot_attention_backward<double>>,
};

}  // namespace ATTN_LEVEL
}  // namespace attn
