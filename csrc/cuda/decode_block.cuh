// A block of a decoding step. It has all queries and all steps of a sentence, or a part of the steps. It computes the
// scores of its steps (decode_scores.cuh), the softmax within the part (softmax.cuh), and the context of the part.
// Parts are combined by their largest scores and sums, in a fixed order. Either the blocks of a cluster do it, which
// read each other's shared memory, or the block of the sentence that finishes last. Part of decode.cu.
#pragma once

#include "decode_scores.cuh"

namespace attn {
namespace cuda {

constexpr int kThreads = kWarps * kWarp;
constexpr int kMaxClusterBlocks = 16;  // most blocks of a cluster

// Reads threadIdx.x again, so that values derived from it are not kept in registers across the inner loops.
ATTN_DEVICE int this_thread() {
#if defined(__CUDA_ARCH__)
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
#else
  return threadIdx.x;
#endif
}

// One block of the kernel.
template <class F, int NQ>
struct Block {
  using T = typename F::T;
  using W = Wide<T>;
  using Normaliser = typename F::Normaliser;
  using Part = typename Normaliser::Part;
  static constexpr int kEach = kPer16Bytes<T>;

  const DecodeParams& p;
  int b, rank, length;
  Steps steps;

  // Block constants live in shared memory to save registers.
  ATTN_DEVICE explicit Block(const DecodeParams& p) : p(p), steps{p, 0, 0} {
    if (threadIdx.x == 0) {
      b = blockIdx.x / p.splits;
      rank = blockIdx.x % p.splits;
      length = static_cast<int>(attended_steps(p.attended, b, p.Tk));
      const int part = (length + p.splits - 1) / p.splits, first = rank * part < length ? rank * part : length;
      BlockState* state = this->state();
      state->sentence = b, state->rank = rank, state->length = length;
      state->first = first, state->steps = state->attended_steps = part < length - first ? part : length - first;
      state->combined_blocks = p.splits == 1 || p.cluster ? p.splits : 0;
      state->attending_queries = (1 << p.Tq) - 1;
    }
    sync(&BlockState::steps);
  }

  // A barrier. It reloads the block constants afterwards, so they are not kept in registers.
  ATTN_DEVICE void sync() { sync(&BlockState::attended_steps); }

  ATTN_DEVICE void sync(int BlockState::* steps_now) {
    __syncthreads();
    const BlockState* state = this->state();
    b = state->sentence, rank = state->rank, length = state->length;
    steps.first = state->first, steps.n = state->*steps_now;
  }

  ATTN_DEVICE BlockState* state() const { return reinterpret_cast<BlockState*>(shared_memory() + p.shared.state); }
  ATTN_DEVICE W* contexts() const { return reinterpret_cast<W*>(shared_memory()); }  // (NQ, columns.n)
  ATTN_DEVICE W* weights() const { return reinterpret_cast<W*>(shared_memory() + p.shared.weights); }
  ATTN_DEVICE W* stats() const { return reinterpret_cast<W*>(shared_memory() + p.shared.stats); }
  ATTN_DEVICE W* factors() const { return reinterpret_cast<W*>(shared_memory() + p.shared.factors); }
  ATTN_DEVICE int* list() const { return reinterpret_cast<int*>(shared_memory() + p.shared.list); }
  ATTN_DEVICE unsigned char* attending() const {
    return reinterpret_cast<unsigned char*>(shared_memory() + p.shared.attends);
  }
  // Whether a step of the block may be attended by some queries only.
  ATTN_DEVICE bool mixed() const { return NQ > 1 && p.attended.mask != nullptr && p.attended.per_query; }
  ATTN_DEVICE bool attends(int q, int i) const { return !mixed() || (attending()[i] >> q & 1); }
  ATTN_DEVICE T* alignment(int q, int64_t j) const {
    return static_cast<T*>(p.alignments) + (static_cast<int64_t>(b) * p.Tq + q) * p.Tk + j;
  }

  ATTN_DEVICE void run() {
    fetch_values();
    if (p.attended.mask != nullptr) list_attended();
    ScoreTile<F, NQ>{p, b, steps}.run();
    sync();
    softmax();
    sync();
    int pass = 0;
    do {
      sum_values(first_column(pass));
      sync();
      if (state()->combined_blocks > 0)
        combine_shared(first_column(pass));
      else
        write_partial(first_column(pass));
      sync();
    } while (first_column(++pass) < p.D);
    if (p.splits > 1 && !p.cluster) combine_last();
  }

  ATTN_DEVICE int64_t first_column(int pass) const { return static_cast<int64_t>(pass) * p.columns.n; }

  // Prefetches values while scores are computed, up to a number of cache lines that stay in the cache until they are
  // used.
  ATTN_DEVICE void fetch_values() const {
    if constexpr (F::kVectorized) {
      constexpr int kLine = 128 / sizeof(T);
      const int lines = static_cast<int>((p.D + kLine - 1) / kLine);
      int64_t most = int64_t(steps.n) * lines;
      if (most > 512) most = 512;
#pragma unroll 1
      for (int i = threadIdx.x; i < most; i += kThreads)
        prefetch(row_of<T>(p.values, b, steps.first + i / lines) + i % lines * kLine);
    }
  }

  // Lists the steps that at least one query attends, in order, with a bit per query. Sets the alignments of all steps
  // of the block to zero.
  ATTN_DEVICE void list_attended() {
    const int lane = threadIdx.x % kWarp;
    if (threadIdx.x < kWarp) {
      int n = 0;
      unsigned all = 0;
#pragma unroll 1
      for (int first = 0; first < steps.n; first += kWarp) {
        const int j = first + lane;
        unsigned bits = 0;
        if (j < steps.n) {
#pragma unroll 1
          for (int q = 0; q < p.Tq; ++q) bits |= unsigned(mask_allows(p.attended, b, q, steps.first + j)) << q;
        }
        const unsigned some = __ballot_sync(kAllLanes, bits != 0);
        all |= bits;
        if (bits != 0) {
          int at = n;
          for (unsigned below = some & ((1u << lane) - 1); below != 0; below &= below - 1) ++at;
          list()[at] = j;
          attending()[at] = static_cast<unsigned char>(bits);
        }
        for (unsigned rest = some; rest != 0; rest &= rest - 1) ++n;
      }
#pragma unroll
      for (int step = kWarp / 2; step > 0; step /= 2) all |= __shfl_xor_sync(kAllLanes, all, step);
      if (lane == 0) state()->attended_steps = n, state()->attending_queries = static_cast<int>(all);
    }
    if (p.alignments != nullptr && (p.splits == 1 || p.cluster))
#pragma unroll 1
      for (int q = 0; q < p.Tq; ++q)
#pragma unroll 1
        for (int j = threadIdx.x; j < steps.n; j += kThreads) *alignment(q, steps.first + j) = narrow<T>(W(0));
    sync();
  }

  // Replaces the scores in weights() by e^(score - largest), 0 for steps that are not attended. One warp per query.
  ATTN_DEVICE void softmax() const {
    const int q = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    if (q >= NQ) return;
    W* weight = weights() + q;
    if (q >= p.Tq) {
#pragma unroll 1
      for (int i = lane; i < steps.n; i += kWarp) weight[i * NQ] = 0;
      return;
    }
    const auto part = Normaliser::part(
        steps.n, [&](int i) -> W& { return weight[i * NQ]; }, [&](int i) { return attends(q, i); },
        [&](int i, W score) {
          if (p.scores != nullptr)
            static_cast<W*>(p.scores)[(static_cast<int64_t>(b) * p.Tq + q) * p.Tk + steps[i]] = score;
        });
    if (lane == 0) {
      stats()[q] = part.largest;
      stats()[NQ + q] = part.sum;
      if (p.splits > 1 && !p.cluster) {
        W* to = static_cast<W*>(p.stats) + static_cast<int64_t>(blockIdx.x) * 2 * p.Tq + q;
        to[0] = part.largest;
        to[p.Tq] = part.sum;
      }
    }
  }

  // contexts = weights @ values over the steps of the part, columns d .. d + columns.n.
  ATTN_DEVICE void sum_values(int64_t d) const {
    const int thread = this_thread(), warp = thread / kWarp, lane = thread % kWarp;
    const int groups = kWarps / p.columns.warps, group = warp / p.columns.warps;
    const int first = warp % p.columns.warps * kWarp * kEach;
    const int n = static_cast<int>(p.D - d < p.columns.n ? p.D - d : p.columns.n);
    W sums[NQ * kEach] = {};
    if (group < groups) {
      if (mixed())
        sum_rows<true>(sums, d, first, n, group, groups);
      else
        sum_rows<false>(sums, d, first, n, group, groups);
    }
#pragma unroll 1
    for (int g = 0; g < groups; ++g) {
      if (group == g) {
#pragma unroll
        for (int q = 0; q < NQ; ++q) {
          W* to = contexts() + q * p.columns.n + first;
#pragma unroll
          for (int j = 0; j < kEach; j += 4) {
            if constexpr (F::kVectorized) {
              add_four(sums + q * kEach + j, to + lane * kEach + j, g > 0);
            } else {
#pragma unroll
              for (int i = j; i < j + 4 && i < kEach; ++i) {
                W* sum = to + i * kWarp + lane;
                *sum = g > 0 ? *sum + sums[q * kEach + i] : sums[q * kEach + i];
              }
            }
          }
        }
      }
      __syncthreads();
    }
  }

  ATTN_DEVICE void load_weights(int i, W* weight) const {
#pragma unroll
    for (int q = 0; q < NQ; q += 4)
      if constexpr (sizeof(W) == 4 && NQ % 4 == 0)
        load_four(weights() + i * NQ + q, weight + q);
      else
        for (int r = q; r < q + 4 && r < NQ; ++r) weight[r] = weights()[i * NQ + r];
  }

  // weights @ values over the steps of a group of warps, for the columns of this lane.
  template <bool kMixed>
  ATTN_DEVICE void sum_rows(W* sums, int64_t d, int first, int n, int group, int groups) const {
    // kRows: steps in flight, limited by registers.
    constexpr int kMax = NQ * kEach >= 32 ? 4 : 8;
    constexpr int kRows = kMixed || (NQ == 8 && !F::kVectorized) ? 1 : NQ * kEach == 64 || !F::kVectorized ? 2 : kMax;
    const Rows<F, T> rows(p.values, b, steps.first, d);
#pragma unroll 1
    for (int i = group; i < steps.n; i += groups * kRows) {
      uint4 raw[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int at = i + r * groups;
        raw[r] = rows.load(steps.offset(at < steps.n ? at : i), first, at < steps.n ? n : 0);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int at = i + r * groups < steps.n ? i + r * groups : i;
        const unsigned bits = kMixed ? attending()[at] : 0;
        W x[kEach], weight[NQ];
        widen_16_bytes<T>(raw[r], x);
        load_weights(at, weight);
#pragma unroll
        for (int q = 0; q < NQ; ++q) {
          const bool selected = !kMixed || (bits >> q & 1);
#pragma unroll
          for (int j = 0; j < kEach; ++j) sums[q * kEach + j] += weight[q] * (selected ? x[j] : W(0));
        }
      }
    }
  }

  // Merges the Parts of a query of all blocks r, given by part(r). Computed by one warp.
  template <class PartOf>
  ATTN_DEVICE Part whole(const PartOf& part) const {
    Part all = Normaliser::nothing();
#pragma unroll 1
    for (int r = threadIdx.x % kWarp; r < p.splits; r += kWarp) all = Normaliser::merge(all, part(r));
#pragma unroll 1
    for (int step = kWarp / 2; step > 0; step /= 2)
      all = Normaliser::merge(
          all, Part{__shfl_xor_sync(kAllLanes, all.largest, step), __shfl_xor_sync(kAllLanes, all.sum, step)});
    return all;
  }

  // Loads from the shared memory of block r of the cluster, or of this block without a cluster.
  ATTN_DEVICE W load_of(const W* address, int r) const {
    if constexpr (sizeof(W) == 4)
      if (p.cluster) return load_of_rank(address, r);
    return *address;
  }

  // Writes columns d .. d + columns.n of the context and, for d = 0, the alignments. The blocks of a cluster divide the
  // columns.
  ATTN_DEVICE void combine_shared(int64_t d) const {
    const int thread = this_thread(), warp = thread / kWarp, lane = thread % kWarp;
    if (p.cluster) cluster_sync();
    if (d == 0) {
      if (warp < p.Tq) {
        auto part = [&](int r) { return Part{load_of(stats() + warp, r), load_of(stats() + NQ + warp, r)}; };
        const Part all = whole(part);
        if (lane < p.splits)
          factors()[lane * NQ + warp] = Normaliser::share(part(lane).largest, all.largest) * Normaliser::finish(all);
      }
      __syncthreads();
      if (p.alignments != nullptr) write_alignments();
    }
    const int n = static_cast<int>(p.D - d < p.columns.n ? p.D - d : p.columns.n), splits = state()->combined_blocks;
    for (int i = (warp * splits + rank) * kWarp + lane; i < p.Tq * n; i += splits * kThreads) {
      const int q = i / n, c = i % n;
      W sum = 0;
#pragma unroll 4
      for (int r = 0; r < splits; ++r) sum += factors()[r * NQ + q] * load_of(contexts() + q * p.columns.n + c, r);
      static_cast<T*>(p.context)[(static_cast<int64_t>(b) * p.Tq + q) * p.D + d + c] = narrow<T>(sum);
    }
    if (p.cluster) cluster_sync();  // other blocks may read this block's contexts until here
  }

  // Writes the alignments of this block's steps, and zeros for its share of the steps beyond the length.
  ATTN_DEVICE void write_alignments() const {
#pragma unroll 1
    for (int q = 0; q < p.Tq; ++q) {
      const W factor = factors()[rank * NQ + q];
#pragma unroll 1
      for (int i = threadIdx.x; i < steps.n; i += kThreads)
        *alignment(q, steps[i]) = narrow<T>(attends(q, i) ? weights()[i * NQ + q] * factor : W(0));
#pragma unroll 1
      for (int j = length + rank * kThreads + threadIdx.x; j < p.Tk; j += p.splits * kThreads)
        *alignment(q, j) = narrow<T>(W(0));
    }
  }

  ATTN_DEVICE void write_partial(int64_t d) const {
    const int n = static_cast<int>(p.D - d < p.columns.n ? p.D - d : p.columns.n);
#pragma unroll 1
    for (int q = 0; q < p.Tq; ++q) {
      W* to = static_cast<W*>(p.partial) + (static_cast<int64_t>(blockIdx.x) * p.Tq + q) * p.D + d;
#pragma unroll 1
      for (int c = threadIdx.x; c < n; c += kThreads) to[c] = contexts()[q * p.columns.n + c];
    }
  }

  // In the last block of a sentence to finish: combines all parts, and writes context and alignments.
  ATTN_DEVICE void combine_last() const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) state()->is_last = atomicAdd(p.finished + b, 1u) == static_cast<unsigned>(p.splits - 1);
    __syncthreads();
    if (!state()->is_last) return;
    __threadfence();
    const W* stats = static_cast<const W*>(p.stats) + static_cast<int64_t>(b) * p.splits * 2 * p.Tq;
    W *largest = factors(), *normalisers = factors() + NQ;
    if (warp < p.Tq) {
      const Part all = whole([&](int r) { return Part{stats[r * 2 * p.Tq + warp], stats[(r * 2 + 1) * p.Tq + warp]}; });
      if (lane == 0) largest[warp] = all.largest, normalisers[warp] = Normaliser::finish(all);
    }
    __syncthreads();
#pragma unroll 1
    for (int q = 0; q < p.Tq; ++q) {
      const int64_t row = static_cast<int64_t>(b) * p.Tq + q;
      const W* partial = static_cast<const W*>(p.partial) + (static_cast<int64_t>(b) * p.splits * p.Tq + q) * p.D;
#pragma unroll 1
      for (int64_t d = threadIdx.x; d < p.D; d += kThreads) {
        W sum = 0;
#pragma unroll 8
        for (int r = 0; r < p.splits; ++r)
          sum += Normaliser::share(stats[r * 2 * p.Tq + q], largest[q]) *
                 partial[static_cast<int64_t>(r) * p.Tq * p.D + d];
        static_cast<T*>(p.context)[row * p.D + d] = narrow<T>(sum * normalisers[q]);
      }
      if (p.alignments == nullptr) continue;
#pragma unroll 1
      for (int j = threadIdx.x; j < p.Tk; j += kThreads) {
        W x = 0;
        if (j < length && mask_allows(p.attended, b, q, j))
          x = Normaliser::alignment(static_cast<const W*>(p.scores)[row * p.Tk + j], largest[q], normalisers[q]);
        *alignment(q, j) = narrow<T>(x);
      }
    }
  }
};

}  // namespace cuda
}  // namespace attn
