// Additive attention, backward. Part of a SIMD level: see simd.h; ../additive_math.h has the guards.
//
// With E = e^{2q} e^{2k}, dquery and dkeys are sums of 4 v g, g = ds (1 - tanh^2) / 4, and dv is the sum of ds tanh.
//
// Many queries, columnwise: with C = e^{q+k} + e^{-(q+k)} and S the difference, g = ds / C^2 and ds tanh = ds S / C,
// where the exponentials are products, too; or, with divisions, g = ds / (E + 1/E + 2) and ds tanh = g (E - 1/E).
//
// Few queries, rowwise: a second exponential per key would take too long. With r = 1 / (1 + E) and p = ds r,
// g = p (E r) and ds tanh = -2 (p - ds / 2).
//
// In all forms 1 - tanh^2 does not cancel for saturated units.
//
// Nothing of size (B, Tq, Tk, A) is stored: the exponentials are recomputed. A task computes some units of one
// sentence, so all sums over queries and steps are local to a task.
#pragma once

#include "activated_attention_fwd.h"
#include "additive_columnwise.h"
#include "additive_rowwise.h"

namespace attn {
namespace ATTN_LEVEL {

// Computes dquery, dv, dbias and dkeys, if needed, from the compact gradients of the scores, (B, Tq, Tk), that the
// stages `before` compute.
template <typename T, class Op, class Pair, class... Before>
void unit_gradients(const Op& op, const StridedView3& prepared, Pair pair, const AttentionMask& attended,
                    const StridedView3& values, const StridedView3& grad_context, int64_t D, const T* dscores,
                    const Before&... before) {
  constexpr int64_t w = width<T>;
  Scratch& call = thread_scratch();
  const FactoredV<T> units(op, call);
  T* dv_parts = alloc<T>(call, op.B * units.size);
  T* dbias_parts = alloc<T>(call, op.B * units.size);
  const BackwardParams<T, Pair> back{op,    prepared, pair,      attended, values,   grad_context, D,
                                     units, dscores,  op.dquery, op.dkeys, dv_parts, dbias_parts};
  const bool few = op.Tq <= kMaxRowwiseQueries && !attended.per_query;
  // The width of a strip of units. Few queries: exponentials, sums and a tile of keys about fit L1. Many queries: the
  // exponentials and sums of a sentence fill a quarter of L2. Strips are narrower if there would be fewer tasks than
  // threads.
  const int64_t unit_bytes = static_cast<int64_t>(sizeof(T)) * (few ? 2 * (op.Tq + 3) : 3 * (op.Tq + op.Tk));
  const int64_t in_cache = (few ? 3 << 14 : 1 << 18) / unit_bytes;
  const int64_t per_thread = divide_up(units.size * op.B, thread_count());
  const int64_t widest = max(4 * w, min(in_cache, per_thread));
  const int64_t even = divide_up(units.size, max(1, divide_up(units.size, widest)));  // strips of about equal width
  const int64_t strip = max(w, padded<T>(even));
  const int64_t strips = divide_up(units.size, strip);
  auto run = [&](int64_t b, int64_t task, Scratch& scratch) {
    const int64_t first = task * strip, size = min(strip, units.size - first);
    if (few && op.dkeys != nullptr)
      rowwise_task<T, true>(back, b, first, size, scratch);
    else if (few)
      rowwise_task<T, false>(back, b, first, size, scratch);
    else
      columnwise_task(back, b, first, size / w, scratch);
  };
  for_each_sentence(op.B, before..., Stage{strips, op.Tq * op.Tk * strip, run});
  if (op.dquery == nullptr) return;
  for (int64_t c = 0; c < units.size; c += w) {
    Vec<T> v_sum{}, bias_sum{};
    for (int64_t b = 0; b < op.B; ++b) {
      v_sum += load(dv_parts + b * units.size + c);
      bias_sum += load(dbias_parts + b * units.size + c);
    }
    const Dtype dtype = op.wide ? native<T> : op.query.dtype;
    store_as<T>(op.dv, dtype, c, v_sum, op.A - c);
    if (op.dbias != nullptr) store_as<T>(op.dbias, dtype, c, bias_sum, op.A - c);
  }
}

// Computes only the scores, for the backward of clipped scores.
template <typename T>
void vector_scores(const ScoresForward<AdditiveScores>& op) {
  additive_forward<T>(op);
}
template <typename T>
void vector_scores(const ScoresForward<ActivatedScores>& op) {
  activated_forward<T>(op);
}

template <typename T, class Pair, class Scores>
void gradients(const AttentionBackward<Scores>& op, const StridedView3& prepared, Pair pair) {
  Scratch& call = thread_scratch();
  ScratchScope scope(call);
  AttentionParams problem = params_of(op);
  T* weights = alloc<T>(call, op.B * op.Tq * op.Tk);
  T* dscores = alloc<T>(call, op.B * op.Tq * op.Tk);
  auto no_more = [](int64_t, int64_t, int64_t, const int32_t*, int64_t, const T*, Scratch&) {};
  // Only the gradient of values is needed: a product with the compact alignments.
  if (op.dquery == nullptr && op.dkeys == nullptr && op.dscore_bias == nullptr && op.dvalues != nullptr) {
    const auto compact = scores_backward(problem, op.alignments, {}, {}, weights, dscores, no_more);
    return for_each_sentence(op.B, compact, weighted_steps(problem, weights, op.grad_context, op.D, op.dvalues));
  }
  scores_again<T, Scores>(op, vector_scores<T>, call, problem);
  const auto scores =
      scores_backward(problem, op.alignments, op.grad_context, op.grad_alignments, weights, dscores, no_more);
  auto with = [&](const auto&... before) {
    unit_gradients<T>(op, prepared, pair, op.attended, op.values, op.grad_context, op.D, dscores, scores, before...);
  };
  if (op.dvalues == nullptr)
    with();
  else
    with(weighted_steps(problem, weights, op.grad_context, op.D, op.dvalues));
}

template <typename T, class Pair, class Scores>
void gradients(const ScoresBackward<Scores>& op, const StridedView3& prepared, Pair pair) {
  Scratch& call = thread_scratch();
  ScratchScope scope(call);
  T* dscores = alloc<T>(call, op.B * op.Tq * op.Tk);
  const StridedView3 none;
  unit_gradients<T>(op, prepared, pair, AttentionMask{}, none, none, 0, dscores, compact_gradient(op, dscores));
}

// Chooses between divisions and refined estimates of reciprocals.
template <typename T, class Op>
void additive_backward(const Op& op) {
  if constexpr (sizeof(T) == 4 && kCanRefine)
    if (level().estimates) return gradients<T>(op, op.prepared, TanhPair<T, true>{});
  gradients<T>(op, op.prepared, TanhPair<T, false>{});
}

template <typename T, class Op>
void activated_backward(const Op& op) {
  by_activation_of<T>(op, [&](auto f) { gradients<T>(op, {}, ActivatedPair<T, decltype(f)>{f}); });
}

}  // namespace ATTN_LEVEL
}  // namespace attn
