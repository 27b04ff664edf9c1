// The sums of a thread over units, for its pairs of queries and steps: see additive_attention_fwd.cu.
#pragma once

#include "activations.cuh"
#include "additive_math.cuh"

namespace attn {
namespace cuda {
namespace {  // included by one .cu file

constexpr int kStep = 6;  // units per iteration of a thread's loop: twice three

// Loads q[n] and k[n] for the units first + n. Consecutive units are kColumns elements apart.
template <int kColumns, int kUnits, int kQ, int kK>
ATTN_DEVICE void load_units(const float* eq, const float* ek, int first, float (&q)[kUnits][kQ],
                            float (&k)[kUnits][kK]) {
#pragma unroll
  for (int n = 0; n < kUnits; ++n) {
#pragma unroll
    for (int i = 0; i < kQ; i += 4) load_16_bytes(eq + (first + n) * kColumns + i, q[n] + i);
#pragma unroll
    for (int j = 0; j < kK; j += 4) load_16_bytes(ek + (first + n) * kColumns + j, k[n] + j);
  }
}

// part += the (kQ, kK) sums of 1 / d over `units` units. eq, ek: [unit][kColumns], starting at the thread's first query
// and step; constants: [unit].
template <int kQ, int kK, int kColumns>
ATTN_DEVICE void add_factored(const float* eq, const float* ek, const float* constants, int units,
                              float (&part)[kQ][kK]) {
#pragma unroll 1
  for (int t = 0; t < units; t += kStep) {
#pragma unroll
    for (int half = 0; half < kStep; half += 3) {
      float q[3][kQ], k[3][kK];
      load_units<kColumns>(eq, ek, half, q, k);
      const float* c = constants + half;
#pragma unroll
      for (int j = 0; j < kK; ++j)
#pragma unroll
        for (int i = 0; i < kQ; i += 2) {
          F32x2<float> d[3];
#pragma unroll
          for (int n = 0; n < 3; ++n)
            d[n] = multiply_add({q[n][i], q[n][i + 1]}, {k[n][j], k[n][j]}, F32x2<float>{c[n], c[n]});
          const F32x2<float> sum = add_three(d[0], d[1], d[2], F32x2<float>{part[i][j], part[i + 1][j]});
          part[i][j] = sum.x;
          part[i + 1][j] = sum.y;
        }
    }
    eq += kStep * kColumns;
    ek += kStep * kColumns;
    constants += kStep;
  }
}

// The same in the compensated form. v: [unit], in units of the scale.
template <int kQ, int kK, int kColumns, bool kClamped>
ATTN_DEVICE void add_compensated_units(const float* eq, const float* ek, const float* constants, const float* v,
                                       int units, float (&part)[kQ][kK]) {
#pragma unroll 1
  for (int t = 0; t < units; t += 2) {
    float q[2][kQ], k[2][kK];
    load_units<kColumns>(eq, ek, t, q, k);
    const UnitPair of_units(constants[t], constants[t + 1], v[t], v[t + 1]);
#pragma unroll
    for (int j = 0; j < kK; ++j)
#pragma unroll
      for (int i = 0; i < kQ; i += 2) {
        const F32x2<float> sum =
            add_compensated<kClamped>(of_units, {q[0][i], q[0][i + 1]}, {k[0][j], k[0][j]}, {q[1][i], q[1][i + 1]},
                                      {k[1][j], k[1][j]}, F32x2<float>{part[i][j], part[i + 1][j]});
        part[i][j] = sum.x;
        part[i + 1][j] = sum.y;
      }
  }
}

// The same with tanh itself: q (bias added) and k replace the exponentials, and v replaces the constants. The sums use
// Kahan compensation: with a large v, one unit may be much larger than the others.
template <typename W, int kQ, int kK, int kColumns>
ATTN_DEVICE void add_exact(const W* q, const W* k, const W* v, int units, W (&total)[kQ][kK], W (&lost)[kQ][kK]) {
#pragma unroll 1
  for (int t = 0; t < units; ++t) {
#pragma unroll
    for (int i = 0; i < kQ; ++i)
#pragma unroll
      for (int j = 0; j < kK; ++j)
        add_exactly(v[t] * tanh_of(q[t * kColumns + i] + k[t * kColumns + j]), total[i][j], lost[i][j]);
  }
}

// The same with another activation f.
template <class F, typename W, int kQ, int kK, int kColumns>
ATTN_DEVICE void add_activated(const F& f, const W* q, const W* k, const W* v, int units, W (&part)[kQ][kK]) {
#pragma unroll 2
  for (int t = 0; t < units; ++t) {
    W xq[kQ], xk[kK];
#pragma unroll
    for (int i = 0; i < kQ; i += kPer16Bytes<W>) load_16_bytes(q + t * kColumns + i, xq + i);
#pragma unroll
    for (int j = 0; j < kK; j += kPer16Bytes<W>) load_16_bytes(k + t * kColumns + j, xk + j);
    const F32x2<W> of_unit{v[t], v[t]};
#pragma unroll
    for (int j = 0; j < kK; ++j)
#pragma unroll
      for (int i = 0; i < kQ; i += 2) {
        const F32x2<W> x = F32x2<W>{xq[i], xq[i + 1]} + F32x2<W>{xk[j], xk[j]};
        const F32x2<W> sum = multiply_add(of_unit, value(f, x), F32x2<W>{part[i][j], part[i + 1][j]});
        part[i][j] = sum.x;
        part[i + 1][j] = sum.y;
      }
  }
}

// Adds each part to its total, and resets the parts to `start`.
template <typename W, int kQ, int kK>
ATTN_DEVICE void move_part(W (&part)[kQ][kK], W (&total)[kQ][kK], W start) {
#pragma unroll
  for (int i = 0; i < kQ; ++i)
#pragma unroll
    for (int j = 0; j < kK; ++j) {
      total[i][j] += part[i][j];
      part[i][j] = start;
    }
}

}  // namespace
}  // namespace cuda
}  // namespace attn
