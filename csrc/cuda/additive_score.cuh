// The score of additive attention in a decoding step, as a policy of ScoreTile (decode_scores.cuh):
//
//   kGuarded                whether the fast sums are valid only within limits; outside them ExactUnit is used
//   kCompensated            whether float32 has a compensated form, the fast sums with the rests of the exponentials;
//                           its members: stage_compensated, max_compensated, prepare_key_and_rest
//   staged_rows(NQ), stage  the number of rows of floats that NQ queries stage in shared memory, and the staging
//   limits                  the range of a step's largest |k| for which the fast sums are valid
//   prepare_key             converts an element of a key to the operand of add_two()
//   Units, Query, add_two   four units of the staged rows, and the accumulation of two of them
//   by_form                 calls its argument with the first argument of add_two(), whose type is e.g. an activation
//   ExactUnit               the contribution of a unit by the formula
//   finish                  the score, computed from the sum over units
#pragma once

#include "additive_math.cuh"
#include "decode_types.cuh"

namespace attn {
namespace cuda {

// v . tanh(query + keys + bias). Two units share a reciprocal. Outside the limits of this form, the compensated form or
// tanh itself is computed.
struct AdditiveScore {
  static constexpr bool kGuarded = true, kCompensated = true;

  // Staged: (NQ, padded) e^{2 (q + bias)}, (NQ, padded) v e^{2 (q + bias)}, (padded) v
  ATTN_HOST_DEVICE static constexpr int staged_rows(int queries) { return 2 * queries + 1; }

  // Stages unit u, with the query's element x, at index i of the rows of query q. Units from `end` on are 0. Updates
  // the query's largest magnitude and, for q = 0 only, the sum of the squares of v.
  template <typename T, int NQ>
  ATTN_DEVICE static void stage(const DecodeParams& p, float* staged, int padded, int q, int i, int64_t u, int64_t end,
                                float x, float& abs_max, float& norm2) {
    const float v = element_or_zero(static_cast<const T*>(p.v.data), u, end, p.v.stride[2]);
    float e = exp2x(x), size = fabsf(x);
    if (p.bias.data != nullptr) {  // a product: q + bias would round, which shows if k cancels it
      const float bias = element_or_zero(static_cast<const T*>(p.bias.data), u, end, p.bias.stride[2]);
      e *= exp2x(bias);
      size += fabsf(bias);
    }
    abs_max = larger_magnitude(abs_max, size);
    staged[q * padded + i] = e;
    staged[(NQ + q) * padded + i] = e * v;
    if (q == 0) {
      staged[2 * NQ * padded + i] = v;
      norm2 += v * v;
    }
  }

  // The same for the compensated form. Adds to `rest` the sum of v r over units: the staged numbers are exact for
  // q + bias - r.
  template <typename T, int NQ>
  ATTN_DEVICE static void stage_compensated(const DecodeParams& p, float* staged, int padded, int q, int i, int64_t u,
                                            int64_t end, float x, float& rest) {
    const float v = element_or_zero(static_cast<const T*>(p.v.data), u, end, p.v.stride[2]);
    float r, lost = 0, e = exp2x_and_rest(x, &r);
    if (p.bias.data != nullptr) {
      float of_bias;
      const float bias = element_or_zero(static_cast<const T*>(p.bias.data), u, end, p.bias.stride[2]),
                  factor = exp2x_and_rest(bias, &of_bias), product = e * factor;
      lost = lost_of_product(e, 0, factor, product);
      e = product, r += of_bias;
    }
    const float ev = e * v;
    staged[q * padded + i] = e;
    staged[(NQ + q) * padded + i] = ev;
    if (q == 0) staged[2 * NQ * padded + i] = v;
    rest += fmaf(v, r, 0.5f * lost_of_product(e, lost, v, ev) * reciprocal(e));
  }

  // largest, smallest: the extremes over the queries of each query's largest |query| + |bias|.
  template <typename T>
  ATTN_DEVICE static void limits(float norm2, int units, float largest, float smallest, float* max_k, float* min_k) {
    *max_k = kMaxBoundTwo - largest;
    *min_k = min_abs_bound_two<T>(norm2, units) - smallest;
  }

  // The largest |k| of a step for which the compensated form is valid.
  ATTN_DEVICE static float max_compensated(float norm2, float largest) { return max_bound_two(norm2) - largest; }

  template <typename T>
  ATTN_DEVICE static void prepare_key(float& k, float& abs_max) {
    abs_max = larger_magnitude(abs_max, k);
    k = exp2x_of<T>(k);
  }

  // The same for the compensated form. Adds v r to `rest`: the result is exact for k - r.
  ATTN_DEVICE static void prepare_key_and_rest(float& k, float v, float& abs_max, float& rest) {
    abs_max = larger_magnitude(abs_max, k);
    float r;
    k = exp2x_and_rest(k, &r);
    rest = fmaf(v, r, rest);
  }

  struct Units {
    float v[4];

    ATTN_DEVICE Units(const float* staged, int padded, int queries, int at) {
      load_four(staged + 2 * queries * padded + at, v);
    }
  };

  struct Query {
    float e[4], ev[4];

    ATTN_DEVICE Query(const float* staged, int padded, int queries, int q, int at) {
      load_four(staged + q * padded + at, e);
      load_four(staged + (queries + q) * padded + at, ev);
    }
  };

  template <class Body>
  ATTN_DEVICE static void by_form(const DecodeParams&, const Body& body) {
    body(std::false_type());
  }

  ATTN_DEVICE static float add_two(std::false_type, float sum, const Query& q, const Units& units, const float* k,
                                   int j) {
    return add_two_units(sum, q.e[j], q.ev[j], units.v[j], k[j], q.e[j + 1], q.ev[j + 1], units.v[j + 1], k[j + 1]);
  }

  template <typename T>
  struct ExactUnit {
    Wide<T> v, bias;

    ATTN_DEVICE ExactUnit(const DecodeParams& p, int64_t u)
        : v(widen(static_cast<const T*>(p.v.data)[u * p.v.stride[2]])),
          bias(p.bias.data != nullptr ? widen(static_cast<const T*>(p.bias.data)[u * p.bias.stride[2]]) : Wide<T>(0)) {}

    ATTN_DEVICE Wide<T> operator()(Wide<T> x, Wide<T> k) const { return v * tanh_of(x + k + bias); }
  };

  template <typename W>
  ATTN_DEVICE static W finish(const DecodeParams&, W sum) {
    return sum;
  }
};

}  // namespace cuda
}  // namespace attn
