// Compares attend, softmax_backward, product and weighted_sum of csrc/cuda, in the emulator, with loops over single
// elements in double. Padding and scratch memory hold NaN and Inf; outputs are between guards. It prints a line for
// each group of checks, or the first mismatch.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "cuda/views.cuh"

namespace attn {
namespace cuda {

void* current_stream() { return nullptr; }

std::vector<void*> scratch_blocks;

// Allocated to the byte, so that a sanitizer detects reads and writes beyond the end.
void* scratch_bytes(std::int64_t bytes) {
  void* memory = std::malloc(bytes);
  std::memset(memory, 0xff, bytes);
  scratch_blocks.push_back(memory);
  return memory;
}

}  // namespace cuda
}  // namespace attn

namespace {

using namespace attn;
using namespace attn::cuda;

const double kNaN = std::numeric_limits<double>::quiet_NaN(), kInf = std::numeric_limits<double>::infinity();
const double kPoison[] = {kNaN, kInf, -kInf, 6e4};  // the last for sums that multiply by zero

// Random numbers ------------------------------------------------------------------------------------------------------

std::uint64_t state = 88172645463325252ull;

std::uint64_t random_bits() {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state >> 11;
}
int random_below(int n) { return static_cast<int>(random_bits() % n); }
double random_value() { return (random_bits() % 20001 - 10000.0) / 5000.0; }

// Dtypes --------------------------------------------------------------------------------------------------------------

constexpr Dtype kDtypes[] = {Dtype::float32, Dtype::float64, Dtype::bfloat16, Dtype::float16};
const char* name_of(Dtype dtype) {
  const char* names[] = {"float32", "float64", "bfloat16", "float16"};
  return names[static_cast<int>(dtype)];
}

Dtype wide(Dtype dtype) { return dtype == Dtype::float64 ? dtype : Dtype::float32; }

// The largest relative error of a rounding to the dtype.
double rounding(Dtype dtype) {
  return dtype == Dtype::float64    ? 0x1p-53
         : dtype == Dtype::float32  ? 0x1p-24
         : dtype == Dtype::bfloat16 ? 0x1p-8
                                    : 0x1p-11;
}
double least(Dtype dtype) { return dtype == Dtype::float16 ? 0x1p-25 : 1e-37; }  // the least absolute tolerance

double get(const void* data, Dtype dtype, std::int64_t i) {
  if (dtype == Dtype::float32) return static_cast<const float*>(data)[i];
  if (dtype == Dtype::float64) return static_cast<const double*>(data)[i];
  if (dtype == Dtype::bfloat16) return widen(static_cast<const BFloat16*>(data)[i]);
  return widen(static_cast<const Float16*>(data)[i]);
}
void set(void* data, Dtype dtype, std::int64_t i, double x) {
  if (dtype == Dtype::float32) static_cast<float*>(data)[i] = static_cast<float>(x);
  if (dtype == Dtype::float64) static_cast<double*>(data)[i] = x;
  if (dtype == Dtype::bfloat16) static_cast<BFloat16*>(data)[i] = narrow<BFloat16>(static_cast<float>(x));
  if (dtype == Dtype::float16) static_cast<Float16*>(data)[i] = narrow<Float16>(static_cast<float>(x));
}

// Inputs --------------------------------------------------------------------------------------------------------------

enum Layout { contiguous, time_major, columns, sliced, misaligned, expanded, repeated, scalar, kLayouts };

// An (n0, n1, n2) input in some layout, with NaN between and around its elements. Layouts with a stride of 0 share
// elements.
struct Input {
  std::vector<double> memory;  // room for any dtype, aligned
  StridedView3 array;

  Input() = default;
  Input(std::int64_t n0, std::int64_t n1, std::int64_t n2, Dtype dtype, Layout layout) {
    std::int64_t s[3] = {n1 * n2, n2, 1}, first = 0;
    if (layout == time_major) s[0] = n2, s[1] = n0 * n2;
    if (layout == columns) s[1] = 1, s[2] = n1;
    if (layout == sliced) s[2] = 2, s[1] = 2 * n2 + 3, s[0] = (n1 + 2) * s[1], first = s[1] + 1;
    if (layout == misaligned) first = 1;
    if (layout == expanded) s[0] = 0;
    if (layout == repeated) s[1] = 0;
    if (layout == scalar) s[0] = s[1] = s[2] = 0;
    const std::int64_t size = (n0 + 2) * (n1 + 3) * (2 * n2 + 4);
    memory.resize(size * item_size(dtype) / 8 + 2);
    for (std::int64_t i = 0; i < size; ++i) set(memory.data(), dtype, i, kNaN);
    array.data = reinterpret_cast<char*>(memory.data()) + first * item_size(dtype);
    array.dtype = dtype;
    for (int axis = 0; axis < 3; ++axis) array.stride[axis] = s[axis];
    for (std::int64_t b = 0; b < n0; ++b)
      for (std::int64_t i = 0; i < n1; ++i)
        for (std::int64_t j = 0; j < n2; ++j) put(b, i, j, random_value());
  }
  Input(Input&&) = default;
  Input& operator=(Input&&) = default;

  bool shares() const { return array.stride[0] == 0 || array.stride[1] == 0 || array.stride[2] == 0; }
  std::int64_t at(std::int64_t b, std::int64_t i, std::int64_t j) const {
    return b * array.stride[0] + i * array.stride[1] + j * array.stride[2];
  }
  double operator()(std::int64_t b, std::int64_t i, std::int64_t j) const {
    return get(array.data, array.dtype, at(b, i, j));
  }
  void put(std::int64_t b, std::int64_t i, std::int64_t j, double x) {
    set(const_cast<void*>(array.data), array.dtype, at(b, i, j), x);
  }
};

struct Case {
  std::int64_t B, Tq, Tk, D;
  int lengths = 0;  // 0 none, 1 random int64, 2 random int32
  int mask = 0;     // 0 none, 1 per step, 2 per query, 3 per query with stride 0 along queries
  Layout layout = contiguous;
  bool special = false;  // NaN and Inf at attended steps
};

// Which pairs are attended.
struct Pairs {
  std::vector<std::int64_t> lengths64;
  std::vector<std::int32_t> lengths32;
  std::vector<unsigned char> mask;
  AttentionMask attended;
  std::int64_t Tk;

  explicit Pairs(const Case& c) : Tk(c.Tk) {
    for (std::int64_t b = 0; b < c.B; ++b) {
      std::int64_t length = random_below(static_cast<int>(c.Tk) + 1);
      if (b == 1) length = 0;
      if (b == 2) length = c.Tk + 5;
      if (b == 3) length = -2;
      if (c.B == 1) length = c.Tk - c.Tk / 5;
      lengths64.insert(lengths64.end(), {length, 1 << 20});
      lengths32.push_back(static_cast<std::int32_t>(length));
    }
    if (c.lengths == 1)
      attended.lengths = lengths64.data(), attended.lengths_are_64 = true, attended.lengths_stride = 2;
    if (c.lengths == 2) attended.lengths = lengths32.data(), attended.lengths_stride = 1;
    if (c.mask == 0) return;
    const std::int64_t rows = c.mask == 2 ? c.Tq : 1;
    mask.assign(c.B * rows * c.Tk * 2 + 1, 1);
    for (std::int64_t b = 0; b < c.B; ++b)
      for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t j = 0; j < c.Tk; ++j)
          mask[((b * rows + i) * c.Tk + j) * 2] = random_below(10) < 6 && !(b == 0 && i == 1) && !(j % 7 == 2);
    attended.mask = reinterpret_cast<const bool*>(mask.data());
    attended.mask_stride[0] = rows * c.Tk * 2, attended.mask_stride[1] = c.mask == 2 ? c.Tk * 2 : 0;
    attended.mask_stride[2] = 2;
    attended.per_query = c.mask >= 2;
  }

  bool operator()(std::int64_t b, std::int64_t i, std::int64_t j) const {
    return j < attended.length(b, Tk) && mask_allows(attended, b, i, j);
  }
};

// Results -------------------------------------------------------------------------------------------------------------

std::string now;  // the current check
long compared = 0;

[[noreturn]] void fail(const std::string& what) {
  std::printf("%s: %s\n", now.c_str(), what.c_str());
  std::exit(1);
}

// A contiguous output, full of NaN, between guards.
struct Output {
  static constexpr std::int64_t kGuard = 64;
  std::vector<double> memory;
  Dtype dtype;
  std::int64_t n1, n2, bytes;

  Output(std::int64_t n0, std::int64_t n1, std::int64_t n2, Dtype dtype, bool aligned = true)
      : dtype(dtype), n1(n1), n2(n2), bytes(n0 * n1 * n2 * item_size(dtype)), shift_(aligned ? 0 : item_size(dtype)) {
    memory.resize((bytes + 7) / 8 + 2 * kGuard);
    std::memset(memory.data(), 0xff, memory.size() * 8);
  }
  char* data() { return reinterpret_cast<char*>(memory.data()) + kGuard * 8 + shift_; }
  double operator()(std::int64_t b, std::int64_t i, std::int64_t j) {
    return get(data(), dtype, (b * n1 + i) * n2 + j);
  }

  void check_guards() {
    const unsigned char* all = reinterpret_cast<unsigned char*>(memory.data());
    const std::int64_t first = kGuard * 8 + shift_;
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(memory.size() * 8); ++i)
      if ((i < first || i >= first + bytes) && all[i] != 0xff) fail("written out of bounds");
  }
  bool same_bits(Output& other) { return std::memcmp(data(), other.data(), bytes) == 0; }

 private:
  std::int64_t shift_;
};

void compare(const char* name, double is, double right, double allowed, std::int64_t b, std::int64_t i,
             std::int64_t j) {
  ++compared;
  if (std::isnan(right) ? std::isnan(is) : std::isinf(right) ? is == right : std::fabs(is - right) <= allowed) return;
  char text[256];
  std::snprintf(text, sizeof text, "%s[%ld, %ld, %ld] is %.9g, not %.9g within %.3g", name, static_cast<long>(b),
                static_cast<long>(i), static_cast<long>(j), is, right, allowed);
  fail(text);
}

// Runs the call on a small or a large device, which use different tiles. With both_same, runs it on both and compares
// the bits.
template <class CallContext>
void on_devices(bool both_same, Output& out, const CallContext& call) {
  Output other = out;
  int& multiprocessors = emulator::machine().multiprocessors;
  multiprocessors = random_below(2) ? 132 : 1;
  call(out);
  out.check_guards();
  if (both_same) {
    multiprocessors = 133 - multiprocessors;
    call(other);
    if (!out.same_bits(other)) fail("another tile gives other bits");
  }
  for (void* block : scratch_blocks) std::free(block);
  scratch_blocks.clear();
}

// A sum and its tolerance, in units of one rounding of each term.
struct Sum {
  double total = 0, sizes = 0;

  void add(double x) {
    total += x;
    if (std::isfinite(x)) sizes += std::fabs(x);
  }
};

// Checks --------------------------------------------------------------------------------------------------------------

void check_product(const Case& c, Dtype dtype, Layout query_layout, Layout keys_layout) {
  const Pairs pairs(c);
  Input query(c.B, c.Tq, c.D, dtype, query_layout), keys(c.B, c.Tk, c.D, dtype, keys_layout);
  if (c.special && c.D > 0 && c.B > 0) {
    if (c.Tq > 0) query.put(0, c.Tq / 2, c.D / 2, kInf);
    if (c.Tk > 0) keys.put(0, c.Tk / 3, c.D / 3, kNaN);
  }
  const double scale = 0.37;
  Output out(c.B, c.Tq, c.Tk, wide(dtype));
  on_devices(false, out, [&](Output& to) {
    product({c.B, c.Tq, c.Tk, c.D, query.array, keys.array, scale, pairs.attended, to.data()});
  });
  for (std::int64_t b = 0; b < c.B; ++b)
    for (std::int64_t i = 0; i < c.Tq; ++i)
      for (std::int64_t j = 0; j < c.Tk; ++j) {
        if (!pairs(b, i, j)) continue;
        Sum sum;
        for (std::int64_t u = 0; u < c.D; ++u) sum.add(query(b, i, u) * keys(b, j, u));
        compare("product", out(b, i, j), scale * sum.total, rounding(wide(dtype)) * (c.D + 4) * sum.sizes + 1e-37, b, i,
                j);
      }
}

// Pairs that are not attended hold poison: their weights, and rows that no attended pair uses.
void check_weighted_sum(const Case& c, Dtype dtype, bool wide_weights, bool transposed, Layout weights_layout,
                        Layout rows_layout) {
  const Pairs pairs(c);
  const std::int64_t M = transposed ? c.Tk : c.Tq, X = transposed ? c.Tq : c.Tk;
  const auto attends = [&](std::int64_t b, std::int64_t m, std::int64_t x) {
    return transposed ? pairs(b, x, m) : pairs(b, m, x);
  };
  const Dtype weights_dtype = wide_weights ? wide(dtype) : dtype;
  Input weights(c.B, c.Tq, c.Tk, weights_dtype, weights_layout), rows(c.B, X, c.D, dtype, rows_layout);
  for (std::int64_t b = 0; b < c.B && !rows.shares(); ++b)
    for (std::int64_t x = 0; x < X; ++x) {
      bool used = false;
      for (std::int64_t m = 0; m < M; ++m) used |= attends(b, m, x);
      const bool poison = !used || (c.special && (x == X / 2 || x == X - 1));  // padding for some pairs only
      for (std::int64_t n = 0; n < c.D && poison; ++n)
        if (!used || n % 3 == x % 3) rows.put(b, x, n, kPoison[(x + n) % (used ? 3 : 4)]);
    }
  for (std::int64_t b = 0; b < c.B && !weights.shares(); ++b)
    for (std::int64_t i = 0; i < c.Tq; ++i)
      for (std::int64_t j = 0; j < c.Tk; ++j) {
        if (!pairs(b, i, j)) weights.put(b, i, j, kPoison[(i + j) % 4]);
        if (c.special && pairs(b, i, j) && (i * c.Tk + j) % 97 == 5) weights.put(b, i, j, (i + j) % 2 ? 0 : kInf);
      }
  const double scale = -1.7;
  Output out(c.B, M, c.D, dtype, rows_layout != misaligned);
  const bool tiles = c.Tq > kMaxDecodeQueries;
  on_devices(tiles && dtype == Dtype::float32, out, [&](Output& to) {
    weighted_sum({c.B, c.Tq, c.Tk, c.D, weights.array, rows.array, scale, pairs.attended, transposed, to.data()});
  });
  // Tensor cores read weights in the dtype of rows.
  const bool rounds = tiles && weights_dtype != dtype;
  for (std::int64_t b = 0; b < c.B; ++b)
    for (std::int64_t m = 0; m < M; ++m)
      for (std::int64_t n = 0; n < c.D; ++n) {
        Sum sum;
        double row_sizes = 0;
        for (std::int64_t x = 0; x < X; ++x)
          if (attends(b, m, x)) {
            sum.add((transposed ? weights(b, x, m) : weights(b, m, x)) * rows(b, x, n));
            row_sizes += std::isfinite(rows(b, x, n)) ? std::fabs(rows(b, x, n)) : 0;
          }
        const double right = scale * sum.total;
        double allowed = rounding(wide(dtype)) * (X + 4) * sum.sizes * 1.7 + rounding(dtype) * 1.01 * std::fabs(right);
        if (rounds) allowed += 1.75 * (rounding(dtype) * sum.sizes + least(dtype) * row_sizes);
        compare("sum", out(b, m, n), right, allowed + least(dtype), b, m, n);
      }
}

void check_attend(const Case& c, Dtype dtype, bool with_alignments) {
  const Pairs pairs(c);
  Input scores(c.B, c.Tq, c.Tk, wide(dtype), contiguous), values(c.B, c.Tk, c.D, dtype, c.layout);
  for (std::int64_t b = 0; b < c.B; ++b)
    for (std::int64_t j = 0; j < c.Tk; ++j) {
      bool used = false;
      for (std::int64_t i = 0; i < c.Tq; ++i) {
        used |= pairs(b, i, j);
        if (!pairs(b, i, j)) scores.put(b, i, j, kPoison[(i + j) % 4]);
        if (c.special && pairs(b, i, j)) {
          if (i % 5 == 1 && j % 3 == 1) scores.put(b, i, j, -kInf);
          if (i % 5 == 2) scores.put(b, i, j, -kInf);  // only -inf: the softmax is NaN
          if (i % 5 == 3 && j == c.Tk / 2) scores.put(b, i, j, kInf);
        }
      }
      for (std::int64_t d = 0; d < c.D && !values.shares(); ++d) {
        if (!used) values.put(b, j, d, kPoison[(j + d) % 4]);
        if (used && c.special && j % 11 == 4 && d % 5 == 2) values.put(b, j, d, kPoison[(j + d) % 3]);
      }
    }
  Output context(c.B, c.Tq, c.D, dtype), alignments(c.B, c.Tq, c.Tk, dtype);
  on_devices(c.Tq > kMaxDecodeQueries && dtype == Dtype::float32, context, [&](Output& to) {
    attend({c.B, c.Tq, c.Tk, c.D, scores.array.data, values.array, pairs.attended, to.data(),
            with_alignments ? alignments.data() : nullptr});
  });
  alignments.check_guards();
  std::vector<double> p(c.Tk);
  const bool rounds = c.Tq > kMaxDecodeQueries && dtype != wide(dtype);
  for (std::int64_t b = 0; b < c.B; ++b)
    for (std::int64_t i = 0; i < c.Tq; ++i) {
      double top = -1e300, total = 0;
      for (std::int64_t j = 0; j < c.Tk; ++j)
        if (pairs(b, i, j)) top = std::fmax(top, scores(b, i, j));
      for (std::int64_t j = 0; j < c.Tk; ++j)
        if (pairs(b, i, j)) total += p[j] = std::exp(scores(b, i, j) - top);
      for (std::int64_t j = 0; j < c.Tk; ++j) p[j] = pairs(b, i, j) ? p[j] / total : 0;
      const double of_p = rounding(wide(dtype)) * (c.Tk + 40);
      for (std::int64_t j = 0; j < c.Tk && with_alignments; ++j)
        compare("alignments", alignments(b, i, j), p[j],
                (of_p + 1.01 * rounding(dtype)) * p[j] + (p[j] != 0 ? least(dtype) : 0), b, i, j);
      for (std::int64_t d = 0; d < c.D; ++d) {
        Sum sum;
        double sizes = 0;
        for (std::int64_t j = 0; j < c.Tk; ++j)
          if (pairs(b, i, j)) {
            sum.add(p[j] * values(b, j, d));
            sizes += std::isfinite(values(b, j, d)) ? std::fabs(values(b, j, d)) : 0;
          }
        double allowed = 2 * of_p * sum.sizes + rounding(dtype) * 1.01 * std::fabs(sum.total);
        if (rounds) allowed += 1.01 * rounding(dtype) * sum.sizes + least(dtype) * sizes;
        compare("context", context(b, i, d), sum.total, allowed + least(dtype), b, i, d);
      }
    }
}

void check_softmax_backward(const Case& c, Dtype dtype, bool has_context, bool has_alignments, Layout grad_layout) {
  const Pairs pairs(c);
  Input alignments(c.B, c.Tq, c.Tk, dtype, c.layout == sliced ? sliced : contiguous);
  Input grad_context(c.B, c.Tq, c.D, dtype, grad_layout), grad_alignments(c.B, c.Tq, c.Tk, dtype, grad_layout);
  Input values(c.B, c.Tk, c.D, dtype, c.layout);
  for (std::int64_t b = 0; b < c.B; ++b)
    for (std::int64_t j = 0; j < c.Tk; ++j) {
      bool used = false;
      for (std::int64_t i = 0; i < c.Tq; ++i) {
        alignments.put(b, i, j, pairs(b, i, j) ? std::fabs(random_value()) / c.Tk : kPoison[(i + j) % 4]);
        used |= pairs(b, i, j);
        if (!pairs(b, i, j) && !grad_alignments.shares()) grad_alignments.put(b, i, j, kPoison[(i * 3 + j) % 4]);
        if (c.special && pairs(b, i, j) && i % 7 == 3 && !grad_alignments.shares()) grad_alignments.put(b, i, j, kInf);
      }
      for (std::int64_t d = 0; d < c.D && !values.shares(); ++d) {
        if (!used) values.put(b, j, d, kPoison[(j + d) % 4]);
        if (used && c.special && j == c.Tk / 3 && d == c.D / 2) values.put(b, j, d, kNaN);
      }
    }
  Output out(c.B, c.Tq, c.Tk, wide(dtype));
  on_devices(false, out, [&](Output& to) {
    softmax_backward({c.B, c.Tq, c.Tk, c.D, alignments.array, has_context ? grad_context.array : StridedView3{},
                      has_alignments ? grad_alignments.array : StridedView3{}, values.array, pairs.attended,
                      to.data()});
  });
  std::vector<Sum> g(c.Tk);
  for (std::int64_t b = 0; b < c.B; ++b)
    for (std::int64_t i = 0; i < c.Tq; ++i) {
      double total = 0, largest = 0;
      Sum products;
      for (std::int64_t j = 0; j < c.Tk; ++j) {
        if (!pairs(b, i, j)) continue;
        g[j] = Sum();
        for (std::int64_t d = 0; d < c.D && has_context; ++d) g[j].add(grad_context(b, i, d) * values(b, j, d));
        if (has_alignments) g[j].add(grad_alignments(b, i, j));
        products.add(alignments(b, i, j) * g[j].total);
        total += alignments(b, i, j);
        largest = std::fmax(largest, g[j].sizes);
      }
      const double mean = products.total / std::fmax(total, 1e-30);
      for (std::int64_t j = 0; j < c.Tk; ++j) {
        const double p = alignments(b, i, j);
        const double right = pairs(b, i, j) ? p * (g[j].total - mean) : 0;
        const double allowed = pairs(b, i, j) ? rounding(wide(dtype)) * (c.D + 2 * c.Tk + 20) * 2 * largest * p : 0;
        compare("dscores", out(b, i, j), right, allowed, b, i, j);
      }
    }
}

// Sizes at the boundaries: one of each, few queries, whole tiles and slices, one more than whole ones, and zeros.
const Case kSizes[] = {
    {1, 1, 1, 1},    {5, 1, 50, 33},   {3, 3, 17, 64},    {4, 5, 66, 40},    {2, 8, 130, 136}, {4, 9, 9, 9},
    {2, 17, 63, 70}, {1, 33, 65, 16},  {1, 130, 75, 100}, {1, 129, 129, 65}, {2, 64, 64, 64},  {1, 100, 100, 128},
    {3, 40, 33, 7},  {1, 56, 112, 49}, {2, 10, 128, 132}, {1, 1, 1500, 20},  {1, 6, 700, 130}, {3, 0, 5, 4},
    {3, 4, 0, 4},    {3, 12, 0, 4},    {2, 12, 7, 0},     {2, 3, 7, 0},      {0, 12, 7, 4},    {4, 300, 1, 1},
    {1, 74, 75, 96}, {4, 13, 21, 33},
};

template <class Check>
void group(const char* name, const Check& check) {
  compared = 0;
  for (Dtype dtype : kDtypes) {
    int k = 0;
    for (const Case& size : kSizes)
      for (int variant = 0; variant < (dtype == Dtype::float16 ? 1 : 3); ++variant) {
        // Each size has some of the masks and layouts, so each of these is combined with many sizes.
        Case c = size;
        c.lengths = (k + variant) % 3;
        c.mask = (k / 3 + variant * 2 + k) % 4;
        c.layout = variant == 0 ? contiguous : static_cast<Layout>((k * 3 + variant) % kLayouts);
        c.special = (k + variant) % 2 == 1;
        char text[200];
        std::snprintf(text, sizeof text, "%s, %s, (B, Tq, Tk, D) = (%d, %d, %d, %d), lengths %d, mask %d, layout %d%s",
                      name, name_of(dtype), static_cast<int>(c.B), static_cast<int>(c.Tq), static_cast<int>(c.Tk),
                      static_cast<int>(c.D), c.lengths, c.mask, static_cast<int>(c.layout),
                      c.special ? ", special" : "");
        now = text;
        check(c, dtype, k++);
      }
  }
  std::printf("%s: %ld results\n", name, compared);
}

}  // namespace

int main() {
  const auto other = [](int k) { return static_cast<Layout>(k * 5 % kLayouts); };
  group("product",
        [&](const Case& c, Dtype dtype, int k) { check_product(c, dtype, c.layout, k % 3 ? other(k) : contiguous); });
  group("sum over steps", [&](const Case& c, Dtype dtype, int k) {
    check_weighted_sum(c, dtype, k % 2, false, k % 3 ? contiguous : other(k), c.layout);
  });
  group("sum over queries", [&](const Case& c, Dtype dtype, int k) {
    check_weighted_sum(c, dtype, k % 2, true, k % 3 ? contiguous : other(k), c.layout);
  });
  group("attend", [&](const Case& c, Dtype dtype, int k) { check_attend(c, dtype, k % 3 != 1); });
  group("softmax_backward", [&](const Case& c, Dtype dtype, int k) {
    check_softmax_backward(c, dtype, k % 5 != 1, k % 4 != 2, k % 3 ? contiguous : other(k));
  });
  return 0;
}
