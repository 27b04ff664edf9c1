// Sums the partial results of blocks, always in the same order.
#pragma once

#include "launch.h"
#include "rows.cuh"

namespace attn {
namespace cuda {

// `groups` threads sum a column of the parts, each over a share of the rows. Their sums are added in shared memory.
template <typename W>
__global__ void __launch_bounds__(256)
    sum_parts_kernel(const W* parts,  // (P, n)
                     int64_t P, int64_t n, int groups, void* first, int64_t n_first, void* second, Dtype dtype) {
  const int columns = blockDim.x / groups, column = threadIdx.x % columns, group = threadIdx.x / columns;
  const int64_t i = int64_t(blockIdx.x) * columns + column;
  W sum = 0;
  if (i < n) {
#pragma unroll 4
    for (int64_t p = group; p < P; p += groups) sum += parts[p * n + i];
  }
  W* sums = reinterpret_cast<W*>(shared_memory());
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (group != 0 || i >= n) return;
  for (int g = 1; g < groups; ++g) sum += sums[g * columns + column];
  if (i < n_first)
    store_element(first, dtype, i, sum);
  else if (second != nullptr)
    store_element(second, dtype, i - n_first, sum);
}

// first (n_first,), then second (n - n_first,) = the sum of the rows of parts (P, n), in dtype.
template <typename W>
void sum_parts(const W* parts, int64_t P, int64_t n, void* first, int64_t n_first, void* second, Dtype dtype) {
  const int groups = P >= 8 ? 8 : 1;
  const Grid grid{ceil_div(n, 256 / groups), 256, 256 * int64_t(sizeof(W))};
  launch(sum_parts_kernel<W>, grid, parts, P, n, groups, first, n_first, second, dtype);
}

}  // namespace cuda
}  // namespace attn
