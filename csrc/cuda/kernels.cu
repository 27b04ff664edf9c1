// The table of kernels, with each op as a sequence of launches; and the properties of the device.
#include <mutex>
#include <set>
#include <stdexcept>

#include "kernels.h"
#include "launch.h"
#include "rows.cuh"

namespace attn {
namespace cuda {

#if !defined(ATTN_EMULATED)
namespace {
constexpr int kMostDevices = 64;

int current_index() {
  int index = 0;
  check(cudaGetDevice(&index), "device");
  if (index >= kMostDevices) throw std::runtime_error("attn_kernels: more than 64 CUDA devices");
  return index;
}
}  // namespace

Device current_device() {
  static Device known[kMostDevices];
  static std::once_flag asked[kMostDevices];
  const int index = current_index();
  std::call_once(asked[index], [&] {
    auto attribute = [&](cudaDeviceAttr name) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, name, index), "device");
      return value;
    };
    known[index] = {attribute(cudaDevAttrMultiProcessorCount),
                    10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor),
                    attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  });
  return known[index];
}

void allow_everything(const void* kernel) {
  static std::mutex mutex;
  static std::set<const void*> allowed[kMostDevices];
  const int index = current_index();
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed[index].count(kernel) != 0) return;
  const Device device = current_device();
  check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(device.shared_bytes)),
      "shared memory");
  if (device.capability >= 90)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cluster");
  allowed[index].insert(kernel);
}
#endif

namespace {

int64_t wide_size(Dtype dtype) { return dtype == Dtype::float64 ? 8 : 4; }

void* scores_scratch(int64_t B, int64_t Tq, int64_t Tk, Dtype dtype) {
  return scratch_bytes(B * Tq * Tk * wide_size(dtype));
}

// A view of scores (B, Tq, Tk), of type W.
StridedView3 wide_array(const void* scores, int64_t Tq, int64_t Tk, Dtype dtype) {
  StridedView3 a;
  a.data = scores;
  a.dtype = dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
  a.stride[0] = Tq * Tk;
  a.stride[1] = Tk;
  a.stride[2] = 1;
  return a;
}

template <typename W>
__global__ void __launch_bounds__(256) widen_kernel(StridedView3 from, W* to, int64_t Tq, int64_t Tk, int64_t n) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const int64_t b = i / (Tq * Tk), q = i / Tk % Tq, k = i % Tk;
  to[i] = element<W>(from.data, from.dtype, b * from.stride[0] + q * from.stride[1] + k * from.stride[2]);
}

// Scores with a score vector: Score is AdditiveScores or ActivatedScores ---------------------------------------------

template <class Score>
void scores_forward(const ScoresForward<Score>& op) {
  additive_scores(op, AttentionMask{}, op.scores, true);
}

template <class Score>
void scores_backward(const ScoresBackward<Score>& op) {
  void* dscores = scores_scratch(op.B, op.Tq, op.Tk, op.query.dtype);
  const int64_t n = op.B * op.Tq * op.Tk;
  const Grid grid{ceil_div(n, 256), 256};
  if (op.query.dtype == Dtype::float64)
    launch(widen_kernel<double>, grid, op.grad_scores, static_cast<double*>(dscores), op.Tq, op.Tk, n);
  else
    launch(widen_kernel<float>, grid, op.grad_scores, static_cast<float*>(dscores), op.Tq, op.Tk, n);
  additive_scores_backward(op, AttentionMask{}, dscores, op.dquery, op.dkeys, op.dv, op.dbias);
}

template <class Score>
void vector_forward(const AttentionForward<Score>& op) {
  if (op.Tq <= kMaxDecodeQueries && op.Tk > 0) return decode_attention(op);
  void* scores = scores_scratch(op.B, op.Tq, op.Tk, op.query.dtype);
  if (op.Tk > 0) additive_scores(op, op.attended, scores, false);
  attend({op.B, op.Tq, op.Tk, op.D, scores, op.values, op.attended, op.context, op.alignments});
}

// dvalues = alignments^T @ grad_context, if needed
template <class Op>
void values_backward(const Op& op) {
  if (op.dvalues == nullptr) return;
  if (!op.grad_context) return clear(op.dvalues, op.B * op.Tk * op.D * item_size(op.query.dtype));
  weighted_sum({op.B, op.Tq, op.Tk, op.D, op.alignments, op.grad_context, 1.0, op.attended, true, op.dvalues});
}

template <class Score>
void vector_backward(const AttentionBackward<Score>& op) {
  if (op.dquery == nullptr && op.dkeys == nullptr) return values_backward(op);  // dv and dbias go with dquery
  void* dscores = scores_scratch(op.B, op.Tq, op.Tk, op.query.dtype);
  softmax_backward(
      {op.B, op.Tq, op.Tk, op.D, op.alignments, op.grad_context, op.grad_alignments, op.values, op.attended, dscores});
  additive_scores_backward(op, op.attended, dscores, op.dquery, op.dkeys, op.dv, op.dbias);
  values_backward(op);
}

template <class Score>
constexpr ScoreKernels<Score> kernels_of = {scores_forward<Score>, scores_backward<Score>, vector_forward<Score>,
                                            vector_backward<Score>};

// Dot-product attention -----------------------------------------------------------------------------------------------

void dot_forward(const AttentionForward<DotScores>& op) {
  if (op.Tq <= kMaxDecodeQueries && op.Tk > 0) return decode_attention(op);
  void* scores = scores_scratch(op.B, op.Tq, op.Tk, op.query.dtype);
  product({op.B, op.Tq, op.Tk, op.A, op.query, op.keys, op.scale, op.attended, scores});
  attend({op.B, op.Tq, op.Tk, op.D, scores, op.values, op.attended, op.context, op.alignments});
}

void dot_backward(const AttentionBackward<DotScores>& op) {
  void* dscores = scores_scratch(op.B, op.Tq, op.Tk, op.query.dtype);
  softmax_backward(
      {op.B, op.Tq, op.Tk, op.D, op.alignments, op.grad_context, op.grad_alignments, op.values, op.attended, dscores});
  const StridedView3 weights = wide_array(dscores, op.Tq, op.Tk, op.query.dtype);
  if (op.dquery != nullptr)
    weighted_sum({op.B, op.Tq, op.Tk, op.A, weights, op.keys, op.scale, op.attended, false, op.dquery});
  if (op.dkeys != nullptr)
    weighted_sum({op.B, op.Tq, op.Tk, op.A, weights, op.query, op.scale, op.attended, true, op.dkeys});
  values_backward(op);
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {additive_prepare,
                         kernels_of<AdditiveScores>,
                         kernels_of<ActivatedScores>,
                         {nullptr, nullptr, dot_forward, dot_backward}};

}  // namespace cuda
}  // namespace attn
