// Prepares keys once for all steps of a decoder: e^{2k}, and the largest |k| of each step. PreparedSizes in
// additive_attention.h has the layout.
#include "additive_math.cuh"
#include "kernels.h"
#include "launch.h"
#include "rows.cuh"

namespace attn {
namespace cuda {
namespace {

constexpr int kWarps = 8;

// One warp per step.
__global__ void __launch_bounds__(kWarps* kWarp, 4)
    prepare_kernel(AdditivePrepare op, PreparedSizes sizes, int64_t item) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= op.B * op.Tk) return;
  const int64_t b = row / op.Tk, j = row % op.Tk;
  const int64_t sentence = b * sizes.rows * sizes.columns;
  float top = 0;
  for (int64_t u = lane; u < sizes.columns; u += kWarp) {
    float e = 0;
    if (u < op.A) {
      const float x = element<float>(op.keys.data, op.keys.dtype,
                                     b * op.keys.stride[0] + j * op.keys.stride[1] + u * op.keys.stride[2]);
      top = larger(top, fabsf(x));
      e = exp2x(x);
    }
    store_element(op.prepared, op.dtype, sentence + j * sizes.columns + u, e);
  }
  top = warp_largest(top);
  float* tops = reinterpret_cast<float*>(static_cast<char*>(op.prepared) + (sentence + op.Tk * sizes.columns) * item);
  if (lane == 0) tops[j] = top;
}

}  // namespace

void additive_prepare(const AdditivePrepare& op) {
  launch(prepare_kernel, {ceil_div(op.B * op.Tk, kWarps), kWarps * kWarp}, op, PreparedSizes(op.A, op.Tk, op.dtype),
         item_size(op.dtype));
}

}  // namespace cuda
}  // namespace attn
