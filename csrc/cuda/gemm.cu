// Products of rows and weighted sums of rows, for many queries: tiles of batched matrix products. With few queries most
// of a tile would be padding: gemm_small_m.cu has kernels for them.
#include "gemm_mma.cuh"
#include "gemm_simt.cuh"
#include "gemm_small_m.cuh"
#include "sum_parts.cuh"

namespace attn {
namespace cuda {
namespace {

// If there are more than twice as many steps, a float32 sum is split into parts of this many steps: each addition has a
// rounding error proportional to the sum so far.
constexpr std::int64_t kMaxStepsPerSum = 4096;

// A batched matrix product (M, X) x (X, N) in tiles: maps a block to its tile and its part of the steps X.
struct Tiling {
  std::int64_t M, N;
  unsigned tiles_m, tiles_n;  // of a sentence
  unsigned parts;

  ATTN_DEVICE std::int64_t sentence() const { return blockIdx.x / tiles_n / tiles_m / parts; }
  ATTN_DEVICE std::int64_t part() const { return blockIdx.x / tiles_n / tiles_m % parts; }
  ATTN_DEVICE std::int64_t sentences() const { return gridDim.x / tiles_n / tiles_m / parts; }
  ATTN_DEVICE std::int64_t tile_m() const { return blockIdx.x / tiles_n % tiles_m; }
  ATTN_DEVICE std::int64_t tile_n() const { return blockIdx.x % tiles_n; }
};

// A factor of the product of each sentence. Sentences are `batch` elements apart.
template <typename S>
struct Factors {
  Factor<S> first;
  std::int64_t batch;

  ATTN_DEVICE Factor<S> of(std::int64_t b) const {
    return {first.data + b * batch, first.stride_r, first.stride_x, first.vectorized};
  }
};

// out[b, i, j] = scale * query[b, i] . keys[b, j]. Tiles beyond the length are not written.
template <class Tile, typename T>
__global__ void __launch_bounds__(kTileThreads, Tile::kBlocks)
    product_kernel(Tiling tiling, std::int64_t A,
                   Factors<T> query,  // (B, Tq, A)
                   Factors<T> keys,   // (B, Tk, A)
                   AttentionMask attended, Wide<T> scale, bool vectorized,
                   Wide<T>* out) {  // (B, Tq, Tk) contiguous
  const std::int64_t b = tiling.sentence();
  const std::int64_t i0 = tiling.tile_m() * Tile::kRows, j0 = tiling.tile_n() * Tile::kColumns;
  const std::int64_t length = attended_steps(attended, b, tiling.N);
  if (j0 >= length) return;
  Tile tile;
  SliceLoader<Tile, T, Tile::kRows, true> rows(query.of(b), i0, tiling.M);
  SliceLoader<Tile, T, Tile::kColumns, true> columns(keys.of(b), j0, length);
  sum_slices(tile, rows, columns, A, Kept(), Kept(), false);
  store_tile(tile, out + (b * tiling.M + i0) * tiling.N + j0, tiling.M - i0, length - j0, tiling.N, scale, vectorized,
             [](int) { return true; });
}

// out[b, m, n] = scale * sum over x of weights[b, m, x] * rows[b, x, n] over the attended pairs (m, x). m are queries
// and x steps; with kTransposed, m are steps and x queries. Masks need registers, so there is an instance without
// (!kMasked). The sums of each part of x are written separately.
template <class Tile, typename S, typename T, bool kTransposed, bool kMasked>
__global__ void __launch_bounds__(kTileThreads, Tile::kBlocks - kMasked)
    weighted_sum_kernel(Tiling tiling, std::int64_t X,
                        Factors<S> weights,  // (B, Tq, Tk)
                        Factors<T> rows,     // (B, X, N)
                        AttentionMask attended, Wide<T> scale, bool vectorized,
                        T* out) {  // (parts, B, M, N) contiguous
  const std::int64_t b = tiling.sentence();
  const std::int64_t m0 = tiling.tile_m() * Tile::kRows, n0 = tiling.tile_n() * Tile::kColumns;
  const std::int64_t length = attended_steps(attended, b, kTransposed ? tiling.M : X);
  const std::int64_t M = kTransposed ? length : tiling.M;
  if (!kTransposed) X = length;
  const std::int64_t first = tiling.part() * kMaxStepsPerSum;
  X -= first;
  if (tiling.parts > 1 && X > kMaxStepsPerSum) X = kMaxStepsPerSum;
  if (m0 >= M) X = 0;  // writes zeros
  Tile tile;
  SliceLoader<Tile, S, Tile::kRows, !kTransposed> left(weights.of(b).from(first), m0, M);
  SliceLoader<Tile, T, Tile::kColumns, false> right(rows.of(b).from(first), n0, tiling.N);
  Kept kept_weights, kept_rows;
  if (kMasked) {
    const std::int64_t* stride = attended.mask_stride;
    const unsigned char* mask = reinterpret_cast<const unsigned char*>(attended.mask) + b * stride[0];
    if (!kTransposed) mask += first * stride[2];
    kept_weights = {mask + m0 * stride[kTransposed ? 2 : 1], stride[kTransposed ? 2 : 1], stride[kTransposed ? 1 : 2]};
    if (!kTransposed && !attended.per_query) kept_rows = {mask, 0, stride[2]};
  }
  sum_slices(tile, left, right, X, kept_weights, kept_rows, kMasked && attended.per_query);
  // For a step that is padding for all queries, the weights are 0, but the sum may be NaN since 0 * NaN is NaN.
  store_tile(tile, out + ((tiling.part() * tiling.sentences() + b) * tiling.M + m0) * tiling.N + n0, tiling.M - m0,
             tiling.N - n0, tiling.N, scale, vectorized, [&](int r) {
               return !kTransposed || (m0 + r < M && (attended.per_query || mask_allows(attended, b, 0, m0 + r)));
             });
}

// Host ----------------------------------------------------------------------------------------------------------------

template <class Tile>
Tiling tiling_of(std::int64_t M, std::int64_t N, std::int64_t parts = 1) {
  return {M, N, static_cast<unsigned>(ceil_div(M, Tile::kRows)), static_cast<unsigned>(ceil_div(N, Tile::kColumns)),
          static_cast<unsigned>(parts)};
}

// The estimated time of the busiest multiprocessor, in waves of tiles.
template <class Tile>
std::int64_t cost(std::int64_t B, std::int64_t M, std::int64_t N, std::int64_t multiprocessors) {
  return ceil_div(B * ceil_div(M, Tile::kRows) * ceil_div(N, Tile::kColumns), multiprocessors) * Tile::kCost;
}

// Calls f(Type<Tile>) with the fastest of the tiles. All tiles sum in the same order.
template <class... Tiles, class F>
void with_fastest(std::int64_t B, std::int64_t M, std::int64_t N, const F& f) {
  const std::int64_t multiprocessors = current_device().multiprocessors;
  const std::int64_t costs[] = {cost<Tiles>(B, M, N, multiprocessors)...};
  std::size_t best = 0, k = 0;
  for (std::size_t i = 1; i < sizeof...(Tiles); ++i)
    if (costs[i] < costs[best]) best = i;
  (void)((k++ == best && (f(Type<Tiles>()), true)) || ...);
}

template <typename T, class F>
void with_product_tile(std::int64_t B, std::int64_t M, std::int64_t N, const F& f) {
  if constexpr (sizeof(T) == 8)
    f(Type<SimtTile<T, 4, 4>>());
  else if constexpr (sizeof(T) == 2)
    with_fastest<MmaTile<T, 1>, MmaTile<T, 2>>(B, M, N, f);
  else
    with_fastest<SimtTile<T, 2, 4>, SimtTile<T, 4, 4>, SimtTile<T, 5, 5>, SimtTile<T, 7, 4>, SimtTile<T, 7, 7>,
                 SimtTile<T, 8, 8>>(B, M, N, f);
}

template <typename T, bool kMasked, class F>
void with_sum_tile(std::int64_t B, std::int64_t M, std::int64_t N, const F& f) {
  if constexpr (sizeof(T) == 8)
    f(Type<SimtTile<T, 4, 4>>());
  else if constexpr (sizeof(T) == 2)
    with_fastest<MmaTile<T, 1>, MmaTile<T, 2>>(B, M, N, f);
  else if constexpr (kMasked)
    with_fastest<SimtTile<T, 4, 8>, SimtTile<T, 5, 8>>(B, M, N, f);
  else
    with_fastest<SimtTile<T, 2, 4>, SimtTile<T, 4, 8>, SimtTile<T, 5, 8>, SimtTile<T, 7, 8>, SimtTile<T, 8, 8>>(B, M, N,
                                                                                                                f);
}

// The factor whose rows r are along axis_of_r of the array, and whose summation index is along the other axis.
template <typename S>
Factors<S> factors(const StridedView3& a, int axis_of_r) {
  const Strided<S> s = strided<S>(a);
  return {{s.data, s.stride[axis_of_r], s.stride[3 - axis_of_r], s.vectorized}, s.stride[0]};
}

template <typename O>
bool stores_vectorized(const O* out, std::int64_t N) {
  return N % 4 == 0 && reinterpret_cast<std::uintptr_t>(out) % 16 == 0;
}

template <class Tile, typename T>
void launch_product(const Product& op) {
  const Tiling tiling = tiling_of<Tile>(op.Tq, op.Tk);
  Wide<T>* out = static_cast<Wide<T>*>(op.out);
  using Rows = SliceLoader<Tile, T, Tile::kRows, true>;
  using Columns = SliceLoader<Tile, T, Tile::kColumns, true>;
  launch(product_kernel<Tile, T>,
         Grid{op.B * tiling.tiles_m * tiling.tiles_n, kTileThreads, tile_shared_bytes<Rows, Columns>()}, tiling, op.A,
         factors<T>(op.query, 1), factors<T>(op.keys, 1), op.attended, static_cast<Wide<T>>(op.scale),
         stores_vectorized(out, op.Tk), out);
}

template <class Tile, typename S, typename T, bool kTransposed, bool kMasked>
void launch_weighted_sum(const WeightedSum& op) {
  const std::int64_t M = kTransposed ? op.Tk : op.Tq, n = op.B * M * op.N;
  // For elements of 16 bits the rounding errors of the sum are below those of the elements.
  const bool in_parts = !kTransposed && sizeof(T) > 2 && op.Tk > 2 * kMaxStepsPerSum;
  const Tiling tiling = tiling_of<Tile>(M, op.N, in_parts ? ceil_div(op.Tk, kMaxStepsPerSum) : 1);
  T* out = in_parts ? scratch<T>(tiling.parts * n) : static_cast<T*>(op.out);
  using Weights = SliceLoader<Tile, S, Tile::kRows, !kTransposed>;
  using Rows = SliceLoader<Tile, T, Tile::kColumns, false>;
  launch(weighted_sum_kernel<Tile, S, T, kTransposed, kMasked>,
         Grid{op.B * tiling.parts * tiling.tiles_m * tiling.tiles_n, kTileThreads, tile_shared_bytes<Weights, Rows>()},
         tiling, kTransposed ? op.Tq : op.Tk, factors<S>(op.weights, kTransposed ? 2 : 1), factors<T>(op.rows, 2),
         op.attended, static_cast<Wide<T>>(op.scale), stores_vectorized(out, op.N), out);
  if constexpr (sizeof(T) > 2)
    if (in_parts) sum_parts(out, tiling.parts, n, op.out, n, nullptr, op.rows.dtype);
}

template <typename S, typename T, bool kMasked>
void sum_of(const WeightedSum& op) {
  with_sum_tile<T, kMasked>(op.B, op.transposed ? op.Tk : op.Tq, op.N, [&](auto tile) {
    using Tile = typename decltype(tile)::type;
    if (op.transposed)
      launch_weighted_sum<Tile, S, T, true, kMasked>(op);
    else
      launch_weighted_sum<Tile, S, T, false, kMasked>(op);
  });
}

template <typename S, typename T>
void sum_of(const WeightedSum& op) {
  if (op.attended.mask != nullptr)
    sum_of<S, T, true>(op);
  else
    sum_of<S, T, false>(op);
}

template <class Op>
Op with_simplified_mask(Op op) {
  op.attended = simplified(op.attended, op.Tq);
  return op;
}

}  // namespace

void product(const Product& call) {
  const Product op = with_simplified_mask(call);
  if (op.Tq <= kMaxDecodeQueries) return gemm_small_m_nt(op);
  with_type(op.query.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_product_tile<T>(op.B, op.Tq, op.Tk, [&](auto tile) { launch_product<typename decltype(tile)::type, T>(op); });
  });
}

void weighted_sum(const WeightedSum& call) {
  const WeightedSum op = with_simplified_mask(call);
  if (op.Tq <= kMaxDecodeQueries) return gemm_small_m_nn(op);
  with_type(op.rows.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) == 2)
      if (op.weights.dtype == Dtype::float32) return sum_of<float, T>(op);
    sum_of<T, T>(op);
  });
}

}  // namespace cuda
}  // namespace attn
