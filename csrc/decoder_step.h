// A step of the seq2seq decoder for a search on the CPU: embedding, cells, attention, attentional vector, and the
// likeliest tokens. It calls kernels on buffers that are allocated once. It computes the same as FastDecoder.step of
// attn_kernels/seq2seq/fused/inference.py, without calls of PyTorch.
#pragma once

#include <cmath>
#include <functional>
#include <utility>

#include "cell_step.h"

namespace attn {

// H units, G = 4 H gates of an LSTM or 3 H of a GRU.
template <typename T>
struct DecoderLayer {
  Weight x;            // (G, inputs), for inputs other than the token
  int64_t inputs;      // 0 in the first layer without input feeding
  Weight h;            // (G, H)
  const T* bias;       // (G,), of the products with inputs; for an LSTM, the sum of both biases
  const T* recurrent;  // (G,), of the product with the state; GRU only, otherwise null
};

template <typename T>
struct DecoderWeights {
  int64_t hidden_size, memory_size, vocabulary, embedding_size, query_size;
  bool is_lstm, input_feeding;
  std::vector<DecoderLayer<T>> layers;
  RowsView embedding;              // (vocabulary, embedding_size)
  Weight of_token;                 // (G, embedding_size): the first layer's weight of the embedding
  Weight query;                    // (query_size, H); absent if the state is not projected
  double query_factor, query_eps;  // a query is divided by its norm if that is above query_eps >= 0
  Weight of_context, of_state;     // (H, memory_size), absent if values are projected; (H, H)
  Weight output;                   // (vocabulary, H)
  const T* output_bias;            // or null
};

// Attention of `queries` queries for each of the sentences [first, first + count). All arrays are contiguous.
using Attend =
    std::function<void(int64_t first, int64_t count, int64_t queries, void* query, void* context, void* alignments)>;

// The state of R rows, which are K hypotheses of each of n sentences, and the step that updates it. R is at most
// `most`. table_bytes: the size limit of the cache of products with embeddings.
template <typename T>
class DecoderStep {
 public:
  DecoderStep(const Kernels& kernels, const DecoderWeights<T>& weights, Attend attend, int64_t source, int64_t most,
              int64_t table_bytes)
      : kernels_(kernels),
        weights_(weights),
        attend_(std::move(attend)),
        source_(source),
        cells_(kernels, weights.is_lstm, weights.hidden_size, most),
        query_(most, weights.query_size),
        context_(most, weights.memory_size),
        feed_(most, weights.hidden_size),
        place_(weights.vocabulary, -1),
        table_rows_(table_bytes / (cells_.gates() * static_cast<int64_t>(sizeof(T)))) {
    for (size_t l = 0; l < weights.layers.size(); ++l) {
      hidden_.emplace_back(most, weights.hidden_size);
      cell_.emplace_back(most, weights.is_lstm ? weights.hidden_size : 0);
    }
    spare_ = Matrix<T>(most, weights.hidden_size);
  }

  std::vector<Matrix<T>>& hidden() { return hidden_; }
  std::vector<Matrix<T>>& cell() { return cell_; }
  Matrix<T>& feed() { return feed_; }

  // tokens: (R,), the inputs of the step. sentences: (n,), in order. Writes alignments (R, S), and the
  // log-probabilities and tokens, each (R, count), of the `count` likeliest next tokens, best first.
  void run(const std::vector<int32_t>& tokens, const std::vector<int64_t>& sentences, int64_t count, T* alignments,
           double* log_probabilities, int32_t* best) {
    const int64_t R = static_cast<int64_t>(tokens.size());
    for (size_t l = 0; l < weights_.layers.size(); ++l) run_layer(l, tokens);
    Matrix<T>& top = hidden_.back();
    run_attention(R, sentences, alignments);
    std::vector<void*> context = pointers(context_, R), feed = pointers(feed_, R), states = pointers(top, R);
    const int64_t H = weights_.hidden_size;
    if (weights_.of_context) {
      product(R, H, weights_.memory_size, context, weights_.of_context, nullptr, feed);
      context = feed;
    }
    product(R, H, H, states, weights_.of_state, &context, feed, true);
    kernels_.likeliest_tokens({R, weights_.vocabulary, H, count, dtype_as<T>, feed.data(), weights_.output.read(),
                               weights_.output_bias, log_probabilities, best});
  }

  // New row r is old row from[r].
  void reorder(const std::vector<int64_t>& from) {
    bool same = true;
    for (size_t r = 0; r < from.size(); ++r) same = same && from[r] == static_cast<int64_t>(r);
    if (same) return;
    for (auto& state : hidden_) reorder(state, from);
    for (auto& state : cell_) reorder(state, from);
    if (weights_.input_feeding) reorder(feed_, from);
  }

 private:
  void product(int64_t R, int64_t n, int64_t k, const std::vector<void*>& x, const Weight& weight,
               const std::vector<void*>* added, const std::vector<void*>& out, bool tanh = false) {
    multiply<T>(kernels_, R, n, k, x, weight, added, out, tanh);
  }

  // The contribution of each token to the gates of the first layer, including the bias. Tokens repeat, so their
  // products are cached up to the limit of the table, and recomputed beyond it.
  std::vector<void*> gates_of(const std::vector<int32_t>& tokens) {
    std::vector<void*> rows(tokens.size()), x, out;
    std::vector<void*> bias;
    size_t beyond = 0;
    for (const int32_t token : tokens) {
      if (place_[token] >= 0) continue;
      if (static_cast<int64_t>(table_.size()) >= table_rows_) {
        ++beyond;
        continue;
      }
      place_[token] = static_cast<int32_t>(table_.size());
      table_.emplace_back(cells_.gates());
      x.push_back(embedding(token));
      out.push_back(table_.back().data());
    }
    if (beyond > 0) beyond_ = Matrix<T>(beyond, cells_.gates());
    for (size_t r = 0, b = 0; r < tokens.size(); ++r) {
      const int64_t place = place_[tokens[r]];
      if (place >= 0) {
        rows[r] = table_[place].data();
        continue;
      }
      rows[r] = beyond_.row(b++);
      x.push_back(embedding(tokens[r]));
      out.push_back(rows[r]);
    }
    if (!x.empty()) {
      bias.assign(x.size(), const_cast<T*>(weights_.layers[0].bias));
      product(static_cast<int64_t>(x.size()), cells_.gates(), weights_.embedding_size, x, weights_.of_token, &bias,
              out);
    }
    return rows;
  }

  void* embedding(int32_t token) const {
    return static_cast<T*>(weights_.embedding.data) + token * weights_.embedding.stride;
  }

  void run_layer(size_t l, const std::vector<int32_t>& tokens) {
    const DecoderLayer<T>& layer = weights_.layers[l];
    const int64_t R = static_cast<int64_t>(tokens.size());
    std::vector<void*> added = l == 0 ? gates_of(tokens) : std::vector<void*>(R, const_cast<T*>(layer.bias));
    if (layer.inputs > 0) {
      const std::vector<void*> gates = cells_.buffer(R);
      const std::vector<void*> inputs = pointers(l == 0 ? feed_ : hidden_[l - 1], R);
      product(R, cells_.gates(), layer.inputs, inputs, layer.x, &added, gates);
      added = gates;
    }
    cells_.run(R, added, layer.h, layer.recurrent, hidden_[l], cell_[l]);
  }

  void run_attention(int64_t R, const std::vector<int64_t>& sentences, T* alignments) {
    Matrix<T>& states = hidden_.back();
    const int64_t A = weights_.query_size, n = static_cast<int64_t>(sentences.size()), K = R / n;
    if (weights_.query)
      product(R, A, weights_.hidden_size, pointers(states, R), weights_.query, nullptr, pointers(query_, R));
    else
      std::memcpy(query_.row(0), states.row(0), R * A * sizeof(T));
    if (weights_.query_eps >= 0 || weights_.query_factor != 1)
      for (int64_t r = 0; r < R; ++r) scale(query_.row(r), A);
    for (int64_t first = 0, end; first < n; first = end) {  // one call for adjacent sentences
      for (end = first + 1; end < n && sentences[end] == sentences[end - 1] + 1;) ++end;
      attend_(sentences[first], end - first, K, query_.row(first * K), context_.row(first * K),
              alignments + first * K * source_);
    }
  }

  void scale(T* query, int64_t A) const {
    T factor = static_cast<T>(weights_.query_factor);
    if (weights_.query_eps >= 0) {
      T squares = 0;
      for (int64_t a = 0; a < A; ++a) squares += query[a] * query[a];
      if (squares > static_cast<T>(weights_.query_eps * weights_.query_eps)) factor /= std::sqrt(squares);
    }
    for (int64_t a = 0; a < A; ++a) query[a] *= factor;
  }

  void reorder(Matrix<T>& state, const std::vector<int64_t>& from) {
    if (state.columns == 0) return;
    for (size_t r = 0; r < from.size(); ++r) std::memcpy(spare_.row(r), state.row(from[r]), state.columns * sizeof(T));
    std::swap(spare_.data, state.data);
  }

  const Kernels& kernels_;
  const DecoderWeights<T>& weights_;
  Attend attend_;
  int64_t source_;
  std::vector<Matrix<T>> hidden_, cell_;
  CellStep<T> cells_;
  Matrix<T> query_, context_, feed_, spare_, beyond_;
  std::vector<int32_t> place_;  // the row of a token in the table, or -1
  std::vector<std::vector<T>> table_;
  int64_t table_rows_;
};

}  // namespace attn
