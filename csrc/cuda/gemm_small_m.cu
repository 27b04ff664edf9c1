// Products and weighted sums with few queries, as in the backward of a decoding step. They are memory-bound: the rows
// of the memory are read once, or the rows of its gradient written once, 16 bytes per thread along a row. All queries
// are computed at once; kQ is the next size for which there is a kernel.
#include <algorithm>
#include <type_traits>

#include "gemm_small_m.cuh"
#include "views.cuh"

namespace attn {
namespace cuda {
namespace {

// out[b, i, j] = scale * query[b, i] . keys[b, j] for j below the length. A warp computes kSteps steps.
constexpr int kProductWarps = 4, kSteps = 4;

template <typename T, int kQ>
__global__ void __launch_bounds__(kProductWarps* kWarp)
    small_m_product_kernel(int Tq, std::int64_t Tk, std::int64_t A, unsigned blocks_of_sentence,
                           Strided<T> query,  // (B, Tq, A)
                           Strided<T> keys,   // (B, Tk, A)
                           AttentionMask attended, Wide<T> scale,
                           Wide<T>* out) {  // (B, Tq, Tk) contiguous
  using W = Wide<T>;
  constexpr int n = kPer16Bytes<T>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const std::int64_t b = blockIdx.x / blocks_of_sentence;
  const std::int64_t j0 = (static_cast<std::int64_t>(blockIdx.x % blocks_of_sentence) * kProductWarps + warp) * kSteps;
  const std::int64_t length = attended_steps(attended, b, Tk);
  if (j0 >= length) return;
  const T* first_query = query.data + b * query.stride[0];
  const T* first_key = keys.data + b * keys.stride[0] + j0 * keys.stride[1];

  W sum[kQ][kSteps] = {};
  for (std::int64_t u = lane * n; u < A; u += kWarp * n) {
    W key[kSteps][n];
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
      load_units(first_key + s * keys.stride[1], keys.stride[2], keys.vectorized, u, j0 + s < length ? A : 0, key[s]);
#pragma unroll
    for (int i = 0; i < kQ; ++i) {
      if (i >= Tq) continue;
      W part[n];
      load_units(first_query + i * query.stride[1], query.stride[2], query.vectorized, u, A, part);
#pragma unroll
      for (int s = 0; s < kSteps; ++s)
#pragma unroll
        for (int e = 0; e < n; ++e) sum[i][s] += part[e] * key[s][e];
    }
  }
#pragma unroll
  for (int i = 0; i < kQ; ++i)
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const W total = warp_sum(sum[i][s]);
      if (lane == i * kSteps + s && i < Tq && j0 + s < length) out[(b * Tq + i) * Tk + j0 + s] = scale * total;
    }
}

// Weights (B, Tq, Tk), of type W or T.
template <typename T>
struct Weights {
  const void* data;
  std::int64_t stride[3];
  bool wide;

  ATTN_DEVICE Wide<T> at(std::int64_t i) const {
    return wide ? static_cast<const Wide<T>*>(data)[i] : widen(static_cast<const T*>(data)[i]);
  }
};

// Loads the weights of the steps j0 .. j0 + n for all queries, (n, kQ), and for each step a bit per query that attends
// it.
template <typename T, int kQ>
ATTN_DEVICE void share_weights(const Weights<T>& weights, const AttentionMask& attended, std::int64_t b, int Tq,
                               std::int64_t length, std::int64_t j0, int n, Wide<T>* shared, unsigned* attending) {
  for (int x = threadIdx.x; x < n; x += blockDim.x) {
    const std::int64_t j = j0 + x;
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < kQ; ++i) {
      const bool attends = i < Tq && j < length && mask_allows(attended, b, i, j);
      shared[x * kQ + i] =
          attends ? weights.at(b * weights.stride[0] + i * weights.stride[1] + j * weights.stride[2]) : Wide<T>(0);
      bits |= static_cast<unsigned>(attends) << i;
    }
    attending[x] = bits;
  }
}

// Sums over steps: out[b, i, n] = scale * sum over j of weights[b, i, j] * rows[b, j, n] over the attended pairs. A
// block has the columns of one warp and some of the steps, which its warps take in turn.
constexpr int kSumWarps = 8, kSumSteps = 256;

template <typename T, int kQ>
constexpr std::int64_t small_m_sum_bytes() {
  const std::int64_t columns = kWarp * kPer16Bytes<T>;
  return (kSumSteps * kQ + kSumWarps * columns) * sizeof(Wide<T>) + kSumSteps * sizeof(unsigned);
}

template <typename T, typename O, int kQ>
__global__ void __launch_bounds__(kSumWarps* kWarp, 2)
    small_m_sum_kernel(std::int64_t B, int Tq, std::int64_t Tk, std::int64_t N, unsigned blocks_n, unsigned parts,
                       std::int64_t steps_of_part, Weights<T> weights,
                       Strided<T> rows,  // (B, Tk, N)
                       AttentionMask attended, Wide<T> scale,
                       O* out) {  // (parts, B, Tq, N) contiguous
  using W = Wide<T>;
  constexpr int n = kPer16Bytes<T>;
  constexpr int kAhead = kQ * n >= 64 ? 2 : 4;                // rows in flight, limited by registers
  W* shared_weights = reinterpret_cast<W*>(shared_memory());  // (kSumSteps, kQ)
  W* partial = shared_weights + kSumSteps * kQ;               // (warps, columns of a warp)
  unsigned* attending = reinterpret_cast<unsigned*>(partial + kSumWarps * kWarp * n);  // (kSumSteps,)
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const std::int64_t n0 = static_cast<std::int64_t>(blockIdx.x % blocks_n) * (kWarp * n);
  const unsigned part = blockIdx.x / blocks_n % parts;
  const std::int64_t b = blockIdx.x / blocks_n / parts;
  const std::int64_t length = attended_steps(attended, b, Tk);
  const std::int64_t begin = part * steps_of_part;
  const std::int64_t end = begin + steps_of_part < length ? begin + steps_of_part : length;

  W sum[kQ][n] = {};
  for (std::int64_t j0 = begin; j0 < end; j0 += kSumSteps) {
    const int count = static_cast<int>(end - j0 < kSumSteps ? end - j0 : kSumSteps);
    __syncthreads();
    share_weights<T, kQ>(weights, attended, b, Tq, length, j0, count, shared_weights, attending);
    __syncthreads();
    for (int x0 = warp; x0 < count; x0 += kSumWarps * kAhead) {
      W row[kAhead][n];
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        const int x = x0 + ahead * kSumWarps;
        const bool used = x < count && attending[x] != 0;
        load_units(rows.data + b * rows.stride[0] + (j0 + x) * rows.stride[1], rows.stride[2], rows.vectorized,
                   n0 + lane * n, used ? N : 0, row[ahead]);
      }
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        const int x = x0 + ahead * kSumWarps;
        const unsigned bits = x < count ? attending[x] : 0;
        if (bits == 0) continue;
#pragma unroll
        for (int i = 0; i < kQ; ++i)
          if (bits >> i & 1) {
            const W weight = shared_weights[x * kQ + i];
#pragma unroll
            for (int e = 0; e < n; ++e) sum[i][e] += weight * row[ahead][e];
          }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kQ; ++i) {
    if (i >= Tq) break;
    __syncthreads();
#pragma unroll
    for (int e = 0; e < n; ++e) partial[(warp * n + e) * kWarp + lane] = sum[i][e];
    __syncthreads();
    for (int c = threadIdx.x; c < kWarp * n && n0 + c < N; c += kSumWarps * kWarp) {
      W total = 0;
      for (int w = 0; w < kSumWarps; ++w) total += partial[(w * n + c % n) * kWarp + c / n];
      out[((part * B + b) * Tq + i) * N + n0 + c] = narrow<O>(scale * total);
    }
  }
}

// out[k] = the sum of the parts, in order.
constexpr int kTotalThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kTotalThreads) small_m_total_kernel(std::int64_t size, unsigned parts,
                                                                      const Wide<T>* partial,  // (parts, size)
                                                                      T* out) {                // (size,)
  const std::int64_t k = static_cast<std::int64_t>(blockIdx.x) * kTotalThreads + threadIdx.x;
  if (k >= size) return;
  Wide<T> total = 0;
  for (unsigned part = 0; part < parts; ++part) total += partial[part * size + k];
  out[k] = narrow<T>(total);
}

// Sums over queries: out[b, j, n] = scale * sum over i of weights[b, i, j] * rows[b, i, n] over the attended pairs. A
// thread keeps its columns of all rows in registers. Its warp writes every eighth step of a block.
constexpr int kOuterWarps = 8, kOuterSteps = 64;

template <typename T, int kQ>
__global__ void __launch_bounds__(kOuterWarps* kWarp)
    small_m_outer_kernel(int Tq, std::int64_t Tk, std::int64_t N, unsigned blocks_n, unsigned blocks_j,
                         Weights<T> weights,
                         Strided<T> rows,  // (B, Tq, N)
                         AttentionMask attended, Wide<T> scale, bool vectorized,
                         T* out) {  // (B, Tk, N) contiguous
  using W = Wide<T>;
  constexpr int n = kPer16Bytes<T>;
  W* shared_weights = reinterpret_cast<W*>(shared_memory());                             // (kOuterSteps, kQ)
  unsigned* attending = reinterpret_cast<unsigned*>(shared_weights + kOuterSteps * kQ);  // (kOuterSteps,)
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const std::int64_t n0 = static_cast<std::int64_t>(blockIdx.x % blocks_n) * (kWarp * n) + lane * n;
  const std::int64_t j0 = static_cast<std::int64_t>(blockIdx.x / blocks_n % blocks_j) * kOuterSteps;
  const std::int64_t b = blockIdx.x / blocks_n / blocks_j;
  const int count = static_cast<int>(Tk - j0 < kOuterSteps ? Tk - j0 : kOuterSteps);
  share_weights<T, kQ>(weights, attended, b, Tq, attended_steps(attended, b, Tk), j0, count, shared_weights, attending);
  W row[kQ][n];
#pragma unroll
  for (int i = 0; i < kQ; ++i)
    load_units(rows.data + b * rows.stride[0] + i * rows.stride[1], rows.stride[2], rows.vectorized, n0, i < Tq ? N : 0,
               row[i]);
  __syncthreads();
  if (n0 >= N) return;
  for (int x = warp; x < count; x += kOuterWarps) {
    const unsigned bits = attending[x];
    W sum[n] = {};
#pragma unroll
    for (int i = 0; i < kQ; ++i)
      if (bits >> i & 1) {
        const W weight = scale * shared_weights[x * kQ + i];
#pragma unroll
        for (int e = 0; e < n; ++e) sum[e] += weight * row[i][e];
      }
    Pack<T, n> pack;
#pragma unroll
    for (int e = 0; e < n; ++e) pack.x[e] = narrow<T>(sum[e]);
    T* to = out + (b * Tk + j0 + x) * N + n0;
    if (vectorized) {
      vector_at<Pack<T, n>>(to) = pack;
    } else {
#pragma unroll
      for (int e = 0; e < n; ++e)
        if (n0 + e < N) to[e] = pack.x[e];
    }
  }
}

// Host ----------------------------------------------------------------------------------------------------------------

// Calls f(Int<kQ>) with the smallest kQ that holds the queries.
template <class F>
void with_queries(std::int64_t Tq, const F& f) {
  if (Tq <= 1)
    f(Int<1>());
  else if (Tq <= 4)
    f(Int<4>());
  else
    f(Int<8>());
}
static_assert(kMaxDecodeQueries == 8, "with_queries has a kernel for each number of queries");

template <typename T>
Weights<T> weights_of(const WeightedSum& op) {
  const std::int64_t* stride = op.weights.stride;
  return {op.weights.data, {stride[0], stride[1], stride[2]}, op.weights.dtype != op.rows.dtype};
}

template <typename T, int kQ>
void sum_over_steps(const WeightedSum& op) {
  using W = Wide<T>;
  const std::int64_t blocks_n = ceil_div(op.N, kWarp * kPer16Bytes<T>), size = op.B * op.Tq * op.N;
  const std::int64_t multiprocessors = current_device().multiprocessors;
  // If the blocks fill less than half of the device and there are enough steps, splitting the steps and summing the
  // parts in a second kernel is faster.
  std::int64_t parts = 1;
  if (op.B * blocks_n * 2 <= multiprocessors && op.Tk >= 512 && size > 0)
    parts = std::min(multiprocessors / (op.B * blocks_n), ceil_div(op.Tk, 128));
  const std::int64_t steps_of_part = ceil_div(op.Tk, parts);
  const auto run = [&](auto* out) {
    using O = std::remove_pointer_t<decltype(out)>;
    launch(small_m_sum_kernel<T, O, kQ>, Grid{op.B * blocks_n * parts, kSumWarps * kWarp, small_m_sum_bytes<T, kQ>()},
           op.B, static_cast<int>(op.Tq), op.Tk, op.N, static_cast<unsigned>(blocks_n), static_cast<unsigned>(parts),
           steps_of_part, weights_of<T>(op), strided<T>(op.rows), op.attended, static_cast<W>(op.scale), out);
  };
  if (parts == 1) return run(static_cast<T*>(op.out));
  W* partial = scratch<W>(parts * size);
  run(partial);
  launch(small_m_total_kernel<T>, Grid{ceil_div(size, kTotalThreads), kTotalThreads}, size,
         static_cast<unsigned>(parts), partial, static_cast<T*>(op.out));
}

template <typename T, int kQ>
void sum_over_queries(const WeightedSum& op) {
  using W = Wide<T>;
  constexpr int n = kPer16Bytes<T>;
  const std::int64_t blocks_n = ceil_div(op.N, kWarp * n), blocks_j = ceil_div(op.Tk, kOuterSteps);
  const bool vectorized = op.N % n == 0 && reinterpret_cast<std::uintptr_t>(op.out) % 16 == 0;
  launch(small_m_outer_kernel<T, kQ>,
         Grid{op.B * blocks_n * blocks_j, kOuterWarps * kWarp,
              kOuterSteps * static_cast<std::int64_t>(kQ * sizeof(W) + sizeof(unsigned))},
         static_cast<int>(op.Tq), op.Tk, op.N, static_cast<unsigned>(blocks_n), static_cast<unsigned>(blocks_j),
         weights_of<T>(op), strided<T>(op.rows), op.attended, static_cast<W>(op.scale), vectorized,
         static_cast<T*>(op.out));
}

}  // namespace

void gemm_small_m_nt(const Product& op) {
  with_type(op.query.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_queries(op.Tq, [&](auto queries) {
      const std::int64_t blocks = op.Tq > 0 ? ceil_div(op.Tk, kProductWarps * kSteps) : 0;
      launch(small_m_product_kernel<T, decltype(queries)::value>, Grid{op.B * blocks, kProductWarps * kWarp},
             static_cast<int>(op.Tq), op.Tk, op.A, static_cast<unsigned>(blocks), strided<T>(op.query),
             strided<T>(op.keys), op.attended, static_cast<Wide<T>>(op.scale), static_cast<Wide<T>*>(op.out));
    });
  });
}

void gemm_small_m_nn(const WeightedSum& op) {
  with_type(op.rows.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_queries(op.Tq, [&](auto queries) {
      constexpr int kQ = decltype(queries)::value;
      if (op.transposed)
        sum_over_queries<T, kQ>(op);
      else
        sum_over_steps<T, kQ>(op);
    });
  });
}

}  // namespace cuda
}  // namespace attn
