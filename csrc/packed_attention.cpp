// The ops of attn_kernels/ops.py for attention over packed memories: keys (N, A) and values (N, D), the steps of all
// sentences concatenated. CPU only.
//
// Each sentence is one call of the kernel, as a batch of one without padding. So the kernels need no support for
// packing, and padded calls have no overhead. Alignments are either (B, Tq, columns), zero after the end of each
// sentence, or packed: (Tq N,), where the alignments (Tq, length) of sentence b begin at Tq offsets[b].
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/runtime.h"
#include "dot_attention.h"
#include "vector_binding.h"

namespace attn {
namespace {

constexpr int64_t kMinParallelCost = 1 << 17;  // in multiply-adds; less work runs on one thread

// The first step and the number of steps of each sentence.
class Sentences {
 public:
  // offsets: (B + 1,), into N steps.
  Sentences(const Tensor& offsets, int64_t B, int64_t N) : starts_(B + 1) {
    check_shape(offsets, "memory_offsets", {B + 1});
    const ScalarType type = offsets.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, "memory_offsets must be int32 or int64");
    const void* data = offsets.const_data_ptr();
    for (int64_t b = 0; b <= B; ++b) {
      const int64_t i = b * offsets.stride(0);
      starts_[b] =
          type == ScalarType::Long ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
    }
    bool fits = starts_[0] == 0 && starts_[B] == N;
    for (int64_t b = 0; b < B; ++b) {
      fits = fits && starts_[b] <= starts_[b + 1];
      longest_ = std::max(longest_, steps(b));
    }
    STD_TORCH_CHECK(fits, "memory_offsets must start with 0, not decrease, and end with N");
  }

  int64_t start(int64_t b) const { return starts_[b]; }
  int64_t steps(int64_t b) const { return starts_[b + 1] - starts_[b]; }
  int64_t longest() const { return longest_; }

  // Runs body(b) for all sentences. cost: the work per step. The kernel splits a sentence that has more steps than a
  // thread's share of all. Each other sentence runs on one thread, the longest first.
  template <class Body>
  void for_each(int64_t cost, const Body& body) const {
    const int64_t B = static_cast<int64_t>(starts_.size()) - 1, threads = thread_count(), all = starts_[B];
    if (threads == 1 || all * cost < kMinParallelCost) {
      for (int64_t b = 0; b < B; ++b) body(b);
      return;
    }
    std::vector<int64_t> order(B);
    for (int64_t b = 0; b < B; ++b) order[b] = b;
    std::stable_sort(order.begin(), order.end(), [this](int64_t a, int64_t b) { return steps(a) > steps(b); });
    int64_t cut = 0;
    for (; cut < B && steps(order[cut]) * threads > all; ++cut) body(order[cut]);
    struct Rest {
      const Body& body;
      const int64_t* order;
    } rest{body, order.data() + cut};
    if (cut < B)
      for_each_in_turn(
          B - cut,
          [](int64_t i, void* context) {
            const Rest& of = *static_cast<const Rest*>(context);
            of.body(of.order[i]);
          },
          &rest);
  }

 private:
  std::vector<int64_t> starts_;
  int64_t longest_ = 0;
};

// The view or pointer, advanced by `elements`.
StridedView3 from(StridedView3 a, int64_t elements) {
  if (a) a.data = static_cast<const char*>(a.data) + elements * item_size(a.dtype);
  return a;
}
void* from(void* data, Dtype dtype, int64_t elements) {
  return data == nullptr ? nullptr : static_cast<char*>(data) + elements * item_size(dtype);
}

Scores packed_scores(const Tensor& query, const Tensor& keys) {
  STD_TORCH_CHECK(query.dim() == 3 && keys.dim() == 2, "query must have 3 axes and keys 2");
  const int64_t B = query.size(0), Tq = query.size(1), N = keys.size(0), A = query.size(2);
  const Dtype dtype = dtype_of(query, "query");
  return {B, Tq, N, A, array(query, "query", dtype, {B, Tq, A}), array(keys, "keys", dtype, {N, A})};
}

VectorScores packed_scores(const Tensor& query, const Tensor& keys, const Tensor& v,
                           const std::optional<Tensor>& bias) {
  const Scores n = packed_scores(query, keys);
  return {n, array(v, "v", n.query.dtype, {n.A}), array(bias, "bias", n.query.dtype, {n.A})};
}

// The score of sentence b alone. all: the score of B sentences with N steps in total.
template <class Score>
Score of_sentence(const Score& all, const Sentences& sentences, int64_t b) {
  Score one = all;
  one.B = 1;
  one.Tk = sentences.steps(b);
  one.query = from(all.query, b * all.query.stride[0]);
  one.keys = from(all.keys, sentences.start(b) * all.keys.stride[1]);
  return one;
}

// max_length: the columns of padded alignments, 0 for packed alignments.
template <class Score>
std::tuple<Tensor, Tensor> forward(void (*kernel)(const AttentionForward<Score>&), const Score& score,
                                   const Tensor& query, const Tensor& values, const Tensor& offsets, int64_t max_length,
                                   bool need_alignments) {
  STD_TORCH_CHECK(values.dim() == 2, "values must have 2 axes");
  const int64_t B = score.B, Tq = score.Tq, N = score.Tk, D = values.size(1);
  const Dtype dtype = score.query.dtype;
  const StridedView3 rows = array(values, "values", dtype, {N, D});
  const Sentences sentences(offsets, B, N);
  STD_TORCH_CHECK(max_length == 0 || sentences.longest() <= max_length, "memory_offsets has a longer sentence");
  Tensor context = output(query, {B, Tq, D});
  Tensor alignments = !need_alignments ? output(query, {0})
                      : max_length > 0 ? output(query, {B, Tq, max_length})
                                       : output(query, {Tq * N});
  if (B * Tq == 0) return {context, alignments};
  void *to_context = context.mutable_data_ptr(), *to_alignments = data_if(need_alignments, alignments);
  sentences.for_each(Tq * (score.A + D), [&](int64_t b) {
    const int64_t start = sentences.start(b);
    AttentionForward<Score> op{of_sentence(score, sentences, b),
                               D,
                               from(rows, start * rows.stride[1]),
                               AttentionMask{},
                               from(to_context, dtype, b * Tq * D),
                               from(to_alignments, dtype, max_length > 0 ? b * Tq * max_length : Tq * start)};
    op.alignments_columns = max_length;
    kernel(op);
  });
  return {context, alignments};
}

struct Backward {
  const std::optional<Tensor>&grad_context, &grad_alignments;
  const Tensor &query, &keys, &values, &offsets, &alignments;
  bool need_query, need_memory;
};

// Alignments or their gradients, padded or packed.
class Alignments {
 public:
  Alignments(const std::optional<Tensor>& t, const char* name, const Scores& n)
      : packed_(t && t->dim() == 1), Tq_(n.Tq) {
    if (t)
      a_ = packed_ ? array(t, name, n.query.dtype, {n.Tq * n.Tk})
                   : array(t, name, n.query.dtype, {n.B, n.Tq, t->size(2)});
  }

  StridedView3 of(const Sentences& sentences, int64_t b) const {
    if (!packed_) return from(a_, b * a_.stride[0]);
    StridedView3 one = from(a_, Tq_ * sentences.start(b) * a_.stride[2]);
    one.stride[1] = sentences.steps(b) * a_.stride[2];
    return one;
  }

 private:
  StridedView3 a_;
  bool packed_;
  int64_t Tq_;
};

// Returns the gradients of query, keys and values. gradients_of(b): the outputs for the gradients of the score's own
// arguments from sentence b.
template <class Score, class GradientsOf>
std::tuple<Tensor, Tensor, Tensor> backward(void (*kernel)(const AttentionBackward<Score>&), const Score& score,
                                            const Backward& of, const GradientsOf& gradients_of) {
  STD_TORCH_CHECK(of.values.dim() == 2, "values must have 2 axes");
  const int64_t B = score.B, Tq = score.Tq, N = score.Tk, A = score.A, D = of.values.size(1);
  const Dtype dtype = score.query.dtype;
  const Sentences sentences(of.offsets, B, N);
  const StridedView3 values = array(of.values, "values", dtype, {N, D});
  const StridedView3 grad_context = array(of.grad_context, "grad_context", dtype, {B, Tq, D});
  const Alignments alignments(of.alignments, "alignments", score);
  const Alignments grad_alignments(of.grad_alignments, "grad_alignments", score);
  Tensor dquery = output_if(of.need_query, of.query, {B, Tq, A});
  Tensor dkeys = output_if(of.need_memory, of.keys, {N, A});
  Tensor dvalues = output_if(of.need_memory, of.values, {N, D});
  if (B * Tq * N == 0) {
    for (Tensor* t : {&dquery, &dkeys, &dvalues}) torch::stable::zero_(*t);
  } else if (of.need_query || of.need_memory) {
    void *to_query = data_if(of.need_query, dquery), *to_keys = data_if(of.need_memory, dkeys),
         *to_values = data_if(of.need_memory, dvalues);
    sentences.for_each(2 * Tq * (A + D), [&](int64_t b) {
      const int64_t start = sentences.start(b);
      void* dq = from(to_query, dtype, b * Tq * A);
      if (sentences.steps(b) == 0) {
        if (dq != nullptr) std::memset(dq, 0, Tq * A * item_size(dtype));
        return;
      }
      kernel({of_sentence(score, sentences, b), gradients_of(b), D, from(values, start * values.stride[1]),
              AttentionMask{}, alignments.of(sentences, b), from(grad_context, b * grad_context.stride[0]),
              grad_alignments.of(sentences, b), dq, from(to_keys, dtype, start * A),
              from(to_values, dtype, start * D)});
    });
  }
  return {dquery, dkeys, dvalues};
}

// The gradient of v or bias: one part per sentence, in float or double, summed in order.
class Sum {
 public:
  Sum(const Tensor& v, int64_t B, bool needed)
      : n_(needed ? v.size(0) : 0),
        wide_(v.scalar_type() == ScalarType::Double ? Dtype::float64 : Dtype::float32),
        result_(output_if(needed, v, {v.size(0)})),
        parts_(B * n_ * item_size(wide_)) {}

  void* part(int64_t b) { return parts_.empty() ? nullptr : from(parts_.data(), wide_, b * n_); }

  Tensor result() {
    if (n_ == 0) return result_;
    const ScalarType type = wide_ == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
    const bool direct = result_.scalar_type() == type;
    Tensor sum = direct ? result_ : output(result_, {n_}, type);
    wide_ == Dtype::float64 ? add(static_cast<double*>(sum.mutable_data_ptr()))
                            : add(static_cast<float*>(sum.mutable_data_ptr()));
    if (!direct) torch::stable::copy_(result_, sum);
    return result_;
  }

 private:
  template <typename T>
  void add(T* sum) const {
    std::fill(sum, sum + n_, T(0));
    const T* part = reinterpret_cast<const T*>(parts_.data());
    for (const T* end = part + parts_.size() / sizeof(T); part != end; part += n_)
      for (int64_t i = 0; i < n_; ++i) sum[i] += part[i];
  }

  int64_t n_;
  Dtype wide_;
  Tensor result_;
  std::vector<char> parts_;  // zeros
};

template <class Score>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> vector_backward(void (*kernel)(const AttentionBackward<Score>&),
                                                                   const Score& score, const Backward& of,
                                                                   const Tensor& v) {
  Sum dv(v, score.B, of.need_query), dbias(v, score.B, of.need_query && score.bias);
  auto [dquery, dkeys, dvalues] =
      backward(kernel, score, of, [&](int64_t b) { return VectorGradients{dv.part(b), dbias.part(b), true}; });
  return {dquery, dkeys, dvalues, dv.result(), dbias.result()};
}

// The ops -------------------------------------------------------------------------------------------------------------

// The ops of a score S with a score vector, Additive or Activated. Own: the types of its further arguments.
template <class S, class... Own>
struct PackedOps {
  static std::tuple<Tensor, Tensor> attention(Tensor query, Tensor keys, Tensor values, Tensor v,
                                              std::optional<Tensor> bias, Own... own, int64_t max_length,
                                              Tensor offsets, bool need_alignments) {
    const CallContext call(query);
    return forward((call.kernels().*S::kKernels).attention, S::of(packed_scores(query, keys, v, bias), own...), query,
                   values, offsets, max_length, need_alignments);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(std::optional<Tensor> grad_context,
                                                                     std::optional<Tensor> grad_alignments,
                                                                     Tensor query, Tensor keys, Tensor values, Tensor v,
                                                                     std::optional<Tensor> bias, Own... own, int64_t,
                                                                     Tensor offsets, Tensor alignments, bool need_query,
                                                                     bool need_memory) {
    const CallContext call(query);
    return vector_backward(
        (call.kernels().*S::kKernels).attention_backward, S::of(packed_scores(query, keys, v, bias), own...),
        {grad_context, grad_alignments, query, keys, values, offsets, alignments, need_query, need_memory}, v);
  }
};

using AdditivePackedOps = PackedOps<Additive>;
using ActivatedPackedOps = PackedOps<Activated, int64_t, double>;

std::tuple<Tensor, Tensor> dot(Tensor query, Tensor keys, Tensor values, double scale, int64_t max_length,
                               Tensor offsets, bool need_alignments) {
  const CallContext call(query);
  return forward(call.kernels().dot.attention, DotScores{packed_scores(query, keys), scale}, query, values, offsets,
                 max_length, need_alignments);
}

std::tuple<Tensor, Tensor, Tensor> dot_backward(std::optional<Tensor> grad_context,
                                                std::optional<Tensor> grad_alignments, Tensor query, Tensor keys,
                                                Tensor values, double scale, int64_t, Tensor offsets, Tensor alignments,
                                                bool need_query, bool need_memory) {
  const CallContext call(query);
  return backward(call.kernels().dot.attention_backward, DotScores{packed_scores(query, keys), scale},
                  {grad_context, grad_alignments, query, keys, values, offsets, alignments, need_query, need_memory},
                  [](int64_t) { return DotScores::Gradients{}; });
}

}  // namespace
}  // namespace attn

STABLE_TORCH_LIBRARY_IMPL(attn_kernels, ATTN_DISPATCH_KEY, m) {
  m.impl(ATTN_OVERLOAD("additive_attention_packed"), TORCH_BOX(&attn::AdditivePackedOps::attention));
  m.impl(ATTN_OVERLOAD("additive_attention_packed_backward"), TORCH_BOX(&attn::AdditivePackedOps::backward));
  m.impl(ATTN_OVERLOAD("activated_attention_packed"), TORCH_BOX(&attn::ActivatedPackedOps::attention));
  m.impl(ATTN_OVERLOAD("activated_attention_packed_backward"), TORCH_BOX(&attn::ActivatedPackedOps::backward));
  m.impl(ATTN_OVERLOAD("dot_attention_packed"), TORCH_BOX(&attn::dot));
  m.impl(ATTN_OVERLOAD("dot_attention_packed_backward"), TORCH_BOX(&attn::dot_backward));
}
