// What NVIDIA GPUs compute inexactly, for the emulator: the approximate instructions of PTX at the edge of the error that
// its manual allows, functions of the CUDA math library, and the sums of tensor cores.
//
// The same operands always give the same result, half of them too large and half too small; they are rounded besides, so
// the errors are up to half a unit larger than on a GPU. float64 is exact there but for the rounding, and here.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulator {

// 1 or -1, by the bits of x.
inline double sign_of_error(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  bits = (bits ^ bits >> 16) * 0x7feb352du;
  bits = (bits ^ bits >> 15) * 0x846ca68bu;
  return (bits ^ bits >> 16) & 1 ? 1 : -1;
}

// .ftz: subnormal numbers are zeros.
inline float flushed(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }

// The exact value for x with the relative error `error`, rounded.
inline float with_error(double exact, float x, double error) {
  return static_cast<float>(exact * (1 + sign_of_error(x) * error));
}

// ex2.approx.ftz.f32: 2^x to 2^-22, and 1 for 0.
inline float ex2_approx_ftz(float x) {
  x = flushed(x);
  return x == 0 ? 1 : flushed(with_error(std::exp2(double(x)), x, 0x1p-22));
}

// rcp.approx.ftz.f32: 1 / x to 2^-23.
inline float rcp_approx_ftz(float x) {
  x = flushed(x);
  return flushed(with_error(1 / double(x), x, 0x1p-23));
}

// expf and tanhf of the CUDA math library: a unit in the last place. tanh is 1 where it rounds to that, and never more.
inline float expf(float x) { return x == 0 ? 1 : with_error(std::exp(double(x)), x, 0x1p-24); }
inline float tanhf(float x) {
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

// c + the sum of the products a[k] b[k] of elements of 16 bits, as a tensor core adds them up: eight products at a time,
// which are exact, and c are cut off below the largest of them, at one bit more than float32 has; then the sum is cut off
// to float32. Measured on an A100; later ones keep more bits (M. Fasi et al., Numerical behavior of NVIDIA tensor cores,
// 2021). PTX promises less.
inline float tensor_core_sum(float c, const float* a, const float* b, int n) {
  constexpr int kAtOnce = 8, kBits = 24;  // below the leading one
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
    std::int64_t bits;  // as a double, the largest is a normal number
    std::memcpy(&bits, &largest, sizeof(bits));
    const std::int64_t exponent = (bits >> 52) - 1023;
    const double unit = power_of_two(exponent - kBits), parts = power_of_two(kBits - exponent);
    std::int64_t sum = static_cast<std::int64_t>(c * parts);  // towards zero
    for (int k = first; k < first + kAtOnce; ++k) sum += static_cast<std::int64_t>(double(a[k]) * b[k] * parts);
    const double total = static_cast<double>(sum) * unit;
    c = static_cast<float>(total);
    if (std::fabs(double(c)) > std::fabs(total)) c = std::nextafter(c, 0.0f);
  }
  return c;
}

}  // namespace emulator
