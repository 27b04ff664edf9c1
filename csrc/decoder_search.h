// Greedy and beam search on DecoderStep, with the same results as attn_kernels/seq2seq/search.py. The formulas and
// their sources are documented there. Here the rest of a step is fast, too, which matters once products are cheap.
#pragma once

#include <algorithm>
#include <limits>
#include <memory>

#include "decoder_step.h"

namespace attn {

struct SearchOptions {
  int64_t bos, eos, max_length, beam_size, num_hypotheses;
  double length_penalty, coverage_penalty;
  bool early_stopping;

  // The divisor of the log-probability of `length` tokens, eos included.
  double length_factor(int64_t length) const { return std::pow(static_cast<double>(5 + length) / 6, length_penalty); }
};

constexpr double kImpossible = -std::numeric_limits<double>::infinity();

// The record of a step of n sentences: it extended w hypotheses of each sentence to `made` new ones.
template <typename T>
struct SearchStep {
  std::vector<int64_t> sentences;  // (n,), in order
  int64_t w, made;
  std::vector<int32_t> tokens;      // (n, made), the last of each new hypothesis
  std::vector<int64_t> parents;     // (n, made), the hypothesis that it continues
  std::unique_ptr<T[]> alignments;  // (n, w, S), of the w extended hypotheses

  // The index of sentence b, which must be among `sentences`.
  int64_t place(int64_t b) const { return std::lower_bound(sentences.begin(), sentences.end(), b) - sentences.begin(); }
};

// A finished hypothesis: its score with penalties, its number of tokens without eos, and its index among the hypotheses
// of that length.
struct Finished {
  double score = kImpossible;
  int64_t length = 0, slot = 0;
};

template <typename T>
class DecoderSearch {
 public:
  // allowed: (B, S), 0 in padding; empty if there is no padding.
  DecoderSearch(DecoderStep<T>& step, const SearchOptions& options, int64_t batch, int64_t source, int64_t vocabulary,
                const std::vector<char>& allowed)
      : step_(step),
        options_(options),
        batch_(batch),
        source_(source),
        vocabulary_(vocabulary),
        allowed_(allowed),
        finished_(batch, std::vector<Finished>(options.beam_size)) {}

  // Returns whether no log-probability was NaN. The search stops at the first NaN.
  bool run() {
    for (int64_t b = 0; b < batch_; ++b) sentences_.push_back(b);
    tokens_.assign(batch_, static_cast<int32_t>(options_.bos));
    const bool is_greedy = options_.beam_size == 1 && options_.length_penalty == 0 && options_.coverage_penalty == 0;
    return is_greedy ? greedy() : beams();
  }

  int64_t steps() const { return static_cast<int64_t>(history_.size()); }
  const Finished& found(int64_t b, int64_t k) const { return finished_[b][k]; }

  // Writes the tokens (length,) and alignments (length, S) of one finished hypothesis.
  void trace(int64_t b, const Finished& hypothesis, int64_t* tokens, T* alignments) const {
    int64_t slot = hypothesis.slot;
    for (int64_t t = hypothesis.length - 1; t >= 0; --t) {
      const SearchStep<T>& step = history_[t];
      const int64_t place = step.place(b), at = place * step.made + slot;
      tokens[t] = step.tokens[at];
      slot = step.parents.empty() ? slot : step.parents[at];
      std::copy_n(step.alignments.get() + (place * step.w + slot) * source_, source_, alignments + t * source_);
    }
  }

 private:
  struct Candidate {
    double score, total;  // score: without penalties; total: with penalties
    int64_t parent;
    int32_t token;
  };

  // A step of all hypotheses, with the `count` likeliest tokens of each. Returns whether no log-probability is NaN.
  bool advance(int64_t count) {
    const int64_t n = static_cast<int64_t>(sentences_.size()), R = static_cast<int64_t>(tokens_.size());
    SearchStep<T> step{sentences_, R / n, 0, {}, {}, std::unique_ptr<T[]>(new T[R * source_])};
    log_probabilities_.resize(R * count);
    best_.resize(R * count);
    step_.run(tokens_, sentences_, count, step.alignments.get(), log_probabilities_.data(), best_.data());
    history_.push_back(std::move(step));
    // A NaN among the logits makes the sum NaN, and with it every log-probability of the row.
    return std::none_of(log_probabilities_.begin(), log_probabilities_.end(), [](double x) { return std::isnan(x); });
  }

  bool greedy() {
    std::vector<double> scores(batch_, 0.0);
    for (int64_t length = 0; length < options_.max_length && !sentences_.empty(); ++length) {
      if (!advance(1)) return false;
      history_.back().made = 1;
      history_.back().tokens = best_;
      std::vector<int64_t> stay;
      for (size_t i = 0; i < sentences_.size(); ++i) {
        const int64_t b = sentences_[i];
        scores[b] += static_cast<T>(log_probabilities_[i]);
        const bool ends = best_[i] == options_.eos;
        finished_[b][0] = {scores[b], ends ? length : length + 1, 0};
        if (!ends) stay.push_back(static_cast<int64_t>(i));
      }
      tokens_.clear();
      for (const int64_t i : stay) tokens_.push_back(best_[i]);
      go_on_with(stay);
      step_.reorder(stay);
    }
    return true;
  }

  bool beams() {
    const int64_t K = options_.beam_size;
    std::vector<double> scores(batch_, 0.0);  // (n, w)
    int64_t w = 1;
    if (options_.coverage_penalty > 0) {
      coverage_.assign(batch_ * source_, 0.0);
      for (size_t i = 0; i < allowed_.size(); ++i) coverage_[i] = allowed_[i] ? 0.0 : 1.0;
    }
    for (int64_t length = 1; !sentences_.empty(); ++length) {
      const int64_t each = std::min(2 * K, vocabulary_);
      if (!advance(each)) return false;
      const bool is_last = length == options_.max_length;
      const int64_t n = static_cast<int64_t>(sentences_.size());
      const int64_t count = std::min(2 * K, w * each), made = std::min(K, count);
      const std::vector<double> looked = look(n, w);
      const double factor = options_.length_factor(length), last_factor = options_.length_factor(options_.max_length);
      SearchStep<T>& step = history_.back();
      step.made = made;
      std::vector<double> new_scores;
      std::vector<int32_t> new_tokens;
      std::vector<int64_t> stay, rows;
      for (int64_t i = 0; i < n; ++i) {
        extend(scores.data() + i * w, i, w, each, count);
        std::vector<Finished>& finished = finished_[sentences_[i]];
        for (Candidate& c : candidates_) {
          c.total = c.score / factor + (looked.empty() ? 0.0 : looked[i * w + c.parent]);
        }
        for (int64_t k = 0; k < std::min(K, count); ++k) {
          const Candidate& c = candidates_[k];
          if (c.token == options_.eos) add(finished, {c.total, length - 1, c.parent});
        }
        // The unfinished candidates, best first. Remaining places are filled with finished ones of score kImpossible.
        std::stable_partition(candidates_.begin(), candidates_.end(),
                              [this](const Candidate& c) { return c.token != options_.eos; });
        for (int64_t k = 0; k < made; ++k) {
          Candidate& c = candidates_[k];
          if (c.token == options_.eos) c.score = c.total = kImpossible;
          step.tokens.push_back(c.token);
          step.parents.push_back(c.parent);
          if (is_last) add(finished, {c.total, length, k});
        }
        const double best = candidates_[0].score;
        // An upper bound of every later score: no token increases a log-probability, no length has a larger divisor,
        // and the coverage term is at most 0.
        const bool done = best / last_factor <= finished[options_.num_hypotheses - 1].score ||
                          (options_.early_stopping && finished.back().score > kImpossible);
        if (is_last || done) continue;
        stay.push_back(i);
        for (int64_t k = 0; k < made; ++k) {
          new_scores.push_back(candidates_[k].score);
          new_tokens.push_back(candidates_[k].token);
          rows.push_back(i * w + candidates_[k].parent);
        }
      }
      scores.swap(new_scores);
      tokens_.swap(new_tokens);
      w = made;
      go_on_with(stay);
      step_.reorder(rows);
      reorder_coverage(rows);
    }
    return true;
  }

  // The `count` likeliest continuations of sentence i, best first; equal ones keep their order. scores: (w,).
  void extend(const double* scores, int64_t i, int64_t w, int64_t each, int64_t count) {
    candidates_.clear();
    for (int64_t h = 0; h < w; ++h)
      for (int64_t j = 0; j < each; ++j) {
        const int64_t at = (i * w + h) * each + j;
        candidates_.push_back({scores[h] + static_cast<T>(log_probabilities_[at]), 0.0, h, best_[at]});
      }
    std::stable_sort(candidates_.begin(), candidates_.end(),
                     [](const Candidate& a, const Candidate& b) { return a.score > b.score; });
    candidates_.resize(count);
  }

  // Adds the alignments of the last step to the coverage. Returns the coverage terms of the hypotheses, (n, w), or an
  // empty vector without a coverage penalty.
  std::vector<double> look(int64_t n, int64_t w) {
    if (!(options_.coverage_penalty > 0)) return {};
    const T* alignments = history_.back().alignments.get();
    std::vector<double> terms(n * w);
    for (int64_t r = 0; r < n * w; ++r) {
      double total = 0;
      for (int64_t j = 0; j < source_; ++j) {
        const double looked = coverage_[r * source_ + j] += static_cast<double>(alignments[r * source_ + j]);
        constexpr double smallest = std::numeric_limits<float>::min();  // replaces a coverage of 0
        if (looked < 1) total += std::log(std::max(looked, smallest));
      }
      terms[r] = options_.coverage_penalty * total;
    }
    return terms;
  }

  void reorder_coverage(const std::vector<int64_t>& rows) {
    if (coverage_.empty()) return;
    std::vector<double> reordered(rows.size() * source_);
    for (size_t r = 0; r < rows.size(); ++r)
      std::copy_n(coverage_.begin() + rows[r] * source_, source_, reordered.begin() + r * source_);
    coverage_.swap(reordered);
  }

  void go_on_with(const std::vector<int64_t>& places) {
    if (places.size() == sentences_.size()) return;
    std::vector<int64_t> left;
    for (const int64_t i : places) left.push_back(sentences_[i]);
    sentences_.swap(left);
  }

  // Inserts a hypothesis into the list of the best, best first. Among equals, earlier ones come first.
  static void add(std::vector<Finished>& finished, const Finished& one) {
    if (!(one.score > finished.back().score)) return;
    size_t at = finished.size() - 1;
    for (; at > 0 && one.score > finished[at - 1].score; --at) finished[at] = finished[at - 1];
    finished[at] = one;
  }

  DecoderStep<T>& step_;
  SearchOptions options_;
  int64_t batch_, source_, vocabulary_;
  const std::vector<char>& allowed_;
  std::vector<int64_t> sentences_;  // (n,), the unfinished ones
  std::vector<int32_t> tokens_;     // (n, w)
  std::vector<double> log_probabilities_, coverage_;
  std::vector<int32_t> best_;
  std::vector<Candidate> candidates_;
  std::vector<std::vector<Finished>> finished_;
  std::vector<SearchStep<T>> history_;
};

}  // namespace attn
