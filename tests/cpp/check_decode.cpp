// Tests csrc/cuda/decode.cu, additive_math.cuh and softmax.cuh without a GPU: the kernels run in the emulator and are
// compared with loops over single elements in double. Link it with decode.cu, both compiled by any C++ compiler with
// ATTN_EMULATED. It prints one line for each group of cases, and exits with 1 at the first mismatch.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "cuda/additive_math.cuh"
#include "cuda/decode.h"
#include "cuda/softmax.cuh"

namespace attn {
namespace cuda {

std::vector<std::unique_ptr<char[]>> blocks;

void* current_stream() { return nullptr; }

void* scratch_bytes(std::int64_t bytes) {
  blocks.emplace_back(new char[bytes]);
  std::memset(blocks.back().get(), 0xff, bytes);  // NaN
  return blocks.back().get();
}

}  // namespace cuda
}  // namespace attn

namespace {

using namespace attn;
using namespace attn::cuda;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN(), kInf = std::numeric_limits<double>::infinity();
const char* const kDtypes[] = {"float32", "float64", "bfloat16", "float16"};
const double kEpsilon[] = {0x1p-23, 0x1p-52, 0x1p-7, 0x1p-10};

std::uint32_t state = 1;
std::uint32_t random_bits() { return (state = state * 1664525u + 1013904223u) >> 8; }
double uniform() { return static_cast<double>(random_bits()) / 0x1p23 - 1; }

// The layout of elements: contiguous rows; aligned rows with gaps; rows one element off a multiple of 16 bytes; every
// second element; contiguous columns.
enum class Layout { plain, padded, misaligned, spread, transposed };

template <class F>
void with_dtype(Dtype dtype, const F& f) {
  if (dtype == Dtype::float32) f(float());
  if (dtype == Dtype::float64) f(double());
  if (dtype == Dtype::bfloat16) f(BFloat16());
  if (dtype == Dtype::float16) f(Float16());
}

// An array as a kernel's view, with NaN around its elements, and as numbers in double.
struct Data {
  Dtype dtype;
  std::int64_t n0, n1, n2;
  StridedView3 array;
  std::vector<double> x;
  std::vector<std::uint64_t> memory;

  Data(Dtype dtype, std::int64_t n0, std::int64_t n1, std::int64_t n2, double size, Layout layout = Layout::plain)
      : dtype(dtype), n0(n0), n1(n1), n2(n2), x(n0 * n1 * n2) {
    const std::int64_t each = 16 / item_size(dtype);
    std::int64_t s1 = n2, s2 = 1, offset = 0;
    if (layout == Layout::padded) s1 = round_up(n2, each) + each;
    if (layout == Layout::misaligned) offset = 1;
    if (layout == Layout::spread) s1 = 2 * n2, s2 = 2;
    if (layout == Layout::transposed) s1 = 1, s2 = n1;
    const std::int64_t s0 = layout == Layout::transposed ? n1 * n2 : n1 * s1;
    memory.assign(((n0 * s0 + offset) * item_size(dtype) + 15) / 16 * 2 + 4, ~std::uint64_t(0));
    char* base = reinterpret_cast<char*>(memory.data());
    base += (16 - reinterpret_cast<std::uintptr_t>(base) % 16) % 16;
    array.data = base + offset * item_size(dtype);
    array.dtype = dtype;
    array.stride[0] = s0, array.stride[1] = s1, array.stride[2] = s2;
    for (double& e : x) e = size * uniform();
    encode();
  }

  std::int64_t place(std::int64_t i, std::int64_t j, std::int64_t k) const {
    return i * array.stride[0] + j * array.stride[1] + k * array.stride[2];
  }
  double& at(std::int64_t i, std::int64_t j, std::int64_t k) { return x[(i * n1 + j) * n2 + k]; }
  double at(std::int64_t i, std::int64_t j, std::int64_t k) const { return x[(i * n1 + j) * n2 + k]; }

  // Rounds x to the dtype, and writes it to memory.
  void encode() {
    with_dtype(dtype, [&](auto type) {
      using T = decltype(type);
      T* to = static_cast<T*>(const_cast<void*>(array.data));
      for (std::int64_t i = 0; i < n0; ++i)
        for (std::int64_t j = 0; j < n1; ++j)
          for (std::int64_t k = 0; k < n2; ++k) {
            T& element = to[place(i, j, k)];
            element = narrow<T>(static_cast<Wide<T>>(at(i, j, k)));
            at(i, j, k) = widen(element);
          }
    });
  }
  void decode() {
    with_dtype(dtype, [&](auto type) {
      for (std::int64_t i = 0; i < n0 * n1 * n2; ++i) x[i] = widen(static_cast<const decltype(type)*>(array.data)[i]);
    });
  }
};

enum class Score { additive, relu, leaky, dot };
const char* const kScores[] = {"additive", "relu", "leaky relu", "dot"};
constexpr double kScale = 0.5;  // the scale of dot attention
double slope_of(Score score) { return score == Score::leaky ? 0.25 : 0; }

struct Case {
  std::int64_t B, Tq, Tk, A, D;
  Dtype dtype = Dtype::float32;
  Layout layout = Layout::plain;
  int lengths = 0;  // 32 or 64 bits, or 0 without lengths
  int mask = 0;     // 1: per step, 2: per pair
  bool prepared = false, bias = true, alignments = true;
  double size = 1, v_size = 0.25;  // size: of queries and keys; v_size: of v
  int special = 0;                 // values of interest in the inputs
  bool extra = false;              // added to the keys, for scores with v
  Layout extra_layout = Layout::plain;
};

std::string describe(const Case& c) {
  char text[256];
  std::snprintf(
      text, sizeof text,
      "(B, Tq, Tk, A, D) = (%d, %d, %d, %d, %d), %s, layout %d, lengths %d, mask %d, prepared %d, inputs up to "
      "%g, v to %g, special %d, extra %d, in layout %d",
      int(c.B), int(c.Tq), int(c.Tk), int(c.A), int(c.D), kDtypes[int(c.dtype)], int(c.layout), c.lengths, c.mask,
      c.prepared, c.size, c.v_size, c.special, c.extra, int(c.extra_layout));
  return text;
}

struct Inputs {
  Case c;
  Data query, keys, values, v, bias, prepared, extra;
  std::vector<std::int64_t> lengths;
  std::vector<std::int32_t> lengths32;
  std::vector<char> mask;

  explicit Inputs(const Case& c)
      : c(c),
        query(c.dtype, c.B, c.Tq, c.A, c.size, c.layout),
        keys(c.dtype, c.B, c.Tk, c.A, c.size, c.layout),
        values(c.dtype, c.B, c.Tk, c.D, 1, c.layout),
        v(c.dtype, 1, 1, c.A, c.v_size, c.layout == Layout::spread ? Layout::spread : Layout::plain),
        bias(c.dtype, 1, 1, c.A, 0.5),
        prepared(Dtype::float32, 0, 0, 0, 0),
        extra(c.dtype, c.extra ? c.B : 0, c.Tk, c.A, c.size, c.extra_layout) {
    for (std::int64_t b = 0; b < c.B; ++b) {
      const std::int64_t some[] = {c.Tk, 0, c.Tk - 1, c.Tk + 5, -3, random_bits() % (c.Tk + 1), 1};
      lengths.push_back(some[(b + c.lengths / 64) % 7]);
      lengths32.push_back(static_cast<std::int32_t>(lengths.back()));
    }
    for (std::int64_t i = 0; i < c.B * c.Tq * c.Tk; ++i) mask.push_back(random_bits() % 3 > 0);
    if (c.mask == 2 && c.Tq > 1)  // one query attends nothing
      for (std::int64_t j = 0; j < c.Tk; ++j) mask[c.Tk + j] = 0;
    make_special();
    for (std::int64_t b = 0; b < c.B; ++b)  // padding
      for (std::int64_t j = 0; j < c.Tk; ++j) {
        bool used = false;
        for (std::int64_t i = 0; i < c.Tq; ++i) used |= allowed(b, i, j);
        if (used) continue;
        for (std::int64_t a = 0; a < c.A; ++a) keys.at(b, j, a) = random_bits() % 2 ? kNaN : kInf;
        for (std::int64_t a = 0; c.extra && a < c.A; ++a) extra.at(b, j, a) = random_bits() % 2 ? kNaN : -kInf;
        for (std::int64_t d = 0; d < c.D; ++d) values.at(b, j, d) = random_bits() % 2 ? kNaN : -kInf;
      }
    for (Data* data : {&query, &keys, &values, &v, &bias, &extra}) data->encode();
    if (c.prepared) prepare();
  }

  void make_special() {
    auto random_of = [](Data& data) -> double& { return data.x[random_bits() % data.x.size()]; };
    if (c.special == 1) random_of(keys) = kNaN;
    if (c.special == 2) random_of(query) = kNaN;
    if (c.special == 3) random_of(keys) = kInf, random_of(keys) = -kInf;
    if (c.special == 4) random_of(query) = -kInf;
    if (c.special == 5) random_of(values) = kInf;
    if (c.special == 6) random_of(values) = kNaN;
    if (c.special == 7) random_of(v) = 1e4, random_of(v) = 0, random_of(v) = 1e-42, random_of(v) = -1e4;
    if (c.special == 8) v.x.assign(v.x.size(), 0.0);
    if (c.special == 9) random_of(v) = kNaN;
    if (c.special == 10) random_of(keys) = 60, random_of(keys) = -45, random_of(keys) = 25;
    if (c.special == 11) v.x.assign(v.x.size(), -kInf);  // scores of -inf, or NaN
    if (c.special == 11)
      for (double& k : keys.x) k = std::fabs(k) + 2 * c.size + 1;  // -inf
    if (c.special == 12 && c.mask == 2)                            // padding for some queries only
      for (std::int64_t j = 0; j < c.Tk; ++j)
        if (!mask[j] && c.D > 0) values.at(0, j, j % c.D) = kNaN;
    if (c.special == 13 && c.Tq > 1)  // padding: a query that attends nothing
      for (std::int64_t a = 0; a < c.A; ++a) query.at(0, 1, a) = kNaN;
    if (c.special == 14)
      for (double& e : keys.x) e *= 1e-3;
    if (c.special == 14)
      for (double& e : query.x) e *= 1e-3;
    if (c.special == 15) random_of(extra) = kNaN, random_of(extra) = kInf;
    if (c.special == 16)  // cancels the keys
      for (std::size_t i = 0; i < extra.x.size(); ++i) extra.x[i] = -keys.x[i];
  }

  void prepare() {
    const Dtype dtype = c.dtype == Dtype::bfloat16 ? Dtype::bfloat16 : Dtype::float32;
    const PreparedSizes sizes(c.A, c.Tk, dtype);
    prepared = Data(dtype, c.B, sizes.rows, sizes.columns, 0);
    for (std::int64_t b = 0; b < c.B; ++b)
      for (std::int64_t j = 0; j < c.Tk; ++j)
        for (std::int64_t a = 0; a < c.A; ++a) prepared.at(b, j, a) = std::exp(2 * keys.at(b, j, a));
    prepared.encode();
    for (std::int64_t b = 0; b < c.B && c.A > 0; ++b) {
      char* tops =
          static_cast<char*>(const_cast<void*>(prepared.array.data)) + prepared.place(b, c.Tk, 0) * item_size(dtype);
      for (std::int64_t j = 0; j < c.Tk; ++j) {
        float top = 0;
        for (std::int64_t a = 0; a < c.A; ++a) top = larger(top, static_cast<float>(std::fabs(keys.at(b, j, a))));
        std::memcpy(tops + 4 * j, &top, 4);
        // The expected result uses the rounded values of the prepared rows.
        for (std::int64_t a = 0; a < c.A && dtype == Dtype::bfloat16; ++a)
          if (top < 10) keys.at(b, j, a) = std::log(prepared.at(b, j, a)) / 2;
      }
    }
  }

  bool allowed(std::int64_t b, std::int64_t i, std::int64_t j) const {
    if (c.lengths && j >= lengths[b]) return false;
    return !c.mask || mask[(b * c.Tq + (c.mask == 2 ? i : 0)) * c.Tk + j];
  }

  AttentionMask attended() const {
    AttentionMask a;
    if (c.lengths % 64 == 32) a.lengths = lengths32.data(), a.lengths_stride = 1;
    if (c.lengths && c.lengths % 64 == 0) a.lengths = lengths.data(), a.lengths_are_64 = true, a.lengths_stride = 1;
    if (c.mask) {
      a.mask = reinterpret_cast<const bool*>(mask.data());
      a.mask_stride[0] = c.Tq * c.Tk, a.mask_stride[1] = c.mask == 2 ? c.Tk : 0, a.mask_stride[2] = 1;
      a.per_query = c.mask == 2;
    }
    return a;
  }

  // The formula, with everything in R.
  template <typename R>
  void loops(Score of, std::vector<double>* context, std::vector<double>* alignments) const {
    context->assign(c.B * c.Tq * c.D, 0);
    alignments->assign(c.B * c.Tq * c.Tk, 0);
    std::vector<R> s(c.Tk), sums(c.D);
    for (std::int64_t b = 0; b < c.B; ++b)
      for (std::int64_t i = 0; i < c.Tq; ++i) {
        R top = -R(kInf), total = 0;
        bool any = false;
        for (std::int64_t j = 0; j < c.Tk; ++j) {
          if (!allowed(b, i, j)) continue;
          R score = 0;
          for (std::int64_t a = 0; a < c.A; ++a) {
            const R q = R(query.at(b, i, a)), k = R(keys.at(b, j, a)), shift = c.bias ? R(bias.x[a]) : R(0);
            const R x = q + (c.extra ? k + R(extra.at(b, j, a)) : k) + shift;
            if (of == Score::dot)
              score += q * k;
            else if (of == Score::additive)
              score += R(v.x[a]) * std::tanh(x);
            else if (of == Score::relu)
              score += R(v.x[a]) * (x <= 0 ? R(0) : x);
            else
              score += R(v.x[a]) * (x > 0 ? x : R(slope_of(of)) * x);
          }
          s[j] = of == Score::dot ? R(kScale) * score : score;
          top = larger(top, s[j]);
          any = true;
        }
        if (!any) continue;
        for (std::int64_t j = 0; j < c.Tk; ++j)
          if (allowed(b, i, j)) total += s[j] = std::exp(s[j] - top);
        sums.assign(c.D, 0);
        for (std::int64_t j = 0; j < c.Tk; ++j) {
          if (!allowed(b, i, j)) continue;
          const R p = s[j] / total;
          (*alignments)[(b * c.Tq + i) * c.Tk + j] = p;
          for (std::int64_t d = 0; d < c.D; ++d) sums[d] += p * R(values.at(b, j, d));
        }
        for (std::int64_t d = 0; d < c.D; ++d) (*context)[(b * c.Tq + i) * c.D + d] = sums[d];
      }
  }
};

int checks = 0;

void fail(const Case& c, Score of, const Splits& splits, const char* name, std::size_t i, double actual,
          double expected, double allowed) {
  std::printf("%s attention, %s, %d splits%s: %s[%d] is %.9g, expected %.9g within %.3g\n", kScores[int(of)],
              describe(c).c_str(), int(splits.n), splits.cluster ? " in clusters" : "", name, int(i), actual, expected,
              allowed);
  std::exit(1);
}

// The tolerance of tests/matrix.py: twice the error of the formula in float32, plus a rounding.
void compare(const Case& c, Score of, const Splits& splits, const char* name, const Data& actual,
             const std::vector<double>& expected, const std::vector<double>& eager) {
  double peak = 0, eager_error = 0;
  for (std::size_t i = 0; i < expected.size(); ++i)
    if (std::isfinite(expected[i])) {
      peak = std::fmax(peak, std::fabs(expected[i]));
      eager_error = std::fmax(eager_error, std::fabs(eager[i] - expected[i]));
    }
  const double scale = std::strcmp(name, "alignments") == 0 ? peak : std::fmax(peak, 1);
  // The error of a score is relative to its terms, and softmax amplifies it.
  const double term = of == Score::additive ? 0 : c.size * (of == Score::dot ? kScale * c.size : c.v_size),
               terms = std::fmin(std::fmax(term * std::sqrt(c.A) / 3, 1), 1e5);
  const double rounding = (c.dtype == Dtype::float64 ? 1e-10 : 1e-6) * scale * terms;
  const bool low = item_size(c.dtype) == 2;
  const double allowed = (c.dtype == Dtype::float64 ? 0 : 2 * eager_error) + rounding +
                         (low ? kEpsilon[int(c.dtype)] * (peak + c.v_size * std::sqrt(c.A) * 1e-3) : 0);
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double a = actual.x[i], e = expected[i];
    const bool right = std::isnan(e)   ? std::isnan(a)
                       : std::isinf(e) ? a == e || std::isnan(a)
                                       : std::fabs(a - e) <= allowed;
    if (!right) fail(c, of, splits, name, i, a, e, allowed);
  }
}

struct Expected {
  std::vector<double> context, alignments, eager_context, eager_alignments;

  Expected(const Inputs& in, Score of) {
    in.loops<double>(of, &context, &alignments);
    in.loops<float>(of, &eager_context, &eager_alignments);
  }
};

template <class Op>
void call(Op op, const Inputs& in, void* context, void* alignments, const Splits& splits) {
  const Case& c = in.c;
  op.B = c.B, op.Tq = c.Tq, op.Tk = c.Tk, op.A = c.A, op.D = c.D;
  op.query = in.query.array, op.keys = in.keys.array, op.values = in.values.array;
  op.attended = in.attended(), op.context = context, op.alignments = alignments;
  splits.n > 0 ? decode_attention(op, splits) : decode_attention(op);
}

template <class Op>
Op with_vector(const Inputs& in) {
  Op op{};
  op.v = in.v.array;
  if (in.c.bias) op.bias = in.bias.array;
  if (in.c.extra) op.extra = in.extra.array;
  return op;
}

void check(const Inputs& in, Score of, const Expected& expected, const Splits& splits) {
  const Case& c = in.c;
  Data out(c.dtype, c.B, c.Tq, c.D, 0), weights(c.dtype, c.B, c.Tq, c.Tk, 0);
  for (Data* data : {&out, &weights}) data->memory.assign(data->memory.size(), ~std::uint64_t(0));
  const std::vector<std::uint64_t> before[] = {in.query.memory, in.keys.memory, in.values.memory, in.extra.memory};
  void* to[] = {const_cast<void*>(out.array.data), c.alignments ? const_cast<void*>(weights.array.data) : nullptr};
  if (of == Score::additive) {
    auto op = with_vector<AttentionForward<AdditiveScores>>(in);
    if (c.prepared && c.A > 0) op.prepared = in.prepared.array;
    call(op, in, to[0], to[1], splits);
  } else if (of == Score::dot) {
    AttentionForward<DotScores> op{};
    op.scale = kScale;
    call(op, in, to[0], to[1], splits);
  } else {
    auto op = with_vector<AttentionForward<ActivatedScores>>(in);
    op.activation = of == Score::leaky ? Activation::leaky_relu : Activation::relu;
    op.negative_slope = slope_of(of);
    call(op, in, to[0], to[1], splits);
  }
  attn::cuda::blocks.clear();
  if (before[0] != in.query.memory || before[1] != in.keys.memory || before[2] != in.values.memory ||
      before[3] != in.extra.memory)
    fail(c, of, splits, "an input was written to", 0, 0, 0, 0);
  out.decode(), weights.decode();
  compare(c, of, splits, "context", out, expected.context, expected.eager_context);
  if (c.alignments) compare(c, of, splits, "alignments", weights, expected.alignments, expected.eager_alignments);
  ++checks;
}

// Checks every score, with one of the two activations relu and leaky_relu. The steps are in one part, in few parts or
// in many, combined in both ways. With `every`, all of these are checked, otherwise a different selection each time.
void check_all(const Case& c, bool every = false) {
  static int turn = 0;
  const Inputs in(c);
  for (const Score of : {Score::additive, turn % 2 ? Score::leaky : Score::relu, Score::dot}) {
    if (of != Score::additive && c.prepared) continue;
    if (of == Score::dot && (c.special >= 7 || c.extra)) continue;
    const Expected expected(in, of);
    int i = ++turn;
    for (const Splits& splits : {Splits{0, false}, Splits{1, false}, Splits{2, true}, Splits{3, false}, Splits{4, true},
                                 Splits{7, false}, Splits{16, true}}) {
      if (!every && ++i % 3 != 0) continue;
      if (splits.cluster && c.dtype == Dtype::float64) continue;
      if (splits.n > 4 && (c.Tk < 5 || c.B > 3)) continue;
      if (splits.n > 7 && !every && c.Tk < 64) continue;  // the slowest in the emulator
      check(in, of, expected, splits);
    }
  }
}

void report(const char* group) {
  std::printf("%s: %d checks\n", group, checks);
  std::fflush(stdout);
  checks = 0;
}

void require(bool right, const char* what, double at, double error) {
  ++checks;
  if (right) return;
  std::printf("additive_math.cuh: %s at %g: error %g\n", what, at, error);
  std::exit(1);
}

void check_pairs() {
  double worst = 0, worst_at = 0, rough = 0, rough_at = 0;
  for (double x = -43; x <= 43; x += 1.37e-4) {
    const float f = static_cast<float>(x), g = static_cast<float>(std::exp(2.0 * f));
    const double exact = std::exp(2.0 * f), ulp = std::nextafter(g, INFINITY) - g;
    const double error = std::fabs(exp2x(f) - exact) / ulp;
    const double rough_error = std::fabs(rough_exp2x(f) / exact - 1) / (0x1p-22 * (1 + std::fabs(f)));
    if (error > worst) worst = error, worst_at = f;
    if (rough_error > rough) rough = rough_error, rough_at = f;
  }
  require(worst < 1.1, "exp2x, in ulps", worst_at, worst);
  require(rough < 1.3, "rough_exp2x", rough_at, rough);  // a quarter is the rounding of the instruction's result
  require(exp2x(0.0f) == 1, "exp2x", 0, 0);
  require(std::isnan(exp2x(NAN)) && std::isnan(rough_exp2x(NAN)), "exp2x of NaN", kNaN, 0);
  for (double size : {1e-4, 0.03, 0.5, 2.0, 9.9}) {
    double most = 0, squares = 0;
    constexpr int n = 100000;
    for (int i = 0; i < n; ++i) {
      const float q1 = float(size * uniform()), q2 = float(size * uniform()), k1 = float(size * uniform()),
                  k2 = float(size * uniform()), v1 = float(uniform()), v2 = float(uniform());
      const float e1 = exp2x(q1), e2 = exp2x(q2);
      const double error = add_two_units(0, e1, e1 * v1, v1, exp2x(k1), e2, e2 * v2, v2, exp2x(k2)) -
                           (v1 * std::tanh(double(q1) + k1) + v2 * std::tanh(double(q2) + k2));
      most = std::fmax(most, std::fabs(error)), squares += error * error;
    }
    // With an exact reciprocal the errors are 5e-7 and 6e-8. The emulator's reciprocal always has an error of 2^-23, of
    // a sum of up to 2.
    require(most < 5e-7 + 2 * 0x1p-23, "add_two_units, at most", size, most);
    require(std::sqrt(squares / n) < 6e-8 + 0x1p-23 / 2, "add_two_units, on average", size, std::sqrt(squares / n));
  }
  for (float k : {-kMaxBoundTwo, kMaxBoundTwo}) {  // no overflow or underflow at the limits
    const float e = exp2x(k), sum = add_two_units(0, 1, kMaxAbsVTwo, kMaxAbsVTwo, e, 1, kMaxAbsVTwo, kMaxAbsVTwo, e);
    require(std::fabs(sum - std::copysign(2 * kMaxAbsVTwo, k)) < 1e-3, "add_two_units at the edge", k, sum);
  }
  using Normaliser = Softmax<float>;
  using Part = Normaliser::Part;
  const Part empty{-INFINITY, 0}, two{1, 2}, more{3, 0.5f}, hopeless{-INFINITY, 3}, lost{NAN, NAN};
  const double sum = 0.5 + 2 * std::exp(-2.0);
  require(std::fabs(Normaliser::merge(two, more).sum - sum) < 1e-6 && Normaliser::merge(two, more).largest == 3,
          "merge", 0, 0);
  require(Normaliser::merge(empty, two).sum == 2 && Normaliser::merge(two, empty).largest == 1, "merge with nothing", 0,
          0);
  require(Normaliser::merge(hopeless, two).sum == 2 && Normaliser::merge(hopeless, two).largest == 1, "merge with -inf",
          0, 0);
  require(Normaliser::finish(Normaliser::merge(empty, empty)) == 0, "normaliser of nothing", 0, 0);
  require(std::isnan(Normaliser::finish(Normaliser::merge(empty, hopeless))), "normaliser of -inf", 0, 0);
  for (const Part& part : {empty, two, hopeless, lost})
    require(std::isnan(Normaliser::finish(Normaliser::merge(part, lost))) &&
                std::isnan(Normaliser::finish(Normaliser::merge(lost, part))),
            "merge with NaN", 0, 0);
  require(Normaliser::weight(-INFINITY, -INFINITY) == 1 && std::isnan(Normaliser::weight(INFINITY, INFINITY)),
          "weight_of", 0, 0);
  report("additive_math.cuh");
}

}  // namespace

int main() {
  check_pairs();
  const Dtype dtypes[] = {Dtype::float32, Dtype::float64, Dtype::bfloat16, Dtype::float16};
  const std::int64_t shapes[][5] = {{1, 1, 1, 1, 1},    {2, 1, 50, 128, 64},  {2, 3, 17, 63, 129}, {3, 2, 33, 256, 40},
                                    {1, 8, 31, 72, 24}, {2, 5, 20, 520, 136}, {2, 4, 9, 0, 16},    {2, 6, 11, 16, 0},
                                    {1, 1, 130, 40, 7}, {1, 7, 16, 7, 1032}};
  for (Dtype dtype : dtypes) {
    for (const auto& s : shapes) check_all({s[0], s[1], s[2], s[3], s[4], dtype}, dtype == Dtype::float32);
    report((std::string("shapes, ") + kDtypes[int(dtype)]).c_str());
  }
  for (std::int64_t Tk : {2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129}) check_all({1, 1, Tk, 64, 32});
  report("steps around splits");
  check_all({1, 1, 1000, 64, 64});
  check_all({1, 5, 1000, 32, 16, Dtype::bfloat16, Layout::plain, 0, 2});
  check_all({1, 1, 5000, 8, 8});
  check_all({1, 2, 40, 4100, 2056});
  check_all({1, 8, 9, 1032, 2056, Dtype::bfloat16});
  report("large");
  for (Dtype dtype : dtypes)
    for (Layout layout : {Layout::padded, Layout::misaligned, Layout::spread, Layout::transposed})
      for (int Tq : {1, 3}) check_all({2, Tq, 19, 40, 24, dtype, layout, 32, Tq > 1 ? 2 : 1});
  report("layouts");
  int turn = 0;
  for (int lengths : {0, 32, 64, 96, 128})
    for (int mask : {0, 1, 2})
      for (int Tq : {1, 2, 8}) {
        Case c{lengths ? 7 : 2, Tq, 13, 24, 16, dtypes[turn++ % 4], Layout::plain, lengths, mask};
        check_all(c);
        c.dtype = dtypes[turn % 4], c.alignments = false, c.bias = false, c.Tk = 35, c.B = 2;
        check_all(c, lengths == 64);
      }
  report("lengths and masks");
  for (int special = 1; special <= 14; ++special)
    for (Dtype dtype : {Dtype::float32, special % 2 ? Dtype::bfloat16 : Dtype::float64})
      for (int mask : {0, 2}) {
        Case c{2, 3, 21, 40, 24, dtype, Layout::plain, 0, mask};
        c.special = special;
        if (special == 14) c.v_size = 30;
        check_all(c);
        c.Tq = 1, c.mask = mask / 2;
        check_all(c);
      }
  report("special values");
  for (double size : {0.01, 0.3, 5.0, 12.0, 30.0, 1e4})
    for (double v_size : {0.1, 1.0, 20.0, 1e4})
      for (int Tq : {1, 4})
        for (Dtype dtype : {Dtype::float32, Dtype::float16}) {
          Case c{1, Tq, 24, 96, 16, dtype};
          c.size = size, c.v_size = dtype == Dtype::float16 ? std::fmin(v_size, 1) : v_size;
          check_all(c);
        }
  report("sizes of inputs");
  for (Dtype dtype : dtypes)
    for (int Tq : {1, 3, 8}) {
      Case c{2, Tq, 19, 40, 24, dtype, Layout::plain, 32, Tq > 1 ? 2 : 1};
      c.extra = true;
      for (Layout layout : {Layout::plain, Layout::padded, Layout::misaligned, Layout::spread, Layout::transposed}) {
        c.extra_layout = layout, c.layout = layout == Layout::spread ? Layout::padded : Layout::plain;
        check_all(c, dtype == Dtype::float32 && Tq < 8);
      }
      c.extra_layout = c.layout = Layout::plain;
      for (int special : {1, 15, 16}) {
        c.special = special;
        check_all(c);
      }
      c.special = 0, c.size = 30, c.A = 600, c.mask = 0;
      check_all(c);
    }
  report("extra");
  for (Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16})
    for (int A : {33, 100, 600})
      for (int Tq : {1, 3}) {
        Case c{2, Tq, 29, A, 16, dtype, Layout::plain, 32, 1};
        c.prepared = true;
        check_all(c);
        if (dtype == Dtype::bfloat16) continue;
        c.size = 30;
        check_all(c);
        for (int special : {1, 2, 3, 10}) {
          c.special = special;
          c.size = 1;
          check_all(c);
        }
      }
  report("prepared keys");
  // The compensated form, and steps beyond its limits.
  for (bool prepared : {false, true})
    for (int A : {33, 100, 600})
      for (int Tq : {2, 4, 8})
        for (int special : {0, 1, 10, 14}) {
          Case c{1, Tq, 29, A, 16, Dtype::float32, Layout::plain, 0, special == 0 ? 2 : 0};
          c.prepared = prepared, c.special = special;
          const bool huge = A == 33 && (special == 0 || special == 14);
          c.size = special == 14 ? 1 : huge ? 1e-3 : 0.02, c.v_size = huge ? 1e4 : 30;
          c.bias = false;  // with it, scores would be so large that their own rounding decides
          check_all(c);
        }
  report("large v");
}
