// The interfaces between the .cu files of the CUDA backend. Each function launches kernels on the current stream
// (launch.h) and does not wait for them. Sizes are those of the op. W is float, or double for float64 (Wide in
// platform.cuh).
#pragma once

#include "../kernels.h"

namespace attn {
namespace cuda {

// decode.cu: few queries, all of an attention in one launch -----------------------------------------------------------

// Up to this many queries, an attention is one launch that reads keys and values once for all queries of a sentence.
constexpr int64_t kMaxDecodeQueries = 8;

void decode_attention(const AttentionForward<AdditiveScores>& op);  // op.Tq <= kMaxDecodeQueries, op.Tk > 0
void decode_attention(const AttentionForward<ActivatedScores>& op);
void decode_attention(const AttentionForward<DotScores>& op);

// additive_attention_fwd.cu, additive_attention_bwd.cu ----------------------------------------------------------------

// scores: (B, Tq, Tk) contiguous, of W; with `narrow`, of the dtype of query. All pairs are computed.
void additive_scores(const AdditiveScores& op, const AttentionMask& attended, void* scores, bool narrow);
void additive_scores(const ActivatedScores& op, const AttentionMask& attended, void* scores, bool narrow);

// dscores: (B, Tq, Tk) contiguous, of W, 0 if not attended. Either dquery, dv and dbias may be null, or dkeys.
void additive_scores_backward(const AdditiveScores& op, const AttentionMask& attended, const void* dscores,
                              void* dquery, void* dkeys, void* dv, void* dbias);
void additive_scores_backward(const ActivatedScores& op, const AttentionMask& attended, const void* dscores,
                              void* dquery, void* dkeys, void* dv, void* dbias);

void additive_prepare(const AdditivePrepare& op);

// softmax.cu: the parts that additive and dot attention with many queries share, and their gradients -----------------

struct Attend {
  int64_t B, Tq, Tk, D;
  const void* scores;   // (B, Tq, Tk) contiguous, of W; undefined if not attended
  StridedView3 values;  // (B, Tk, D)
  AttentionMask attended;
  void* context;     // (B, Tq, D) contiguous, dtype of values
  void* alignments;  // (B, Tq, Tk) contiguous, dtype of values, or null
};
void attend(const Attend& op);  // alignments = softmax of the attended scores, context = alignments @ values

struct SoftmaxBackward {
  int64_t B, Tq, Tk, D;
  StridedView3 alignments;       // (B, Tq, Tk), from the forward
  StridedView3 grad_context;     // (B, Tq, D) or absent
  StridedView3 grad_alignments;  // (B, Tq, Tk) or absent
  StridedView3 values;           // (B, Tk, D)
  AttentionMask attended;
  void* dscores;  // (B, Tq, Tk) contiguous, of W; 0 if not attended
};
void softmax_backward(const SoftmaxBackward& op);

// out[b, i, j] = scale * query[b, i] . keys[b, j], (B, Tq, Tk) contiguous, of W; undefined if not attended.
struct Product {
  int64_t B, Tq, Tk, A;
  StridedView3 query, keys;
  double scale;
  AttentionMask attended;
  void* out;
};
void product(const Product& op);

// out = scale * weights @ rows over the attended pairs. Other pairs do not contribute, even if they hold NaN.
struct WeightedSum {
  int64_t B, Tq, Tk, N;
  StridedView3 weights;  // (B, Tq, Tk), of W or of the dtype of rows
  StridedView3 rows;     // (B, Tk, N), or (B, Tq, N) if transposed
  double scale;
  AttentionMask attended;
  bool transposed;  // true: out is (B, Tk, N), the sum over queries; false: (B, Tq, N), the sum over steps
  void* out;        // contiguous, dtype of rows
};
void weighted_sum(const WeightedSum& op);

}  // namespace cuda
}  // namespace attn
