// The arithmetic of a pair of query and step of v . relu(query + keys + bias), and of its leaky form: an addition, a
// maximum and a multiply-add for each unit, exact for all inputs.
//
// Whether there is a slope is the same for all pairs of a call: kernels ask once, and have a loop for each answer.
#pragma once

#include "f32x2.cuh"

namespace attn {
namespace cuda {

// Calls body with whether there is a slope, as a type.
template <class Body>
ATTN_DEVICE void by_slope(double negative_slope, const Body& body) {
  if (negative_slope == 0)
    body(std::false_type());
  else
    body(std::true_type());
}

// NaN where x is.
template <bool kLeaky, typename W>
ATTN_HOST_DEVICE W rectified(W x, W negative_slope) {
  if constexpr (kLeaky)
    return x > 0 ? x : negative_slope * x;
  else
    return larger_or_nan(x, W(0));
}

template <bool kLeaky, typename W>
ATTN_HOST_DEVICE F32x2<W> rectified(F32x2<W> x, W negative_slope) {
  return {rectified<kLeaky>(x.x, negative_slope), rectified<kLeaky>(x.y, negative_slope)};
}

// The gradient of x, with ds that of rectified(x). As PyTorch has it: for x = 0 that of the negative side, and that of
// relu passes where x is NaN.
template <bool kLeaky, typename W>
ATTN_HOST_DEVICE W rectified_backward(W x, W ds, W negative_slope) {
  if constexpr (kLeaky)
    return x > 0 ? ds : negative_slope * ds;
  else
    return x <= 0 ? W(0) : ds;
}

template <bool kLeaky, typename W>
ATTN_HOST_DEVICE F32x2<W> rectified_backward(F32x2<W> x, F32x2<W> ds, W negative_slope) {
  return {rectified_backward<kLeaky>(x.x, ds.x, negative_slope), rectified_backward<kLeaky>(x.y, ds.y, negative_slope)};
}

}  // namespace cuda
}  // namespace attn
