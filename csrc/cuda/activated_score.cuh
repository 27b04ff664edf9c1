// The scores of a decoding step with activations other than tanh: a policy like AdditiveScore (additive_score.cuh
// describes the members).
#pragma once

#include "activations.cuh"
#include "decode_types.cuh"

namespace attn {
namespace cuda {

// v . f(query + keys + bias)
struct ActivatedScore {
  static constexpr bool kGuarded = false, kCompensated = false;

  // Staged: (NQ, padded) q + bias, (padded) v
  ATTN_HOST_DEVICE static constexpr int staged_rows(int queries) { return queries + 1; }

  template <typename T, int NQ>
  ATTN_DEVICE static void stage(const DecodeParams& p, float* staged, int padded, int q, int i, int64_t u, int64_t end,
                                float x, float&, float&) {
    if (p.bias.data != nullptr) x += element_or_zero(static_cast<const T*>(p.bias.data), u, end, p.bias.stride[2]);
    staged[q * padded + i] = x;
    if (q == 0) staged[NQ * padded + i] = element_or_zero(static_cast<const T*>(p.v.data), u, end, p.v.stride[2]);
  }

  template <typename T>
  ATTN_DEVICE static void limits(float, int, float, float, float*, float*) {}

  template <typename T>
  ATTN_DEVICE static void prepare_key(float&, float&) {}

  struct Units {
    float v[4];

    ATTN_DEVICE Units(const float* staged, int padded, int queries, int at) {
      load_four(staged + queries * padded + at, v);
    }
  };

  struct Query {
    float x[4];

    ATTN_DEVICE Query(const float* staged, int padded, int, int q, int at) { load_four(staged + q * padded + at, x); }
  };

  template <class Body>
  ATTN_DEVICE static void by_form(const DecodeParams& p, const Body& body) {
    by_activation_of<float>(p, body);
  }

  template <class F>
  ATTN_DEVICE static float add_two(const F& f, float sum, const Query& q, const Units& units, const float* k, int j) {
    sum = fmaf(units.v[j], f.value(q.x[j] + k[j]), sum);
    return fmaf(units.v[j + 1], f.value(q.x[j + 1] + k[j + 1]), sum);
  }

  template <typename T>
  struct ExactUnit {
    const DecodeParams& p;
    Wide<T> v, bias;

    ATTN_DEVICE ExactUnit(const DecodeParams& p, int64_t u)
        : p(p),
          v(widen(static_cast<const T*>(p.v.data)[u * p.v.stride[2]])),
          bias(p.bias.data != nullptr ? widen(static_cast<const T*>(p.bias.data)[u * p.bias.stride[2]]) : Wide<T>(0)) {}

    ATTN_DEVICE Wide<T> operator()(Wide<T> x, Wide<T> k) const {
      x += k + bias;
      by_activation_of<Wide<T>>(p, [&](auto f) { x = f.value(x); });
      return v * x;
    }
  };

  template <typename W>
  ATTN_DEVICE static W finish(const DecodeParams&, W sum) {
    return sum;
  }
};

}  // namespace cuda
}  // namespace attn
