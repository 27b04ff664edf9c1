// Alignments and context, and the gradient of scores. Each is a kernel over rows of scores and a product (gemm.cu).
#include "softmax.cuh"
#include "views.cuh"

namespace attn {
namespace cuda {
namespace {

constexpr int kRowWarps = 4;  // each has a row

// Loop unrolling, limited by registers.
template <typename W>
constexpr int kAtOnce = sizeof(W) == 8 ? 1 : 2;

// The row (b, i) of a warp; b < 0 beyond the last row.
struct Row {
  std::int64_t index, b, i;

  ATTN_DEVICE Row(std::int64_t rows, std::int64_t Tq)
      : index(static_cast<std::int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarp),
        b(index < rows ? index / Tq : -1),
        i(index % Tq) {}
};

// Applies the normaliser (a policy: softmax.cuh) to the attended scores; the result is 0 for other steps. It is written
// to alignments, without rounding to weights, or both.
template <typename T, class Normaliser>
__global__ void __launch_bounds__(kRowWarps* kWarp)
    attend_kernel(std::int64_t rows, std::int64_t Tq, std::int64_t Tk,
                  const Wide<T>* scores,  // (B, Tq, Tk) contiguous
                  AttentionMask attended,
                  T* alignments,       // (B, Tq, Tk) contiguous, or null
                  Wide<T>* weights) {  // (B, Tq, Tk) contiguous, or null
  using W = Wide<T>;
  const Row row(rows, Tq);
  if (row.b < 0) return;
  const int lane = threadIdx.x % kWarp;
  const std::int64_t length = attended_steps(attended, row.b, Tk);
  const W* score = scores + row.index * Tk;

  typename Normaliser::Part whole = Normaliser::nothing();
#pragma unroll(kAtOnce<W>)
  for (std::int64_t j = lane; j < length; j += kWarp)
    if (mask_allows(attended, row.b, row.i, j)) whole.largest = larger(whole.largest, score[j]);
  whole.largest = warp_largest(whole.largest);
#pragma unroll(kAtOnce<W>)
  for (std::int64_t j = lane; j < length; j += kWarp)
    if (mask_allows(attended, row.b, row.i, j)) whole.sum += Normaliser::weight(score[j], whole.largest);
  whole.sum = warp_sum(whole.sum);
  const W finished = Normaliser::finish(whole);
#pragma unroll(kAtOnce<W>)
  for (std::int64_t j = lane; j < Tk; j += kWarp) {
    W p = 0;
    if (j < length && mask_allows(attended, row.b, row.i, j))
      p = Normaliser::alignment(score[j], whole.largest, finished);
    if (alignments != nullptr) alignments[row.index * Tk + j] = narrow<T>(p);
    if (weights != nullptr) weights[row.index * Tk + j] = p;
  }
}

// dscores, 0 if not attended, from the gradient of the alignments, product + grad_alignments.
template <typename T, class Normaliser>
__global__ void __launch_bounds__(kRowWarps* kWarp)
    softmax_backward_kernel(std::int64_t rows, std::int64_t Tq, std::int64_t Tk,
                            Strided<T> alignments,       // (B, Tq, Tk)
                            Strided<T> grad_alignments,  // (B, Tq, Tk), or null
                            AttentionMask attended, bool has_product,
                            Wide<T>* dscores) {  // (B, Tq, Tk) contiguous; in: the product, if there is one
  using W = Wide<T>;
  const Row row(rows, Tq);
  if (row.b < 0) return;
  const int lane = threadIdx.x % kWarp;
  const std::int64_t length = attended_steps(attended, row.b, Tk);
  const T* p_row = alignments.data + row.b * alignments.stride[0] + row.i * alignments.stride[1];
  const std::int64_t g_start = row.b * grad_alignments.stride[0] + row.i * grad_alignments.stride[1];
  W* d_row = dscores + row.index * Tk;
  const auto gradient = [&](std::int64_t j) {
    W g = has_product ? d_row[j] : W(0);
    if (grad_alignments.data != nullptr) g += widen(grad_alignments.data[g_start + j * grad_alignments.stride[2]]);
    return g;
  };

  W products = 0, total = 0;
#pragma unroll(kAtOnce<W>)
  for (std::int64_t j = lane; j < length; j += kWarp)
    if (mask_allows(attended, row.b, row.i, j)) {
      const W p = widen(p_row[j * alignments.stride[2]]);
      products += p * gradient(j);
      total += p;
    }
  products = warp_sum(products);
  total = warp_sum(total);
  const W mean = Normaliser::mean(products, total);
#pragma unroll(kAtOnce<W>)
  for (std::int64_t j = lane; j < Tk; j += kWarp) {
    W d = 0;
    if (j < length && mask_allows(attended, row.b, row.i, j))
      d = Normaliser::gradient(widen(p_row[j * alignments.stride[2]]), gradient(j), mean);
    d_row[j] = d;
  }
}

Grid rows_grid(std::int64_t rows) { return {ceil_div(rows, kRowWarps), kRowWarps * kWarp}; }

StridedView3 contiguous(const void* data, Dtype dtype, std::int64_t Tq, std::int64_t Tk) {
  return {data, dtype, {Tq * Tk, Tk, 1}};
}

}  // namespace

void attend(const Attend& op) {
  const AttentionMask attended = simplified(op.attended, op.Tq);
  with_type(op.values.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using W = Wide<T>;
    const std::int64_t rows = op.B * op.Tq, size = op.Tk > 0 ? rows * op.Tk : 0;
    // The context is summed with unrounded weights, except on tensor cores, whose operands have the dtype of values.
    constexpr bool kRounds = sizeof(T) != sizeof(W);
    const bool unrounded = kRounds && op.Tq <= kMaxDecodeQueries && op.D > 0;
    T* alignments = static_cast<T*>(op.alignments);
    W* weights = nullptr;
    if (unrounded)
      weights = scratch<W>(size);
    else if (alignments == nullptr && op.D > 0)
      alignments = scratch<T>(size);
    if (size > 0 && (alignments != nullptr || weights != nullptr))
      launch(attend_kernel<T, Softmax<W>>, rows_grid(rows), rows, op.Tq, op.Tk, static_cast<const W*>(op.scores),
             attended, alignments, weights);
    const Dtype dtype = op.values.dtype;
    const StridedView3 averages =
        unrounded ? contiguous(weights, Dtype::float32, op.Tq, op.Tk) : contiguous(alignments, dtype, op.Tq, op.Tk);
    weighted_sum({op.B, op.Tq, op.Tk, op.D, averages, op.values, 1.0, attended, false, op.context});
  });
}

void softmax_backward(const SoftmaxBackward& op) {
  const AttentionMask attended = simplified(op.attended, op.Tq);
  const std::int64_t rows = op.Tk > 0 ? op.B * op.Tq : 0;
  if (op.grad_context) product({op.B, op.Tq, op.Tk, op.D, op.grad_context, op.values, 1.0, attended, op.dscores});
  with_type(op.alignments.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(softmax_backward_kernel<T, Softmax<Wide<T>>>, rows_grid(rows), rows, op.Tq, op.Tk, strided<T>(op.alignments),
           strided<T>(op.grad_alignments), attended, static_cast<bool>(op.grad_context),
           static_cast<Wide<T>*>(op.dscores));
  });
}

}  // namespace cuda
}  // namespace attn
