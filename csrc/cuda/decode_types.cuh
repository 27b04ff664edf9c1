// Types that the parts of a decoding step share: the layout of shared memory, the arguments of the kernel, the template
// parameters of an instance, and how the lanes of a warp read rows. Part of decode.cu.
#pragma once

#include "softmax.cuh"
#include "views.cuh"

namespace attn {
namespace cuda {

constexpr int kWarps = 8;

// The layout of a block's shared memory: offsets in bytes. It begins with the staged rows of the scores, which are
// later overwritten by the contexts of the part.
struct Shared {
  int weights;      // (capacity, NQ), of W: scores, later e^(score - largest), 0 if not attended
  int stats;        // (2, NQ), of W: Normaliser::Part
  int factors;      // (kMaxClusterBlocks, NQ), of W: alignments = factor * weights, for each block
  int guards;       // (3, kWarps) float
  int state;        // a BlockState
  int list;         // (capacity) int, with a mask: offsets of the attended steps from the first step
  int attends;      // (capacity) bytes, with a mask: a bit for each query
  int needs_exact;  // (capacity) bytes: steps that need the exact form
  int bytes;
};

// The constants of a block live in shared memory to save registers.
struct BlockState {
  int sentence, rank, length;  // rank: which of the sentence's blocks this is
  int first, steps;            // the steps of the block, before masking
  int attended_steps;          // steps that some query attends
  int is_last;                 // whether the block is the last of its sentence to finish
  int combined_blocks;         // blocks that combine in shared memory; 0 if the last block combines in global memory
  int attending_queries;       // a bit for each query that attends a step of the block
};

// How a block divides D: `n` columns per pass, over groups of `warps` warps. The kWarps / warps groups divide the
// steps.
struct Columns {
  int warps, n;
};

// The arguments of the kernel.
struct DecodeParams {
  int Tq, Tk;
  int64_t A, D;
  StridedView3 query;     // (B, Tq, A)
  StridedView3 keys;      // (B, Tk, A)
  StridedView3 prepared;  // (B, rows, columns) or absent: see PreparedSizes
  StridedView3 v, bias;   // (1, 1, A) or absent
  StridedView3 values;    // (B, Tk, D)
  double scale;
  AttentionMask attended;
  void* context;     // (B, Tq, D) contiguous
  void* alignments;  // (B, Tq, Tk) contiguous, or null
  Shared shared;
  Columns columns;
  int splits;             // blocks per sentence
  bool cluster;           // whether they are a cluster; otherwise they use the next four arrays
  void* stats;            // (B, splits, 2, Tq), of W: Normaliser::Part of each block
  void* partial;          // (B, splits, Tq, D), of W: the context of each block
  void* scores;           // (B, Tq, Tk), of W, or null
  unsigned* finished;     // (B,): the number of finished blocks
  Activation activation;  // of ActivatedScore
  double negative_slope;  // of leaky_relu
  StridedView3 extra;     // (B, Tk, A), added to the keys, or absent
  bool vectorized_keys;   // whether the keys, not the prepared ones, can be read by 16 bytes
};

// The template parameters of an instance: the score and the normaliser (policies: additive_score.cuh,
// activated_score.cuh, dot_score.cuh, softmax.cuh), the element type of the inputs, the element type of the keys that
// are read (T, or that of prepared keys), and whether rows are read by 16 bytes.
template <class ScorePolicy, typename Element, typename KeyElement, bool prepared, bool vectorized>
struct Form {
  using Score = ScorePolicy;
  using T = Element;
  using Key = KeyElement;
  using Normaliser = Softmax<Wide<T>>;
  static constexpr bool kPrepared = prepared, kVectorized = vectorized;
};

// The attended steps of a block: all of first .. first + n or, with a mask, the n steps in the list.
struct Steps {
  const DecodeParams& p;
  int first, n;

  ATTN_DEVICE int offset(int i) const {
    return p.attended.mask == nullptr ? i : reinterpret_cast<const int*>(shared_memory() + p.shared.list)[i];
  }
  ATTN_DEVICE int operator[](int i) const { return first + offset(i); }
};

template <typename T>
ATTN_DEVICE const T* row_of(const StridedView3& a, int64_t b, int64_t i) {
  return static_cast<const T*>(a.data) + b * a.stride[0] + i * a.stride[1];
}

// Element i of a row of n elements; 0 for i >= n.
template <typename T>
ATTN_DEVICE Wide<T> element_or_zero(const T* row, int64_t i, int64_t n, int64_t stride) {
  return i < n ? widen(row[i * stride]) : Wide<T>(0);
}

// Rows of elements, as the lanes of a warp read them, 16 bytes per lane. If rows are read by 16 bytes, a lane has
// adjacent elements, otherwise every 32nd element.
template <class F, typename E>
struct Rows {
  const char* lane_first;
  int64_t stride, element_stride;  // in bytes; if rows are read by 16 bytes, the stride of rows fits in 32 bits

  ATTN_DEVICE Rows(const StridedView3& a, int64_t b, int64_t row, int64_t element)
      : stride(a.stride[1] * static_cast<int>(sizeof(E))), element_stride(a.stride[2] * static_cast<int>(sizeof(E))) {
    if (F::kVectorized) element_stride = sizeof(E);
    const int lane = threadIdx.x % kWarp;
    lane_first = reinterpret_cast<const char*>(row_of<E>(a, b, row)) + element * element_stride +
                 (F::kVectorized ? lane * 16 : lane * element_stride);
  }

  // This lane's part of elements first .. first + 32 * kPer16Bytes of a row; elements from n on are zeros.
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

// The order in which the units of a block are staged: returns the unit at index i. A lane finds the values for its
// elements of Rows four at a time, next to those of its neighbour lanes.
template <class F>
ATTN_DEVICE int unit_at(int i) {
  constexpr int kEach = kPer16Bytes<typename F::Key>, kAll = kWarp * kEach;
  const int part = i % kAll / (4 * kWarp), lane = i % (4 * kWarp) / 4, j = 4 * part + i % 4;
  return i / kAll * kAll + (F::kVectorized ? lane * kEach + j : j * kWarp + lane);
}

// Sums each x[i] over all lanes. The lanes from 32 / N * i on get the sum of x[i]. N is a power of two. The additions
// are divided among the lanes.
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

}  // namespace cuda
}  // namespace attn
