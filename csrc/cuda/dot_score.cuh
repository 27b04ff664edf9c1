// The score of dot-product attention in a decoding step: a policy like AdditiveScore (additive_score.cuh describes the
// members).
#pragma once

#include "decode_types.cuh"

namespace attn {
namespace cuda {

// scale * query . keys
struct DotScore {
  static constexpr bool kGuarded = false, kCompensated = false;

  // Staged: (NQ, padded) q
  ATTN_HOST_DEVICE static constexpr int staged_rows(int queries) { return queries; }

  template <typename T, int NQ>
  ATTN_DEVICE static void stage(const DecodeParams&, float* staged, int padded, int q, int i, int64_t, int64_t, float x,
                                float&, float&) {
    staged[q * padded + i] = x;
  }

  template <typename T>
  ATTN_DEVICE static void limits(float, int, float, float, float*, float*) {}

  template <typename T>
  ATTN_DEVICE static void prepare_key(float&, float&) {}

  struct Units {
    ATTN_DEVICE Units(const float*, int, int, int) {}
  };

  struct Query {
    float x[4];

    ATTN_DEVICE Query(const float* staged, int padded, int, int q, int at) { load_four(staged + q * padded + at, x); }
  };

  template <class Body>
  ATTN_DEVICE static void by_form(const DecodeParams&, const Body& body) {
    body(std::false_type());
  }

  ATTN_DEVICE static float add_two(std::false_type, float sum, const Query& q, const Units&, const float* k, int j) {
    return fmaf(q.x[j + 1], k[j + 1], fmaf(q.x[j], k[j], sum));
  }

  template <typename T>
  struct ExactUnit {
    ATTN_DEVICE ExactUnit(const DecodeParams&, int64_t) {}

    ATTN_DEVICE Wide<T> operator()(Wide<T> x, Wide<T> k) const { return x * k; }
  };

  template <typename W>
  ATTN_DEVICE static W finish(const DecodeParams& p, W sum) {
    return sum * static_cast<W>(p.scale);
  }
};

}  // namespace cuda
}  // namespace attn
