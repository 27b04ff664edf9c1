// Attention of few queries on one memory (a decoder step; beams), in one launch that reads keys and values once. This
// file has the kernel, its launch parameters, and the split of a sentence's steps over blocks (decode_block.cuh).
#include "activated_score.cuh"
#include "additive_score.cuh"
#include "decode.h"
#include "decode_block.cuh"
#include "dot_score.cuh"

namespace attn {
namespace cuda {
namespace {

template <class F, int NQ>
__global__ void __launch_bounds__(kThreads, 2) few_queries_kernel(DecodeParams p) {
  Block<F, NQ>(p).run();
}

constexpr int kCapacity = 1024;  // most steps of a block, limited by shared memory; half of it in float64
constexpr int kMinSteps = 8;     // fewest steps of a block for which a further split is faster

bool has_vectorized_rows(const StridedView3& a, int64_t n, int64_t item) {
  const int64_t each = 16 / item;
  return reinterpret_cast<std::uintptr_t>(a.data) % 16 == 0 && a.stride[0] % each == 0 && a.stride[1] % each == 0 &&
         (a.stride[2] == 1 || n <= 1) && n % each == 0 && std::abs(a.stride[1]) < (int64_t(1) << 31) / item;
}

template <typename T>
Columns columns_of(int64_t D) {
  constexpr int kEach = kWarp * kPer16Bytes<T>, kMax = 1024 / kEach < kWarps ? 1024 / kEach : kWarps;
  const int warps = D >= kMax * kEach ? kMax : D <= kEach ? 1 : static_cast<int>(ceil_div(D, kEach));
  return {warps, warps * kEach};
}

template <typename W, int NQ>
Shared shared_of(int64_t beginning, int64_t capacity) {
  Shared s;
  int64_t bytes = 0;
  auto take = [&](int* offset, int64_t n) {
    *offset = static_cast<int>(bytes);
    bytes = round_up(bytes + n, 16);
  };
  take(&s.weights, beginning);
  take(&s.weights, capacity * NQ * sizeof(W));
  take(&s.stats, 2 * NQ * sizeof(W));
  take(&s.factors, kMaxClusterBlocks * NQ * sizeof(W));
  take(&s.guards, 3 * kWarps * sizeof(float));
  take(&s.state, sizeof(BlockState));
  take(&s.list, capacity * sizeof(int));
  take(&s.attends, capacity);
  take(&s.needs_exact, capacity);
  take(&s.bytes, 0);
  return s;
}

template <class F, int NQ>
void run(DecodeParams p, int64_t B) {
  using T = typename F::T;
  using W = Wide<T>;
  p.columns = columns_of<T>(p.D);
  const int64_t contexts = NQ * p.columns.n * sizeof(W), staged = ScoreTile<F, NQ>::bytes(p.A);
  p.shared = shared_of<W, NQ>(contexts > staged ? contexts : staged, ceil_div(p.Tk, p.splits));
  if (p.splits > 1 && !p.cluster) {
    p.stats = scratch<W>(B * p.splits * 2 * p.Tq);
    p.partial = scratch<W>(B * p.splits * p.Tq * p.D);
    if (p.alignments != nullptr) p.scores = scratch<W>(B * p.Tq * p.Tk);
    p.finished = scratch<unsigned>(B);
    clear(p.finished, B * sizeof(unsigned));
  }
  launch(few_queries_kernel<F, NQ>,
         Grid{B * p.splits, kThreads, p.shared.bytes, p.cluster ? static_cast<int>(p.splits) : 1}, p);
}

template <class F>
void run_queries(const DecodeParams& p, int64_t B) {
  if (p.Tq == 1) return run<F, 1>(p, B);
  if constexpr (F::kVectorized && !kAddsExtra<typename F::Score>) {  // an extra is usually of one query
    if (p.Tq <= 2) return run<F, 2>(p, B);
    if (p.Tq <= 4) return run<F, 4>(p, B);
  }
  run<F, 8>(p, B);
}

// Prepared keys are an input of the vectorized forms without extra only. All forms can use the raw keys.
template <class Score, typename T>
void run_form(DecodeParams p, int64_t B) {
  if constexpr (sizeof(T) <= 4) {
    p.vectorized_keys = has_vectorized_rows(p.keys, p.A, sizeof(T));
    if (has_vectorized_rows(p.values, p.D, sizeof(T))) {
      using Prepared = std::conditional_t<std::is_same_v<T, BFloat16>, BFloat16, float>;
      if constexpr (Score::kGuarded && !kAddsExtra<Score>)
        if (p.prepared.data != nullptr && has_vectorized_rows(p.prepared, 0, sizeof(Prepared)))
          return run_queries<Form<Score, T, Prepared, true, true>>(p, B);
      if (p.vectorized_keys && (!kAddsExtra<Score> || has_vectorized_rows(p.extra, p.A, sizeof(T))))
        return run_queries<Form<Score, T, T, false, true>>(p, B);
    }
  }
  run_queries<Form<Score, T, T, false, false>>(p, B);
}

template <class Score, class Op>
void run_dtype(const Op& op, const Splits& splits, DecodeParams p) {
  if (op.B == 0 || op.Tq == 0) return;
  if (op.Tk > (int64_t(1) << 30)) throw std::runtime_error("attn_kernels: memory has more than 2^30 steps");
  p.Tq = static_cast<int>(op.Tq), p.Tk = static_cast<int>(op.Tk), p.A = op.A, p.D = op.D;
  p.query = op.query, p.keys = op.keys, p.values = op.values;
  p.attended = op.attended;
  p.context = op.context, p.alignments = op.alignments;
  p.splits = static_cast<int>(splits.n), p.cluster = splits.cluster && splits.n > 1;
  switch (op.query.dtype) {
    case Dtype::float32:
      return run_form<Score, float>(p, op.B);
    case Dtype::float64:
      return run_form<Score, double>(p, op.B);
    case Dtype::bfloat16:
      return run_form<Score, BFloat16>(p, op.B);
    case Dtype::float16:
      return run_form<Score, Float16>(p, op.B);
  }
}

}  // namespace

// About two blocks per multiprocessor. The blocks of a cluster combine their parts without global memory and without a
// counter to clear. So a cluster is preferred as long as its blocks have few steps.
Splits choose_splits(const Device& device, int64_t B, int64_t Tk, Dtype dtype) {
  const auto smaller = [](int64_t a, int64_t b) { return a < b ? a : b; };
  const auto larger = [](int64_t a, int64_t b) { return a > b ? a : b; };
  const int64_t wanted = larger(1, 2 * device.multiprocessors / larger(B, 1)),
                least = ceil_div(Tk, dtype == Dtype::float64 ? kCapacity / 2 : kCapacity);
  if (device.capability >= 90 && dtype != Dtype::float64) {
    // Only the large chips support clusters of more than 8 blocks.
    const int64_t most = device.capability < 110 ? 16 : 8;
    constexpr int64_t kMaxSteps = 96;
    int64_t n = 1;
    while (n < most && (n < least || (2 * n <= wanted && Tk >= 2 * n * kMinSteps))) n *= 2;
    if (n >= least && (2 * n > wanted || ceil_div(Tk, n) <= kMaxSteps)) return {n, n > 1};
  }
  // The last block reads a context from each of the others. With more than about sqrt(2 Tk) blocks that would take
  // longest.
  int64_t most = 1;
  while (most * most < 2 * Tk) ++most;
  return {larger(least, smaller(smaller(wanted, most), larger(1, Tk / (2 * kMinSteps)))), false};
}

void decode_attention(const AttentionForward<AdditiveScores>& op, const Splits& splits) {
  DecodeParams p = {};
  p.v = op.v, p.bias = op.bias, p.prepared = op.prepared, p.extra = op.extra;
  if (op.extra) return run_dtype<WithExtra<AdditiveScore>>(op, splits, p);
  run_dtype<AdditiveScore>(op, splits, p);
}

void decode_attention(const AttentionForward<ActivatedScores>& op, const Splits& splits) {
  DecodeParams p = {};
  p.v = op.v, p.bias = op.bias, p.activation = op.activation, p.negative_slope = op.negative_slope, p.extra = op.extra;
  if (op.extra) return run_dtype<WithExtra<ActivatedScore>>(op, splits, p);
  run_dtype<ActivatedScore>(op, splits, p);
}

void decode_attention(const AttentionForward<DotScores>& op, const Splits& splits) {
  DecodeParams p = {};
  p.scale = op.scale;
  run_dtype<DotScore>(op, splits, p);
}

void decode_attention(const AttentionForward<AdditiveScores>& op) {
  decode_attention(op, choose_splits(current_device(), op.B, op.Tk, op.query.dtype));
}

void decode_attention(const AttentionForward<ActivatedScores>& op) {
  decode_attention(op, choose_splits(current_device(), op.B, op.Tk, op.query.dtype));
}

void decode_attention(const AttentionForward<DotScores>& op) {
  decode_attention(op, choose_splits(current_device(), op.B, op.Tk, op.query.dtype));
}

}  // namespace cuda
}  // namespace attn
