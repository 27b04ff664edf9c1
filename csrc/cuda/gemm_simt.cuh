// A tile of a matrix product by multiply-adds of single elements: float32 and float64.
#pragma once

#include "gemm_mainloop.cuh"

namespace attn {
namespace cuda {

// The elements of thread t among the kThreads * n of a tile's side: first groups of up to kMax contiguous elements,
// then groups of 2, then of 1. So any n is read from shared memory with few instructions.
template <int n, int kThreads, int kMax, int kFirst = 0>
struct Fragment {
  static constexpr int kGroup = n >= kMax ? kMax : n >= 2 ? 2 : 1;

  // Calls f(Int<group>, the index of its first element, the position of that element) for each group.
  template <class F>
  ATTN_DEVICE static void each(int t, const F& f) {
    f(Int<kGroup>(), kFirst, kFirst * kThreads + t * kGroup);
    if constexpr (n > kGroup) Fragment<n - kGroup, kThreads, kMax, kFirst + kGroup>::each(t, f);
  }
};

// kM x kN elements for each thread, 8 x 16 threads.
template <typename W, int kM, int kN>
struct SimtTile {
  using Stored = W;
  using Sum = W;
  static constexpr int kRows = 8 * kM, kColumns = 16 * kN, kSlice = 16;
  static constexpr int kBlocks = kM * kN >= 40 || sizeof(W) == 8 ? 3 : 4;  // per multiprocessor: what registers allow
  static constexpr int kCost = kM * kN + 2 * (kM + kN) + 8;                // issue slots per step of the sum
  static constexpr int kMax = kPer16Bytes<W>;

  W sum[kM][kN];

  ATTN_DEVICE SimtTile() {
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int j = 0; j < kN; ++j) sum[i][j] = 0;
  }

  // (kSlice, kR) in shared memory. Elements that are read along x are written across it, several steps at once. To
  // spread these writes over all banks, the positions of rows are swizzled from one group of steps to the next.
  template <int kR, bool kAlongX>
  struct Layout {
    static constexpr int kStride = (kR + 31) / 32 * 32;
    static constexpr int kSize = kSlice * kStride;

    ATTN_DEVICE static int at(int r, int x) { return x * kStride + (kAlongX ? r ^ (x / 4 % 4 * 8) : r); }
    ATTN_DEVICE static W get(const W* shared, int r, int x) { return shared[at(r, x)]; }
    ATTN_DEVICE static void put(W* shared, int r, int x, const uint4& pack) {
      if constexpr (kAlongX) {
        W elements[kMax];
        memcpy(elements, &pack, 16);
#pragma unroll
        for (int e = 0; e < kMax; ++e) shared[at(r, x + e)] = elements[e];
      } else {
        vector_at<uint4>(shared + at(r, x)) = pack;
      }
    }
  };

  // A warp is 4 x 8 threads, a block 2 x 2 warps.
  ATTN_DEVICE static int row_thread() { return threadIdx.x / 64 * 4 + threadIdx.x % 32 / 8; }
  ATTN_DEVICE static int column_thread() { return threadIdx.x / 32 % 2 * 8 + threadIdx.x % 8; }

  template <class F>
  ATTN_DEVICE void each_row(const F& f) const {
    Fragment<kM, 8, kMax>::each(row_thread(), f);
  }
  template <class F>
  ATTN_DEVICE void each_column(const F& f) const {
    Fragment<kN, 16, kMax>::each(column_thread(), f);
  }

  template <class LayoutA, class LayoutB>
  ATTN_DEVICE void multiply(const W* a, const W* b) {
#pragma unroll
    for (int x = 0; x < kSlice; ++x) {
      W row[kM], column[kN];
      each_row([&](auto count, int i, int r) { read<LayoutA>(a, count, r, x, row + i); });
      each_column([&](auto count, int j, int c) { read<LayoutB>(b, count, c, x, column + j); });
#pragma unroll
      for (int i = 0; i < kM; ++i)
#pragma unroll
        for (int j = 0; j < kN; ++j) sum[i][j] += row[i] * column[j];
    }
  }

  template <class L, class Count>
  ATTN_DEVICE static void read(const W* shared, Count, int r, int x, W* to) {
    constexpr int n = Count::value;
    const Pack<W, n> pack = vector_at<Pack<W, n>>(shared + L::at(r, x));
#pragma unroll
    for (int e = 0; e < n; ++e) to[e] = pack.x[e];
  }
};

}  // namespace cuda
}  // namespace attn
