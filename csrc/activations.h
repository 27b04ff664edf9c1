// The activations f of scores v . f(query + keys + bias) that a pair of query and step computes by itself: for vectors of
// the CPU and numbers of a GPU. An activation is a class here, and a line in Activation and in by_activation.
//
// tanh has forms of its own, of exponentials that are made once for each row, and sigmoid is the tanh of half the
// argument but for scores with a gate, which are on the CPU only: gated_additive_fwd.h has these two.
//
// The numbers of activations are for all. The classes are for code of a SIMD level, to be compiled for its target, and of
// CUDA, which include this after defining ATTN_ACTIVATION: what stands before a function.
#if !defined(ATTN_ACTIVATION_NUMBERS)
#define ATTN_ACTIVATION_NUMBERS

#include <cstdint>

namespace attn {

// In the order of attn_kernels/activations.py.
enum class Activation : int64_t { tanh, relu, leaky_relu, sigmoid, count };

}  // namespace attn
#endif

#if defined(ATTN_ACTIVATION) && !defined(ATTN_ACTIVATION_CLASSES)
#define ATTN_ACTIVATION_CLASSES

namespace attn {

// Math: of a SIMD level, so that nothing compiled for one is linked into another, or of CUDA. V is a vector or a number,
// N the type of its elements.
//
//   value(x)        f(x), NaN where x is
//   gradient(x, t)  t f'(x), as PyTorch has it
//   kByGradient     whether gradient(x, t) x is t f(x), NaN where t is: an instruction less on a GPU
template <class Math>
struct Relu {
  using V = typename Math::V;
  static constexpr bool kByGradient = false;  // 0 for a t of NaN where x < 0

  ATTN_ACTIVATION V value(V x) const { return Math::positive_part(x); }
  ATTN_ACTIVATION V gradient(V x, V t) const {
    const V zero{};
    return x <= zero ? zero : t;  // the gradient passes where x is NaN
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

// Calls body with an activation. Which one is the same for all pairs of a call: kernels ask once, and have a loop for
// each.
template <class Math, class Body>
ATTN_ACTIVATION void by_activation(Activation activation, double negative_slope, const Body& body) {
  if (activation == Activation::relu) return body(Relu<Math>{});
  body(LeakyRelu<Math>{static_cast<typename Math::N>(negative_slope)});
}

}  // namespace attn
#endif
