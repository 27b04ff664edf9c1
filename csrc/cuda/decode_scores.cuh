// Scores of the few queries of a sentence and the steps of a block. Part of decode.cu. The policies of the scores are
// in additive_score.cuh, activated_score.cuh and dot_score.cuh.
//
// A warp computes a few steps at a time. Its lanes divide the hidden units, and all queries share each loaded key. The
// queries' operands (exponentials for additive attention) are staged in shared memory, in blocks of units, in the order
// in which lanes read them. While a warp computes with 16 bytes of each of its steps, the next 16 bytes are being
// loaded.
//
// A block of units has one of three forms, chosen by the sizes of v, of the queries and, where they are prepared, of
// the keys. Single steps that are too large for it are computed exactly.
#pragma once

#include "decode_types.cuh"

namespace attn {
namespace cuda {

// fast: within the limits of the score. compensated: the same sums, and the rests of the exponentials, for a large v
// and small inputs. exact: by the formula.
enum class Sums { fast, compensated, exact };

// Computes weights[i * NQ + q], the scores of step i of the block; undefined for pairs that are not attended.
template <class F, int NQ>
struct ScoreTile {
  using T = typename F::T;
  using Key = typename F::Key;
  using W = Wide<T>;
  using Score = typename F::Score;
  using Units = typename Score::Units;
  static constexpr bool kStaged = sizeof(T) <= 4;  // float64 uses the exact form
  static constexpr bool kExtra = kAddsExtra<Score>;
  // With one query, tanh itself takes no longer than the reads of a large memory (docs/design.md). In low precision the
  // fast sums are accurate enough for small inputs.
  static constexpr bool kCompensated = Score::kCompensated && std::is_same_v<T, float> && NQ > 1;
  // Steps of a warp at a time, limited by registers with 8 queries.
  static constexpr int kRows = NQ == 4 && F::kVectorized ? 4 : NQ == 8 && kExtra && sizeof(T) == 2 ? 1 : 2;
  static constexpr int kArrays = kExtra ? 2 : 1;  // keys, extra
  static constexpr int kInFlight = kRows * kArrays;
  static constexpr int kLoads = F::kVectorized && kInFlight < 4 ? 4 / kInFlight : 1;  // loads per step of each array
  static constexpr int kRaw = kInFlight * kLoads;                                     // [array][row][load]
  static constexpr int kUnits = kWarp * kPer16Bytes<Key>;                             // units per load of the warp
  // Units of a lane at a time in the exact form, whose loads otherwise wait for each other.
  static constexpr int kExactUnits = F::kVectorized && NQ == 1 ? 4 : 1;

  const DecodeParams& p;
  int b;
  Steps steps;

  int64_t unit = 0;            // the first unit of this block of units
  int units = 0, padded = 0;   // its number of units, and that number rounded up to whole loads
  float max_k = 0, min_k = 0;  // the range of the largest |k| for which the sums are valid
  bool all_exact = true;

  // (Score::staged_rows(NQ), padded): see the policies of the scores.
  ATTN_DEVICE float* staged() const { return reinterpret_cast<float*>(shared_memory()); }
  ATTN_DEVICE float* guards() const { return reinterpret_cast<float*>(shared_memory() + p.shared.guards); }
  ATTN_DEVICE unsigned char* needs_exact() const {
    return reinterpret_cast<unsigned char*>(shared_memory() + p.shared.needs_exact);
  }

  // The most units of a block of units, and the bytes that they need.
  static constexpr int kMaxUnits = 4096 / (NQ < 2 ? 2 : NQ);
  static int64_t bytes(int64_t A) {
    if (!kStaged) return 0;
    const int64_t n = A < kMaxUnits ? A : kMaxUnits;
    return Score::staged_rows(NQ) * round_up(n > 0 ? n : 1, kUnits) * 4;
  }

  ATTN_DEVICE void run() {
    const int warp = threadIdx.x / kWarp;
    do {
      bool any_exact = true;  // whether any of this warp's steps needs the exact form
      units = static_cast<int>(!kStaged || p.A - unit < kMaxUnits ? p.A - unit : kMaxUnits);
      if constexpr (kStaged) {
        padded = static_cast<int>(round_up(units > 0 ? units : 1, kUnits));
        uint4 next[kRaw];
        const KeyRows<F::kPrepared> rows(p, b, steps.first, unit);
        if (steps.n > 0) fetch(rows, next, warp * kRows, 0);
        if (unit > 0) __syncthreads();
        stage<Sums::fast>();
        __syncthreads();
        const Sums sums = choose();
        all_exact = sums == Sums::exact;
        any_exact = all_exact;
        if (kCompensated ? sums == Sums::fast : !all_exact)
#pragma unroll 1
          for (int i = warp * kRows; i < steps.n; i += kWarps * kRows)
            any_exact |= !score_rows<Sums::fast>(rows, next, i);
        if constexpr (kCompensated)
          if (sums == Sums::compensated) {
            const KeyRows<false> raw(p, b, steps.first, unit);
            if (F::kPrepared && steps.n > 0) fetch(raw, next, warp * kRows, 0);
            stage<Sums::compensated>();
            __syncthreads();
#pragma unroll 1
            for (int i = warp * kRows; i < steps.n; i += kWarps * kRows)
              any_exact |= !score_rows<Sums::compensated>(raw, next, i);
          }
      }
      if ((Score::kGuarded || !kStaged) && any_exact) {
        __syncwarp();
#pragma unroll 1
        for (int i = warp * kRows; i < steps.n; i += kWarps * kRows)
#pragma unroll 1
          for (int r = i; r < i + kRows && r < steps.n; ++r)
            if (all_exact || needs_exact()[r]) score_exactly(r);
      }
      unit += kMaxUnits;
    } while (kStaged && unit < p.A);
  }

  // extra: unused without one.
  template <bool prepared>
  struct KeyRows {
    static constexpr bool kPrepared = prepared;
    Rows<F, Key> keys, extra;

    ATTN_DEVICE KeyRows(const DecodeParams& p, int b, int first, int64_t unit)
        : keys(prepared ? p.prepared : p.keys, b, first, unit), extra(kExtra ? p.extra : p.keys, b, first, unit) {}
  };

  // kLoads loads of each array from unit c of the block on, for each of the kRows steps from i on. Nothing is read
  // beyond the last step.
  template <class Source>
  ATTN_DEVICE void fetch(const Source& rows, uint4* raw, int i, int c) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = steps.offset(i + r < steps.n ? i + r : steps.n - 1), n = i < steps.n ? units : 0;
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
        raw[r * kLoads + l] = rows.keys.load(row, c + l * kUnits, n);
        if constexpr (kExtra) raw[(kRows + r) * kLoads + l] = rows.extra.load(row, c + l * kUnits, n);
      }
    }
  }

  // Each warp stages one query: all units of the block, or a share of them if several warps stage the query. guards():
  // the largest |q| of each warp, its sum of the squares of v and, compensated, its sum of v r.
  template <Sums kSums>
  ATTN_DEVICE void stage() {
    constexpr int kEach = kWarps / NQ;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, q = warp / kEach;
    const T* query = row_of<T>(p.query, b, q < p.Tq ? q : 0) + unit * p.query.stride[2];
    const int n = q < p.Tq ? units : 0;
    float abs_max = 0, norm2 = 0, rest = 0;
#pragma unroll 2
    for (int i = warp % kEach * kWarp + lane; i < padded; i += kEach * kWarp) {
      const int u = unit_at<F>(i);
      const float x = element_or_zero(query, u, n, p.query.stride[2]);
      if constexpr (kSums == Sums::compensated)
        Score::template stage_compensated<T, NQ>(p, staged(), padded, q, i, unit + u, unit + units, x, rest);
      else
        Score::template stage<T, NQ>(p, staged(), padded, q, i, unit + u, unit + units, x, abs_max, norm2);
    }
    if constexpr (kSums == Sums::compensated) {
      rest = warp_sum(rest);
      if (lane == 0) guards()[2 * kWarps + warp] = rest;
    } else if constexpr (Score::kGuarded) {
      abs_max = warp_largest(abs_max);
      norm2 = warp_sum(norm2);
      if (lane == 0) guards()[warp] = abs_max, guards()[kWarps + warp] = norm2;
    }
  }

  // Chooses the sums of all threads, and computes the limits of |k|.
  ATTN_DEVICE Sums choose() {
    if constexpr (!Score::kGuarded) return Sums::fast;
    constexpr int kEach = kWarps / NQ;
    float largest = 0, smallest = INFINITY, norm2 = 0;
    const int attending = reinterpret_cast<const BlockState*>(shared_memory() + p.shared.state)->attending_queries;
#pragma unroll
    for (int q = 0; q < NQ; ++q) {
      float abs_max = 0;
#pragma unroll
      for (int w = q * kEach; w < (q + 1) * kEach; ++w) abs_max = larger_magnitude(abs_max, guards()[w]);
      if (attending >> q & 1) largest = fmaxf(largest, abs_max), smallest = fminf(smallest, abs_max);
    }
    for (int w = 0; w < kEach; ++w) norm2 += guards()[kWarps + w];
    Score::template limits<T>(norm2, units, largest, smallest, &max_k, &min_k);
    if (max_k >= 0 && min_k <= 0) return Sums::fast;
    if constexpr (kCompensated) {
      const float most = Score::max_compensated(norm2, largest);
      const bool readable = !F::kPrepared || p.vectorized_keys;  // it reads the keys themselves
      if (most >= 0 && readable && !(F::kPrepared && max_k >= 0 && all_from(min_k))) {
        max_k = most, min_k = 0;
        return Sums::compensated;
      }
    }
    return max_k >= 0 && min_k <= max_k ? Sums::fast : Sums::exact;
  }

  // Whether the largest |k| of each step of the block is at least `bound`. Each warp looks at all steps.
  ATTN_DEVICE bool all_from(float bound) const {
    bool all = true;
#pragma unroll 1
    for (int i = threadIdx.x % kWarp; i < steps.n; i += kWarp) all = all && prepared_abs_max(i) >= bound;
    return __all_sync(kAllLanes, all);
  }

  // Computes the scores of kRows steps from i on. Returns false if some need the exact form. next: in, the first loads
  // of these steps; out, the first loads of the warp's next steps.
  template <Sums kSums, class Source>
  ATTN_DEVICE bool score_rows(const Source& rows, uint4* next, int i) {
    const int lane = threadIdx.x % kWarp;
    float sums[kRows * NQ] = {}, abs_max[kRows] = {}, rests[kRows] = {};
#pragma unroll 1
    for (int c = 0; c < padded; c += kLoads * kUnits) {
      uint4 now[kRaw];
#pragma unroll
      for (int l = 0; l < kRaw; ++l) now[l] = next[l];
      const bool more = c + kLoads * kUnits < padded;
      const int j = more ? i : i + kWarps * kRows;
      fetch(rows, next, j, more ? c + kLoads * kUnits : 0);
#pragma unroll
      for (int l = 0; l < kLoads; ++l)
        if (l == 0 || c + l * kUnits < padded)
          add_units<kSums, Source::kPrepared>(now + l, c + l * kUnits, sums, abs_max, rests);
    }
    if constexpr (kSums == Sums::compensated)
#pragma unroll
      for (int n = 0; n < kRows * NQ; ++n) sums[n] += rests[n / NQ];
    unsigned accepted = 0;  // a bit for each step for which the factored form is valid
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (F::kPrepared) abs_max[r] = prepared_abs_max(i + r < steps.n ? i + r : steps.n - 1);
      if (!Score::kGuarded ||
          (__all_sync(kAllLanes, abs_max[r] <= max_k) && __any_sync(kAllLanes, abs_max[r] >= min_k)))
        accepted |= 1u << r;
    }
    float sum = warp_sums<kRows * NQ>(sums);
    constexpr int kLanes = kWarp / (kRows * NQ);
    const int k = lane / kLanes, r = k / NQ;
    if constexpr (kSums == Sums::compensated) sum += query_rest(k % NQ);
    if (lane % kLanes == 0 && i + r < steps.n) {
      if (Score::kGuarded && k % NQ == 0) needs_exact()[i + r] = !(accepted >> r & 1);
      if (accepted >> r & 1) store(i * NQ + k, sum);
    }
    return accepted == (1u << kRows) - 1;
  }

  // The sum of v r of a query, over the units of the block.
  ATTN_DEVICE float query_rest(int q) const {
    constexpr int kEach = kWarps / NQ;
    float rest = 0;
#pragma unroll
    for (int w = 0; w < kEach; ++w) rest += guards()[2 * kWarps + q * kEach + w];
    return rest;
  }

  // Accumulates one load of each row, the units from c on, into sums (row, query) and, compensated, the sums of v r of
  // the rows. raw: the load of the first row.
  template <Sums kSums, bool kPrepared>
  ATTN_DEVICE void add_units(const uint4* raw, int c, float* sums, float* abs_max, float* rests) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int part = 0; part < kPer16Bytes<Key> / 4; ++part) {
      const int at = c + part * 4 * kWarp + lane * 4;
      float k[kRows][4];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        widen_four(raw[r * kLoads], static_cast<const Key*>(nullptr), part, k[r]);
        if constexpr (kExtra) {
          float added[4];
          widen_four(raw[(kRows + r) * kLoads], static_cast<const Key*>(nullptr), part, added);
#pragma unroll
          for (int j = 0; j < 4; ++j) k[r][j] += added[j];
        }
        if constexpr (!kPrepared) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if constexpr (kSums == Sums::compensated)
              Score::prepare_key_and_rest(k[r][j], Units(staged(), padded, NQ, at).v[j], abs_max[r], rests[r]);
            else
              Score::template prepare_key<T>(k[r][j], abs_max[r]);
          }
        }
      }
      const Units unit_constants(staged(), padded, NQ, at);
      Score::by_form(p, [&](auto form) {
#pragma unroll
        for (int q = 0; q < NQ; ++q) {
          if (NQ > 2 && q >= p.Tq) break;
          const typename Score::Query query(staged(), padded, NQ, q, at);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            float& sum = sums[r * NQ + q];
#pragma unroll
            for (int j = 0; j < 4; j += 2) sum = Score::add_two(form, sum, query, unit_constants, k[r], j);
          }
        }
      });
    }
  }

  ATTN_DEVICE float prepared_abs_max(int i) const {
    return reinterpret_cast<const float*>(row_of<Key>(p.prepared, b, p.Tk))[steps[i]];
  }

  // The scores of step i by the formula, in the precision of W.
  ATTN_DEVICE void score_exactly(int i) const {
    const int lane = threadIdx.x % kWarp;
    const int64_t query_stride = p.query.stride[2], keys_stride = p.keys.stride[2];
    const T* query = row_of<T>(p.query, b, 0) + unit * query_stride;
    const T* key = row_of<T>(p.keys, b, steps[i]) + unit * keys_stride;
    W sums[NQ] = {};
#pragma unroll(kExactUnits)
    for (int u = lane; u < units; u += kWarp) {
      W k = widen(key[u * keys_stride]);
      if constexpr (kExtra) k += widen(row_of<T>(p.extra, b, steps[i])[(unit + u) * p.extra.stride[2]]);
      const typename Score::template ExactUnit<T> exact(p, unit + u);
#pragma unroll
      for (int q = 0; q < NQ; ++q) {
        if (q >= p.Tq) break;
        const W x = widen(query[q * p.query.stride[1] + u * query_stride]);
        sums[q] += exact(x, k);
      }
    }
    const W sum = warp_sums<NQ>(sums);
    if (lane % (kWarp / NQ) == 0) store(i * NQ + lane / (kWarp / NQ), sum);
  }

  ATTN_DEVICE void store(int at, W sum) const {
    sum = Score::finish(p, sum);
    W* out = reinterpret_cast<W*>(shared_memory() + p.shared.weights) + at;
    *out = unit == 0 ? sum : *out + sum;
  }
};

}  // namespace cuda
}  // namespace attn
