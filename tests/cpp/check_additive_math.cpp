// Compares the arithmetic of units that share a reciprocal (csrc/cuda/additive_math.cuh) with double. The functions are
// those that the kernels use on a GPU, compiled as plain C++.
#include <cmath>
#include <cstdio>
#include <random>

#include "cuda/additive_math.cuh"

namespace {

int failures = 0;

void expect(bool holds, const char* what, double a, double b = 0, double c = 0) {
  if (holds) return;
  if (++failures <= 10) std::printf("FAILED %s: %.9g %.9g %.9g\n", what, a, b, c);
}

using namespace attn;
using namespace attn::cuda;

// Three units share a reciprocal: compares v . tanh(q + k), within the limits of the form, with double.
void check_three() {
  std::mt19937 random(1);
  std::uniform_real_distribution<float> uniform(-1, 1);
  double worst = 0;
  const int n = 200000;
  for (int t = 0; t < n; ++t) {
    const float bound = kMaxBoundThree * std::fabs(uniform(random)), unit = 1;
    float d[3];
    double exact = 0, half = 0, size = 0;
    for (int u = 0; u < 3; ++u) {
      // |v| ranges from the largest to the smallest that is not dropped. q and k have opposite signs as often as the
      // same.
      float v = std::ldexp(uniform(random), -static_cast<int>(24 * std::fabs(uniform(random))));
      if (std::fabs(v) < kMinRelativeV) v = kMinRelativeV;
      const float part = std::fabs(uniform(random));
      const float q = std::copysign(bound * part, uniform(random)),
                  k = std::copysign(bound * (1 - part), uniform(random));
      const float factor = unit * kDenominatorScale / v;
      d[u] = factor + factor * exp2x(q) * exp2x(k);
      exact += v * std::tanh(double(q) + double(k));
      half += double(v) / (2 * unit * kDenominatorScale);
      size += std::fabs(v);
    }
    const float sum = add_three(d[0], d[1], d[2], static_cast<float>(-half));
    const double error = std::fabs(-2 * double(unit) * kDenominatorScale * sum - exact);
    expect(std::isfinite(sum), "a sum of three is finite", sum, bound);
    worst = std::fmax(worst, error / size);
  }
  // F32x2 exponentials and their product: 2e-7; six more roundings of 2 v / (1 + E): 7e-7.
  expect(worst < 9e-7, "a sum of three, as a share of |v|", worst);
  std::printf("three units: %d cases, worst error %.2g of the sum of |v|\n", n, worst);
}

// Two units in the compensated form: the error of each is a few roundings of its tanh, also if q is near -k, and a
// fraction of the rounding of q and k. If clamped, for any sum.
template <bool kClamped>
void check_compensated() {
  std::mt19937 random(2);
  std::uniform_real_distribution<float> uniform(-1, 1);
  double worst = 0;
  const int n = 200000;
  for (int t = 0; t < n; ++t) {
    const float size = kClamped ? kMaxAbsClamped : std::ldexp(kMaxBoundUnclamped / 2, -t % 12);
    const bool opposite = t % 2 == 0;
    float v[2], c[2], e[2], k[2];
    double exact = 0, rests = 0, allowed = 0;
    for (int u = 0; u < 2; ++u) {
      v[u] = std::ldexp(uniform(random), -static_cast<int>(t % 3 * 11 * std::fabs(uniform(random))));
      if (std::fabs(v[u]) < kMinRelativeV) v[u] = kMinRelativeV;
      const float x = size * uniform(random),
                  y = opposite ? -x * (1 + 0.001f * uniform(random)) : size * uniform(random);
      const float y_kept = std::fmin(std::fmax(y, -size), size);
      c[u] = kDenominatorScale / v[u];
      float of_query, of_key;
      const float power = exp2x_and_rest(x, &of_query), factor = c[u] / kDenominatorScaleOfRow;
      e[u] = power * factor;
      of_query += 0.5f * std::fma(power, factor, -e[u]) / e[u];
      k[u] = exp2x_and_rest(y_kept, &of_key) * kDenominatorScaleOfRow;
      const double tanh = std::tanh(double(x) + double(y_kept));
      exact += v[u] * tanh;
      rests += v[u] * (double(of_query) + double(of_key));
      allowed += std::fabs(v[u]) * (15.5 * std::fabs(tanh) * 0x1p-24 + std::fmin(0.75f, 2.3f * size) * 0x1p-24);
    }
    const F32x2<float> sum = add_compensated<kClamped>(UnitPair(c[0], c[1], v[0], v[1]), {e[0], e[0]}, {k[0], k[0]},
                                                       {e[1], e[1]}, {k[1], k[1]}, {0, 0});
    expect(std::isfinite(sum.x) && sum.x == sum.y, "a compensated sum is finite", sum.x, sum.y, size);
    worst = std::fmax(worst, std::fabs(sum.x + rests - exact) / allowed);
  }
  expect(worst < 1, "a compensated sum, as a share of what is allowed", worst);
  std::printf("two units%s: %d cases, worst error %.2g of what is allowed\n", kClamped ? ", clamped" : "", n, worst);
}

// Two units with v outside of the exponentials, and the rests: as check_compensated. Beyond the limit of |v| up to a
// smaller bound.
void check_two_and_rests(float largest_v) {
  std::mt19937 random(3);
  std::uniform_real_distribution<float> uniform(-1, 1);
  const float bound = max_bound_two(largest_v * largest_v);
  double worst = 0;
  const int n = 200000;
  for (int t = 0; t < n; ++t) {
    const float size = std::ldexp(bound / 3, -t % 12);
    float v[2], e[2], ev[2], k[2];
    double exact = 0, rests = 0, allowed = 0;
    for (int u = 0; u < 2; ++u) {
      v[u] = largest_v * std::ldexp(uniform(random), -static_cast<int>(t % 3 * 11 * std::fabs(uniform(random))));
      const float x = size * uniform(random), bias = size * uniform(random),
                  y = t % 2 ? size * uniform(random) : -(x + bias) * (1 + 0.001f * uniform(random));
      float of_query, of_bias, of_key;
      const float power = exp2x_and_rest(x, &of_query), factor = exp2x_and_rest(bias, &of_bias);
      e[u] = power * factor;
      ev[u] = e[u] * v[u];
      k[u] = exp2x_and_rest(y, &of_key);
      const float lost = lost_of_product(power, 0, factor, e[u]), of_v = lost_of_product(e[u], lost, v[u], ev[u]);
      const double tanh = std::tanh(double(x) + double(bias) + double(y));
      exact += v[u] * tanh;
      rests += v[u] * (double(of_query) + double(of_bias) + double(of_key)) + 0.5 * double(of_v) / e[u];
      // As above, but three numbers are rounded, not two.
      const float all = std::fabs(x) + std::fabs(bias) + std::fabs(y), of_numbers = std::fmin(1.125f, 1.15f * all);
      allowed += std::fabs(v[u]) * (15.5 * std::fabs(tanh) + of_numbers) * 0x1p-24;
    }
    const float sum = add_two_units(0, e[0], ev[0], v[0], k[0], e[1], ev[1], v[1], k[1]);
    expect(std::isfinite(sum), "a sum of two is finite", sum, size, largest_v);
    worst = std::fmax(worst, std::fabs(sum + rests - exact) / allowed);
  }
  expect(worst < 1, "a sum of two and their rests, as a share of what is allowed", worst, largest_v);
  const float end = exp2x(bound), edge = add_two_units(0, 1, largest_v, largest_v, end, 1, largest_v, largest_v, end);
  expect(std::fabs(edge / (2 * largest_v) - 1) < 1e-6, "a sum of two at the edge", edge, largest_v);
  std::printf("two units and rests, v up to %g: %d cases, worst error %.2g of what is allowed\n", largest_v, n, worst);
}

// The corners of the range: no overflow, no underflow, the limits of tanh.
void check_corners() {
  const float ends[] = {-kMaxBoundThree, 0, kMaxBoundThree}, units[] = {1, kMinRelativeV, -1, -kMinRelativeV};
  for (float x : ends)
    for (float y : ends)
      for (float z : ends)
        for (float v : units)
          for (float w : units) {
            const float a = kDenominatorScale / v, b = kDenominatorScale / w, c = kDenominatorScale / w;
            const float sum = add_three(a + a * exp2x(x), b + b * exp2x(y), c + c * exp2x(z), 0.0f);
            const double exact =
                v / (1 + std::exp(2.0 * x)) + w / (1 + std::exp(2.0 * y)) + w / (1 + std::exp(2.0 * z));
            const double size = std::fabs(v) + 2 * std::fabs(w);
            expect(std::fabs(sum * double(kDenominatorScale) - exact) <= 1e-6 * size, "a corner",
                   sum * double(kDenominatorScale), exact);
          }
  const float dropped =
      add_three(kDroppedDenominator, kDenominatorScale, kDroppedDenominator, 0.0f) * kDenominatorScale;
  expect(std::fabs(dropped - 1) < 1e-6, "dropped units add nothing", dropped);
}

void check_limits() {
  for (float x : {1e-30f, 0.75f, 1.0f, 1.5f, 2.0f, 3e29f}) {
    const float power = power_of_two_above(x);
    int exponent;
    expect(std::frexp(power, &exponent) == 0.5f && power > x && power <= 2 * x, "a power of two above", x, power);
  }
  expect(min_abs_bound(3, 100) == 0 && min_abs_bound(60, 100) == 2 && min_abs_bound(100, 100) == 5, "limits", 0);
  expect(min_abs_bound(1e9f, 256) == 10, "a large v of many units", 0);
  expect(std::isinf(min_abs_bound(200, 100)) && std::isinf(min_abs_bound(NAN, 100)), "no limit for a large v", 0);
  expect(std::isinf(min_abs_bound_two<float>(1e9f, 256)) && min_abs_bound_two<attn::cuda::BFloat16>(200, 100) == 0,
         "limits of two units", 0);
  expect(max_bound_two(0) == kMaxBoundTwo && max_bound_two(kMaxAbsVTwo * kMaxAbsVTwo) == kMaxBoundTwo &&
             max_bound_two(INFINITY) < 0 && std::isnan(max_bound_two(NAN)),
         "the largest bound of two units", 0);
}

// The compensation of a running sum: a million small numbers are added to a large one.
void check_exact_sum() {
  float total = 0, lost = 0;
  add_exactly(1e8f, total, lost);
  for (int i = 0; i < 1000000; ++i) add_exactly(0.1f, total, lost);
  expect(std::fabs(total - (1e8 + 1e6 * double(0.1f))) <= 8, "a long sum", total);
  add_exactly(INFINITY, total, lost);
  add_exactly(1.0f, total, lost);
  expect(std::isinf(total), "infinity stays", total, lost);
}

}  // namespace

int main() {
  check_three();
  check_compensated<false>();
  check_compensated<true>();
  check_two_and_rests(1);
  check_two_and_rests(kMaxAbsVTwo);
  check_two_and_rests(1e15f);
  check_corners();
  check_limits();
  check_exact_sum();
  std::printf(failures == 0 ? "all right\n" : "%d failures\n", failures);
  return failures != 0;
}
