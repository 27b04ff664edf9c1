// Defines the table of kernels of one SIMD level, from ATTN_LEVEL and ATTN_VECTOR_BYTES (see simd.h). Each level_*.cpp
// includes it once, under the compiler target of its level. ATTN_FLOAT64_LEVEL, if defined, is a lower level whose
// float64 kernels are as good and are used instead.
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

template <class Op, void (*kFloat)(const Op&), auto kScore, auto kKernel>
void of_score_by_dtype(const Op& op) {
  computed_in(op) == Dtype::float64 ? (ATTN_FLOAT64_LEVEL::kernels.*kScore.*kKernel)(op) : kFloat(op);
}
#define ATTN_OF_SCORE(Op, Scores, score, function, kernel) \
  of_score_by_dtype<Op<Scores>, function<float>, &Kernels::score, &ScoreKernels<Scores>::kernel>
#else
template <class Op, void (*kFloat)(const Op&), void (*kDouble)(const Op&)>
void by_dtype(const Op& op) {
  computed_in(op) == Dtype::float64 ? kDouble(op) : kFloat(op);
}
#define ATTN_BY_DTYPE(Op, kernel) by_dtype<Op, kernel<float>, kernel<double>>
#define ATTN_OF_SCORE(Op, Scores, score, function, kernel) by_dtype<Op<Scores>, function<float>, function<double>>
#endif

// The kernels of a score. The same forward and backward templates serve attention and the op of the scores alone.
#define ATTN_ATTENTION(Scores, score)                                         \
  ATTN_OF_SCORE(AttentionForward, Scores, score, score##_forward, attention), \
      ATTN_OF_SCORE(AttentionBackward, Scores, score, score##_backward, attention_backward)
#define ATTN_SCORE(Scores, score)                                        \
  {ATTN_OF_SCORE(ScoresForward, Scores, score, score##_forward, scores), \
   ATTN_OF_SCORE(ScoresBackward, Scores, score, score##_backward, scores_backward), ATTN_ATTENTION(Scores, score)}

const Kernels kernels = {
    additive_prepare<float>,
    ATTN_SCORE(AdditiveScores, additive),
    ATTN_SCORE(ActivatedScores, activated),
    {nullptr, nullptr, ATTN_ATTENTION(DotScores, dot)},
    ATTN_SCORE(GatedAdditiveScores, gated_additive),
    ATTN_BY_DTYPE(LstmStep, lstm_step),
    ATTN_BY_DTYPE(LstmStepBackward, lstm_step_backward),
    ATTN_BY_DTYPE(GruStep, gru_step),
    ATTN_BY_DTYPE(GruStepBackward, gru_step_backward),
    checksum,
    rounded_blocks,
    ATTN_BY_DTYPE(RowProducts, row_products),
    ATTN_BY_DTYPE(LikeliestTokens, likeliest_tokens),
};

}  // namespace ATTN_LEVEL
}  // namespace attn
