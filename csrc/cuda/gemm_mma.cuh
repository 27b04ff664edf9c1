// A tile of a matrix product on tensor cores: bfloat16 and float16, with sums in float32.
#pragma once

#include "gemm_mainloop.cuh"

namespace attn {
namespace cuda {

template <typename T>
constexpr bool kIsBFloat16 = false;
template <>
constexpr bool kIsBFloat16<BFloat16> = true;

// Loads four 8 x 8 matrices of 16-bit elements from shared memory. Lane l passes the address of row l % 8 of matrix
// l / 8. From each matrix it gets two elements of row l / 4: 2 * (l % 4) and the next one. With kTransposed, they are
// elements of column l / 4.
template <bool kTransposed>
ATTN_DEVICE void load_matrices(const void* row, unsigned (&part)[4]) {
#if defined(ATTN_EMULATED)
  const int lane = threadIdx.x % kWarp, line = lane / 4, first = lane % 4 * 2;
  for (int q = 0; q < 4; ++q) {
    std::uint16_t two[2];
    for (int e = 0; e < 2; ++e) {
      const void* theirs = __shfl_sync(kAllLanes, row, q * 8 + (kTransposed ? first + e : line));
      memcpy(&two[e], static_cast<const std::uint16_t*>(theirs) + (kTransposed ? line : first + e), 2);
    }
    part[q] = two[0] | static_cast<unsigned>(two[1]) << 16;
  }
#elif defined(__CUDA_ARCH__)
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(part[0]), "=r"(part[1]), "=r"(part[2]), "=r"(part[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(part[0]), "=r"(part[1]), "=r"(part[2]), "=r"(part[3])
                 : "r"(address)
                 : "memory");
#endif
}

// sum (16, 8) += a (16, 16) @ b (16, 8), distributed over a warp in the layout of mma.m16n8k16. For lane l, with
// g = l / 4 and t = 2 * (l % 4):
//   sum[0], sum[1]   elements (g, t) and (g, t + 1); sum[2], sum[3] the same of row g + 8
//   a[0]             (g, t) and (g, t + 1); a[1] the same of row g + 8; a[2], a[3] the same, eight columns further
//   b[0]             (t, g) and (t + 1, g); b[1] the same, eight rows further
template <typename T>
ATTN_DEVICE void multiply_matrices(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if defined(ATTN_EMULATED)
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4 * 2;
  float rows[2][16], columns[2][16];
  const auto set = [](float* to, unsigned two) {
    to[0] = widen(T{static_cast<std::uint16_t>(two)});
    to[1] = widen(T{static_cast<std::uint16_t>(two >> 16)});
  };
  const auto together = [](unsigned low, unsigned high) { return low | static_cast<std::uint64_t>(high) << 32; };
  for (int other = 0; other < 4; ++other) {
    for (int half = 0; half < 2; ++half) {
      const std::uint64_t two = __shfl_sync(kAllLanes, together(a[2 * half], a[2 * half + 1]), g * 4 + other);
      for (int r = 0; r < 2; ++r) set(&rows[r][half * 8 + other * 2], static_cast<unsigned>(two >> 32 * r));
    }
    for (int c = 0; c < 2; ++c) {
      const std::uint64_t two = __shfl_sync(kAllLanes, together(b[0], b[1]), (t + c) * 4 + other);
      for (int half = 0; half < 2; ++half)
        set(&columns[c][half * 8 + other * 2], static_cast<unsigned>(two >> 32 * half));
    }
  }
  for (int r = 0; r < 2; ++r)
    for (int c = 0; c < 2; ++c) sum[r * 2 + c] = emulator::tensor_core_sum(sum[r * 2 + c], rows[r], columns[c], 16);
#elif defined(__CUDA_ARCH__)
  if constexpr (kIsBFloat16<T>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// 2 x 2 warps, each with kM x 4 matrices (16, 8).
template <typename T, int kM>
struct MmaTile {
  using Stored = T;
  using Sum = float;
  static constexpr int kN = 4;
  static constexpr int kRows = 32 * kM, kColumns = 16 * kN, kSlice = 32;
  static constexpr int kBlocks = 4;
  static constexpr int kCost = 2 * kM * kN + 4 * (kM + kN);

  float sum[2 * kM][2 * kN];  // [2 * matrix + half][2 * matrix + column]

  ATTN_DEVICE MmaTile() {
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i)
#pragma unroll
      for (int j = 0; j < 2 * kN; ++j) sum[i][j] = 0;
  }

  // The same order as in global memory: (kR, kSlice) if read along x, otherwise (kSlice, kR). Each line is padded by 16
  // bytes, so that eight consecutive lines are in different banks.
  template <int kR, bool kAlongX>
  struct Layout {
    static constexpr int kStride = (kAlongX ? kSlice : kR) + 8;
    static constexpr int kSize = (kAlongX ? kR : kSlice) * kStride;

    ATTN_DEVICE static int at(int r, int x) { return kAlongX ? r * kStride + x : x * kStride + r; }
    ATTN_DEVICE static T get(const T* shared, int r, int x) { return shared[at(r, x)]; }
    ATTN_DEVICE static void put(T* shared, int r, int x, const uint4& pack) {
      vector_at<uint4>(shared + at(r, x)) = pack;
    }
    // Loads four matrices (8 rows, 8 steps). (r, x): the origin of the matrix whose lines this lane addresses.
    ATTN_DEVICE static void load(const T* shared, int r, int x, unsigned (&part)[4]) {
      const int line = threadIdx.x % 8;
      load_matrices<!kAlongX>(shared + (kAlongX ? at(r + line, x) : at(r, x + line)), part);
    }
  };

  ATTN_DEVICE static int first_row() { return threadIdx.x / 64 * (16 * kM); }
  ATTN_DEVICE static int first_column() { return threadIdx.x / 32 % 2 * (8 * kN); }

  template <class F>
  ATTN_DEVICE void each_row(const F& f) const {
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i) f(Int<1>(), i, first_row() + i * 8 + static_cast<int>(threadIdx.x % 32 / 4));
  }
  template <class F>
  ATTN_DEVICE void each_column(const F& f) const {
#pragma unroll
    for (int j = 0; j < kN; ++j) f(Int<2>(), 2 * j, first_column() + j * 8 + static_cast<int>(threadIdx.x % 4 * 2));
  }

  template <class LayoutA, class LayoutB>
  ATTN_DEVICE void multiply(const T* a, const T* b) {
    const int matrix = threadIdx.x % 32 / 8, low = matrix % 2 * 8, high = matrix / 2 * 8;
#pragma unroll
    for (int x = 0; x < kSlice; x += 16) {
      unsigned columns[kN / 2]
                      [4];  // of two matrices of b: the first and the last eight steps of one, then of the other
#pragma unroll
      for (int j = 0; j < kN / 2; ++j) LayoutB::load(b, first_column() + j * 16 + high, x + low, columns[j]);
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        unsigned rows[4];
        LayoutA::load(a, first_row() + i * 16 + low, x + high, rows);
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          float part[4] = {sum[2 * i][2 * j], sum[2 * i][2 * j + 1], sum[2 * i + 1][2 * j], sum[2 * i + 1][2 * j + 1]};
          const unsigned column[2] = {columns[j / 2][j % 2 * 2], columns[j / 2][j % 2 * 2 + 1]};
          multiply_matrices<T>(part, rows, column);
          sum[2 * i][2 * j] = part[0], sum[2 * i][2 * j + 1] = part[1];
          sum[2 * i + 1][2 * j] = part[2], sum[2 * i + 1][2 * j + 1] = part[3];
        }
      }
    }
  }
};

}  // namespace cuda
}  // namespace attn
