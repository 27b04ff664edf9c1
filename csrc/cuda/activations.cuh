// The activations of ../activations.h on the GPU, for one number or two (f32x2.cuh).
#pragma once

#include "f32x2.cuh"

#define ATTN_ACTIVATION ATTN_DEVICE
#include "../activations.h"

namespace attn {
namespace cuda {

template <typename W>
struct NumberMath {
  using V = W;
  using N = W;
  ATTN_HOST_DEVICE static W positive_part(W x) { return larger_or_nan(x, W(0)); }
  ATTN_HOST_DEVICE static W absolute(W x) { return fabs(x); }
};

// Calls body with the activation of an op.
template <typename W, class Op, class Body>
ATTN_DEVICE void by_activation_of(const Op& op, const Body& body) {
  by_activation<NumberMath<W>>(op.activation, op.negative_slope, body);
}

// The same for two numbers.
template <class F, typename W>
ATTN_DEVICE F32x2<W> value(const F& f, F32x2<W> x) {
  return {f.value(x.x), f.value(x.y)};
}
template <class F, typename W>
ATTN_DEVICE F32x2<W> gradient(const F& f, F32x2<W> x, F32x2<W> t) {
  return {f.gradient(x.x, t.x), f.gradient(x.y, t.y)};
}

}  // namespace cuda
}  // namespace attn
