// A block's tile of pairs of queries and steps: its shared memory, and the computation of its scores. See
// additive_attention_fwd.cu.
#pragma once

#include "additive_sums.cuh"
#include "kernels.h"
#include "rows.cuh"

namespace attn {
namespace cuda {
namespace {  // included by one .cu file

constexpr int kUnits = 12;          // units of a chunk, in each split of the units
constexpr int kQuads = kUnits / 4;  // a thread loads four units at once
constexpr int kKnownItems = 3;      // quads of a thread whose position is kept in registers; large tiles have no more
template <typename W>
constexpr int kMaxThreads = sizeof(W) == 4 ? 384 : 256;  // limited by their registers
constexpr int kMaxUnitSplits = 12, kMaxColumns = 192;

template <class Score>
struct ScoresTile {
  Score op;
  AttentionMask attended;
  void* scores;  // (B, Tq, Tk) contiguous
  Dtype dtype;   // of scores
  // A block has threads_q x threads_k threads for each of unit_splits parts of the units, rounded up to whole warps.
  int threads_q, threads_k, unit_splits;
  int64_t tiles_q, tiles_k;  // blocks along queries and steps
  int split_units;  // units of a split, a multiple of kStep; of kUnits if there are several: rows are read by fours
};

// The properties of v for the factored form: its scale, and the smallest |q| + |k| from which the form may be used.
struct Scale {
  float unit;        // v / unit is at most 1
  float min_bound;   // infinity if the factored form may not be used at all
  bool compensated;  // whether the compensated form may be used
};

enum class Form { factored, compensated, exact, activated };

// A reduction over the block, sum or maximum, of one value per thread. All threads get the result.
// buffer: (threads / 32) floats.
template <bool kLargest>
ATTN_DEVICE float of_block(float x, float* buffer) {
  x = kLargest ? warp_largest(x) : warp_sum(x);
  if (threadIdx.x % kWarp == 0) buffer[threadIdx.x / kWarp] = x;
  __syncthreads();
  float total = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w)
    total = kLargest ? larger(total, buffer[w]) : total + buffer[w];
  __syncthreads();  // the buffer can be reused
  return total;
}

ATTN_DEVICE Scale scale_of(const AdditiveScores& op, float* buffer) {
  float top = 0, squares = 0;
  for (int64_t u = threadIdx.x; u < op.A; u += blockDim.x) {
    const float x = element<float>(op.v.data, op.v.dtype, u * op.v.stride[2]);
    top = larger(top, fabsf(x));
    squares += x * x;
  }
  top = of_block<true>(top, buffer);
  squares = of_block<false>(squares, buffer);
  Scale scale{power_of_two_above(top), min_abs_bound(squares, op.A), false};
  float dropped = 0;
  for (int64_t u = threadIdx.x; u < op.A; u += blockDim.x) {
    const float x = fabsf(element<float>(op.v.data, op.v.dtype, u * op.v.stride[2]));
    dropped += x < scale.unit * kMinRelativeV ? x : 0.0f;
  }
  dropped = of_block<false>(dropped, buffer);
  // Not for NaN or infinity. The sum of all dropped units must be below the rounding of the largest unit.
  const bool in_range = top > kMinAbsMaxV && top < kMaxAbsMaxV;
  if (!(in_range && dropped <= scale.unit * kMinRelativeV)) scale.min_bound = INFINITY;
  // In this form no unit may be dropped: if the tanh of the largest units are small, a small unit may still matter.
  scale.compensated = in_range && dropped == 0;
  return scale;
}

// Shared memory of a block. At the end, the sums of the splits overwrite it.
template <typename W, int kColumns>
struct SharedTile {
  int columns_q, columns_k, columns;  // rows of the tile: queries, steps, both
  W* rows;                            // [split][unit][kColumns]: kColumns is a constant, so loads need no arithmetic
  W *constants, *factors, *biases;    // [split][unit]: d = constant + factor e^{2 (q + bias)} e^{2k}; compensated: v
  W* halves;                          // [split]
  W* staging;                         // [item][4], item = (split, quad, column): the next four units of a row
  W* abs_max;                         // [item]: their largest magnitude so far; compensated: sum of v r
  float* buffer;                      // for of_block

  ATTN_DEVICE SharedTile(int unit_splits, int columns_q, int columns_k)
      : columns_q(columns_q), columns_k(columns_k), columns(columns_q + columns_k) {
    rows = reinterpret_cast<W*>(shared_memory());
    constants = rows + unit_splits * kUnits * kColumns;
    factors = constants + unit_splits * kUnits;
    biases = factors + unit_splits * kUnits;
    staging = biases + unit_splits * kUnits;
    abs_max = staging + 4 * unit_splits * kQuads * columns;
    halves = abs_max + unit_splits * kQuads * columns;
    buffer = reinterpret_cast<float*>(halves + unit_splits);
  }

  static int64_t bytes(int unit_splits, int columns_q, int columns_k) {
    const int columns = columns_q + columns_k;
    const int64_t staged = int64_t(unit_splits) * (kUnits * kColumns + 3 * kUnits + 5 * kQuads * columns + 1);
    const int64_t summed = int64_t(unit_splits) * columns_q * columns_k;
    return (staged > summed ? staged : summed) * int64_t(sizeof(W)) + kMaxThreads<W> / kWarp * int64_t(sizeof(float));
  }
};

// x[0 .. 4) from shared memory, aligned to 16 bytes.
template <typename W>
ATTN_DEVICE void load_4_staged(const W* from, W* x) {
#pragma unroll
  for (int i = 0; i < 4; i += kPer16Bytes<W>) load_16_bytes(from + i, x + i);
}

// abs_max[column] = the reduction, by `combine`, of abs_max over all items of the column.
template <int kColumns, class Score, class Combine>
ATTN_DEVICE void combine_items(const ScoresTile<Score>& a, const SharedTile<float, kColumns>& s,
                               const Combine& combine) {
  for (int column = threadIdx.x; column < s.columns; column += blockDim.x) {
    float x = s.abs_max[column];
    for (int n = 1; n < a.unit_splits * kQuads; ++n) x = combine(x, s.abs_max[n * s.columns + column]);
    s.abs_max[column] = x;
  }
  __syncthreads();
}

// Replaces x, four units of a row from unit `unit` of the chunk on, by exponentials. They are exact for x - r; the sum
// of v r is added to rest.
template <int kColumns>
ATTN_DEVICE void stage_compensated(const SharedTile<float, kColumns>& s, int unit, bool is_query, float* x,
                                   float& rest) {
  float bias[4], constant[4], v[4];
  load_4_staged(s.biases + unit, bias);
  load_4_staged(s.constants + unit, constant);
  load_4_staged(s.factors + unit, v);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float added = is_query ? bias[i] : 0.0f, sum = x[i] + added, of_added = sum - x[i];
    const float lost_of_sum = (x[i] - (sum - of_added)) + (added - of_added);
    float r;
    const float rounded = exp2x_and_rest(sum, &r);
    // The rounding error of the sum goes into the exponential, not into the rest. A rest must not exceed the rounding
    // of x: it is weighted as if the slope of every tanh were 1, which does not hold for large sums.
    const float e = fmaf(rounded, 2 * lost_of_sum, rounded), lost = fmaf(rounded, 2 * lost_of_sum, rounded - e);
    const float factor = is_query ? constant[i] / kDenominatorScaleOfRow : kDenominatorScaleOfRow;
    x[i] = e * factor;
    r += 0.5f * lost_of_product(e, lost, factor, x[i]) * reciprocal(x[i]);  // the rounding of both products
    rest = fmaf(v[i], r, rest);
  }
}

template <typename W, int kQ, int kK, int kColumns, Form kForm, bool kVectorized, class Score>
ATTN_DEVICE void compute_tile(const ScoresTile<Score>& a, const SharedTile<W, kColumns>& s, int b, int q0, int k0,
                              float unit, bool clamped, W (&total)[kQ][kK]) {
  const Score& op = a.op;
  const int columns = s.columns, split = threadIdx.x / (a.threads_q * a.threads_k);
  const bool works = split < a.unit_splits;
  const int within = works ? threadIdx.x % (a.threads_q * a.threads_k) : 0;
  const W* mine = s.rows + (works ? split : 0) * kUnits * kColumns;
  const W* mine_v = s.constants + (works ? split : 0) * kUnits;
  const int mine_q = within / a.threads_k * kQ, mine_k = s.columns_q + within % a.threads_k * kK;

  // An item is four units of a row. Consecutive threads have consecutive rows. The positions of a thread's first items
  // are kept in registers.
  constexpr int kKnown = kAddsExtra<Score> ? 1 : kKnownItems;
  struct Item {
    short column, unit;  // unit: index in the chunk, over all splits
  } known[kKnown];
  const int items = a.unit_splits * kQuads * columns;
  auto item = [&](int index) {
    return Item{static_cast<short>(index % columns), static_cast<short>(index / columns * 4)};
  };
#pragma unroll
  for (int n = 0; n < kKnown; ++n) known[n] = item(threadIdx.x + n * blockDim.x);
  auto for_items = [&](auto body) {
#pragma unroll
    for (int n = 0; n < kKnown; ++n) {
      const int index = threadIdx.x + n * blockDim.x;
      if (index < items) body(index, known[n]);
    }
    for (int index = threadIdx.x + kKnown * blockDim.x; index < items; index += blockDim.x) body(index, item(index));
  };
  for_items([&](int index, Item) { s.abs_max[index] = 0; });
  auto first_unit = [&](int of_split, int chunk) { return of_split * a.split_units + chunk * kUnits; };
  // v and bias are loaded by 16 threads per split, in whole warps.
  const int v_split = threadIdx.x / 16, v_unit = threadIdx.x % 16;
  W next_v = 0, next_bias = 0;

  // Asynchronous copies from the rows to the staging area in shared memory. Each thread later reads its own part.
  auto load_chunk = [&](int chunk) {
    for_items([&](int index, Item of) {
      const bool is_query = of.column < s.columns_q;
      const int u = first_unit(of.unit / kUnits, chunk) + of.unit % kUnits;
      const int row = is_query ? q0 + of.column : k0 + of.column - s.columns_q;
      const bool exists = row < (is_query ? op.Tq : op.Tk);
      const StridedView3& from = is_query ? op.query : op.keys;
      fill_slot<W, kVectorized>(from, b * from.stride[0] + row * from.stride[1], u, exists ? op.A : 0,
                                s.staging + 4 * index);
    });
    const int u = first_unit(v_split, chunk) + v_unit;
    const bool exists =
        v_split < a.unit_splits && v_unit < a.split_units - chunk * kUnits && v_unit < kUnits && u < op.A;
    next_v = exists ? element<W>(op.v.data, op.v.dtype, u * op.v.stride[2]) : W(0);
    const bool biased = exists && op.bias.data != nullptr;
    next_bias = biased ? element<W>(op.bias.data, op.bias.dtype, u * op.bias.stride[2]) : W(0);
  };
  auto stage_v = [&]() {
    if (int(threadIdx.x) / kWarp * 2 >= a.unit_splits) return;
    W constant = next_v, factor = 0, half = 0;
    if constexpr (kForm == Form::factored) {
      const bool kept = fabsf(next_v) >= unit * kMinRelativeV;
      factor = kept ? unit * kDenominatorScale / next_v : 0.0f;
      constant = kept ? factor : kDroppedDenominator;
      half = kept ? next_v / (2 * unit * kDenominatorScale) : 0.0f;
#pragma unroll
      for (int step = 8; step > 0; step /= 2) half += __shfl_xor_sync(kAllLanes, half, step);
    }
    if constexpr (kForm == Form::compensated) {
      factor = next_v / unit;
      constant = kDenominatorScale * (next_v == 0 ? 1.0f : unit / next_v);
    }
    if (v_split >= a.unit_splits || v_unit >= kUnits) return;
    s.constants[v_split * kUnits + v_unit] = constant;
    s.factors[v_split * kUnits + v_unit] = factor;
    s.biases[v_split * kUnits + v_unit] = next_bias;
    if (v_unit == 0) s.halves[v_split] = half;
  };
  // Widens the slots of this thread, and adds extra to those of keys. One at a time, as unrolled it would need too many
  // registers.
  auto add_extra = [&](int chunk) {
    if constexpr (kAddsExtra<Score>) {
#pragma unroll 1
      for (int index = threadIdx.x; index < items; index += blockDim.x) {
        const Item of = item(index);
        const int u = first_unit(of.unit / kUnits, chunk) + of.unit % kUnits, row = k0 + of.column - s.columns_q;
        W *slot = s.staging + 4 * index, x[4];
        read_slot<W, kVectorized>(slot, op.query.dtype, x);
        if (of.column >= s.columns_q && row < op.Tk) {
          const int64_t offset = b * op.extra.stride[0] + row * op.extra.stride[1];
          add_four<W, kVectorized>(op.extra, offset, u, op.A, x);
          if (kVectorized && u + kUnits < op.A)  // of the next chunk
            prefetch(static_cast<const char*>(op.extra.data) +
                     (offset + u + kUnits) * (op.extra.dtype == Dtype::float32 ? 4 : 2));
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) slot[i] = x[i];
      }
    }
  };
  auto stage = [&](int chunk) {
    wait_for_copies();
    add_extra(chunk);
    for_items([&](int index, Item of) {
      const bool is_query = of.column < s.columns_q;
      W* to = s.rows + of.unit * kColumns + of.column;
      W x[4], bias[4], factor[4], top = s.abs_max[index];
      read_slot<W, kVectorized && !kAddsExtra<Score>>(s.staging + 4 * index, op.query.dtype, x);
      if constexpr (kForm == Form::compensated) {
        stage_compensated(s, of.unit, is_query, x, top);
      } else {
        if (is_query) {
          load_4_staged(s.biases + of.unit, bias);
          load_4_staged(s.factors + of.unit, factor);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (is_query) x[i] += bias[i];
          if constexpr (kForm == Form::factored) {
            top = larger_magnitude(top, x[i]);
            x[i] = is_query ? factor[i] * quick_exp2x(x[i]) : quick_exp2x(x[i]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i * kColumns] = x[i];
      if constexpr (kForm != Form::activated) s.abs_max[index] = top;
    });
  };

  // part: the sum over two chunks. In the factored form half their sum of v is subtracted, which keeps it as small as
  // the scores. In the exact form it holds the Kahan compensation.
  W part[kQ][kK], owed = 0;
#pragma unroll
  for (int i = 0; i < kQ; ++i)
#pragma unroll
    for (int j = 0; j < kK; ++j) total[i][j] = part[i][j] = 0;
  load_chunk(0);
  stage_v();
  __syncthreads();
  const int chunks = (a.split_units + kUnits - 1) / kUnits;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    stage(chunk);
    __syncthreads();
    if (chunk + 1 < chunks) load_chunk(chunk + 1);
    const int left = a.split_units - chunk * kUnits, units = left < kUnits ? left : kUnits;
    if constexpr (kForm == Form::factored) {
      owed += s.halves[works ? split : 0];
      if (chunk % 2 == 0) {
        move_part(part, total, -owed);
        owed = 0;
      }
      add_factored<kQ, kK, kColumns>(mine + mine_q, mine + mine_k, mine_v, units, part);
    } else if constexpr (kForm != Form::exact) {
      if (chunk % 2 == 0) move_part(part, total, W(0));
      if constexpr (kForm == Form::compensated) {
        const W* v = s.factors + (works ? split : 0) * kUnits;
        if (clamped)
          add_compensated_units<kQ, kK, kColumns, true>(mine + mine_q, mine + mine_k, mine_v, v, units, part);
        else
          add_compensated_units<kQ, kK, kColumns, false>(mine + mine_q, mine + mine_k, mine_v, v, units, part);
      } else {
        by_activation_of<W>(op, [&](auto f) {
          add_activated<decltype(f), W, kQ, kK, kColumns>(f, mine + mine_q, mine + mine_k, mine_v, units, part);
        });
      }
    } else {
      add_exact<W, kQ, kK, kColumns>(mine + mine_q, mine + mine_k, mine_v, units, total, part);
    }
    __syncthreads();
    if (chunk + 1 < chunks) {
      stage_v();
      __syncthreads();
    }
  }
  if constexpr (kForm == Form::factored) {
#pragma unroll
    for (int i = 0; i < kQ; ++i)
#pragma unroll
      for (int j = 0; j < kK; ++j) total[i][j] = -2 * unit * kDenominatorScale * (total[i][j] + (part[i][j] - owed));
  }
  if constexpr (kForm == Form::activated) move_part(part, total, W(0));
  if constexpr (kForm == Form::compensated) {
    combine_items(a, s, [](float x, float y) { return x + y; });
#pragma unroll
    for (int i = 0; i < kQ; ++i)
#pragma unroll
      for (int j = 0; j < kK; ++j) {
        const float rest = split == 0 ? s.abs_max[mine_q + i] + s.abs_max[mine_k + j] : 0.0f;
        total[i][j] = unit * (total[i][j] + part[i][j] + rest);
      }
  }
  __syncthreads();
}

// Sums over the splits and writes the tile.
template <typename W, int kQ, int kK, int kColumns, class Score>
ATTN_DEVICE void write_tile(const ScoresTile<Score>& a, const SharedTile<W, kColumns>& s, int b, int q0, int k0,
                            const W (&total)[kQ][kK]) {
  const int pairs = s.columns_q * s.columns_k, threads = a.threads_q * a.threads_k;
  W* sums = s.rows;  // [split][columns_q][columns_k]
  if (static_cast<int>(threadIdx.x) < a.unit_splits * threads) {
    const int within = threadIdx.x % threads, q = within / a.threads_k * kQ, k = within % a.threads_k * kK;
    W* to = sums + threadIdx.x / threads * pairs + q * s.columns_k + k;
#pragma unroll
    for (int i = 0; i < kQ; ++i)
#pragma unroll
      for (int j = 0; j < kK; ++j) to[i * s.columns_k + j] = total[i][j];
  }
  __syncthreads();
  for (int e = threadIdx.x; e < pairs; e += blockDim.x) {
    const int i = q0 + e / s.columns_k, j = k0 + e % s.columns_k;
    if (i >= a.op.Tq || j >= a.op.Tk) continue;
    W x = 0;
    for (int n = 0; n < a.unit_splits; ++n) x += sums[n * pairs + e];
    store_element(a.scores, a.dtype, (b * a.op.Tq + i) * a.op.Tk + j, x);
  }
}

// abs_max[column] = the largest |query + bias| or |key| of the row, for tiles without a form that computes it. NaN is
// ignored: it propagates through the sums.
template <int kColumns, class Score>
ATTN_DEVICE void find_largest(const ScoresTile<Score>& a, const SharedTile<float, kColumns>& s, int b, int q0, int k0) {
  const Score& op = a.op;
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  for (int column = threadIdx.x / kWarp; column < s.columns; column += warps) {
    const bool is_query = column < s.columns_q;
    const StridedView3& rows = is_query ? op.query : op.keys;
    const int row = is_query ? q0 + column : k0 + column - s.columns_q;
    float top = 0;
    for (int u = lane; u < op.A && row < (is_query ? op.Tq : op.Tk); u += kWarp) {
      float x = element<float>(rows.data, rows.dtype, b * rows.stride[0] + row * rows.stride[1] + u * rows.stride[2]);
      if (is_query && op.bias.data != nullptr) x += element<float>(op.bias.data, op.bias.dtype, u * op.bias.stride[2]);
      if constexpr (kAddsExtra<Score>)
        if (!is_query)
          x += element<float>(op.extra.data, op.extra.dtype,
                              b * op.extra.stride[0] + row * op.extra.stride[1] + u * op.extra.stride[2]);
      top = larger_magnitude(top, x);
    }
    top = warp_largest(top);
    if (lane == 0) s.abs_max[column] = top;
  }
  __syncthreads();
}

// Calls body(|q|, |k|), with the largest values of the two rows, for the attended pairs of this thread for which
// counts(|q|, |k|) is true.
template <int kColumns, class Score, class Counts, class Body>
ATTN_DEVICE void for_attended(const ScoresTile<Score>& a, const SharedTile<float, kColumns>& s, int b, int q0, int k0,
                              int length, const Counts& counts, const Body& body) {
  for (int e = threadIdx.x; e < s.columns_q * s.columns_k; e += blockDim.x) {
    const int row = e / s.columns_k, column = e % s.columns_k;
    const float q = s.abs_max[row], k = s.abs_max[s.columns_q + column];
    if (counts(q, k) && q0 + row < a.op.Tq && k0 + column < length && mask_allows(a.attended, b, q0 + row, k0 + column))
      body(q, k);
  }
}

// Whether an attended pair is outside the limits of the factored form. All threads get the same result.
template <int kColumns, class Score>
ATTN_DEVICE bool is_out_of_bounds(const ScoresTile<Score>& a, const SharedTile<float, kColumns>& s, int b, int q0,
                                  int k0, int length, float min_bound) {
  bool outside = false;
  for_attended(
      a, s, b, q0, k0, length, [&](float q, float k) { return !(q + k >= min_bound && q + k <= kMaxBoundThree); },
      [&](float, float) { outside = true; });
  return of_block<true>(outside ? 1.0f : 0.0f, s.buffer) != 0;
}

// The largest magnitudes of the attended pairs of a tile. All threads get the same result.
struct Reach {
  float bound, side;  // bound: the largest |q| + |k|; side: the largest of all |q| and |k|
};

template <int kColumns, class Score>
ATTN_DEVICE Reach reach_of(const ScoresTile<Score>& a, const SharedTile<float, kColumns>& s, int b, int q0, int k0,
                           int length) {
  Reach reach{0, 0};
  for_attended(
      a, s, b, q0, k0, length, [&](float q, float k) { return q + k > reach.bound || fmaxf(q, k) > reach.side; },
      [&](float q, float k) {
        reach.bound = fmaxf(reach.bound, q + k);
        reach.side = fmaxf(reach.side, fmaxf(q, k));
      });
  return {of_block<true>(reach.bound, s.buffer), of_block<true>(reach.side, s.buffer)};
}

}  // namespace
}  // namespace cuda
}  // namespace attn
