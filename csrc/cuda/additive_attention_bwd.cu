// The backward of scores with a score vector: the gradients of query, keys, v and bias. Hidden units are recomputed.
// TanhPair (additive attention) and ActivatedPair (other activations) are policies.
//
// With E = e^{2q} e^{2k}, r = 1 / (1 + E) and ds the gradient of a score: 1 - tanh^2 = 4 E r^2 and tanh = (E - 1) r, so
//
//   dquery = 4 v e^{2q} (sum of ds r^2 e^{2k})    dkeys = 4 v e^{2k} (sum of ds r^2 e^{2q})    dv = sum of ds r (E - 1)
//
// and dbias is the sum of dquery. That is eight instructions per pair and unit, one of them a special function. Packed
// instructions (f32x2.cuh) halve the number of the others. Nothing here cancels: the error of each term is a few ulps
// of its own value, however near tanh is to 0 or 1, and however large v is. With 1 - tanh^2 and 1 - 2 r the error would
// be a few ulps of 1. If e^{2q} or e^{2k} is too large for such sums, E is clamped and ds (E r) r is summed, at ten
// instructions. If the exponential itself is out of range, tanh is computed for each pair.
//
// A block has 64 units of the queries and steps of a part of one sentence. A lane keeps two units of kQ queries in
// registers and loops over the steps, so dquery and dv need no other thread. dkeys of a step is summed over the warps
// that have the queries. There are no atomics: blocks write partial sums, which are added in order.
#include "activations.cuh"
#include "additive_math.cuh"
#include "kernels.h"
#include "launch.h"
#include "rows.cuh"
#include "sum_parts.cuh"

namespace attn {
namespace cuda {
namespace {

constexpr int kSteps = 16;     // steps of a warp in a chunk
constexpr int kLaneUnits = 2;  // units of a lane
constexpr int kBlockUnits = kLaneUnits * kWarp;
// Most warps of a block: their sums fit the shared memory of every GPU, which is 99 KB on the smaller ones.
template <typename W>
constexpr int kMaxWarps = sizeof(W) == 4 ? 8 : 4;

// Loop unrolling over steps with few queries, limited by registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kAtOnce = 2;
#else
constexpr int kAtOnce = 4;
#endif

// How a sentence is divided. A block has warps_q x warps_k warps, each with kQ queries and kSteps steps of every chunk.
struct BackwardTile {
  int warps_q, warps_k;
  int64_t parts_q, parts_k, queries, steps;  // queries and steps: per part; steps is a multiple of a chunk
};

// Which form an element of a row allows. For a row, the bits say whether it has such elements.
enum class Range { fast = 0, clamped = 1, beyond = 2 };

// Each activation f has a class with these members: the values that the fast form stores per row element, the terms
// that it accumulates for a pair with score gradient ds and x = q + k, and f itself. dquery and dkeys are kGain v times
// their sums.
struct TanhPair {
  using Score = AdditiveScores;
  static constexpr int kGain = 4;
  static constexpr bool kBounded = true;  // f(x) is finite unless x is NaN: pairs with a ds of 0 can be skipped
  template <typename W>
  static constexpr bool kHasFast = sizeof(W) == 4;
  static constexpr bool kHasClamped = true;

  // The range of an element of a query or key. The fast forms replace elements beyond all ranges by 0.
  ATTN_DEVICE static Range range(float x) {
    return fabsf(x) <= kMaxAbsBackward ? Range::fast : fabsf(x) <= kMaxAbsExponential ? Range::clamped : Range::beyond;
  }
  ATTN_DEVICE static float kept(float x) { return exp2x(x); }

  // Whether the terms of add() already have all factors. Form: the type of the first argument of add().
  template <class Form>
  static constexpr bool kComplete = Form::value;

  // Calls body with an object of one of these types.
  template <typename W, class Body>
  ATTN_DEVICE static void by_form(const Score&, bool clamped, const Body& body) {
    if (clamped)
      body(std::true_type());
    else
      body(std::false_type());
  }

  // Accumulates dq and dk without a factor, the stored value of the own row (of_row). With kWithFactors, all factors
  // are included.
  template <int kQ, bool kWithFactors, typename W>
  ATTN_DEVICE static void add(std::bool_constant<kWithFactors>, F32x2<W> e, F32x2<W> ek, F32x2<W> ds, F32x2<W>& dq,
                              F32x2<W>& dk, F32x2<W>& dv) {
    constexpr F32x2<W> kOne{1, 1}, kMinusOne{-1, -1};
    if constexpr (kWithFactors) {
      const F32x2<W> product = e * ek;
      constexpr W kMost = kMaxExponentialBackward;
      const F32x2<W> pair{W(fmin(product.x, kMost)), W(fmin(product.y, kMost))};
      const F32x2<W> r = reciprocal(pair + kOne), once = ds * r, share = pair * r;
      dq = multiply_add(once, share, dq);
      dk = multiply_add(once, share, dk);
      dv = multiply_add(once, pair + kMinusOne, dv);
      return;
    }
    const F32x2<W> d = multiply_add(e, ek, kOne);
    F32x2<W> r = reciprocal(d);
    // Few queries are memory-bound, so there is time for a Newton step to get the last bit of the approximate
    // reciprocal.
    if constexpr (sizeof(W) == 4 && kQ < 8) r = multiply_add(r, multiply_add(F32x2<W>{-d.x, -d.y}, r, kOne), r);
    const F32x2<W> once = ds * r, twice = once * r;
    dq = multiply_add(twice, ek, dq);
    dk = multiply_add(twice, e, dk);
    dv = multiply_add(once, multiply_add(e, ek, kMinusOne), dv);
  }
  template <typename W>
  ATTN_DEVICE static W of_row(W kept, W sum) {
    return kept * sum;
  }

  // gradient: ds f'(x) / kGain; value: f(x)
  template <typename W>
  ATTN_DEVICE static W gradient(const Score&, W x, W ds) {
    return ds * quarter_slope_of_tanh(x);
  }
  template <typename W>
  ATTN_DEVICE static W value(const Score&, W x) {
    return tanh_of(x);
  }
};

struct ActivatedPair {
  using Score = ActivatedScores;
  static constexpr int kGain = 1;
  static constexpr bool kBounded = false;
  template <typename W>
  static constexpr bool kHasFast = true;
  static constexpr bool kHasClamped = false;
  template <class>
  static constexpr bool kComplete = false;

  // In the fast range the sum of two elements is finite.
  template <typename W>
  ATTN_DEVICE static Range range(W x) {
    return fabs(x) <= (sizeof(W) == 4 ? W(0x1p126f) : W(0x1p1022)) ? Range::fast : Range::beyond;
  }
  template <typename W>
  ATTN_DEVICE static W kept(W x) {
    return x;
  }

  template <typename W, class Body>
  ATTN_DEVICE static void by_form(const Score& op, bool, const Body& body) {
    by_activation_of<W>(op, body);
  }

  template <int, class F, typename W>
  ATTN_DEVICE static void add(const F& f, F32x2<W> q, F32x2<W> k, F32x2<W> ds, F32x2<W>& dq, F32x2<W>& dk,
                              F32x2<W>& dv) {
    const F32x2<W> x = q + k, g = cuda::gradient(f, x, ds);
    dq = dq + g;
    dk = dk + g;
    if constexpr (F::kByGradient)
      dv = multiply_add(g, x, dv);
    else
      dv = multiply_add(ds, cuda::value(f, x), dv);
  }
  template <typename W>
  ATTN_DEVICE static W of_row(W, W sum) {
    return sum;
  }

  template <typename W>
  ATTN_DEVICE static W gradient(const Score& op, W x, W ds) {
    by_activation_of<W>(op, [&](auto f) { ds = f.gradient(x, ds); });
    return ds;
  }
  template <typename W>
  ATTN_DEVICE static W value(const Score& op, W x) {
    by_activation_of<W>(op, [&](auto f) { x = f.value(x); });
    return x;
  }
};

template <typename W, class Score>
struct Backward {
  Score op;
  AttentionMask attended;
  BackwardTile tile;
  const W* dscores;  // (B, Tq, Tk) contiguous, 0 if not attended
  void* dquery;      // (parts_k, B, Tq, A) contiguous
  void* dkeys;       // (parts_q, B, Tk, A) contiguous, or null
  Dtype dquery_dtype, dkeys_dtype;
  W* dunits;  // (B, parts_q, parts_k, 2, A): partial sums of dv and dbias
};

// Shared memory of a block.
template <typename W>
struct Chunk {
  int rows, columns;  // steps of a chunk; queries, padded so that rows are aligned and are in different banks
  W* dscores;         // [step][query]
  W* e;               // [step][unit]: the stored values of k, e^{2k} for tanh
  W* dkeys;           // [warp_q][step][unit]: dkeys / (kGain v); at the end the sums of each warp for dbias and dv
  W* dquery;          // [warp][query][unit]: dquery / (kGain v)
  int* ranges;        // [step]: the Ranges of its elements, as bits

  ATTN_DEVICE Chunk(const BackwardTile& tile, int queries)
      : rows(kSteps * tile.warps_k), columns(padded(tile, queries)) {
    dscores = reinterpret_cast<W*>(shared_memory());
    e = dscores + rows * columns;
    dkeys = e + rows * kBlockUnits;
    dquery = dkeys + tile.warps_q * rows * kBlockUnits;
    ranges = reinterpret_cast<int*>(dquery + tile.warps_q * tile.warps_k * queries * kBlockUnits);
  }
  ATTN_HOST_DEVICE static int padded(const BackwardTile& tile, int queries) { return tile.warps_q * queries + 4; }
  static int64_t bytes(const BackwardTile& tile, int queries) {
    const int64_t rows = kSteps * tile.warps_k, warps = tile.warps_q * tile.warps_k;
    const int64_t units = rows + tile.warps_q * rows + warps * queries;
    return (rows * padded(tile, queries) + units * kBlockUnits) * int64_t(sizeof(W)) + rows * int64_t(sizeof(int));
  }
};

// A sum of 0 gives 0 even for a v of NaN: without attended pairs the gradient is 0.
template <class Pair, typename W>
ATTN_DEVICE W times_v(W sum, W v) {
  return sum == 0 ? W(0) : sum * (Pair::kGain * v);
}

// ds[0 .. kQ) from shared memory, four at a time if possible.
template <int kQ, typename W>
ATTN_DEVICE void load_queries(const W* from, W* ds) {
  if constexpr (kQ % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kQ; i += kPer16Bytes<W>) load_16_bytes(from + i, ds + i);
  } else {
#pragma unroll
    for (int i = 0; i < kQ; ++i) ds[i] = from[i];
  }
}

template <typename W, int kQ, class Pair>
__global__ void __launch_bounds__(kMaxWarps<W>* kWarp, sizeof(W) == 4 ? 2 : 1)
    scores_backward_kernel(Backward<W, typename Pair::Score> a) {
  constexpr bool kHasFast = Pair::template kHasFast<W>;
  const typename Pair::Score& op = a.op;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int warp_q = warp % a.tile.warps_q, warp_k = warp / a.tile.warps_q;
  // Positions have 32 bits: 64 bits would take too many registers, and a 64-bit division is a function call.
  const int tiles_a = static_cast<int>((op.A + kBlockUnits - 1) / kBlockUnits), part = int(blockIdx.x) / tiles_a;
  const int parts_k = static_cast<int>(a.tile.parts_k), parts_q = static_cast<int>(a.tile.parts_q);
  const int first_unit = int(blockIdx.x) % tiles_a * kBlockUnits;
  const int part_k = part % parts_k, part_q = part / parts_k % parts_q, b = part / (parts_k * parts_q);
  const int length = static_cast<int>(attended_steps(a.attended, b, op.Tk));
  const int begin = part_k * static_cast<int>(a.tile.steps);
  const int part_end = begin + a.tile.steps < op.Tk ? begin + static_cast<int>(a.tile.steps) : static_cast<int>(op.Tk);
  const int end = part_end < length ? part_end : length;
  const int q0 = part_q * static_cast<int>(a.tile.queries) + warp_q * kQ;  // this warp's first query
  const Chunk<W> s(a.tile, kQ);

  auto of_query = [&](int i, int n) -> W {
    const int u = first_unit + n * kWarp + lane;
    if (i >= op.Tq || u >= op.A) return 0;
    W x = element<W>(op.query.data, op.query.dtype,
                     b * op.query.stride[0] + i * op.query.stride[1] + u * op.query.stride[2]);
    if (op.bias.data != nullptr) x += element<W>(op.bias.data, op.bias.dtype, u * op.bias.stride[2]);
    return x;
  };
  auto of_key = [&](int j, int n) -> W {
    const int u = first_unit + n * kWarp + lane;
    if (j >= end || u >= op.A) return 0;
    W x =
        element<W>(op.keys.data, op.keys.dtype, b * op.keys.stride[0] + j * op.keys.stride[1] + u * op.keys.stride[2]);
    if constexpr (kAddsExtra<Pair>)
      x += element<W>(op.extra.data, op.extra.dtype,
                      b * op.extra.stride[0] + j * op.extra.stride[1] + u * op.extra.stride[2]);
    return x;
  };

  // This lane's sums in shared memory, which include all factors but kGain v: [query][one of its units]
  auto mine = [&]() { return s.dquery + threadIdx.x / kWarp * (kQ * kBlockUnits) + threadIdx.x % kWarp; };
  // The queries are loaded through shared memory: loading all at once would need more registers than the rest of the
  // kernel.
#pragma unroll 1
  for (int m = 0; m < kQ * kLaneUnits; ++m) mine()[m * kWarp] = of_query(q0 + m / kLaneUnits, m % kLaneUnits);

  W eq[kQ][kLaneUnits], dq[kQ][kLaneUnits];
  W sum_t[kLaneUnits] = {};
  // A fast form may be used only if elements beyond all ranges belong to pairs that are not attended.
  unsigned beyond = 0;  // a bit for each query
  constexpr unsigned kAnyClamped = 1u << kQ;
#pragma unroll
  for (int n = 0; n < kLaneUnits; ++n) {
#pragma unroll
    for (int i = 0; i < kQ; ++i) {
      dq[i][n] = eq[i][n] = 0;
      if constexpr (kHasFast) {
        const W x = mine()[(i * kLaneUnits + n) * kWarp];
        const Range range = Pair::range(x);
        beyond |= range == Range::beyond ? 1u << i : range == Range::clamped ? kAnyClamped : 0u;
        eq[i][n] = range != Range::beyond ? Pair::kept(x) : W(0);
      }
      mine()[(i * kLaneUnits + n) * kWarp] = 0;
    }
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) beyond |= __shfl_xor_sync(kAllLanes, beyond, step);

  // Moves the sums from registers to the sums in shared memory, with the factor if it is missing.
  auto flush = [&](bool without_factor) {
#pragma unroll
    for (int i = 0; i < kQ; ++i)
#pragma unroll
      for (int n = 0; n < kLaneUnits; ++n) {
        mine()[(i * kLaneUnits + n) * kWarp] += without_factor ? Pair::of_row(eq[i][n], dq[i][n]) : dq[i][n];
        dq[i][n] = 0;
      }
  };

  for (int j0 = begin; j0 < end; j0 += s.rows) {
    // Loads a chunk of steps into shared memory.
    for (int row = warp; row < s.rows; row += warps) {
      int ranges = 0;
#pragma unroll
      for (int n = 0; n < kLaneUnits; ++n) {
        if constexpr (kHasFast) {
          const W x = of_key(j0 + row, n);
          const Range range = Pair::range(x);
          ranges |= static_cast<int>(range);
          s.e[row * kBlockUnits + n * kWarp + lane] = range != Range::beyond ? Pair::kept(x) : W(0);
        }
      }
      int all = __any_sync(kAllLanes, (ranges & int(Range::beyond)) != 0) ? int(Range::beyond) : 0;
      if constexpr (Pair::kHasClamped)
        all |= __any_sync(kAllLanes, (ranges & int(Range::clamped)) != 0) ? int(Range::clamped) : 0;
      if (lane == 0) s.ranges[row] = all;
    }
    const int queries = a.tile.warps_q * kQ;
    for (int n = threadIdx.x; n < s.rows * queries; n += blockDim.x) {
      const int row = n % s.rows, column = n / s.rows;
      const int i = part_q * static_cast<int>(a.tile.queries) + column, j = j0 + row;
      const W ds = i < op.Tq && j < end ? a.dscores[(b * op.Tq + i) * op.Tk + j] : W(0);
      s.dscores[row * s.columns + column] = ds;
    }
    __syncthreads();

    const int last = end - j0 < (warp_k + 1) * kSteps ? end - j0 : (warp_k + 1) * kSteps;
    const int first = warp_k * kSteps;
    // Whether the pair of query i of this warp and the step must be added; its term may be 0 times infinity.
    auto counts = [&](int row, int i, W ds) {
      if constexpr (Pair::kBounded)
        return ds != 0;
      else
        return q0 + i < op.Tq && j0 + row < end && mask_allows(a.attended, b, q0 + i, j0 + row);
    };
    bool fast = kHasFast, clamped = false;
    if (kHasFast) {
      const int row = first + lane % kSteps;
      const bool row_beyond = (s.ranges[row] & int(Range::beyond)) != 0;
      bool used = false;
      if (row_beyond || (beyond & (kAnyClamped - 1)) != 0)
#pragma unroll(Pair::kBounded ? kQ : 1)  // unrolled, the addresses of the mask would need registers
        for (int i = 0; i < kQ; ++i)
          used = used ||
                 ((row_beyond || (beyond >> i & 1)) && counts(row, i, s.dscores[row * s.columns + warp_q * kQ + i]));
      fast = !__any_sync(kAllLanes, used);
      // For all pairs, attended or not: the products of the unclamped form could be infinite.
      if constexpr (Pair::kHasClamped)
        clamped = (beyond & kAnyClamped) != 0 || __any_sync(kAllLanes, (s.ranges[row] & int(Range::clamped)) != 0);
    }
    if (fast) {
      if (Pair::kHasClamped && clamped) flush(true);
      Pair::template by_form<W>(op, clamped, [&](auto form) {
        F32x2<W> chunk_t[kLaneUnits] = {};
#pragma unroll(kQ <= 8 ? kAtOnce : 1)
        for (int row = first; row < last; ++row) {
          W ds[kQ], k[kLaneUnits];
          F32x2<W> dk[kLaneUnits] = {};  // separate sums for even and odd queries
          load_queries<kQ>(s.dscores + row * s.columns + warp_q * kQ, ds);
#pragma unroll
          for (int n = 0; n < kLaneUnits; ++n) k[n] = s.e[row * kBlockUnits + n * kWarp + lane];
#pragma unroll
          for (int i = 0; i < kQ; i += 2)
#pragma unroll
            for (int n = 0; n < kLaneUnits; ++n) {
              F32x2<W> sum{dq[i][n], dq[i + 1][n]};
              Pair::template add<kQ>(form, F32x2<W>{eq[i][n], eq[i + 1][n]}, F32x2<W>{k[n], k[n]},
                                     F32x2<W>{ds[i], ds[i + 1]}, sum, dk[n], chunk_t[n]);
              dq[i][n] = sum.x;
              dq[i + 1][n] = sum.y;
            }
#pragma unroll
          for (int n = 0; n < kLaneUnits; ++n)
            s.dkeys[(warp_q * s.rows + row) * kBlockUnits + n * kWarp + lane] =
                Pair::template kComplete<decltype(form)> ? dk[n].x + dk[n].y : Pair::of_row(k[n], dk[n].x + dk[n].y);
        }
#pragma unroll
        for (int n = 0; n < kLaneUnits; ++n) sum_t[n] += chunk_t[n].x + chunk_t[n].y;
      });
      if (Pair::kHasClamped && clamped) flush(false);
    } else {  // the exact form, for attended pairs only: others may have NaN
      for (int row = first; row < last; ++row)
#pragma unroll
        for (int n = 0; n < kLaneUnits; ++n) {
          W dk = 0;
#pragma unroll 1
          for (int i = 0; i < kQ; ++i) {
            const W ds = s.dscores[row * s.columns + warp_q * kQ + i];
            if (!counts(row, i, ds)) continue;
            const W x = of_query(q0 + i, n) + of_key(j0 + row, n), gradient = Pair::gradient(op, x, ds);
            mine()[(i * kLaneUnits + n) * kWarp] += gradient;
            dk += gradient;
            sum_t[n] += ds * Pair::value(op, x);
          }
          s.dkeys[(warp_q * s.rows + row) * kBlockUnits + n * kWarp + lane] = dk;
        }
    }
    __syncthreads();

    if (a.dkeys == nullptr) continue;
    for (int n = threadIdx.x; n < s.rows * kBlockUnits; n += blockDim.x) {
      const int j = j0 + n / kBlockUnits, u = first_unit + n % kBlockUnits;
      if (j >= end || u >= op.A) continue;
      W sum = 0;
      for (int w = 0; w < a.tile.warps_q; ++w) sum += s.dkeys[w * s.rows * kBlockUnits + n];
      const W v = element<W>(op.v.data, op.v.dtype, u * op.v.stride[2]);
      store_element(a.dkeys, a.dkeys_dtype, ((part_q * op.B + b) * op.Tk + j) * op.A + u, times_v<Pair>(sum, v));
    }
  }
  const int padding = a.dkeys == nullptr ? part_end : begin > length ? begin : length;
  for (int j = padding + warp; j < part_end; j += warps)
#pragma unroll
    for (int n = 0; n < kLaneUnits; ++n) {
      const int u = first_unit + n * kWarp + lane;
      if (u < op.A) store_element(a.dkeys, a.dkeys_dtype, ((part_q * op.B + b) * op.Tk + j) * op.A + u, W(0));
    }

  // Sums over the warps w with counts(w): one value per unit of the block.
  auto over_warps = [&](const W* mine, auto counts, auto use) {
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kLaneUnits; ++n) s.dkeys[warp * kBlockUnits + n * kWarp + lane] = mine[n];
    __syncthreads();
    for (int n = threadIdx.x; n < kBlockUnits; n += blockDim.x) {
      W sum = 0;
      for (int w = 0; w < warps; ++w)
        if (counts(w)) sum += s.dkeys[w * kBlockUnits + n];
      use(n, sum);
    }
  };
  flush(true);
  __syncthreads();
  W all_dq[kLaneUnits] = {};
  if (warp_k == 0) {
#pragma unroll
    for (int n = 0; n < kLaneUnits; ++n) {
      const int u = first_unit + n * kWarp + lane;
      if (u >= op.A) continue;
      const W v = element<W>(op.v.data, op.v.dtype, u * op.v.stride[2]);
      for (int i = 0; i < kQ && q0 + i < op.Tq; ++i) {
        W sum = 0;
        for (int w = 0; w < a.tile.warps_k; ++w) sum += mine()[(w * a.tile.warps_q * kQ + i) * kBlockUnits + n * kWarp];
        const W gradient = times_v<Pair>(sum, v);
        all_dq[n] += gradient;
        if (a.dquery == nullptr) continue;
        store_element(a.dquery, a.dquery_dtype, ((part_k * op.B + b) * op.Tq + q0 + i) * op.A + u, gradient);
      }
    }
  }
  W* dunits = a.dunits + int64_t(part) * 2 * op.A;
  over_warps(
      all_dq, [&](int w) { return w < a.tile.warps_q; },
      [&](int n, W sum) {
        if (first_unit + n < op.A) dunits[op.A + first_unit + n] = sum;
      });
  over_warps(
      sum_t, [](int) { return true; },
      [&](int n, W sum) {
        if (first_unit + n < op.A) dunits[first_unit + n] = sum;
      });
}

// The division that pads the queries least and has enough blocks to fill the device.
template <typename W>
BackwardTile choose_tile(const Scores& op, int queries) {
  BackwardTile tile{};
  tile.parts_q = ceil_div(op.Tq, int64_t(queries) * kMaxWarps<W>);
  tile.warps_q = static_cast<int>(ceil_div(ceil_div(op.Tq, tile.parts_q), queries));
  tile.queries = int64_t(tile.warps_q) * queries;
  tile.parts_q = ceil_div(op.Tq, tile.queries);
  const int64_t chunks = ceil_div(op.Tk, kSteps);
  tile.warps_k = static_cast<int>(kMaxWarps<W> / tile.warps_q < chunks ? kMaxWarps<W> / tile.warps_q : chunks);
  if (tile.warps_k > 4) tile.warps_k = 4;
  const int64_t steps = int64_t(kSteps) * tile.warps_k;
  const int64_t blocks = op.B * ceil_div(op.A, kBlockUnits) * tile.parts_q;
  int64_t parts = ceil_div(2 * current_device().multiprocessors, blocks);
  if (parts > ceil_div(op.Tk, steps)) parts = ceil_div(op.Tk, steps);
  tile.steps = round_up(ceil_div(op.Tk, parts), steps);
  tile.parts_k = ceil_div(op.Tk, tile.steps);
  return tile;
}

template <typename W, int kQ, class Pair>
void launch_backward(const typename Pair::Score& op, const AttentionMask& attended, const void* dscores, void* dquery,
                     void* dkeys, void* dv, void* dbias) {
  const Dtype dtype = op.query.dtype, wide = sizeof(W) == 8 ? Dtype::float64 : Dtype::float32;
  Backward<W, typename Pair::Score> a{};
  a.op = op;
  a.attended = attended;
  a.tile = choose_tile<W>(op, kQ);
  a.dscores = static_cast<const W*>(dscores);
  const BackwardTile& tile = a.tile;
  const int64_t n_query = op.B * op.Tq * op.A, n_keys = op.B * op.Tk * op.A;
  const int64_t parts = op.B * tile.parts_q * tile.parts_k;
  a.dquery_dtype = tile.parts_k > 1 ? wide : dtype;
  a.dkeys_dtype = tile.parts_q > 1 ? wide : dtype;
  a.dquery = dquery != nullptr && tile.parts_k > 1 ? scratch<W>(tile.parts_k * n_query) : dquery;
  a.dkeys = dkeys != nullptr && tile.parts_q > 1 ? scratch<W>(tile.parts_q * n_keys) : dkeys;
  a.dunits = scratch<W>(parts * 2 * op.A);
  launch(scores_backward_kernel<W, kQ, Pair>,
         {parts * ceil_div(op.A, kBlockUnits), tile.warps_q * tile.warps_k * kWarp, Chunk<W>::bytes(tile, kQ)}, a);
  if (a.dquery != dquery) sum_parts(static_cast<W*>(a.dquery), tile.parts_k, n_query, dquery, n_query, nullptr, dtype);
  if (a.dkeys != dkeys) sum_parts(static_cast<W*>(a.dkeys), tile.parts_q, n_keys, dkeys, n_keys, nullptr, dtype);
  // Without a bias, the second half of the columns of each part is ignored.
  if (dv != nullptr) sum_parts(a.dunits, parts, 2 * op.A, dv, op.A, dbias, dtype);
}

template <class Pair>
void run(const typename Pair::Score& op, const AttentionMask& attended, const void* dscores, void* dquery, void* dkeys,
         void* dv, void* dbias) {
  if (op.A == 0) return;
  check_sizes(op);
  auto by = [&](auto launch) { launch(op, attended, dscores, dquery, dkeys, dv, dbias); };
  if (op.extra) {  // usually of one query: fewer kernels
    using Sum = WithExtra<Pair>;
    if (op.query.dtype == Dtype::float64) return by(launch_backward<double, 4, Sum>);
    return by(op.Tq <= 2 ? launch_backward<float, 2, Sum> : launch_backward<float, 8, Sum>);
  }
  if (op.query.dtype == Dtype::float64)
    return by(op.Tq <= 2 ? launch_backward<double, 2, Pair> : launch_backward<double, 4, Pair>);
  if (op.Tq <= 2) return by(launch_backward<float, 2, Pair>);
  if (op.Tq <= 4) return by(launch_backward<float, 4, Pair>);
  // The overhead of a step for a warp is about the cost of 1.5 queries.
  auto cost = [&](int queries) { return double(ceil_div(op.Tq, queries)) * (queries + 1.5); };
  const double eight = cost(8), twelve = cost(12), sixteen = cost(16);
  if (eight < twelve && eight < sixteen) return by(launch_backward<float, 8, Pair>);
  by(twelve < sixteen ? launch_backward<float, 12, Pair> : launch_backward<float, 16, Pair>);
}

}  // namespace

void additive_scores_backward(const AdditiveScores& op, const AttentionMask& attended, const void* dscores,
                              void* dquery, void* dkeys, void* dv, void* dbias) {
  run<TanhPair>(op, attended, dscores, dquery, dkeys, dv, dbias);
}

void additive_scores_backward(const ActivatedScores& op, const AttentionMask& attended, const void* dscores,
                              void* dquery, void* dkeys, void* dv, void* dbias) {
  run<ActivatedPair>(op, attended, dscores, dquery, dkeys, dv, dbias);
}

}  // namespace cuda
}  // namespace attn
