// How a pair of query and step contributes to the gradients of scores with a score vector, for each activation. Part of
// a SIMD level: see simd.h.
#pragma once

#include "activated_attention_fwd.h"
#include "additive_attention_fwd.h"

namespace attn {
namespace ATTN_LEVEL {

// Stores e^x, e^{-x}.
template <typename T>
ATTN_INLINE void store_both_exponentials(T* e, Vec<T> x) {
  if constexpr (sizeof(T) == 4) {
    Vec<T> up, down;
    exp_both_ways(x, &up, &down);
    store(e, up);
    store(e + width<T>, down);
  }
}

// Each activation f has a class with these members. A pair with score gradient ds and x = q + k adds g = ds f'(x), up
// to a factor per unit (of_unit), to dq and dk, and ds f(x) to dv. kRefined: uses refined estimates of reciprocals, if
// they are faster than divisions (kernels.cpp).
//
// kClamped: limits the range of products of exponentials; unclamped(), for pairs that fits_unclamped or
// fits_row_unclamped accepts, does not.
template <typename T, bool kRefined, bool kClamped = true>
struct TanhPair {
  static constexpr T kGain = 4;

  static TanhPair<T, kRefined, false> unclamped() { return {}; }

  ATTN_INLINE static Vec<T> clamped(Vec<T> e) {
    if constexpr (kClamped) return at_most<T>(e, kMaxExponentialBackward);
    return e;
  }
  // Limits e^x to the square root of kMaxExponentialBackward.
  ATTN_INLINE static Vec<T> clamped_root(Vec<T> e) {
    constexpr float kMost = 0x1p39f;
    static_assert(kMost * kMost == kMaxExponentialBackward, "the limit of E");
    if constexpr (kClamped) return at_most<T>(e, kMost);
    return e;
  }

  // The gradient of a unit of query or key, computed from the sum of g.
  ATTN_INLINE static Vec<T> of_unit(Vec<T> v, Vec<T> sum) { return kGain * v * sum; }

  // Columnwise: the two vectors that are stored per vector x, and whether they can be used, given the largest |q| and
  // |k|. With divisions these are e^{2x} and e^{-2x}: the divider is the bottleneck then. With refined estimates they
  // are e^x and e^{-x}, whose sum C = 2 cosh(q + k) and difference S take three instructions, and g = ds / C^2,
  // ds tanh = ds S / C.
  ATTN_INLINE static void keep(T* e, Vec<T> x) { store_both_exponentials<T>(e, kRefined ? x : x + x); }
  ATTN_INLINE static bool fits_kept(T q, T k) {
    return sizeof(T) == 4 && q <= kMaxAbsExponential && k <= kMaxAbsExponential;
  }
  ATTN_INLINE static bool fits_unclamped(T q, T k) { return kClamped && q + k <= kMaxBoundUnclampedBackward; }
  ATTN_INLINE void add_kept(Vec<T> q_up, Vec<T> q_down, Vec<T> k_up, Vec<T> k_down, T ds, Vec<T>& dq, Vec<T>& dk,
                            Vec<T>& dv) const {
    if constexpr (kRefined) {
      const Vec<T> up = clamped_root(q_up * k_up), down = rounded(clamped_root(q_down * k_down));
      const Vec<T> r = refined_reciprocal(up + down), p = rounded(ds * r);
      dq += p * r;
      dk += p * r;
      dv += p * (up - down);
      return;
    }
    const Vec<T> up = clamped(q_up * k_up), down = clamped(q_down * k_down), g = ds / ((up + T(2)) + down);
    dq += g;
    dk += g;
    dv += g * (up - down);
  }

  // Rowwise: stores one vector per vector of a row. Returns the largest |x| of the row; NaN if one is NaN.
  template <class Row>
  ATTN_INLINE static T keep_row(int64_t size, T* e, const Row& row) {
    return exponentials(size, e, row);
  }
  ATTN_INLINE static bool fits_row(T q, T k) { return fits_kept(q, k); }
  // Whether unclamped() may compute the pair, in which two steps share a refined estimate: (1 + E)^2 is in range.
  ATTN_INLINE static bool fits_row_unclamped(T q, T k) { return kClamped && q + k <= kMaxBoundTwo; }
  // NK steps k of one query. half: half the sum of their ds.
  template <int NK>
  ATTN_INLINE void add_rows(Vec<T> q, const Vec<T>* k, const T* ds, T half, Vec<T>& dq, Vec<T>* dk, Vec<T>& sum) const {
    constexpr bool kShared = kRefined && !kClamped && NK % 2 == 0;
    Vec<T> e[NK], d[NK], x[NK], p{};
    for (int r = 0; r < NK; ++r) {
      e[r] = clamped(q * k[r]);
      d[r] = T(1) + e[r];
    }
    for (int r = 0; r < NK; ++r) {
      if constexpr (!kShared) {
        x[r] = quotient<kRefined, T>(broadcast(T(1)), d[r]);
      } else if (r % 2 == 0) {
        const Vec<T> both = refined_reciprocal(rounded(d[r] * d[r + 1]));
        x[r] = rounded(both * d[r + 1]);
        x[r + 1] = rounded(both * d[r]);
      }
    }
    for (int r = 0; r < NK; ++r) {
      const Vec<T> pr = rounded(ds[r] * x[r]), g = rounded(pr * (e[r] * x[r]));
      dk[r] += g;
      dq += g;
      p = r == 0 ? pr : p + pr;
    }
    sum += p - half;  // for each few terms: the difference of the whole sums would cancel
  }
  ATTN_INLINE static Vec<T> dv_of_rows(Vec<T> sum) { return T(-2) * sum; }

  // The exact form: tanh per pair.
  ATTN_INLINE void add(Vec<T> x, T ds, Vec<T>& dq, Vec<T>& dk, Vec<T>& dv) const {
    const Vec<T> t = tanh_any(x);
    const Vec<T> g = T(0.25) * ds * ((T(1) - t) * (T(1) + t));
    dq += g;
    dk += g;
    dv += ds * t;
  }
};

// For an activation of ../activations.h.
template <typename T, class F>
struct ActivatedPair {
  F f;

  ActivatedPair unclamped() const { return *this; }

  // If the sum is 0, so is the gradient: 0 times an infinite v would be NaN.
  ATTN_INLINE static Vec<T> of_unit(Vec<T> v, Vec<T> sum) {
    const Vec<T> zero{};
    return sum == zero ? zero : v * sum;
  }

  ATTN_INLINE static void keep(T* e, Vec<T> x) { store(e, x); }
  ATTN_INLINE static bool fits_kept(T, T) { return true; }
  ATTN_INLINE static bool fits_unclamped(T, T) { return false; }
  ATTN_INLINE void add_kept(Vec<T> q, Vec<T>, Vec<T> k, Vec<T>, T ds, Vec<T>& dq, Vec<T>& dk, Vec<T>& dv) const {
    add(q + k, ds, dq, dk, dv);
  }

  template <class Row>
  ATTN_INLINE static T keep_row(int64_t size, T* e, const Row& row) {
    for (int64_t c = 0; c < size; c += width<T>) store(e + c, row(c));
    return T(0);
  }
  ATTN_INLINE static bool fits_row(T, T) { return true; }
  ATTN_INLINE static bool fits_row_unclamped(T, T) { return false; }
  template <int NK>
  ATTN_INLINE void add_rows(Vec<T> q, const Vec<T>* k, const T* ds, T, Vec<T>& dq, Vec<T>* dk, Vec<T>& sum) const {
    for (int r = 0; r < NK; ++r) add(q + k[r], ds[r], dq, dk[r], sum);
  }
  ATTN_INLINE static Vec<T> dv_of_rows(Vec<T> sum) { return sum; }

  ATTN_INLINE void add(Vec<T> x, T ds, Vec<T>& dq, Vec<T>& dk, Vec<T>& dv) const {
    const Vec<T> t = broadcast(ds), g = f.gradient(x, t);
    dq += g;
    dk += g;
    dv += t * f.value(x);
  }
};

}  // namespace ATTN_LEVEL
}  // namespace attn
