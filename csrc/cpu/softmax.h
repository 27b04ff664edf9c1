// The normaliser of attention, from a row of scores to alignments. Part of a SIMD level: see simd.h.
//
// attention.h takes a normaliser as a template argument, a class with
//   row(p, n)          the alignments of n > 0 attended scores p, in place
//   gradient(w, d, n)  d, the gradient of the alignments w, becomes the gradient of the scores, in place
#pragma once

#include "views.h"

namespace attn {
namespace ATTN_LEVEL {

// Longer sums are split into partial sums: the rounding errors of a single sum grow with its number of steps.
// Without fused multiply-adds, the portable level rounds twice for each step.
constexpr int64_t kMaxSummedSteps = ATTN_VECTOR_BYTES == 16 ? 256 : 2048;

// The sum of term(j), a vector, for j = 0, width, ... below n.
template <typename T, class Term>
ATTN_INLINE T sum_of_vectors(int64_t n, const Term& term) {
  Vec<T> total{};
  for (int64_t j = 0; j < n;) {
    const int64_t end = min(n, j + kMaxSummedSteps);
    Vec<T> part{};
    for (; j < end; j += width<T>) part += term(j);
    total += part;
  }
  return sum<T>(total);
}

struct Softmax {
  // p[0..n) = softmax(p[0..n)). p has room for whole vectors. n > 0.
  template <typename T>
  ATTN_INLINE static void row(T* p, int64_t n) {
    constexpr int64_t w = width<T>;
    const T infinity = static_cast<T>(__builtin_inf());
    if (n == 1) {
      *p = 1 + (*p - *p);  // NaN if *p is NaN or infinite
      return;
    }
    const int64_t end = padded<T>(n);
    T* last = p + end - w;
    const Vec<T> tail = first_lanes<T>(n - (end - w)) ? load(last) : broadcast(-infinity);
    if (n <= w) {
      const Vec<T> e = exp_nonpositive(tail - largest<T>(tail));
      return store(p, e * (1 / sum<T>(e)));
    }
    store(last, tail);
    Vec<T> top = tail;
    for (int64_t j = 0; j < end - w; j += w) top = maximum<T>(load(p + j), top);
    const T shift = largest<T>(top);
    const T factor = 1 / sum_of_vectors<T>(end, [&](int64_t j) {
                       const Vec<T> e = exp_nonpositive(load(p + j) - shift);
                       store(p + j, e);
                       return e;
                     });
    for (int64_t j = 0; j < end; j += w) store(p + j, load(p + j) * factor);
  }

  // d = w (d - delta), delta = sum w d / sum w, computed in two steps: the second corrects the rounding of the first.
  // There are two reasons: the sum of w is 1 only up to rounding to a low precision, and if all d are about equal, the
  // rounding error of their mean is as large as their differences.
  template <typename T>
  ATTN_INLINE static void gradient(const T* w, T* d, int64_t n) {
    if (n <= width<T>) {
      const Vec<T> weights = load_upto(w, n), grads = load_upto(d, n);
      const T total = sum<T>(weights);
      Vec<T> rest = grads - sum<T>(weights * grads);
      if (total != 0) rest -= sum<T>(weights * rest) / total;
      return store_upto(d, weights * rest, n);
    }
    const auto mean_above = [&](T delta) {
      return sum_of_vectors<T>(n,
                               [&](int64_t j) { return load_upto(w + j, n - j) * (load_upto(d + j, n - j) - delta); });
    };
    T delta = mean_above(0);
    const T total = sum_of_vectors<T>(n, [&](int64_t j) { return load_upto(w + j, n - j); });
    if (total != 0) delta += mean_above(delta) / total;
    for (int64_t j = 0; j < n; ++j) d[j] = w[j] * (d[j] - delta);
  }
};

}  // namespace ATTN_LEVEL
}  // namespace attn
