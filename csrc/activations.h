// The activations f of scores v . f(query + keys + bias) that are evaluated for each pair of query and step, on SIMD
// vectors (CPU) or single numbers (GPU). A new activation needs a class here and a line in Activation and
// by_activation.
//
// tanh has no class here: it factors into exponentials that are computed once per row. Sigmoid is computed as the tanh
// of half the argument. Scores with a gate evaluate both per pair, on the CPU only: see gated_additive_fwd.h.
//
// Every file may use the enumeration. The classes are for code of a SIMD level and for CUDA code. Such code defines
// ATTN_ACTIVATION, the specifiers of a function, before it includes this file.
#if !defined(ATTN_ACTIVATION_NUMBERS)
#define ATTN_ACTIVATION_NUMBERS

#include <cstdint>

namespace attn {

// The same order as in attn_kernels/activations.py.
enum class Activation : int64_t { tanh, relu, leaky_relu, sigmoid, count };

}  // namespace attn
#endif

#if defined(ATTN_ACTIVATION) && !defined(ATTN_ACTIVATION_CLASSES)
#define ATTN_ACTIVATION_CLASSES

namespace attn {

// Math: the functions of a SIMD level or of CUDA. Each level has its own type, so that code of one level is not linked
// into another. V is a vector or a number, N the type of its elements.
//
//   value(x)        f(x), NaN if x is NaN
//   gradient(x, t)  t f'(x), as in PyTorch
//   kByGradient     whether gradient(x, t) x equals t f(x), and is NaN if t is NaN: it saves an instruction on a GPU
template <class Math>
struct Relu {
  using V = typename Math::V;
  static constexpr bool kByGradient = false;  // gradient(x, NaN) is 0 for x < 0

  ATTN_ACTIVATION V value(V x) const { return Math::positive_part(x); }
  ATTN_ACTIVATION V gradient(V x, V t) const {
    const V zero{};
    return x <= zero ? zero : t;  // a NaN x passes the gradient
  }
};

template <class Math>
struct LeakyRelu {
  using V = typename Math::V;
  static constexpr bool kByGradient = true;
  typename Math::N slope;

  ATTN_ACTIVATION V value(V x) const { return x > V{} ? x : slope * x; }
  ATTN_ACTIVATION V gradient(V x, V t) const { return x > V{} ? t : slope * t; }
};

// Calls body with the activation's class. Kernels call it once, outside their loops, so that each activation gets its
// own loop.
template <class Math, class Body>
ATTN_ACTIVATION void by_activation(Activation activation, double negative_slope, const Body& body) {
  if (activation == Activation::relu) return body(Relu<Math>{});
  body(LeakyRelu<Math>{static_cast<typename Math::N>(negative_slope)});
}

}  // namespace attn
#endif
