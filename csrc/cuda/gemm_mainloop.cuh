// Batched matrix products in tiles: sum[m, n] += a[m, x] * b[n, x] over x, a slice of x at a time through shared
// memory.
//
// Double buffering: while a slice is multiplied, the next slice is loaded into registers, and then stored to the other
// half of shared memory. So there is one barrier per slice. The tile types SimtTile and MmaTile multiply; they have the
// same interface.
#pragma once

#include <type_traits>

#include "views.cuh"

namespace attn {
namespace cuda {

constexpr int kTileThreads = 128;
constexpr int kTileWarps = kTileThreads / kWarp;

// A factor of the product of one sentence: element (r, x) is data[r * stride_r + x * stride_x], where r is a row or a
// column of the result. vectorized: 16 bytes along the axis that is read first are aligned and contiguous.
template <typename S>
struct Factor {
  const S* data;
  std::int64_t stride_r, stride_x;
  bool vectorized;

  // The factor from step x on; x is a multiple of a pack.
  ATTN_DEVICE Factor from(std::int64_t x) const { return {data + x * stride_x, stride_r, stride_x, vectorized}; }
};

// Which elements (r, x) of a factor are not padding; without data, none is padding.
struct Kept {
  const unsigned char* data = nullptr;
  std::int64_t stride_r = 0, stride_x = 0;

  ATTN_DEVICE bool at(std::int64_t r, std::int64_t x) const { return data[r * stride_r + x * stride_x] != 0; }
};

constexpr int power_of_two(int n) { return n <= 1 ? 1 : 2 * power_of_two((n + 1) / 2); }

// A thread's part of a slice (kR, Tile::kSlice) of a factor, in registers between global and shared memory. Adjacent
// threads read along x if kAlongX, otherwise along r: the axis with unit stride, if the caller's array is contiguous.
template <class Tile, typename S, int kR, bool kAlongX>
struct SliceLoader {
  using Stored = typename Tile::Stored;
  using Layout = typename Tile::template Layout<kR, kAlongX>;
  static constexpr int kPack = kPer16Bytes<Stored>;
  // Threads per line, lines that all threads read at once, and the number of repetitions.
  static constexpr int kLine = kAlongX ? Tile::kSlice / kPack : power_of_two(kR) / kPack;
  static constexpr int kLines = kTileThreads / kLine;
  static constexpr int kEach = ((kAlongX ? kR : Tile::kSlice) + kLines - 1) / kLines;

  const S* from;
  std::int64_t step, stride_x, next;  // strides between elements of a pack, between steps, and between packs
  int r_end;                          // rows of the slice that exist
  bool vectorized;
  static constexpr int kParts = kPack * static_cast<int>(sizeof(S)) / 16;
  uint4 raw[kEach][kParts];  // not converted yet: a use would wait for the load

  ATTN_DEVICE static int r_of(int k) {
    return kAlongX ? static_cast<int>(threadIdx.x) / kLine + k * kLines : static_cast<int>(threadIdx.x) % kLine * kPack;
  }
  ATTN_DEVICE static int x_of(int k) {
    return kAlongX ? static_cast<int>(threadIdx.x) % kLine * kPack : static_cast<int>(threadIdx.x) / kLine + k * kLines;
  }
  // Whether pack k of this thread is within the slice. If lines do not divide evenly, some threads have fewer packs.
  ATTN_DEVICE static bool exists(int k) {
    constexpr bool even = (kAlongX ? kR : Tile::kSlice) % kLines == 0 && (kAlongX || kLine * kPack == kR);
    return even || (r_of(k) < kR && x_of(k) < Tile::kSlice);
  }

  // Rows from r0 on, out of R rows.
  ATTN_DEVICE SliceLoader(const Factor<S>& factor, std::int64_t r0, std::int64_t R)
      : from(factor.data + (r0 + r_of(0)) * factor.stride_r + x_of(0) * factor.stride_x),
        step(kAlongX ? factor.stride_x : factor.stride_r),
        stride_x(factor.stride_x),
        next((kAlongX ? factor.stride_r : factor.stride_x) * kLines),
        r_end(static_cast<int>(R - r0 < kR ? R - r0 : kR)),
        vectorized(factor.vectorized) {}

  // Loads the next slice, from step x0 on, which has x_end steps. Padding is loaded as zeros.
  ATTN_DEVICE void load(std::int64_t x0, int x_end, const Kept& kept) {
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if (!exists(k)) continue;
      const int r = r_of(k), x = x_of(k);
      const S* at = from + k * next;
      const bool whole = kAlongX ? r < r_end && x + kPack <= x_end : r + kPack <= r_end && x < x_end;
      if (vectorized && whole) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) raw[k][part] = vector_at<uint4>(at + part * (kPack / kParts));
      } else {
        S elements[kPack] = {};
#pragma unroll
        for (int e = 0; e < kPack; ++e)
          if (kAlongX ? r < r_end && x + e < x_end : r + e < r_end && x < x_end) elements[e] = at[e * step];
        memcpy(raw[k], elements, sizeof(elements));
      }
      if (kept.data != nullptr) {
        S elements[kPack];
        memcpy(elements, raw[k], sizeof(elements));
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          const int re = kAlongX ? r : r + e, xe = kAlongX ? x + e : x;
          if (re < r_end && xe < x_end && !kept.at(re, x0 + xe)) elements[e] = S{};
        }
        memcpy(raw[k], elements, sizeof(elements));
      }
    }
    from += Tile::kSlice * stride_x;
  }

  // 16 bytes of elements, in the type of the product.
  ATTN_DEVICE uint4 pack(int k) const {
    if constexpr (std::is_same_v<S, Stored>) {
      return raw[k][0];
    } else {
      S from_memory[kPack];
      Stored stored[kPack];
      memcpy(from_memory, raw[k], sizeof(from_memory));
#pragma unroll
      for (int e = 0; e < kPack; ++e) stored[e] = narrow<Stored>(from_memory[e]);
      return bit_cast<uint4>(stored);
    }
  }

  ATTN_DEVICE void put(Stored* shared) const {
#pragma unroll
    for (int k = 0; k < kEach; ++k)
      if (exists(k)) Layout::put(shared, r_of(k), x_of(k), pack(k));
  }

  ATTN_DEVICE bool all_finite() const {
    bool all = true;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if (!exists(k)) continue;
      S elements[kPack];
      memcpy(elements, raw[k], sizeof(elements));
#pragma unroll
      for (int e = 0; e < kPack; ++e) all = all && finite(elements[e]);
    }
    return all;
  }
};

template <class A, class B>
constexpr std::int64_t tile_shared_bytes() {
  return 2 * (A::Layout::kSize + B::Layout::kSize) * static_cast<std::int64_t>(sizeof(typename A::Stored)) +
         2 * kTileWarps * static_cast<std::int64_t>(sizeof(unsigned));
}

// tile.sum += the sum over x < X of a * b. With by_pair, a row of b may be padding for one row of a but not for
// another. NaN or Inf in b are then multiplied pair by pair, because 0 * NaN is NaN. Everything else is summed as
// without by_pair, so padding does not change a bit of the result.
template <class Tile, class A, class B>
ATTN_DEVICE void sum_slices(Tile& tile, A& a, B& b, std::int64_t X, const Kept& kept_a, const Kept& kept_b,
                            bool by_pair) {
  using Stored = typename Tile::Stored;
  using Sum = typename Tile::Sum;
  Stored* shared_a = reinterpret_cast<Stored*>(shared_memory());                     // (2, A::Layout::kSize)
  Stored* shared_b = shared_a + 2 * A::Layout::kSize;                                // (2, B::Layout::kSize)
  unsigned* strange = reinterpret_cast<unsigned*>(shared_b + 2 * B::Layout::kSize);  // (2, warps): NaN or Inf in b

  const auto load = [&](std::int64_t x0) {
    const int x_end = static_cast<int>(X - x0 < Tile::kSlice ? X - x0 : Tile::kSlice);
    a.load(x0, x_end, kept_a);
    b.load(x0, x_end, kept_b);
  };
  const auto put = [&](int half) {
    a.put(shared_a + half * A::Layout::kSize);
    b.put(shared_b + half * B::Layout::kSize);
    if (by_pair) {
      const unsigned lanes = __ballot_sync(kAllLanes, !b.all_finite());
      if (threadIdx.x % kWarp == 0) strange[half * kTileWarps + threadIdx.x / kWarp] = lanes;
    }
  };

  if (X <= 0) return;
  load(0);
  put(0);
  __syncthreads();
  int half = 0;
  for (std::int64_t x0 = 0; x0 < X; x0 += Tile::kSlice) {
    const bool more = x0 + Tile::kSlice < X;
    if (more) load(x0 + Tile::kSlice);
    const Stored* slice_a = shared_a + half * A::Layout::kSize;
    const Stored* slice_b = shared_b + half * B::Layout::kSize;
    unsigned any = 0;
    if (by_pair)
      for (int warp = 0; warp < kTileWarps; ++warp) any |= strange[half * kTileWarps + warp];
    if (any != 0) {  // multiplies NaN and Inf pair by pair, then replaces them by 0
#pragma unroll 1
      for (int x = 0; x < Tile::kSlice && x0 + x < X; ++x)
        tile.each_row([&](auto rows, int i, int r) {
#pragma unroll
          for (int e = 0; e < decltype(rows)::value; ++e) {
            if (r + e >= a.r_end || !kept_a.at(r + e, x0 + x)) continue;
            const Stored weight = A::Layout::get(slice_a, r + e, x);
            tile.each_column([&](auto columns, int j, int c) {
#pragma unroll
              for (int f = 0; f < decltype(columns)::value; ++f) {
                const Stored element = B::Layout::get(slice_b, c + f, x);
                if (!finite(element) || !finite(weight)) tile.sum[i + e][j + f] += Sum(widen(weight)) * widen(element);
              }
            });
          }
        });
      __syncthreads();
      const auto clear = [](Stored* elements, int count) {
        for (int n = threadIdx.x; n < count; n += kTileThreads)
          if (!finite(elements[n])) elements[n] = Stored{};
      };
      clear(shared_a + half * A::Layout::kSize, A::Layout::kSize);
      clear(shared_b + half * B::Layout::kSize, B::Layout::kSize);
      __syncthreads();
    }
    tile.template multiply<typename A::Layout, typename B::Layout>(slice_a, slice_b);
    half ^= 1;
    if (more) put(half);
    __syncthreads();
  }
}

// out[r, c] = scale * sum, for the rows and columns of the tile that exist; 0 in rows r for which keep(r) is false.
// out (rows, N) points to the first element of the tile. vectorized: N is a multiple of 4 and out is aligned to 16
// bytes.
template <class Tile, typename O, class Keep>
ATTN_DEVICE void store_tile(const Tile& tile, O* out, std::int64_t rows, std::int64_t columns, std::int64_t N,
                            typename Tile::Sum scale, bool vectorized, const Keep& keep) {
  tile.each_row([&](auto row_count, int i, int r0) {
#pragma unroll
    for (int e = 0; e < decltype(row_count)::value; ++e) {
      const int r = r0 + e;
      if (r >= rows) continue;
      const bool kept = keep(r);
      O* row = out + r * N;
      tile.each_column([&](auto count, int j, int c) {
        constexpr int n = decltype(count)::value;
        Pack<O, n> pack;
#pragma unroll
        for (int f = 0; f < n; ++f)
          pack.x[f] = narrow<O>(kept ? scale * tile.sum[i + e][j + f] : typename Tile::Sum(0));
        if (vectorized && c + n <= columns) {
          vector_at<Pack<O, n>>(row + c) = pack;
        } else {
#pragma unroll
          for (int f = 0; f < n; ++f)
            if (c + f < columns) row[c + f] = pack.x[f];
        }
      });
    }
  });
}

}  // namespace cuda
}  // namespace attn
