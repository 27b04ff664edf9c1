// The inexact arithmetic of NVIDIA GPUs, for the emulator: the approximate instructions of PTX with the largest error
// that its manual allows, functions of the CUDA math library, and the sums of tensor cores.
//
// The same operands always give the same result. Half of the results are too large, half too small. They are rounded in
// addition, so errors are up to half a unit larger than on a GPU. float64 is correctly rounded, both on a GPU and here.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulator {

// 1 or -1, chosen by the bits of x.
inline double sign_of_error(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  bits = (bits ^ bits >> 16) * 0x7feb352du;
  bits = (bits ^ bits >> 15) * 0x846ca68bu;
  return (bits ^ bits >> 16) & 1 ? 1 : -1;
}

// .ftz: subnormal numbers are flushed to zero.
inline float flushed(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }

// The exact value for x with the relative error `error` added, rounded.
inline float with_error(double exact, float x, double error) {
  return static_cast<float>(exact * (1 + sign_of_error(x) * error));
}

// ex2.approx.ftz.f32: 2^x with a relative error of 2^-22, and 1 for 0.
inline float ex2_approx_ftz(float x) {
  x = flushed(x);
  return x == 0 ? 1 : flushed(with_error(std::exp2(double(x)), x, 0x1p-22));
}

// rcp.approx.ftz.f32: 1 / x with a relative error of 2^-23.
inline float rcp_approx_ftz(float x) {
  x = flushed(x);
  return flushed(with_error(1 / double(x), x, 0x1p-23));
}

// A test may make every tanhf NaN, to show that a kernel does without it: ATTN_EMULATOR_TANH.
inline bool tanh_is_nan = false;

// expf and tanhf of the CUDA math library: an error of one unit in the last place. tanh is 1 where it rounds to 1, and
// never larger.
inline float expf(float x) { return x == 0 ? 1 : with_error(std::exp(double(x)), x, 0x1p-24); }
inline float tanhf(float x) {
  if (tanh_is_nan) return NAN;
  const double exact = std::tanh(double(x));
  if (std::fabs(exact) > 1 - 0x1p-25) return static_cast<float>(exact);
  return with_error(exact, x, 0x1p-24);
}

inline double power_of_two(std::int64_t exponent) {
  const std::int64_t bits = (exponent + 1023) << 52;
  double x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// c + the sum of the products a[k] b[k] of elements of 16 bits, as a tensor core sums them. It sums eight exact
// products and c at a time: they are aligned to the largest of them and truncated, with one bit more than float32 has.
// Then the sum is truncated to float32. Measured on an A100; later GPUs keep more bits (M. Fasi et al., Numerical
// behavior of NVIDIA tensor cores, 2021). PTX guarantees less.
inline float tensor_core_sum(float c, const float* a, const float* b, int n) {
  constexpr int kAtOnce = 8, kBits = 24;  // kBits: bits below the leading one
  for (int first = 0; first < n; first += kAtOnce) {
    double largest = std::fabs(double(c)), exact = c;
    for (int k = first; k < first + kAtOnce; ++k) {
      const double product = double(a[k]) * b[k];
      largest = std::fmax(largest, std::fabs(product));
      exact += product;
    }
    if (largest == 0 || !std::isfinite(exact)) {
      c = static_cast<float>(exact);
      continue;
    }
    std::int64_t bits;  // as a double, the largest product is a normal number
    std::memcpy(&bits, &largest, sizeof(bits));
    const std::int64_t exponent = (bits >> 52) - 1023;
    const double unit = power_of_two(exponent - kBits), parts = power_of_two(kBits - exponent);
    std::int64_t sum = static_cast<std::int64_t>(c * parts);  // rounds towards zero
    for (int k = first; k < first + kAtOnce; ++k) sum += static_cast<std::int64_t>(double(a[k]) * b[k] * parts);
    const double total = static_cast<double>(sum) * unit;
    c = static_cast<float>(total);
    if (std::fabs(double(c)) > std::fabs(total)) c = std::nextafter(c, 0.0f);
  }
  return c;
}

}  // namespace emulator
