// Dot-product attention: scores = scale * query . keys. Part of a SIMD level: see simd.h.
#pragma once

#include "../dot_attention.h"
#include "attention.h"

namespace attn {
namespace ATTN_LEVEL {

template <typename T>
struct DotScore {
  const DotScores& op;

  struct Queries {
    int64_t first, n;
  };

  int64_t cost() const { return op.A; }

  Queries queries(int64_t, int64_t first, int64_t n, Scratch&) const { return {first, n}; }

  void score_block(const Queries& q, int64_t b, const int32_t* list, int64_t n, T* out, int64_t ld,
                   Scratch& scratch) const {
    dot_listed(op.query, q.first, q.n, op.keys, b, list, n, op.A, static_cast<T>(op.scale), out, ld, scratch);
  }
};

template <typename T, class Op>
void dot_forward(const Op& op) {
  forward<T>(op, DotScore<T>{op});
}

template <typename T>
void dot_backward(const AttentionBackward<DotScores>& op) {
  Scratch& call = thread_scratch();
  ScratchScope scope(call);
  AttentionParams problem = params_of(op);
  scores_again<T>(op, dot_forward<T, ScoresForward<DotScores>>, call, problem);
  T* weights = alloc<T>(call, op.B * op.Tq * op.Tk);
  T* dscores = alloc<T>(call, op.B * op.Tq * op.Tk);
  const auto scores = scores_backward(
      problem, op.alignments, op.grad_context, op.grad_alignments, weights, dscores,
      [&](int64_t b, int64_t first, int64_t nq, const int32_t* list, int64_t n, T* ds, Scratch& scratch) {
        for (int64_t i = 0; i < nq; ++i)
          for (int64_t j = 0; j < n; ++j) ds[i * op.Tk + j] *= static_cast<T>(op.scale);
        if (op.dquery == nullptr) return;
        weighted_output(op.keys, b, list, n, ds, op.Tk, nq, Range(op.A, 0, 1, 1), op.dquery, problem.dtype,
                        b * op.Tq + first, op.A, scratch);
      });
  const bool query_only = op.dkeys == nullptr && op.dvalues == nullptr;  // one of them is null if it has no elements
  if (query_only) return for_each_sentence(op.B, scores);
  for_each_sentence(op.B, scores, weighted_steps(problem, weights, op.grad_context, op.D, op.dvalues),
                    weighted_steps(problem, dscores, op.query, op.A, op.dkeys));
}

}  // namespace ATTN_LEVEL
}  // namespace attn
