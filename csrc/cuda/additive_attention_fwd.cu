// Scores with a score vector and many queries. For additive attention, v . tanh(query + keys + bias) without a tanh per
// pair. For other activations (activations.cuh), pairs share no computation.
//
// tanh(x) = 1 - 2 / (1 + e^{2x}), and e^{2(q + k)} = e^{2q} e^{2k} is a product of exponentials that are computed once
// per row. With v folded in, v / (1 + E) = 1 / d, d = 1/v + (e^{2q} / v) e^{2k}, and three units share a reciprocal:
//
//   1/d1 + 1/d2 + 1/d3 = ((d1 + d2) d3 + d1 d2) / (d1 d2 d3)
//
// That is nine instructions for three hidden units, one of them a special function. tanh costs about 17 per unit, two
// of them special functions.
//
// A block has the queries and steps of one tile. It loops over chunks of units: the threads load a chunk of the rows
// into shared memory as exponentials, unit by unit, and each thread accumulates kQ x kK pairs in registers. With few
// tiles, additional warps of the block each compute a part of the units (unit_splits).
//
// The exponentials are computed before it is known whether they are in range; meanwhile the largest |q| and |k| are
// computed. If pairs are outside the limits (../additive_math.h), the block starts again with the compensated form, at
// five or seven instructions per unit. If they, or v, are outside the limits of that form, too, it uses tanh itself.
#include <algorithm>

#include "additive_tile.cuh"
#include "launch.h"

namespace attn {
namespace cuda {
namespace {

// Scores of a tile of queries and steps. Tiles beyond the length are not written.
template <typename W, int kQ, int kK, int kColumns, bool kVectorized, class Score>
__global__ void __launch_bounds__(kMaxThreads<W>, 1) many_queries_scores_kernel(ScoresTile<Score> a) {
  // Positions have 32 bits: 64 bits would take too many registers, and a 64-bit division is a function call.
  const int tiles_q = static_cast<int>(a.tiles_q), tiles_k = static_cast<int>(a.tiles_k), tile = blockIdx.x;
  const int b = tile / (tiles_q * tiles_k);
  const int q0 = tile / tiles_k % tiles_q * a.threads_q * kQ, k0 = tile % tiles_k * a.threads_k * kK;
  const int length = static_cast<int>(attended_steps(a.attended, b, a.op.Tk));
  if (k0 >= length) return;
  const SharedTile<W, kColumns> s(a.unit_splits, a.threads_q * kQ, a.threads_k * kK);
  W total[kQ][kK];
  if constexpr (std::is_base_of_v<ActivatedScores, Score>) {
    compute_tile<W, kQ, kK, kColumns, Form::activated, kVectorized>(a, s, b, q0, k0, W(1), false, total);
  } else {
    bool found = false;
    if constexpr (sizeof(W) == 4) {
      const Scale scale = scale_of(a.op, s.buffer);
      const bool factored = scale.min_bound <= kMaxBoundThree;
      if (factored) {
        compute_tile<W, kQ, kK, kColumns, Form::factored, kVectorized>(a, s, b, q0, k0, scale.unit, false, total);
        combine_items(a, s, [](float x, float y) { return fmaxf(x, y); });
        found = !is_out_of_bounds(a, s, b, q0, k0, length, scale.min_bound);
      }
      if (!found && scale.compensated) {
        if (!factored) find_largest(a, s, b, q0, k0);
        const Reach reach = reach_of(a, s, b, q0, k0, length);
        found = reach.side <= kMaxAbsClamped;
        if (found)
          compute_tile<W, kQ, kK, kColumns, Form::compensated, kVectorized>(a, s, b, q0, k0, scale.unit,
                                                                            reach.bound > kMaxBoundUnclamped, total);
      }
    }
    if (!found) compute_tile<W, kQ, kK, kColumns, Form::exact, kVectorized>(a, s, b, q0, k0, W(1), false, total);
  }
  write_tile(a, s, b, q0, k0, total);
}

// Whether the tile has the kernel for rows that need at most half of the columns that a tile may have. With extra, there
// are fewer kernels.
template <int kQ, int kK, class Score>
bool is_narrow(int64_t threads_q, int64_t threads_k) {
  return !kAddsExtra<Score> && threads_q * kQ + threads_k * kK <= kMaxColumns / 2;
}

// Shared memory of a block.
template <typename W, int kQ, int kK, class Score>
int64_t shared_bytes(int64_t unit_splits, int64_t threads_q, int64_t threads_k) {
  const int n = static_cast<int>(unit_splits), q = static_cast<int>(threads_q) * kQ,
            k = static_cast<int>(threads_k) * kK;
  return is_narrow<kQ, kK, Score>(threads_q, threads_k) ? SharedTile<W, kMaxColumns / 2>::bytes(n, q, k)
                                                        : SharedTile<W, kMaxColumns>::bytes(n, q, k);
}

// The division of an op's pairs into blocks that fit the device and have the least estimated time. The estimate is
// based on compiled code: a pair and unit takes 3.2 issue slots (relu about as many), an element of the rows about 15.
// A warp issues in half of the cycles, and four warps issue at once. One split fits every device; several may not.
template <typename W, int kQ, int kK, class Score>
ScoresTile<Score> choose_tile(const Score& op, const Device& device) {
  const int64_t threads_q = ceil_div(op.Tq, kQ), threads_k = ceil_div(op.Tk, kK);
  const double processors = device.multiprocessors;
  ScoresTile<Score> best{};
  double least = INFINITY;
  // Tries the fewest blocks that the limits allow, and some more. Even more blocks would only load more rows.
  const int64_t least_q = ceil_div(threads_q * kQ, kMaxColumns - kK);
  for (int64_t tiles_q = least_q; tiles_q <= threads_q && tiles_q < least_q + 8; ++tiles_q) {
    const int64_t tq = ceil_div(threads_q, tiles_q);
    if (tiles_q != ceil_div(threads_q, tq)) continue;  // a smaller tiles_q has the same threads
    const int64_t least_k = ceil_div(threads_k, std::min(kMaxThreads<W> / tq, (kMaxColumns - tq * kQ) / kK));
    for (int64_t tiles_k = least_k; tiles_k <= threads_k && tiles_k < least_k + 12; ++tiles_k) {
      const int64_t tk = ceil_div(threads_k, tiles_k), threads = tq * tk, columns = tq * kQ + tk * kK;
      if (tiles_k != ceil_div(threads_k, tk)) continue;
      for (int64_t unit_splits = 1; unit_splits * threads <= kMaxThreads<W> && unit_splits <= kMaxUnitSplits;
           ++unit_splits) {
        const int64_t units = round_up(ceil_div(op.A, unit_splits), unit_splits > 1 ? kUnits : kStep);
        if (unit_splits > ceil_div(op.A, units) || (unit_splits > 1 && threads < 16)) break;  // 16 threads load v
        if (shared_bytes<W, kQ, kK, Score>(unit_splits, tq, tk) > device.shared_bytes) break;
        const double warps = double(ceil_div(unit_splits * threads, kWarp)), blocks = double(op.B * tiles_q * tiles_k);
        const double slots =
            double(units) * (3.2 * kQ * kK * warps + 15.0 * double(unit_splits * columns) / kWarp) + 4e3;
        const double at_once = std::fmin(std::floor(kMaxThreads<W> / kWarp / warps), std::ceil(blocks / processors));
        const double rate = std::fmin(4.0, 0.5 * warps * at_once);
        const double time = std::ceil(blocks / (at_once * processors)) * at_once * slots / rate;
        if (time >= least) continue;
        least = time;
        best.threads_q = static_cast<int>(tq);
        best.threads_k = static_cast<int>(tk);
        best.unit_splits = static_cast<int>(unit_splits);
        best.tiles_q = tiles_q;
        best.tiles_k = tiles_k;
        best.split_units = static_cast<int>(units);
      }
    }
  }
  return best;
}

template <typename W, int kQ, int kK, int kColumns, class Score>
void launch_tile(const ScoresTile<Score>& tile) {
  const Grid grid{tile.op.B * tile.tiles_q * tile.tiles_k,
                  static_cast<int>(round_up(tile.unit_splits * tile.threads_q * tile.threads_k, kWarp)),
                  shared_bytes<W, kQ, kK, Score>(tile.unit_splits, tile.threads_q, tile.threads_k)};
  bool vectorized = is_vectorized(tile.op.query, tile.op.A) && is_vectorized(tile.op.keys, tile.op.A);
  if (kAddsExtra<Score>) vectorized = vectorized && is_vectorized(tile.op.extra, tile.op.A);
  if constexpr (!kAddsExtra<Score> || sizeof(W) == 4)
    if (vectorized) return launch(many_queries_scores_kernel<W, kQ, kK, kColumns, true, Score>, grid, tile);
  launch(many_queries_scores_kernel<W, kQ, kK, kColumns, false, Score>, grid, tile);
}

template <typename W, int kQ, int kK, class Score>
void launch_scores(const Score& op, const AttentionMask& attended, void* scores, Dtype dtype) {
  ScoresTile<Score> tile = choose_tile<W, kQ, kK>(op, current_device());
  tile.op = op;
  tile.attended = attended;
  tile.scores = scores;
  tile.dtype = dtype;
  if constexpr (!kAddsExtra<Score>)
    if (is_narrow<kQ, kK, Score>(tile.threads_q, tile.threads_k)) return launch_tile<W, kQ, kK, kMaxColumns / 2>(tile);
  launch_tile<W, kQ, kK, kMaxColumns>(tile);
}

template <class Score>
void run(const Score& op, const AttentionMask& attended, void* scores, bool narrow) {
  if constexpr (!kAddsExtra<Score>)
    if (op.extra) return run(WithExtra<Score>{op}, attended, scores, narrow);
  const Dtype dtype = narrow || op.query.dtype == Dtype::float64 ? op.query.dtype : Dtype::float32;
  check_sizes(op);
  if (op.A == 0) return clear(scores, op.B * op.Tq * op.Tk * item_size(dtype));
  if (dtype == Dtype::float64) return launch_scores<double, 4, 4>(op, attended, scores, dtype);
  launch_scores<float, 8, 4>(op, attended, scores, dtype);
}

}  // namespace

void additive_scores(const AdditiveScores& op, const AttentionMask& attended, void* scores, bool narrow) {
  run(op, attended, scores, narrow);
}

void additive_scores(const ActivatedScores& op, const AttentionMask& attended, void* scores, bool narrow) {
  run(op, attended, scores, narrow);
}

}  // namespace cuda
}  // namespace attn
