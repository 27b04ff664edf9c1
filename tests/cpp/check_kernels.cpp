// Compares the C++ kernels, without PyTorch, with loops over single elements in double. So other compilers, other
// processors and sanitizers can run it. It replaces runtime.cpp: one thread, and scratch memory that is allocated anew
// and to the byte each time, so a sanitizer detects what the kernels' own pool would hide. It prints mismatches.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/runtime.h"

namespace attn {

// Splits into parts that end anywhere, as with several threads.
void parallel_for(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  for (int64_t i = 0; i < n; i += grain) body(i, i + grain < n ? i + grain : n, context);
}

int64_t thread_count() { return 2; }

// Small, so that gradients use non-temporal stores if their rows are aligned.
int64_t last_cache_bytes() { return 2048; }

struct Scratch::Block {
  Block* below;
  void* memory;
};

void* Scratch::alloc(int64_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, bytes) != 0) std::abort();
  std::memset(memory, 0xff, bytes);  // NaN in every dtype
  blocks_ = new Block{blocks_, memory};
  peak_ = ++used_;
  return memory;
}

void Scratch::release(int64_t mark) {
  for (; used_ > mark; --used_) {
    Block* top = blocks_;
    blocks_ = top->below;
    std::free(top->memory);
    delete top;
  }
}

Scratch::~Scratch() { release(0); }

Scratch& thread_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

}  // namespace attn

namespace {

using namespace attn;

const char* const kDtypes[] = {"float32", "float64", "bfloat16", "float16"};
const double kEpsilon[] = {0x1p-23, 0x1p-52, 0x1p-7, 0x1p-10};

double from_float16(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  const double x = exponent == 0    ? std::ldexp(fraction, -24)
                   : exponent == 31 ? std::numeric_limits<double>::quiet_NaN()
                                    : std::ldexp(1024 + fraction, exponent - 25);
  return h & 0x8000 ? -x : x;
}

// Only for numbers that float16 holds exactly.
uint16_t to_float16(double x) {
  uint32_t low = 0, high = 0x7bff;
  while (low < high) {  // the bits of positive numbers are ordered like the numbers
    const uint32_t middle = (low + high) / 2;
    from_float16(middle) < std::fabs(x) ? low = middle + 1 : high = middle;
  }
  return static_cast<uint16_t>(low | (x < 0 ? 0x8000 : 0));
}

// An array as a kernel's view (exactly as long as necessary) and as numbers in double.
struct Data {
  Dtype dtype;
  std::vector<double> x;
  std::vector<char> bytes;

  Data(Dtype dtype, int64_t n) : dtype(dtype), x(n), bytes(n * item_size(dtype), static_cast<char>(0xff)) {}

  void encode() {
    for (size_t i = 0; i < x.size(); ++i) {
      char* to = bytes.data() + i * item_size(dtype);
      const float f = static_cast<float>(x[i]);
      uint32_t word;
      std::memcpy(&word, &f, 4);
      const uint16_t half = dtype == Dtype::bfloat16 ? static_cast<uint16_t>(word >> 16) : to_float16(x[i]);
      const void* from = dtype == Dtype::float64 ? static_cast<const void*>(&x[i]) : dtype == Dtype::float32 ? &f : 0;
      std::memcpy(to, from ? from : &half, item_size(dtype));
      x[i] = value(i);
    }
  }

  double value(int64_t i) const {
    const char* from = bytes.data() + i * item_size(dtype);
    if (dtype == Dtype::float64) {
      double d;
      return std::memcpy(&d, from, 8), d;
    }
    uint32_t word = 0;
    std::memcpy(&word, from, item_size(dtype));
    if (dtype == Dtype::float16) return from_float16(static_cast<uint16_t>(word));
    if (dtype == Dtype::bfloat16) word <<= 16;
    float f;
    return std::memcpy(&f, &word, 4), f;
  }
};

struct Shape {
  int64_t B, Tq, Tk, A, D;
  bool lengths, mask, per_query;
  double size;  // size of the numbers in queries and keys
};

int failures = 0;

// One shape and dtype: the inputs, the expected results by loops, and the results of the kernels.
struct Check {
  Shape n;
  Dtype dtype;
  uint32_t state = 1;
  Data query, keys, values, v, bias, grad_context, grad_alignments, grad_scores, alignments;
  std::vector<int64_t> lengths;
  std::vector<char> mask;

  Check(const Shape& n, Dtype dtype)
      : n(n),
        dtype(dtype),
        query(numbers(n.B * n.Tq * n.A, n.size)),
        keys(numbers(n.B * n.Tk * n.A, n.size)),
        values(numbers(n.B * n.Tk * n.D, 1)),
        v(numbers(n.A, 0.25)),
        bias(numbers(n.A, 0.5)),
        grad_context(numbers(n.B * n.Tq * n.D, 1)),
        grad_alignments(numbers(n.B * n.Tq * n.Tk, 1)),
        grad_scores(numbers(n.B * n.Tq * n.Tk, 1)),
        alignments(dtype, n.B * n.Tq * n.Tk) {
    for (int64_t b = 0; b < n.B; ++b) lengths.push_back(b == 1 ? 0 : n.Tk - b % 3);
    for (int64_t i = 0; i < n.B * n.Tq * n.Tk; ++i) mask.push_back(random() % 3 > 0);
  }

  uint32_t random() { return (state = state * 1664525u + 1013904223u) >> 8; }

  // Multiples of size / 128 in (-size, size): exact in every dtype if size is a power of two.
  Data numbers(int64_t count, double size) {
    Data data(dtype, count);
    for (double& x : data.x) x = size * (static_cast<int>(random() % 255) - 127) / 128;
    data.encode();
    return data;
  }

  bool allowed(int64_t b, int64_t i, int64_t j) const {
    if (n.lengths && j >= lengths[b]) return false;
    return !n.mask || mask[(b * n.Tq + (n.per_query ? i : 0)) * n.Tk + j];
  }

  StridedView3 array(const Data& data, int64_t rows, int64_t columns) const {
    return {data.bytes.data(), dtype, {rows * columns, columns, 1}};
  }
  StridedView3 vector(const Data& data) const { return {data.bytes.data(), dtype, {0, 0, 1}}; }

  AttentionMask attended() const {
    AttentionMask a;
    if (n.lengths) a.lengths = lengths.data(), a.lengths_are_64 = true, a.lengths_stride = 1;
    if (n.mask) {
      a.mask = reinterpret_cast<const bool*>(mask.data());
      a.mask_stride[0] = n.Tq * n.Tk, a.mask_stride[1] = n.per_query ? n.Tk : 0, a.mask_stride[2] = 1;
      a.per_query = n.per_query;
    }
    return a;
  }

  double at(const Data& data, int64_t row, int64_t columns, int64_t c) const { return data.x[row * columns + c]; }

  void compare(const char* op, const char* name, const Data& actual, const std::vector<double>& expected) const {
    double scale = 1, worst = 0;
    for (double x : expected) scale = std::fmax(scale, std::fabs(x));
    for (size_t i = 0; i < expected.size(); ++i) {
      const double error = std::fabs(actual.value(i) - expected[i]);
      worst = std::isnan(error) ? std::numeric_limits<double>::infinity() : std::fmax(worst, error);
    }
    const double allowed = scale * (dtype == Dtype::float32 ? 1e-5 : dtype == Dtype::float64 ? 1e-11 : 1.5 * epsilon());
    if (worst <= allowed) return;
    ++failures;
    std::printf("%s, %s, %s (B, Tq, Tk, A, D) = (%d, %d, %d, %d, %d), inputs up to %g: %s: error %g, allowed %g\n",
                level().name, op, kDtypes[static_cast<int>(dtype)], static_cast<int>(n.B), static_cast<int>(n.Tq),
                static_cast<int>(n.Tk), static_cast<int>(n.A), static_cast<int>(n.D), n.size, name, worst, allowed);
  }
  double epsilon() const { return kEpsilon[static_cast<int>(dtype)]; }

  // The expected results, computed by loops. only_scores: gradients from grad_scores, without a softmax.
  struct Loops {
    std::vector<double> scores, context, alignments, dquery, dkeys, dvalues, dv, dbias;
  };

  Loops loops(bool additive, double dot_scale, bool only_scores) const {
    const int64_t pairs = n.B * n.Tq * n.Tk;
    Loops r{std::vector<double>(pairs),         std::vector<double>(n.B * n.Tq * n.D),
            std::vector<double>(pairs),         std::vector<double>(query.x.size()),
            std::vector<double>(keys.x.size()), std::vector<double>(values.x.size()),
            std::vector<double>(n.A),           std::vector<double>(n.A)};
    auto hidden = [&](int64_t q, int64_t k, int64_t a) {
      return std::tanh(at(query, q, n.A, a) + at(keys, k, n.A, a) + bias.x[a]);
    };
    for (int64_t b = 0; b < n.B; ++b)
      for (int64_t i = 0; i < n.Tq; ++i) {
        const int64_t q = b * n.Tq + i;
        std::vector<double> ds(n.Tk);
        double top = -std::numeric_limits<double>::infinity(), total = 0, delta = 0;
        for (int64_t j = 0; j < n.Tk; ++j) {
          double& score = r.scores[q * n.Tk + j];
          for (int64_t a = 0; a < n.A; ++a)
            score += additive ? v.x[a] * hidden(q, b * n.Tk + j, a)
                              : dot_scale * at(query, q, n.A, a) * at(keys, b * n.Tk + j, n.A, a);
          if (allowed(b, i, j)) top = std::fmax(top, score);
        }
        for (int64_t j = 0; j < n.Tk; ++j)
          if (allowed(b, i, j)) total += std::exp(r.scores[q * n.Tk + j] - top);
        for (int64_t j = 0; j < n.Tk; ++j) {
          ds[j] = only_scores ? grad_scores.x[q * n.Tk + j] : 0;
          if (only_scores || !allowed(b, i, j)) continue;
          const double p = std::exp(r.scores[q * n.Tk + j] - top) / total;
          r.alignments[q * n.Tk + j] = p;
          ds[j] = grad_alignments.x[q * n.Tk + j];
          for (int64_t d = 0; d < n.D; ++d) {
            r.context[q * n.D + d] += p * at(values, b * n.Tk + j, n.D, d);
            r.dvalues[(b * n.Tk + j) * n.D + d] += p * at(grad_context, q, n.D, d);
            ds[j] += at(grad_context, q, n.D, d) * at(values, b * n.Tk + j, n.D, d);
          }
          delta += p * ds[j];
        }
        for (int64_t j = 0; j < n.Tk; ++j) {
          const int64_t k = b * n.Tk + j;
          const double g = only_scores ? ds[j] : r.alignments[q * n.Tk + j] * (ds[j] - delta);
          if (g == 0) continue;
          for (int64_t a = 0; a < n.A; ++a) {
            const double t = additive ? hidden(q, k, a) : 0, slope = v.x[a] * (1 - t * t);
            r.dquery[q * n.A + a] += g * (additive ? slope : dot_scale * at(keys, k, n.A, a));
            r.dkeys[k * n.A + a] += g * (additive ? slope : dot_scale * at(query, q, n.A, a));
            r.dv[a] += g * t;
            r.dbias[a] += g * slope;
          }
        }
      }
    return r;
  }

  void additive_scores() {
    const Loops r = loops(true, 0, true);
    const AdditiveScores sizes = additive_sizes();
    Data scores(dtype, r.scores.size()), dquery(dtype, r.dquery.size()), dkeys(dtype, r.dkeys.size()), dv(dtype, n.A),
        dbias(dtype, n.A);
    level().kernels->additive.scores({sizes, scores.bytes.data()});
    level().kernels->additive.scores_backward({sizes,
                                               {dv.bytes.data(), dbias.bytes.data()},
                                               array(grad_scores, n.Tq, n.Tk),
                                               dquery.bytes.data(),
                                               dkeys.bytes.data()});
    const char* op = "additive_scores";
    compare(op, "scores", scores, r.scores);
    compare(op, "dquery", dquery, r.dquery);
    compare(op, "dkeys", dkeys, r.dkeys);
    compare(op, "dv", dv, r.dv);
    compare(op, "dbias", dbias, r.dbias);
  }

  // Forward and backward of an op with a softmax.
  void attention(bool additive) {
    const double scale = 1 / (n.size * n.size);
    const Loops r = loops(additive, scale, false);
    Data context(dtype, r.context.size()), weights(dtype, r.alignments.size());
    Data dquery(dtype, r.dquery.size()), dkeys(dtype, r.dkeys.size()), dvalues(dtype, r.dvalues.size());
    Data dv(dtype, n.A), dbias(dtype, n.A);
    Data query_alone(dtype, r.dquery.size()), keys_alone(dtype, r.dkeys.size()), values_alone(dtype, r.dvalues.size());
    const StridedView3 value_rows = array(values, n.Tk, n.D), saved = array(weights, n.Tq, n.Tk);
    const StridedView3 dcontext = array(grad_context, n.Tq, n.D), dalignments = array(grad_alignments, n.Tq, n.Tk);
    if (additive) {
      level().kernels->additive.attention(
          {additive_sizes(), n.D, value_rows, attended(), context.bytes.data(), weights.bytes.data()});
      auto backward = [&](const VectorGradients& own, void* to_query, void* to_keys, void* to_values) {
        level().kernels->additive.attention_backward({additive_sizes(), own, n.D, value_rows, attended(), saved,
                                                      dcontext, dalignments, to_query, to_keys, to_values});
      };
      const VectorGradients own{dv.bytes.data(), dbias.bytes.data()};
      backward(own, dquery.bytes.data(), dkeys.bytes.data(), dvalues.bytes.data());
      backward(own, query_alone.bytes.data(), nullptr, nullptr);
      backward({nullptr, nullptr}, nullptr, keys_alone.bytes.data(), values_alone.bytes.data());
    } else {
      const DotScores sizes{{n.B, n.Tq, n.Tk, n.A, array(query, n.Tq, n.A), array(keys, n.Tk, n.A)}, scale};
      level().kernels->dot.attention({sizes, n.D, value_rows, attended(), context.bytes.data(), weights.bytes.data()});
      auto backward = [&](void* to_query, void* to_keys, void* to_values) {
        level().kernels->dot.attention_backward(
            {sizes, {}, n.D, value_rows, attended(), saved, dcontext, dalignments, to_query, to_keys, to_values});
      };
      backward(dquery.bytes.data(), dkeys.bytes.data(), dvalues.bytes.data());
      backward(query_alone.bytes.data(), nullptr, nullptr);
      backward(nullptr, keys_alone.bytes.data(), values_alone.bytes.data());
    }
    const char* op = additive ? "additive_attention" : "dot_attention";
    compare(op, "context", context, r.context);
    compare(op, "alignments", weights, r.alignments);
    compare(op, "dquery", dquery, r.dquery);
    compare(op, "dquery alone", query_alone, r.dquery);
    compare(op, "dkeys alone", keys_alone, r.dkeys);
    compare(op, "dvalues alone", values_alone, r.dvalues);
    compare(op, "dkeys", dkeys, r.dkeys);
    compare(op, "dvalues", dvalues, r.dvalues);
    if (!additive) return;
    compare(op, "dv", dv, r.dv);
    compare(op, "dbias", dbias, r.dbias);
  }

  AdditiveScores additive_sizes() const {
    return {{{n.B, n.Tq, n.Tk, n.A, array(query, n.Tq, n.A), array(keys, n.Tk, n.A)}, vector(v), vector(bias)}, {}};
  }
};

// A decoder step, few and many queries, sizes around vectors and tiles, and inputs in the range of each form of tanh.
const Shape kShapes[] = {
    {1, 1, 1, 1, 1, false, false, false, 1},      {2, 1, 37, 64, 33, false, false, false, 1},
    {3, 1, 70, 21, 7, true, false, false, 8},     {2, 3, 9, 50, 16, true, true, false, 16},
    {2, 9, 11, 100, 5, false, true, false, 2},    {3, 17, 13, 35, 64, true, false, false, 8},
    {2, 5, 19, 17, 12, true, true, true, 4},      {1, 33, 66, 16, 3, false, false, false, 32},
    {2, 10, 12, 19, 40, false, false, false, 16},
};

}  // namespace

// check_kernels [level [dtype ...]]: checks every level of this processor, or those whose name starts with `level`, in
// all dtypes or in these.
int main(int argc, char** argv) {
  const std::pair<const char*, Dtype> dtypes[] = {{"float32", Dtype::float32},
                                                  {"float64", Dtype::float64},
                                                  {"bfloat16", Dtype::bfloat16},
                                                  {"float16", Dtype::float16}};
  for (int i = 0; i < levels().n; ++i) {
    if (argc > 1 && std::strncmp(levels().list[i].name, argv[1], std::strlen(argv[1])) != 0) continue;
    use_level(levels().list[i].name);
    int checks = 0;
    for (const Shape& shape : kShapes)
      for (const auto& [name, dtype] : dtypes) {
        const char* wanted = name;
        if (argc > 2 && std::none_of(argv + 2, argv + argc, [&](char* a) { return std::strcmp(a, wanted) == 0; }))
          continue;
        Check check(shape, dtype);
        check.additive_scores();
        check.attention(true);
        check.attention(false);
        checks += 3;
      }
    std::printf("%s: %d checks\n", level().name, checks);
  }
  return failures == 0 ? 0 : 1;
}
