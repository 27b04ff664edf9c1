// decoder_search: the op of attn_kernels/recurrent_ops.py that searches with a seq2seq decoder, all steps in one call.
// rounded_blocks: the op that rounds weights for it. CPU only.
#include "decoder_search.h"

#include "binding.h"
#include "rows.h"

namespace attn {
namespace {

// The score's own arguments: v (and bias, prepared) of additive attention, or the scale of dot attention.
struct Score {
  const std::optional<Tensor>&v, &bias, &prepared;
  double scale;
};

struct Source {
  const Tensor &keys, &values;
  const std::optional<Tensor>&memory_lengths, &mask;
};

template <typename T>
const T* vector_of(const Tensor& t, const char* name, Dtype dtype, int64_t n) {
  check_shape(t, name, {n});
  STD_TORCH_CHECK(dtype_of(t, name) == dtype && t.is_contiguous(), name, " must be contiguous, of the dtype of keys");
  return static_cast<const T*>(t.const_data_ptr());
}

AttentionMask of_sentences(AttentionMask mask, int64_t first) {
  if (mask.lengths != nullptr)
    mask.lengths = static_cast<const char*>(mask.lengths) + first * mask.lengths_stride * (mask.lengths_are_64 ? 8 : 4);
  if (mask.mask != nullptr) mask.mask += first * mask.mask_stride[0];
  return mask;
}

StridedView3 of_sentences(StridedView3 a, int64_t first) {
  if (a) a.data = static_cast<const char*>(a.data) + first * a.stride[0] * item_size(a.dtype);
  return a;
}

// score: all its members except the sizes and query are set.
template <class AttentionScore>
Attend make_attend(void (*kernel)(const AttentionForward<AttentionScore>&), const AttentionScore& score, int64_t D,
                   const StridedView3& values, const AttentionMask& mask) {
  return [=](int64_t first, int64_t count, int64_t queries, void* query, void* context, void* alignments) {
    AttentionScore part = score;
    part.B = count;
    part.Tq = queries;
    part.query = {query, score.keys.dtype, {queries * score.A, score.A, 1}};
    part.keys = of_sentences(score.keys, first);
    if constexpr (std::is_same_v<AttentionScore, AdditiveScores>) part.prepared = of_sentences(score.prepared, first);
    kernel({part, D, of_sentences(values, first), of_sentences(mask, first), context, alignments});
  };
}

Attend make_attend(const Kernels& kernels, const Source& source, const Score& of, const AttentionMask& mask) {
  const int64_t B = source.keys.size(0), S = source.keys.size(1), A = source.keys.size(2), D = source.values.size(2);
  const Dtype dtype = dtype_of(source.keys, "keys");
  const Scores score{B, 1, S, A, {}, array(source.keys, "keys", dtype, {B, S, A})};
  const StridedView3 values = array(source.values, "values", dtype, {B, S, D});
  if (!of.v.has_value()) return make_attend(kernels.dot.attention, DotScores{score, of.scale}, D, values, mask);
  const PreparedSizes sizes(A, S, Dtype::float32);
  const StridedView3 prepared = array(of.prepared, "prepared", Dtype::float32, {B, sizes.rows, sizes.columns});
  STD_TORCH_CHECK(!prepared || (prepared.stride[1] == sizes.columns && prepared.stride[2] == 1),
                  "prepared must be what additive_prepare returned");
  const VectorScores with_vector{score, array(of.v, "v", dtype, {A}), array(of.bias, "bias", dtype, {A}), {}};
  return make_attend(kernels.additive.attention, AdditiveScores{with_vector, prepared}, D, values, mask);
}

std::vector<char> allowed_steps(const AttentionMask& mask, int64_t B, int64_t S) {
  std::vector<char> allowed;
  if (mask.lengths == nullptr && mask.mask == nullptr) return allowed;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t j = 0; j < S; ++j)
      allowed.push_back(j < mask.length(b, S) &&
                        (mask.mask == nullptr || mask.mask[b * mask.mask_stride[0] + j * mask.mask_stride[2]]));
  return allowed;
}

template <typename T>
void copy_rows(const Tensor& from, const char* name, int64_t B, Matrix<T>& to) {
  const RowsView source = rows(from, name, sizeof(T) == 8 ? Dtype::float64 : Dtype::float32, B, to.columns);
  for (int64_t b = 0; b < B; ++b)
    std::copy_n(static_cast<const T*>(source.data) + b * source.stride, to.columns, to.row(b));
}

struct Parameters {
  const std::vector<Tensor>& layers;
  const Tensor &embedding, &of_token;
  const std::optional<Tensor>& query;
  double query_factor, query_eps;
  const std::optional<Tensor>& of_context;
  const Tensor &of_state, &output;
  const std::optional<Tensor>& output_bias;
  const std::vector<Tensor>& blocks;  // see Weights
};

// Reads weights in place or, if blocks are given, as blocks. There is one tensor of blocks per weight, in the order of
// the calls. It is empty for a weight that the search does not read.
class Weights {
 public:
  Weights(const std::vector<Tensor>& blocks, Dtype dtype) : blocks_(blocks), dtype_(dtype) {}

  Weight operator()(const Tensor& t, const char* name, int64_t n, int64_t k) {
    const RowsView lies = rows(t, name, dtype_, n, k);
    if (blocks_.empty()) return Weight(lies);
    const Tensor& blocks = next();
    STD_TORCH_CHECK(
        dtype_of(blocks, name) == Dtype::float32 && blocks.is_contiguous() && blocks.numel() == words_of_blocks(n, k),
        name, " has blocks of another weight");
    return Weight(lies, static_cast<const uint32_t*>(blocks.const_data_ptr()));
  }

  Weight operator()(const std::optional<Tensor>& t, const char* name, int64_t n, int64_t k) {
    if (t.has_value()) return (*this)(*t, name, n, k);
    if (!blocks_.empty()) next();
    return Weight();
  }

 private:
  const Tensor& next() {
    STD_TORCH_CHECK(at_ < blocks_.size(), "there must be blocks of every weight");
    return blocks_[at_++];
  }

  const std::vector<Tensor>& blocks_;
  const Dtype dtype_;
  size_t at_ = 0;
};

// Four tensors per layer: x (G, inputs), h (G, H), bias (G,), and the bias (G,) of the product with the state. An LSTM
// includes the last in the bias.
template <typename T>
DecoderWeights<T> weights_of(const Parameters& p, const Source& source, bool is_lstm, bool input_feeding, Dtype dtype,
                             Weights& weight) {
  const int64_t H = p.of_state.size(0), G = (is_lstm ? 4 : 3) * H, D = source.values.size(2), A = source.keys.size(2);
  const int64_t V = p.output.size(0), E = p.embedding.size(1);
  STD_TORCH_CHECK(p.blocks.empty() || dtype == Dtype::float32, "only float32 is rounded to bfloat16");
  STD_TORCH_CHECK(!p.layers.empty() && p.layers.size() % 4 == 0, "layers must be four tensors for each");
  std::vector<DecoderLayer<T>> layers;
  for (size_t l = 0; l < p.layers.size(); l += 4) {
    const int64_t inputs = l > 0 || input_feeding ? H : 0;
    layers.push_back({weight(p.layers[l], "x", G, inputs), inputs, weight(p.layers[l + 1], "h", G, H),
                      vector_of<T>(p.layers[l + 2], "bias", dtype, G),
                      vector_of<T>(p.layers[l + 3], "recurrent bias", dtype, G)});
  }
  STD_TORCH_CHECK(p.query.has_value() || A == H, "without a projection keys must have the size of states");
  STD_TORCH_CHECK(p.of_context.has_value() || D == H, "projected values must have the size of states");
  const T* output_bias = p.output_bias.has_value() ? vector_of<T>(*p.output_bias, "output_bias", dtype, V) : nullptr;
  STD_TORCH_CHECK(p.embedding.size(0) >= V, "every output must have an embedding");
  return {H,
          D,
          V,
          E,
          A,
          is_lstm,
          input_feeding,
          std::move(layers),
          rows(p.embedding, "embedding", dtype, p.embedding.size(0), E),
          weight(p.of_token, "of_token", G, E),
          weight(p.query, "query", A, H),
          p.query_factor,
          p.query_eps,
          weight(p.of_context, "of_context", H, D),
          weight(p.of_state, "of_state", H, H),
          weight(p.output, "output", V, H),
          output_bias};
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Tensor output_of_integers(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()),
                                  ScalarType::Long);
}

template <typename T>
Results search(const Parameters& parameters, const Source& source, const Score& score,
               const std::vector<Tensor>& hidden, const std::vector<Tensor>& cell, const std::optional<Tensor>& feed,
               const SearchOptions& options, int64_t table_bytes) {
  const CallContext call(source.keys);
  const int64_t B = source.keys.size(0), S = source.keys.size(1);
  const Dtype dtype = dtype_of(source.keys, "keys");
  const AttentionMask mask = attended(source.memory_lengths, source.mask, B, 1, S);
  Weights of_parameters(parameters.blocks, dtype);
  const DecoderWeights<T> weights =
      weights_of<T>(parameters, source, !cell.empty(), feed.has_value(), dtype, of_parameters);
  STD_TORCH_CHECK(hidden.size() == weights.layers.size() && (cell.empty() || cell.size() == hidden.size()),
                  "every layer must have a state");
  STD_TORCH_CHECK(B > 0, "there must be a sentence");
  STD_TORCH_CHECK(0 <= options.bos && options.bos < weights.vocabulary, "bos must be a token");
  DecoderStep<T> step(call.kernels(), weights, make_attend(call.kernels(), source, score, mask), S,
                      B * options.beam_size, table_bytes);
  for (size_t l = 0; l < hidden.size(); ++l) {
    copy_rows(hidden[l], "hidden", B, step.hidden()[l]);
    if (!cell.empty()) copy_rows(cell[l], "cell", B, step.cell()[l]);
  }
  if (feed.has_value()) copy_rows(*feed, "feed", B, step.feed());
  const std::vector<char> allowed = allowed_steps(mask, B, S);
  DecoderSearch<T> search(step, options, B, S, weights.vocabulary, allowed);
  const bool are_numbers = search.run();
  const int64_t N = are_numbers ? options.num_hypotheses : 0, steps = search.steps();
  Tensor tokens = output_of_integers(source.keys, {B, N, steps}), lengths = output_of_integers(source.keys, {B, N});
  Tensor scores = output(source.keys, {B, N}, ScalarType::Double);
  Tensor alignments = output(source.keys, {B * N, steps, S});
  auto* to_tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  auto* to_lengths = static_cast<int64_t*>(lengths.mutable_data_ptr());
  auto* to_scores = static_cast<double*>(scores.mutable_data_ptr());
  auto* to_alignments = static_cast<T*>(alignments.mutable_data_ptr());
  for (int64_t i = 0; i < B * N; ++i) {
    const Finished& found = search.found(i / N, i % N);
    to_scores[i] = found.score;
    to_lengths[i] = found.length;
    if (found.score > kImpossible) search.trace(i / N, found, to_tokens + i * steps, to_alignments + i * steps * S);
  }
  return {tokens, lengths, scores, alignments};
}

Results decoder_search(std::vector<Tensor> layers, Tensor embedding, Tensor of_token, std::optional<Tensor> query,
                       double query_factor, double query_eps, std::optional<Tensor> of_context, Tensor of_state,
                       Tensor output, std::optional<Tensor> output_bias, Tensor keys, Tensor values,
                       std::optional<Tensor> v, std::optional<Tensor> bias, std::optional<Tensor> prepared,
                       double scale, std::optional<Tensor> memory_lengths, std::optional<Tensor> mask,
                       std::vector<Tensor> hidden, std::vector<Tensor> cell, std::optional<Tensor> feed, int64_t bos,
                       int64_t eos, int64_t max_length, int64_t beam_size, int64_t num_hypotheses,
                       double length_penalty, double coverage_penalty, bool early_stopping, int64_t table_bytes,
                       std::vector<Tensor> blocks) {
  STD_TORCH_CHECK(keys.dim() == 3 && values.dim() == 3, "keys and values must have 3 axes");
  const Parameters parameters{layers,     embedding, of_token, query,       query_factor, query_eps,
                              of_context, of_state,  output,   output_bias, blocks};
  const Source source{keys, values, memory_lengths, mask};
  const Score score{v, bias, prepared, scale};
  const SearchOptions options{
      bos, eos, max_length, beam_size, num_hypotheses, length_penalty, coverage_penalty, early_stopping};
  const Dtype dtype = dtype_of(keys, "keys");
  STD_TORCH_CHECK(dtype == Dtype::float32 || dtype == Dtype::float64, "keys must be float32 or float64");
  STD_TORCH_CHECK(max_length > 0 && 0 < num_hypotheses && num_hypotheses <= beam_size, "options must be checked");
  return dtype == Dtype::float64 ? search<double>(parameters, source, score, hidden, cell, feed, options, table_bytes)
                                 : search<float>(parameters, source, score, hidden, cell, feed, options, table_bytes);
}

Tensor rounded_blocks(Tensor weight) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight must have 2 axes");
  const int64_t n = weight.size(0), k = weight.size(1);
  const RowsView from = rows(weight, "weight", Dtype::float32, n, k);
  Tensor blocks = output(weight, {words_of_blocks(n, k)}, ScalarType::Float);
  CallContext(weight).kernels().rounded_blocks({n, k, from, static_cast<uint32_t*>(blocks.mutable_data_ptr())});
  return blocks;
}

}  // namespace
}  // namespace attn

STABLE_TORCH_LIBRARY_IMPL(attn_kernels, ATTN_DISPATCH_KEY, m) {
  m.impl(ATTN_OVERLOAD("rounded_blocks"), TORCH_BOX(&attn::rounded_blocks));
  m.impl(ATTN_OVERLOAD("decoder_search"), TORCH_BOX(&attn::decoder_search));
}
