// Scores of additive attention with many queries: v . tanh(query + keys + bias) without a tanh for each pair.
//
// tanh(x) = 1 - 2 / (1 + e^{2x}), and e^{2(q + k)} = e^{2q} e^{2k} is a product of exponentials that are made once for
// a row. With v folded in, v / (1 + E) = 1 / d, d = 1/v + (e^{2q} / v) e^{2k}, and three units share a reciprocal:
//
//   1/d1 + 1/d2 + 1/d3 = ((d1 + d2) d3 + d1 d2) / (d1 d2 d3)
//
// nine instructions for three hidden units, one of them a special function, where tanh costs about 17 and two for each.
//
// A block has the queries and steps of one tile. It is walked in chunks of units: the threads bring a chunk of the rows
// as exponentials into shared memory, unit by unit, and each thread sums up kQ x kK pairs in registers. Where there are
// few tiles, further warps of the block take a share of the units each.
//
// The exponentials are made without knowing whether they are in range. Largest |q| and |k| are found on the way, and
// pairs outside the limits make the block walk again with tanh itself. Limits as on the CPU (cpu/additive_attention_fwd.h).
#include "kernels.h"
#include "launch.h"
#include "pair.cuh"
#include "rows.cuh"
#include "shared_form.cuh"

namespace attn {
namespace cuda {
namespace {

constexpr int kUnits = 12;          // of a chunk, in each share of the units
constexpr int kQuads = kUnits / 4;  // what a thread brings at once
constexpr int kMostThreads = 384;
// Quads that a thread brings while it computes, as many as registers allow; further ones come when they are needed.
template <bool kInFours>
constexpr int kQuadsAhead = kInFours ? 3 : 2;

struct ScoresTile {
  AdditiveScores op;
  Attended attended;
  void* scores;  // (B, Tq, Tk) contiguous
  Dtype dtype;   // of scores
  // A block has threads_q x threads_k threads for each of `shares` shares of the units, rounded up to whole warps.
  int threads_q, threads_k, shares, share_threads;
  int64_t tiles_q, tiles_k, chunks;  // blocks along queries and steps; chunks of a share
};

// What the shared form needs of v: how it is scaled, and from which |q| + |k| on it may be used.
struct Scale {
  float unit;         // v / unit is at most 1
  float least_reach;  // infinity where the shared form may not be used at all
};

enum class Form { shared, plain };

// The block's sum, or largest, of one value for each thread; the same for all. buffer: (threads / 32) floats.
template <bool kLargest>
ATTN_DEVICE float of_block(float x, float* buffer) {
  x = kLargest ? warp_largest(x) : warp_sum(x);
  if (threadIdx.x % kWarp == 0) buffer[threadIdx.x / kWarp] = x;
  __syncthreads();
  float total = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w)
    total = kLargest ? larger(total, buffer[w]) : total + buffer[w];
  __syncthreads();  // the buffer is free again, also for something else
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
  Scale scale{power_of_two_above(top), least_reach_of(squares, op.A)};
  float dropped = 0;
  for (int64_t u = threadIdx.x; u < op.A; u += blockDim.x) {
    const float x = fabsf(element<float>(op.v.data, op.v.dtype, u * op.v.stride[2]));
    dropped += x < scale.unit * kSmallestUnit ? x : 0.0f;
  }
  dropped = of_block<false>(dropped, buffer);
  // Not for NaN or infinity; and what is dropped has to be below the rounding of the largest unit, all of it together.
  if (!(top > 1e-30f && top < 1e30f && dropped <= scale.unit * kSmallestUnit)) scale.least_reach = INFINITY;
  return scale;
}

// part += the (kQ, kK) sums of 1 / d over the units of a chunk. eq: [unit][columns], ek: [unit][columns], from the
// thread's first query and step on; constants: [unit].
template <int kQ, int kK>
ATTN_DEVICE void add_shared(const float* eq, const float* ek, int columns, const float* constants,
                            float (&part)[kQ][kK]) {
#pragma unroll 2
  for (int t = 0; t < kUnits; t += 3) {
    float q[3][kQ], k[3][kK], c[3];
#pragma unroll
    for (int n = 0; n < 3; ++n) {
#pragma unroll
      for (int i = 0; i < kQ; i += 4) load_16_bytes(eq + (t + n) * columns + i, q[n] + i);
#pragma unroll
      for (int j = 0; j < kK; j += 4) load_16_bytes(ek + (t + n) * columns + j, k[n] + j);
      c[n] = constants[t + n];
    }
#pragma unroll
    for (int i = 0; i < kQ; ++i)
#pragma unroll
      for (int j = 0; j < kK; ++j)
        part[i][j] =
            add_three(c[0] + q[0][i] * k[0][j], c[1] + q[1][i] * k[1][j], c[2] + q[2][i] * k[2][j], part[i][j]);
  }
}

// The same with tanh itself: q, with the bias, and k lie in place of the exponentials, v in place of the constants.
// What an addition loses is carried to the next one: with a large v one unit may be much larger than the others.
template <typename W, int kQ, int kK>
ATTN_DEVICE void add_plain(const W* q, const W* k, int columns, const W* v, W (&total)[kQ][kK], W (&lost)[kQ][kK]) {
#pragma unroll 1
  for (int t = 0; t < kUnits; ++t) {
#pragma unroll
    for (int i = 0; i < kQ; ++i)
#pragma unroll
      for (int j = 0; j < kK; ++j)
        add_exactly(v[t] * tanh_of(q[t * columns + i] + k[t * columns + j]), total[i][j], lost[i][j]);
  }
}

// Shared memory of a block. The sums of the shares take its place at the end.
template <typename W>
struct Staged {
  int columns_q, columns_k, columns;  // rows of the tile: queries, steps, both
  W* rows;                            // [share][unit][columns]
  W *constants, *factors, *biases;    // [share][unit]: d = constant + factor e^{2 (q + bias)} e^{2k}
  W* halves;                          // [share]
  W* reach;                           // [share][quad][columns]: largest |q|, |k| of what one thread brought
  float* buffer;                      // of of_block

  ATTN_DEVICE Staged(int shares, int columns_q, int columns_k)
      : columns_q(columns_q), columns_k(columns_k), columns(columns_q + columns_k) {
    rows = reinterpret_cast<W*>(shared_memory());
    constants = rows + shares * kUnits * columns;
    factors = constants + shares * kUnits;
    biases = factors + shares * kUnits;
    reach = biases + shares * kUnits;
    halves = reach + shares * kQuads * columns;
    buffer = reinterpret_cast<float*>(halves + shares);
  }

  static int64_t bytes(int shares, int columns_q, int columns_k) {
    const int columns = columns_q + columns_k;
    const int64_t staged = int64_t(shares) * (kUnits * columns + 3 * kUnits + kQuads * columns + 1);
    const int64_t summed = int64_t(shares) * columns_q * columns_k;
    return (staged > summed ? staged : summed) * int64_t(sizeof(W)) + kMostThreads / kWarp * int64_t(sizeof(float));
  }
};

template <typename W, int kQ, int kK, Form kForm, bool kInFours>
ATTN_DEVICE void walk(const ScoresTile& a, const Staged<W>& s, int64_t b, int64_t q0, int64_t k0, float unit,
                      W (&total)[kQ][kK]) {
  const AdditiveScores& op = a.op;
  const int columns = s.columns;
  const int share = threadIdx.x / a.share_threads, within = threadIdx.x % a.share_threads;
  const bool works = within < a.threads_q * a.threads_k;
  const int mine_q = works ? within / a.threads_k * kQ : 0, mine_k = works ? within % a.threads_k * kK : 0;

  // An item is four units of a row. Consecutive threads have consecutive rows.
  constexpr int kAhead = kQuadsAhead<kInFours>;
  const int items = a.shares * kQuads * columns;
  struct Item {
    int column, unit;  // unit of the chunk, counted over all shares
  } ahead[kAhead];
  auto item = [&](int index) { return Item{index % columns, index / columns * 4}; };
#pragma unroll
  for (int n = 0; n < kAhead; ++n) ahead[n] = item(threadIdx.x + n * blockDim.x);
  for (int n = threadIdx.x; n < items; n += blockDim.x) s.reach[n] = 0;
  auto first_unit = [&](int of_share, int64_t chunk) { return (of_share * a.chunks + chunk) * kUnits; };
  // Of v and bias: 16 threads for each share, in whole warps.
  const int v_share = threadIdx.x / 16, v_unit = threadIdx.x % 16;
  W next_v = 0, next_bias = 0;

  auto read = [&](Item of, int64_t chunk, W* x) {
    const bool is_query = of.column < s.columns_q;
    const int64_t u = first_unit(of.unit / kUnits, chunk) + of.unit % kUnits;
    const int64_t row = is_query ? q0 + of.column : k0 + of.column - s.columns_q;
    const bool exists = row < (is_query ? op.Tq : op.Tk);
    const Array3& from = is_query ? op.query : op.keys;
    load_4<W, kInFours>(from, b * from.stride[0] + row * from.stride[1], u, exists ? op.A : 0, x);
  };
  // From the rows to registers, where it arrives while the threads compute; later from there to shared memory.
  W brought[kAhead][4];
  auto bring = [&](int64_t chunk) {
#pragma unroll
    for (int n = 0; n < kAhead; ++n)
      if (ahead[n].unit < a.shares * kUnits) read(ahead[n], chunk, brought[n]);
    const int64_t u = first_unit(v_share, chunk) + v_unit;
    const bool exists = v_share < a.shares && v_unit < kUnits && u < op.A;
    next_v = exists ? element<W>(op.v.data, op.v.dtype, u * op.v.stride[2]) : W(0);
    const bool biased = exists && op.bias.data != nullptr;
    next_bias = biased ? element<W>(op.bias.data, op.bias.dtype, u * op.bias.stride[2]) : W(0);
  };
  auto stage_v = [&]() {
    if (int(threadIdx.x) / kWarp * 2 >= a.shares) return;
    W constant = next_v, factor = 0, half = 0;
    if constexpr (kForm == Form::shared) {
      const bool kept = fabsf(next_v) >= unit * kSmallestUnit;
      factor = kept ? unit * kUnitScale / next_v : 0.0f;
      constant = kept ? factor : kDropped;
      half = kept ? next_v / (2 * unit * kUnitScale) : 0.0f;
#pragma unroll
      for (int step = 8; step > 0; step /= 2) half += __shfl_xor_sync(kAllLanes, half, step);
    }
    if (v_share >= a.shares || v_unit >= kUnits) return;
    s.constants[v_share * kUnits + v_unit] = constant;
    s.factors[v_share * kUnits + v_unit] = factor;
    s.biases[v_share * kUnits + v_unit] = next_bias;
    if (v_unit == 0) s.halves[v_share] = half;
  };
  auto stage_item = [&](Item of, const W* from) {
    const bool is_query = of.column < s.columns_q;
    W* to = s.rows + of.unit * columns + of.column;
    W* reach = s.reach + of.unit / 4 * columns + of.column;
    W top = *reach;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      W x = from[i];
      if (is_query) x += s.biases[of.unit + i];
      if constexpr (kForm == Form::shared) {
        top = larger(top, fabsf(x));
        x = exp2x(x);
        if (is_query) x *= s.factors[of.unit + i];
      }
      to[i * columns] = x;
    }
    *reach = top;
  };
  auto stage = [&](int64_t chunk) {
#pragma unroll
    for (int n = 0; n < kAhead; ++n)
      if (ahead[n].unit < a.shares * kUnits) stage_item(ahead[n], brought[n]);
    for (int n = threadIdx.x + kAhead * blockDim.x; n < items; n += blockDim.x) {
      W x[4];
      read(item(n), chunk, x);
      stage_item(item(n), x);
    }
  };

  // part: what has not been added to the total yet, so that sums stay as small as the scores: every second chunk, half
  // of what the units give without the rest of tanh is taken off. Of the plain form: what was lost.
  W part[kQ][kK], owed = 0;
#pragma unroll
  for (int i = 0; i < kQ; ++i)
#pragma unroll
    for (int j = 0; j < kK; ++j) total[i][j] = part[i][j] = 0;
  bring(0);
  stage_v();
  __syncthreads();
  for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
    stage(chunk);
    __syncthreads();
    if (chunk + 1 < a.chunks) bring(chunk + 1);
    const W* q = s.rows + share * kUnits * columns + mine_q;
    const W* k = s.rows + share * kUnits * columns + s.columns_q + mine_k;
    const W* constants = s.constants + share * kUnits;
    if constexpr (kForm == Form::shared) {
      owed += s.halves[share];
      if (chunk % 2 == 0) {
#pragma unroll
        for (int i = 0; i < kQ; ++i)
#pragma unroll
          for (int j = 0; j < kK; ++j) {
            total[i][j] += part[i][j];
            part[i][j] = -owed;
          }
        owed = 0;
      }
      add_shared<kQ, kK>(q, k, columns, constants, part);
    } else {
      add_plain<W, kQ, kK>(q, k, columns, constants, total, part);
    }
    __syncthreads();
    if (chunk + 1 < a.chunks) {
      stage_v();
      __syncthreads();
    }
  }
  if constexpr (kForm == Form::shared) {
#pragma unroll
    for (int i = 0; i < kQ; ++i)
#pragma unroll
      for (int j = 0; j < kK; ++j) total[i][j] = -2 * unit * kUnitScale * (total[i][j] + (part[i][j] - owed));
  }
  __syncthreads();
}

// Adds up the shares and writes the tile; what `wanted(row, column)` refuses is left as it is.
template <typename W, int kQ, int kK>
ATTN_DEVICE void write_tile(const ScoresTile& a, const Staged<W>& s, int64_t b, int64_t q0, int64_t k0,
                            const W (&total)[kQ][kK]) {
  const int pairs = s.columns_q * s.columns_k;
  const int share = threadIdx.x / a.share_threads, within = threadIdx.x % a.share_threads;
  W* sums = s.rows;  // [share][columns_q][columns_k]
  if (within < a.threads_q * a.threads_k) {
    const int q = within / a.threads_k * kQ, k = within % a.threads_k * kK;
#pragma unroll
    for (int i = 0; i < kQ; ++i)
#pragma unroll
      for (int j = 0; j < kK; ++j) sums[share * pairs + (q + i) * s.columns_k + k + j] = total[i][j];
  }
  __syncthreads();
  for (int e = threadIdx.x; e < pairs; e += blockDim.x) {
    const int64_t i = q0 + e / s.columns_k, j = k0 + e % s.columns_k;
    if (i >= a.op.Tq || j >= a.op.Tk) continue;
    W x = 0;
    for (int n = 0; n < a.shares; ++n) x += sums[n * pairs + e];
    store_element(a.scores, a.dtype, (b * a.op.Tq + i) * a.op.Tk + j, x);
  }
}

// Whether a pair that is attended lies outside the limits of the shared form; the same for all threads.
ATTN_DEVICE bool out_of_reach(const ScoresTile& a, const Staged<float>& s, int64_t b, int64_t q0, int64_t k0,
                              int64_t length, float least_reach) {
  for (int column = threadIdx.x; column < s.columns; column += blockDim.x) {
    float top = 0;
    for (int n = 0; n < a.shares * kQuads; ++n) top = larger(top, s.reach[n * s.columns + column]);
    s.reach[column] = top;
  }
  __syncthreads();
  bool outside = false;
  for (int e = threadIdx.x; e < s.columns_q * s.columns_k; e += blockDim.x) {
    const int row = e / s.columns_k, column = e % s.columns_k;
    const float reach = s.reach[row] + s.reach[s.columns_q + column];
    if (!(reach >= least_reach && reach <= kThreeReach) && q0 + row < a.op.Tq && k0 + column < length)
      outside = outside || mask_allows(a.attended, b, q0 + row, k0 + column);
  }
  return of_block<true>(outside ? 1.0f : 0.0f, s.buffer) != 0;
}

// Scores of a tile of queries and steps. Tiles beyond the length are left as they are.
template <typename W, int kQ, int kK, bool kInFours>
__global__ void __launch_bounds__(kMostThreads) many_queries_scores_kernel(ScoresTile a) {
  const int64_t tile = blockIdx.x, b = tile / (a.tiles_q * a.tiles_k);
  const int64_t q0 = tile / a.tiles_k % a.tiles_q * a.threads_q * kQ, k0 = tile % a.tiles_k * a.threads_k * kK;
  const int64_t length = attended_steps(a.attended, b, a.op.Tk);
  if (k0 >= length) return;
  const Staged<W> s(a.shares, a.threads_q * kQ, a.threads_k * kK);
  W total[kQ][kK];
  if constexpr (sizeof(W) == 4) {
    const Scale scale = scale_of(a.op, s.buffer);
    if (scale.least_reach <= kThreeReach) {
      walk<W, kQ, kK, Form::shared, kInFours>(a, s, b, q0, k0, scale.unit, total);
      if (!out_of_reach(a, s, b, q0, k0, length, scale.least_reach)) return write_tile(a, s, b, q0, k0, total);
    }
  }
  walk<W, kQ, kK, Form::plain, kInFours>(a, s, b, q0, k0, W(1), total);
  write_tile(a, s, b, q0, k0, total);
}

// How the pairs of an op are cut into blocks: that with the least estimated time. Read from compiled code: a pair of
// units takes 3.2 issue slots, an element of the rows about 14; a warp issues in half of the cycles, four warps at once.
template <int kQ, int kK>
ScoresTile choose_tile(const AdditiveScores& op) {
  const int64_t threads_q = ceil_div(op.Tq, kQ), threads_k = ceil_div(op.Tk, kK);
  const int64_t chunks = ceil_div(op.A, kUnits), processors = current_device().multiprocessors;
  ScoresTile best{};
  double least = INFINITY;
  for (int64_t tiles_q = ceil_div(threads_q, 64); tiles_q <= threads_q; ++tiles_q) {
    const int64_t tq = ceil_div(threads_q, tiles_q);
    if (tiles_q != ceil_div(threads_q, tq)) continue;  // another one with the same threads
    for (int64_t tiles_k = ceil_div(threads_k, kMostThreads / tq); tiles_k <= threads_k; ++tiles_k) {
      const int64_t tk = ceil_div(threads_k, tiles_k), of_share = round_up(tq * tk, kWarp);
      if (tiles_k != ceil_div(threads_k, tk) || of_share > kMostThreads) continue;
      const int64_t columns = tq * kQ + tk * kK;
      for (int64_t shares = 1; shares * of_share <= kMostThreads && shares <= chunks; ++shares) {
        const int64_t per_share = ceil_div(chunks, shares);
        const double slots = shares * per_share * kUnits * (3.2 * kQ * kK * of_share + 14.0 * columns) / kWarp + 4e3;
        const double warps = double(shares * of_share) / kWarp, blocks = double(op.B * tiles_q * tiles_k);
        const double resident = std::floor(kMostThreads / (shares * of_share) > 1 ? 12 / warps : 1.0);
        const double at_once = std::fmin(resident, std::ceil(blocks / processors));
        const double rate = std::fmin(4.0, 0.5 * warps * at_once);
        const double time = std::ceil(blocks / (at_once * processors)) * at_once * slots / rate;
        if (time < least) {
          least = time;
          best.threads_q = static_cast<int>(tq);
          best.threads_k = static_cast<int>(tk);
          best.shares = static_cast<int>(ceil_div(chunks, per_share));
          best.share_threads = static_cast<int>(of_share);
          best.tiles_q = tiles_q;
          best.tiles_k = tiles_k;
          best.chunks = per_share;
        }
      }
      if (tk <= 1) break;
    }
    if (tq <= 1) break;
  }
  return best;
}

template <typename W, int kQ, int kK>
void launch_scores(const AdditiveScores& op, const Attended& attended, void* scores, Dtype dtype) {
  ScoresTile tile = choose_tile<kQ, kK>(op);
  tile.op = op;
  tile.attended = attended;
  tile.scores = scores;
  tile.dtype = dtype;
  const Grid grid{op.B * tile.tiles_q * tile.tiles_k, tile.shares * tile.share_threads,
                  Staged<W>::bytes(tile.shares, tile.threads_q * kQ, tile.threads_k * kK)};
  const bool in_fours = in_fours_of(op.query, op.A) && in_fours_of(op.keys, op.A);
  launch(in_fours ? many_queries_scores_kernel<W, kQ, kK, true> : many_queries_scores_kernel<W, kQ, kK, false>, grid,
         tile);
}

}  // namespace

void additive_scores(const AdditiveScores& op, const Attended& attended, void* scores, bool narrow) {
  const Dtype dtype = narrow || op.query.dtype == Dtype::float64 ? op.query.dtype : Dtype::float32;
  if (op.A == 0) return clear(scores, op.B * op.Tq * op.Tk * item_size(dtype));
  if (dtype == Dtype::float64) return launch_scores<double, 4, 4>(op, attended, scores, dtype);
  launch_scores<float, 8, 4>(op, attended, scores, dtype);
}

}  // namespace cuda
}  // namespace attn
