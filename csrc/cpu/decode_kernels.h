// Products of a few rows with a weight, and the likeliest tokens. With the few rows of a search they are memory-bound:
// a weight is read in the order of memory, once for several rows of x. Part of a SIMD level: see simd.h.
#pragma once

#include "../decode.h"
#include "lstm_cell_kernels.h"

namespace attn {
namespace ATTN_LEVEL {

constexpr int64_t kMostRowsAtOnce = 6;         // rows of x
constexpr int64_t kMostWeightRows = 256;       // rows of a weight per block
constexpr int64_t kTokensOfTask = 1024;        // tokens per partial sum, independent of the number of threads
constexpr int64_t kElementsOfBlock = 1 << 15;  // elements that stay in L2 for the next rows of x

// How many rows of a weight, with k elements each, are multiplied with all rows of x before the next rows: whole
// blocks.
ATTN_INLINE int64_t weight_rows_at_once(int64_t k) {
  constexpr int64_t size = kOutputsOfBlock;
  return max(size, min(kMostWeightRows, kElementsOfBlock / max(k, 1) / size * size));
}

inline void rounded_block(const RoundedBlocks& op, int64_t block) {
  constexpr int64_t w = width<float>, kHalf = kOutputsOfBlock / 2;
  const int64_t k = op.k;
  uint32_t* to = op.blocks + block * kHalf * k;
  for (int64_t c = 0; c < k; c += w) {
    const int64_t columns = min(w, k - c);
    // Loads a square of elements, rows from r and columns from c on, as one vector per column.
    auto square = [&](int64_t r, Vec<float>* x) __attribute__((always_inline)) {
      const float* from = row_of<const float>(op.rows, r) + c;
      if (r + w <= op.n && columns == w)
        for (int64_t i = 0; i < w; ++i) x[i] = load(from + i * op.rows.stride);
      else
        for (int64_t i = 0; i < w; ++i)
          x[i] = r + i < op.n ? load_upto(from + i * op.rows.stride, columns) : Vec<float>{};
      transpose<float>(x);
    };
    for (int64_t r = 0; r < kHalf; r += w) {
      Vec<float> lower[w], upper[w];
      square(block * kOutputsOfBlock + r, lower);
      square(block * kOutputsOfBlock + kHalf + r, upper);
      for (int64_t i = 0; i < columns; ++i)
        store(to + (c + i) * kHalf + r,
              (round_to_bfloat16(lower[i]) >> 16) | (round_to_bfloat16(upper[i]) & 0xffff0000u));
    }
  }
}

inline void rounded_blocks(const RoundedBlocks& op) {
  for_each_task(divide_up(op.n, kOutputsOfBlock), kOutputsOfBlock * op.k,
                [&](int64_t block, Scratch&) { rounded_block(op, block); });
}

// How many vectors of each half of a block are multiplied at once with NX rows of x: as many as fit the registers.
template <int NX>
constexpr int half_vectors() {
  constexpr int kMost = kOutputsOfBlock / 2 / static_cast<int>(width<float>);
  constexpr int kRegisters = ATTN_VECTOR_BYTES == 64 ? 32 : 16;
  int n = 1;
  while (2 * n <= kMost && 4 * n * (NX + 1) < kRegisters) n *= 2;
  return n;
}

// out[i * ld + j] = x_i . row j of a block for NX rows x. Computes NV vectors of rows j, from vector `first` on, in
// each half of the block.
template <int NX, int NV, bool kPrefetch>
ATTN_INLINE void block_microkernel(const float* const* x, const uint32_t* block, int64_t first, int64_t k, float* out,
                                   int64_t ld) {
  constexpr int64_t w = width<float>, kHalf = kOutputsOfBlock / 2;
  constexpr int kSums = 2 * NX * NV, kSets = kSums >= 8 ? 1 : kSums >= 4 ? 2 : 4;  // enough independent sums
  constexpr int64_t kAhead = 1024;                                                 // words, a page
  Vec<float> acc[kSets][kSums];
  for (auto& set : acc) clear(set);
  auto add = [&](int set, int64_t c) __attribute__((always_inline)) {
    const uint32_t* from = block + c * kHalf;
    Vec<float> lower[NV], upper[NV];
    for (int u = 0; u < NV; ++u) {
      const Word32 pairs = load(from + (first + u) * w);
      lower[u] = (Vec<float>)(pairs << 16);
      upper[u] = (Vec<float>)(pairs & 0xffff0000u);
    }
    if constexpr (kPrefetch) prefetch_into_l1(from + kAhead);
    for (int i = 0; i < NX; ++i) {
      const Vec<float> factor = broadcast(x[i][c]);
      for (int u = 0; u < NV; ++u) {
        acc[set][2 * (i * NV + u)] += factor * lower[u];
        acc[set][2 * (i * NV + u) + 1] += factor * upper[u];
      }
    }
  };
  int64_t c = 0;
  for (; c + kSets <= k; c += kSets)
    for (int set = 0; set < kSets; ++set) add(set, c + set);
  for (; c < k; ++c) add(0, c);
  for (int i = 0; i < NX; ++i)
    for (int u = 0; u < 2 * NV; ++u) {
      Vec<float> sum = acc[0][2 * i * NV + u];
      for (int set = 1; set < kSets; ++set) sum += acc[set][2 * i * NV + u];
      store(out + i * ld + (first + u / 2) * w + u % 2 * kHalf, sum);
    }
}

// The same for all rows of `count` blocks. out has room for whole blocks, including the padding after the last row.
template <int NX>
__attribute__((noinline)) void block_microkernels(const float* const* x, const uint32_t* blocks, int64_t count,
                                                  int64_t k, float* out, int64_t ld) {
  constexpr int NV = half_vectors<NX>(), kVectors = kOutputsOfBlock / 2 / static_cast<int>(width<float>);
  for (int64_t b = 0; b < count; ++b, out += kOutputsOfBlock) {
    const uint32_t* block = blocks + b * (kOutputsOfBlock / 2) * k;
    block_microkernel<NX, NV, true>(x, block, 0, k, out, ld);
    for (int first = NV; first < kVectors; first += NV) block_microkernel<NX, NV, false>(x, block, first, k, out, ld);
  }
}

// Calls multiply(x, NX, out) for groups of NX <= kMostRowsAtOnce rows of x, with groups of about equal size.
template <typename T, class Multiply>
ATTN_INLINE void by_rows_at_once(const T* const* x, int64_t x_rows, T* out, int64_t ld, const Multiply& multiply) {
  const int64_t groups = divide_up(x_rows, kMostRowsAtOnce), size = divide_up(x_rows, groups);
  for (int64_t i = 0; i < x_rows; i += size) {
    const T* const* from = x + i;
    T* to = out + i * ld;
    switch (min(size, x_rows - i)) {
      case 1:
        multiply(from, std::integral_constant<int, 1>(), to);
        break;
      case 2:
        multiply(from, std::integral_constant<int, 2>(), to);
        break;
      case 3:
        multiply(from, std::integral_constant<int, 3>(), to);
        break;
      case 4:
        multiply(from, std::integral_constant<int, 4>(), to);
        break;
      case 5:
        multiply(from, std::integral_constant<int, 5>(), to);
        break;
      default:
        multiply(from, std::integral_constant<int, 6>(), to);
    }
  }
}

// out[i * ld + j] = x_i . row (first + j) of the weight, for `count` <= kMostWeightRows rows. For a weight in blocks,
// row `first` must be the first of a block, and out must have room for whole blocks.
template <typename T>
void multiply_rows(const T* const* x, int64_t x_rows, const StreamedWeight& weight, int64_t first, int64_t count,
                   int64_t k, T* out, int64_t ld) {
  if constexpr (sizeof(T) == 4) {
    if (weight.blocks != nullptr) {
      const uint32_t* blocks = weight.blocks + words_of_blocks(first, k);
      return by_rows_at_once(x, x_rows, out, ld, [&](auto* from, auto at_once, T* to) {
        block_microkernels<decltype(at_once)::value>(from, blocks, divide_up(count, kOutputsOfBlock), k, to, ld);
      });
    }
  }
  const T* from = row_of<const T>(weight.rows, first);
  if (x_rows == 1) {
    StridedRows<T> rows({from, native<T>, {0, weight.rows.stride, 1}}, 0, 0);
    return dot_streamed(x, 1, rows, count, k, T(1), out, ld);
  }
  const T* rows[kMostWeightRows];
  for (int64_t j = 0; j < count; ++j) rows[j] = from + j * weight.rows.stride;
  by_rows_at_once(x, x_rows, out, ld, [&](auto* some, auto at_once, T* to) {
    dot_microkernels<T, T, decltype(at_once)::value, true>(some, rows, count, k, T(1), to, ld);
  });
}

template <typename T>
void row_products(const RowProducts& op) {
  const int64_t size = weight_rows_at_once(op.k), R = op.R;
  const T* const* x = reinterpret_cast<const T* const*>(op.x);
  for_each_task(divide_up(op.n, size), size * op.k * R, [&](int64_t task, Scratch& scratch) {
    const int64_t first = task * size, count = min(size, op.n - first), ld = padded<T>(size);
    T* sums = alloc<T>(scratch, R * ld);
    multiply_rows(x, R, op.weight, first, count, op.k, sums, ld);
    for (int64_t r = 0; r < R; ++r) {
      const T* added = op.added == nullptr ? nullptr : static_cast<const T*>(op.added[r]) + first;
      T* out = static_cast<T*>(op.out[r]) + first;
      for (int64_t c = 0; c < count; c += width<T>) {
        const int64_t left = count - c;
        Vec<T> y = load_upto(sums + r * ld + c, left);
        if (added != nullptr) y += load_upto(added + c, left);
        store_upto(out + c, op.tanh ? tanh_any(y) : y, left);
      }
    }
  });
}

// Running statistics of a row of logits: the sum of e^(x - top), and the largest logits, best first.
template <typename T>
struct Likeliest {
  T top, sum;
  int64_t count;
  T* logits;
  int32_t* tokens;

  // most: how many logits are kept. Equal logits keep the order in which they were added.
  ATTN_INLINE void add(T logit, int32_t token, int64_t most) {
    if (count == most && !(logit > logits[most - 1])) return;
    int64_t at = count < most ? count++ : most - 1;
    for (; at > 0 && logit > logits[at - 1]; --at) {
      logits[at] = logits[at - 1];
      tokens[at] = tokens[at - 1];
    }
    logits[at] = logit;
    tokens[at] = token;
  }

  ATTN_INLINE void add_sum(T other_top, T other_sum) {
    if (!(other_top <= top)) {
      sum *= static_cast<T>(exp(static_cast<double>(top - other_top)));
      top = other_top;
    }
    sum += other_sum == 0 ? 0 : other_sum * static_cast<T>(exp(static_cast<double>(other_top - top)));
  }

  // Adds n logits p of the tokens from `first` on. p has room for whole vectors.
  ATTN_INLINE void add_block(T* p, int64_t n, int32_t first, int64_t most) {
    constexpr int64_t w = width<T>;
    const T infinity = static_cast<T>(__builtin_inf());
    const int64_t end = padded<T>(n);
    for (int64_t c = n; c < end; ++c) p[c] = -infinity;
    Vec<T> largest_of = load(p);
    for (int64_t c = w; c < end; c += w) largest_of = maximum<T>(load(p + c), largest_of);
    const T block_top = largest<T>(largest_of);
    if (!(block_top > -infinity)) {  // all are -infinity, or one is NaN
      for (int64_t c = 0; c < n; ++c) sum += p[c] == p[c] ? 0 : p[c];
    } else {
      Vec<T> total{};
      for (int64_t c = 0; c < end; c += w) total += exp_nonpositive(load(p + c) - block_top);  // infinity gives NaN
      add_sum(block_top, ATTN_LEVEL::sum<T>(total));
    }
    if (count == most && !(block_top > logits[most - 1])) return;
    for (int64_t c = 0; c < n; ++c) add(p[c], first + static_cast<int32_t>(c), most);
  }
};

template <typename T>
void likeliest_tokens(const LikeliestTokens& op) {
  const int64_t R = op.R, most = op.count, parts = divide_up(op.vocabulary, kTokensOfTask);
  const T* const* x = reinterpret_cast<const T* const*>(op.x);
  const T* bias = static_cast<const T*>(op.bias);
  Scratch& call = thread_scratch();
  ScratchScope scope(call);
  auto* found = alloc<Likeliest<T>>(call, parts * R);
  T* logits = alloc<T>(call, parts * R * most);
  int32_t* tokens = alloc<int32_t>(call, parts * R * most);
  const T infinity = static_cast<T>(__builtin_inf());
  for (int64_t i = 0; i < parts * R; ++i) found[i] = {-infinity, 0, 0, logits + i * most, tokens + i * most};
  for_each_task(parts, min(kTokensOfTask, op.vocabulary) * op.k * R, [&](int64_t part, Scratch& scratch) {
    const int64_t size = weight_rows_at_once(op.k), ld = padded<T>(size);
    const int64_t end = min((part + 1) * kTokensOfTask, op.vocabulary);
    T* block = alloc<T>(scratch, R * ld);
    for (int64_t first = part * kTokensOfTask; first < end; first += size) {
      const int64_t count = min(size, end - first);
      multiply_rows(x, R, op.weight, first, count, op.k, block, ld);
      for (int64_t r = 0; r < R; ++r) {
        T* row = block + r * ld;
        for (int64_t c = 0; bias != nullptr && c < count; c += width<T>)
          store_upto(row + c, load_upto(row + c, count - c) + load_upto(bias + first + c, count - c), count - c);
        found[part * R + r].add_block(row, count, static_cast<int32_t>(first), most);
      }
    }
  });
  for (int64_t r = 0; r < R; ++r) {
    Likeliest<T>& all = found[r];
    for (int64_t part = 1; part < parts; ++part) {
      const Likeliest<T>& other = found[part * R + r];
      all.add_sum(other.top, other.sum);
      for (int64_t i = 0; i < other.count; ++i) all.add(other.logits[i], other.tokens[i], most);
    }
    const double log_total = static_cast<double>(all.top) + log(static_cast<double>(all.sum));
    for (int64_t i = 0; i < most; ++i) {
      op.log_probabilities[r * most + i] = static_cast<double>(all.logits[i]) - log_total;
      op.tokens[r * most + i] = all.tokens[i];
    }
  }
}

}  // namespace ATTN_LEVEL
}  // namespace attn
