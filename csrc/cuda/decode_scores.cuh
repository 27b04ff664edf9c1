// Scores of the few queries of a sentence against the steps of a block. Part of decode.cu.
//
// A warp takes a few steps at a time, its lanes lie along the hidden units, and all queries share each loaded key. What
// the queries bring (for additive attention exponentials) is staged in shared memory, in blocks of units, in the order
// in which lanes read it. While a warp computes with 16 bytes of each of its steps, the next 16 are on their way.
#pragma once

#include "additive_math.cuh"
#include "softmax.cuh"

namespace attn {
namespace cuda {

constexpr int kWarps = 8;

// Shared memory of a block: offsets in bytes. It begins with what the scores stage and, later, the contexts of the part.
struct Shared {
  int weights;      // (capacity, NQ), of W: scores, later e^(score - largest), 0 where not attended
  int stats;        // (2, NQ), of W: SoftmaxPart
  int factors;      // (kMaxClusterBlocks, NQ), of W: what turns weights of each block into alignments
  int guards;       // (2, kWarps) float
  int state;        // a BlockState
  int list;         // (capacity) int, with a mask: offsets of the attended steps from the first
  int attends;      // (capacity) bytes, with a mask: a bit for each query
  int needs_exact;  // (capacity) bytes: steps that need the exact form
  int bytes;
};

// The constants of a block live in shared memory to save registers.
struct BlockState {
  int sentence, rank, length;  // rank: which of the sentence's blocks this is
  int first, steps;            // of the block, before the mask
  int attended_steps;          // steps that some query attends
  int is_last;                 // whether the block is the last of its sentence to finish
  int combined_blocks;         // blocks that combine in shared memory; 0 where the last block does it in global memory
  int attending_queries;       // a bit for each query that attends a step of the block
};

// How a block divides D: columns of a pass, over `warps` warps, of which kWarps / warps groups share the steps.
struct Columns {
  int warps, n;
};

// What a call is, for the kernel.
struct DecodeParams {
  int Tq, Tk;
  int64_t A, D;
  Array3 query;     // (B, Tq, A)
  Array3 keys;      // (B, Tk, A)
  Array3 prepared;  // (B, rows, columns) or absent: see PreparedSizes
  Array3 v, bias;   // (1, 1, A) or absent
  Array3 values;    // (B, Tk, D)
  double scale;
  Attended attended;
  void* context;     // (B, Tq, D) contiguous
  void* alignments;  // (B, Tq, Tk) contiguous, or null
  Shared shared;
  Columns columns;
  int splits;          // blocks of a sentence,
  bool cluster;        // which are a cluster or, otherwise, use what follows
  void* stats;         // (B, splits, 2, Tq), of W: SoftmaxPart of each block
  void* partial;       // (B, splits, Tq, D), of W: their contexts
  void* scores;        // (B, Tq, Tk), of W, or null
  unsigned* finished;  // (B,): how many blocks have
};

// An instance: additive or dot attention, the elements of the inputs, those of the keys as they are read (T, or those
// of prepared keys), and whether rows are read by 16 bytes.
template <bool additive, typename Element, typename KeyElement, bool prepared, bool vectorized>
struct Form {
  using T = Element;
  using Key = KeyElement;
  static constexpr bool kAdditive = additive, kPrepared = prepared, kVectorized = vectorized;
};

// The attended steps of a block: all of first .. first + n, or those in the list.
struct Steps {
  const DecodeParams& p;
  int first, n;

  ATTN_DEVICE int offset(int i) const {
    return p.attended.mask == nullptr ? i : reinterpret_cast<const int*>(shared_memory() + p.shared.list)[i];
  }
  ATTN_DEVICE int operator[](int i) const { return first + offset(i); }
};

template <typename T>
ATTN_DEVICE const T* row_of(const Array3& a, int64_t b, int64_t i) {
  return static_cast<const T*>(a.data) + b * a.stride[0] + i * a.stride[1];
}

// Elements 0 .. n of a row, of whichever lane: T there, zeros beyond.
template <typename T>
ATTN_DEVICE Wide<T> element_or_zero(const T* row, int64_t i, int64_t n, int64_t stride) {
  return i < n ? widen(row[i * stride]) : Wide<T>(0);
}

// Rows of elements from one on, as the lanes of a warp read them: 16 bytes each. By 16 bytes a lane has neighbours,
// otherwise it has every 32nd.
template <class F, typename E>
struct Rows {
  const char* lane_first;
  int64_t stride, element_stride;  // in bytes; of rows it fits in 32 bits where they are read by 16 bytes

  ATTN_DEVICE Rows(const Array3& a, int64_t b, int64_t row, int64_t element)
      : stride(a.stride[1] * static_cast<int>(sizeof(E))), element_stride(a.stride[2] * static_cast<int>(sizeof(E))) {
    if (F::kVectorized) element_stride = sizeof(E);
    const int lane = threadIdx.x % kWarp;
    lane_first = reinterpret_cast<const char*>(row_of<E>(a, b, row)) + element * element_stride +
                 (F::kVectorized ? lane * 16 : lane * element_stride);
  }

  // Of elements first .. first + 32 * kPer16Bytes of a row, those from n on as zeros.
  ATTN_DEVICE uint4 load(int row, int first, int n) const {
    const int lane = threadIdx.x % kWarp;
    if constexpr (F::kVectorized) {
      uint4 raw{0, 0, 0, 0};
      if (first + lane * kPer16Bytes<E> < n)
        raw = vector_at<uint4>(lane_first + static_cast<int64_t>(row) * static_cast<int>(stride) +
                               first * static_cast<int>(sizeof(E)));
      return raw;
    } else {
      E part[kPer16Bytes<E>];
#pragma unroll
      for (int j = 0; j < kPer16Bytes<E>; ++j) {
        const int i = first + j * kWarp;
        part[j] = E{};
        if (i + lane < n) part[j] = *reinterpret_cast<const E*>(lane_first + row * stride + i * element_stride);
      }
      return bit_cast<uint4>(part);
    }
  }
};

// In which order the units of a block are staged, so that a lane finds what belongs to its elements of Rows, four
// at a time, and its neighbours' beside them: the unit at place i.
template <class F>
ATTN_DEVICE int unit_at(int i) {
  constexpr int kEach = kPer16Bytes<typename F::Key>, kAll = kWarp * kEach;
  const int part = i % kAll / (4 * kWarp), lane = i % (4 * kWarp) / 4, j = 4 * part + i % 4;
  return i / kAll * kAll + (F::kVectorized ? lane * kEach + j : j * kWarp + lane);
}

// In the lanes from 32 / N * i on: the sum of x[i] of all lanes. N is a power of two. The lanes share the additions.
template <int N, int kStep = kWarp / 2, typename W>
ATTN_DEVICE W warp_sums(W* x) {
  if constexpr (N > 1) {
    const bool upper = threadIdx.x & kStep;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const W sent = upper ? x[i] : x[i + N / 2], kept = upper ? x[i + N / 2] : x[i];
      x[i] = kept + __shfl_xor_sync(kAllLanes, sent, kStep);
    }
  } else {
    x[0] += __shfl_xor_sync(kAllLanes, x[0], kStep);
  }
  if constexpr (kStep > 1) return warp_sums<(N > 1 ? N / 2 : 1), kStep / 2>(x);
  return x[0];
}

ATTN_DEVICE void load_four(const float* from, float* x) {
  const float4 four = vector_at<float4>(from);
  x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
}

ATTN_DEVICE void add_four(const float* x, float* to, bool add) {
  float old[4] = {};
  if (add) load_four(to, old);
  vector_at<float4>(to) = float4{x[0] + old[0], x[1] + old[1], x[2] + old[2], x[3] + old[3]};
}

// weights[i * NQ + q] for step i of the block: its scores, where not attended anything.
template <class F, int NQ>
struct ScoreTile {
  using T = typename F::T;
  using Key = typename F::Key;
  using W = Wide<T>;
  static constexpr bool kStaged = sizeof(T) <= 4;  // float64 takes the exact form
  static constexpr int kRows =
      NQ == 4 && F::kVectorized ? 4 : 2;  // steps of a warp at a time: with 8 queries, 4 take too many registers
  static constexpr int kLoads = F::kVectorized ? 4 / kRows : 1;  // loads of each
  static constexpr int kUnits = kWarp * kPer16Bytes<Key>;        // of a load of the warp
  static constexpr int kRowsOfUnits = F::kAdditive ? 2 * NQ + 1 : NQ;

  const DecodeParams& p;
  int b;
  Steps steps;

  int64_t unit = 0;            // where this block of units begins,
  int units = 0, padded = 0;   // how many it has, and that in whole loads
  float max_k = 0, min_k = 0;  // which largest |k| the factored form is right for
  bool all_exact = true;

  // (NQ, padded) e^{2(q + bias)}, (NQ, padded) v times that, (padded) v; or (NQ, padded) q.
  ATTN_DEVICE float* staged() const { return reinterpret_cast<float*>(shared_memory()); }
  ATTN_DEVICE float* guards() const { return reinterpret_cast<float*>(shared_memory() + p.shared.guards); }
  ATTN_DEVICE unsigned char* needs_exact() const {
    return reinterpret_cast<unsigned char*>(shared_memory() + p.shared.needs_exact);
  }

  // Most units of a block of them, and the bytes they take.
  static constexpr int kMaxUnits = 4096 / (NQ < 2 ? 2 : NQ);
  static int64_t bytes(int64_t A) {
    if (!kStaged) return 0;
    const int64_t n = A < kMaxUnits ? A : kMaxUnits;
    return kRowsOfUnits * round_up(n > 0 ? n : 1, kUnits) * 4;
  }

  ATTN_DEVICE void run() {
    const int warp = threadIdx.x / kWarp;
    do {
      bool any_exact = true;  // whether some of this warp's steps, or all, need the exact form
      units = static_cast<int>(!kStaged || p.A - unit < kMaxUnits ? p.A - unit : kMaxUnits);
      if constexpr (kStaged) {
        padded = static_cast<int>(round_up(units > 0 ? units : 1, kUnits));
        uint4 next[kRows * kLoads];
        const Rows<F, Key> rows(F::kPrepared ? p.prepared : p.keys, b, steps.first, unit);
        if (steps.n > 0) fetch(rows, next, warp * kRows, 0);
        if (unit > 0) __syncthreads();
        stage();
        __syncthreads();
        all_exact = !choose();
        any_exact = all_exact;
        if (!all_exact)
#pragma unroll 1
          for (int i = warp * kRows; i < steps.n; i += kWarps * kRows) any_exact |= !score_rows(rows, next, i);
      }
      if ((F::kAdditive || !kStaged) && any_exact) {
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

  // Of step i and the kRows - 1 after it, kLoads loads from unit c of the block on. Nothing beyond the last step.
  ATTN_DEVICE void fetch(const Rows<F, Key>& rows, uint4* raw, int i, int c) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = steps.offset(i + r < steps.n ? i + r : steps.n - 1);
#pragma unroll
      for (int l = 0; l < kLoads; ++l) raw[r * kLoads + l] = rows.load(row, c + l * kUnits, i < steps.n ? units : 0);
    }
  }

  // Each warp stages for one query: all of the block's units, or with the other warps of the query a part of them.
  ATTN_DEVICE void stage() {
    constexpr int kEach = kWarps / NQ;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, q = warp / kEach;
    const T* query = row_of<T>(p.query, b, q < p.Tq ? q : 0) + unit * p.query.stride[2];
    const int n = q < p.Tq ? units : 0;
    float abs_max = 0, norm2 = 0;
#pragma unroll 2
    for (int i = warp % kEach * kWarp + lane; i < padded; i += kEach * kWarp) {
      const int u = unit_at<F>(i);
      const float x = element_or_zero(query, u, n, p.query.stride[2]);
      if constexpr (F::kAdditive) {
        const float v = element_or_zero(static_cast<const T*>(p.v.data), unit + u, unit + units, p.v.stride[2]);
        float e = exp2x(x), size = fabsf(x);
        if (p.bias.data != nullptr) {  // a product: the sum would round what keys of the other sign cancel
          const float shift =
              element_or_zero(static_cast<const T*>(p.bias.data), unit + u, unit + units, p.bias.stride[2]);
          e *= exp2x(shift);
          size += fabsf(shift);
        }
        abs_max = larger_magnitude(abs_max, size);
        staged()[q * padded + i] = e;
        staged()[(NQ + q) * padded + i] = e * v;
        if (q == 0) {
          staged()[2 * NQ * padded + i] = v;
          norm2 += v * v;
        }
      } else {
        staged()[q * padded + i] = x;
      }
    }
    if constexpr (F::kAdditive) {
      abs_max = warp_largest(abs_max);
      norm2 = warp_sum(norm2);
      if (lane == 0) guards()[warp] = abs_max, guards()[kWarps + warp] = norm2;
    }
  }

  // Sets the guards. False if no step can pass them.
  ATTN_DEVICE bool choose() {
    if constexpr (!F::kAdditive) return true;
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
    max_k = kMaxBoundTwo - largest;
    min_k = min_abs_bound_two<T>(norm2, units) - smallest;
    return max_k >= 0 && min_k <= max_k;
  }

  // Scores of step i and those after it, or false where some of them are left. next: the first loads of this warp,
  // afterwards those of its next steps.
  ATTN_DEVICE bool score_rows(const Rows<F, Key>& rows, uint4* next, int i) {
    const int lane = threadIdx.x % kWarp;
    float sums[kRows * NQ] = {}, abs_max[kRows] = {};
#pragma unroll 1
    for (int c = 0; c < padded; c += kLoads * kUnits) {
      uint4 now[kRows * kLoads];
#pragma unroll
      for (int l = 0; l < kRows * kLoads; ++l) now[l] = next[l];
      const bool more = c + kLoads * kUnits < padded;
      const int j = more ? i : i + kWarps * kRows;
      fetch(rows, next, j, more ? c + kLoads * kUnits : 0);
#pragma unroll
      for (int l = 0; l < kLoads; ++l)
        if (l == 0 || c + l * kUnits < padded) add_units(now + l, c + l * kUnits, sums, abs_max);
    }
    unsigned accepted = 0;  // a bit for each step for which the factored form is
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (F::kPrepared) abs_max[r] = prepared_top(i + r < steps.n ? i + r : steps.n - 1);
      if (!F::kAdditive || (__all_sync(kAllLanes, abs_max[r] <= max_k) && __any_sync(kAllLanes, abs_max[r] >= min_k)))
        accepted |= 1u << r;
    }
    const float sum = warp_sums<kRows * NQ>(sums);
    constexpr int kLanes = kWarp / (kRows * NQ);
    const int k = lane / kLanes, r = k / NQ;
    if (lane % kLanes == 0 && i + r < steps.n) {
      if (F::kAdditive && k % NQ == 0) needs_exact()[i + r] = !(accepted >> r & 1);
      if (accepted >> r & 1) store(i * NQ + k, sum);
    }
    return accepted == (1u << kRows) - 1;
  }

  // Adds to the sums (row, query) what a load of each row has, of the units from c on.
  ATTN_DEVICE void add_units(const uint4* raw, int c, float* sums, float* abs_max) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int part = 0; part < kPer16Bytes<Key> / 4; ++part) {
      const int at = c + part * 4 * kWarp + lane * 4;
      float k[kRows][4], v[4];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        widen_four(raw[r * kLoads], static_cast<const Key*>(nullptr), part, k[r]);
        if constexpr (F::kAdditive && !F::kPrepared) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            abs_max[r] = larger_magnitude(abs_max[r], k[r][j]);
            k[r][j] = exp2x_of<T>(k[r][j]);
          }
        }
      }
      if constexpr (F::kAdditive) load_four(staged() + 2 * NQ * padded + at, v);
#pragma unroll
      for (int q = 0; q < NQ; ++q) {
        if (NQ > 2 && q >= p.Tq) break;
        float e[4], ev[4];
        load_four(staged() + q * padded + at, e);
        if constexpr (F::kAdditive) load_four(staged() + (NQ + q) * padded + at, ev);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          float& sum = sums[r * NQ + q];
#pragma unroll
          for (int j = 0; j < 4; j += 2) {
            if constexpr (F::kAdditive)
              sum = add_two_units(sum, e[j], ev[j], v[j], k[r][j], e[j + 1], ev[j + 1], v[j + 1], k[r][j + 1]);
            else
              sum = fmaf(e[j + 1], k[r][j + 1], fmaf(e[j], k[r][j], sum));
          }
        }
      }
    }
  }

  ATTN_DEVICE float prepared_top(int i) const {
    return reinterpret_cast<const float*>(row_of<Key>(p.prepared, b, p.Tk))[steps[i]];
  }

  // Step i by the formula itself: by tanh, and in the precision of W.
  ATTN_DEVICE void score_exactly(int i) const {
    const int lane = threadIdx.x % kWarp;
    const int64_t query_stride = p.query.stride[2], keys_stride = p.keys.stride[2];
    const T* query = row_of<T>(p.query, b, 0) + unit * query_stride;
    const T* key = row_of<T>(p.keys, b, steps[i]) + unit * keys_stride;
    const T *v = static_cast<const T*>(p.v.data), *bias = static_cast<const T*>(p.bias.data);
    W sums[NQ] = {};
#pragma unroll 1
    for (int u = lane; u < units; u += kWarp) {
      const W k = widen(key[u * keys_stride]);
      const W unit_v = F::kAdditive ? widen(v[(unit + u) * p.v.stride[2]]) : W(0);
      const W shift = F::kAdditive && bias != nullptr ? widen(bias[(unit + u) * p.bias.stride[2]]) : W(0);
#pragma unroll
      for (int q = 0; q < NQ; ++q) {
        if (q >= p.Tq) break;
        const W x = widen(query[q * p.query.stride[1] + u * query_stride]);
        sums[q] += F::kAdditive ? unit_v * tanh_of(x + k + shift) : x * k;
      }
    }
    const W sum = warp_sums<NQ>(sums);
    if (lane % (kWarp / NQ) == 0) store(i * NQ + lane / (kWarp / NQ), sum);
  }

  ATTN_DEVICE void store(int at, W sum) const {
    if constexpr (!F::kAdditive) sum *= static_cast<W>(p.scale);
    W* out = reinterpret_cast<W*>(shared_memory() + p.shared.weights) + at;
    *out = unit == 0 ? sum : *out + sum;
  }
};

}  // namespace cuda
}  // namespace attn
