// Additive attention without a tanh per pair. Part of a SIMD level: see simd.h.
//
// With E = e^{2q} e^{2k} and the exponentials computed once per row, a pair of query and step costs a multiply-add and a
// reciprocal for each hidden unit, and in the forward units share reciprocals over a common denominator. Guards choose,
// for each tile of queries and each step, a form in which nothing overflows (limits: ../additive_math.h):
//
//   largest |q| + largest |k|   forward                          backward
//   <= kMaxBoundThree           three units share a division     a division for each pair
//   <= kMaxBoundBackward        one division each                a division for each pair
//   <= kMaxBoundOne             one division each                the same for few queries, tanh itself for many
//   beyond, or NaN              tanh itself                      tanh itself
//
// In low precision, where the target has them, estimates of the reciprocal, one each, take the place of the forward's
// divisions.
//
// The forward also uses tanh itself where a large v would show the rounding of the factored form (min_abs_bound).
#pragma once

#include "../additive_attention.h"
#include "../additive_math.h"
#include "attention.h"

namespace attn {
namespace ATTN_LEVEL {

// How the reciprocals of denominators are made: three by one division, by a division each, or by an estimate each.
enum class Reciprocals { shared, single, estimated };

// v and bias as vectors that end in zeros, and what the factored form needs of v.
template <typename T>
struct Units {
  int64_t n, size;  // A, and A in whole vectors
  T *v, *bias;
  T *constant, *factor;  // d = constant + factor * e^{2q} e^{2k}
  T sum_v, scale;        // score = sum_v - scale * sum of 1 / d
  bool factored;         // whether the factored form may be used,
  T least_reach;         // and from which |q| + |k| on
  bool estimated;        // whether estimates may be used,
  T least_estimated;     // and from which |q| + |k| on

  Units(const AdditiveScores& op, Scratch& scratch) : n(op.A), size(padded<T>(op.A)) {
    v = take<T>(scratch, size);
    bias = take<T>(scratch, size);
    constant = take<T>(scratch, size);
    factor = take<T>(scratch, size);
    IntVec<T> top_bits{};
    Vec<T> squares{};
    for (int64_t c = 0; c < size; c += width<T>) {
      const Vec<T> x = load_as<T>(op.v.data, op.v.dtype, c * op.v.stride[2], op.v.stride[2], n - c);
      const Vec<T> zero{};
      store(v + c, x);
      store(bias + c,
            op.bias ? load_as<T>(op.bias.data, op.bias.dtype, c * op.bias.stride[2], op.bias.stride[2], n - c) : zero);
      top_bits = larger_magnitude<T>(top_bits, x);
      squares += x * x;
    }
    const T top = largest_magnitude<T>(top_bits);
    // Not for NaN or Inf, nor for float64, which is there to be exact.
    least_reach = min_abs_bound(static_cast<float>(sum<T>(squares)), n);
    factored = sizeof(T) == 4 && top > kMinAbsMaxV && top < kMaxAbsMaxV && least_reach <= kMaxBoundThree;
    estimated = false;
    if (!factored) return;
    int exponent;
    frexp(top, &exponent);
    const T unit = static_cast<T>(ldexp(1.0, exponent)), smallest = unit * T(kMinRelativeV);
    Vec<T> total{}, lost{}, dropped{};  // lost: by rounding the total
    for (int64_t c = 0; c < size; c += width<T>) {
      const Vec<T> x = load(v + c), zero{};
      const IntVec<T> kept = absolute<T>(x) >= smallest;
      const Vec<T> inverse = unit * T(kDenominatorScale) / x;
      store(factor + c, kept ? inverse : zero);
      store(constant + c, kept ? inverse : broadcast(T(kDroppedDenominator)));
      const Vec<T> term = kept ? x : zero, next = total + term, of_term = next - total;
      lost += (total - (next - of_term)) + (term - of_term);
      total = next;
      dropped += kept ? zero : absolute<T>(x);
    }
    // Each is below the rounding of the largest unit; all of them together have to be, too.
    factored = sum<T>(dropped) <= smallest;
    estimated = factored && kHasEstimate && op.query.dtype != native<T>;
    const T least = op.query.dtype == Dtype::bfloat16 ? kMinBoundEstimateBFloat16 : kMinBoundEstimateFloat16;
    least_estimated = least_reach > least ? least_reach : least;
    sum_v = sum<T>(total) + sum<T>(lost);
    scale = static_cast<T>(2 * unit * kDenominatorScale);
  }

  // Whether three units may share a division, or one each may be used, where |q| + |k| is at most `reach`. NaN:
  // neither.
  bool three(T reach) const { return factored && reach >= least_reach && reach <= kMaxBoundThree; }
  bool single(T reach) const { return factored && reach >= least_reach && reach <= kMaxBoundOne; }
  // Whether estimates will do, of one denominator each.
  bool estimate(T reach) const { return estimated && reach >= least_estimated && reach <= kMaxBoundOne; }

  template <Reciprocals kBy>
  bool in_range(T reach) const {
    return kBy == Reciprocals::shared ? three(reach) : kBy == Reciprocals::single ? single(reach) : estimate(reach);
  }
};

// e = e^{2x} (meaningful up to kMaxBoundOne) for the vectors x = row(c) of a row, times factor where there is one. Returns
// its largest |x|; NaN if it has a NaN.
template <typename T, class Row>
ATTN_INLINE T exponentials(int64_t size, T* e, const Row& row, const T* factor = nullptr) {
  IntVec<T> top{};
  for (int64_t c = 0; c < size; c += width<T>) {
    const Vec<T> x = row(c);
    if constexpr (sizeof(T) == 4) {
      const Vec<T> power = exp_in_range(x + x);
      store(e + c, factor == nullptr ? power : power * load(factor + c));
    }
    top = larger_magnitude<T>(top, x);
  }
  return largest_magnitude<T>(top);
}

// The same for row (b, i) of a, of n elements, plus bias where there is one. buffer: of a row.
template <typename T>
T row_exponentials(const Array3& a, int64_t b, int64_t i, int64_t n, T* e, T* buffer, const T* bias = nullptr,
                   const T* factor = nullptr) {
  const int64_t whole = n / width<T> * width<T>;
  auto of = [&](const auto* row) __attribute__((always_inline)) {
    return exponentials(
        padded<T>(n), e,
        [&](int64_t c) __attribute__((always_inline)) {
          const Vec<T> x = c < whole ? load_element(row + c) : load_element(row + c, n - c);
          return bias == nullptr ? x : x + load(bias + c);
        },
        factor);
  };
  if (a.stride[2] != 1) return of(read_row(a, b, i, n, buffer));
  return by_element<T>(a.dtype, [&](auto* element) {
    return of(static_cast<decltype(element)>(a.data) + b * a.stride[0] + i * a.stride[1]);
  });
}

// Rows of queries (bias added; e^{2q} times the factor of the unit), with the largest |q| of each row.
template <typename T>
struct QueryRows {
  int64_t first, n, ld;
  T *e, *top;  // (n, ld), (n)
};

// Steps as rows of e^{2k}, with the largest |k| of each row.
template <typename T>
struct KeyRows {
  const T** e;
  T* top;
};

// Vectors of terms that are added to one sum: a large term would take away the last bits of more small ones.
constexpr int64_t kTermsOfSum = 48;

// acc[i * NK + j] = sums of 1 / d of NQ queries and NK steps; key(j, c, last) is the vector of e^{2k} from unit c on,
// which may be the row's last only where `last` says so.
template <typename T, int NQ, int NK, Reciprocals kBy, class Key>
ATTN_INLINE void factored_sums(const Units<T>& units, const T* q, int64_t ld, const Key& key, Vec<T>* acc) {
  constexpr int64_t w = width<T>;
  constexpr std::false_type inner{};
  constexpr std::true_type last{};
  const int64_t whole = units.n / w * w;
  clear(acc, std::make_index_sequence<NQ * NK>());
  auto denominator = [&](int64_t c, int i, Vec<T> e)
                         __attribute__((always_inline)) { return load(units.constant + c) + load(q + i * ld + c) * e; };
  const bool in_parts = units.size > 2 * kTermsOfSum * w;
  auto whole_vectors = [&](int64_t& c, int64_t step, const auto& add) __attribute__((always_inline)) {
    if (in_parts) {
      Vec<T> parts[NQ * NK];
      clear(parts, std::make_index_sequence<NQ * NK>());
      while (c + kTermsOfSum * w <= whole) {
        for (const int64_t end = c + kTermsOfSum * w; c < end; c += step) add(inner);
        for (int n = 0; n < NQ * NK; ++n) parts[n] += acc[n];
        clear(acc, std::make_index_sequence<NQ * NK>());
      }
      for (int n = 0; n < NQ * NK; ++n) acc[n] = parts[n];
    }
    for (; c + step <= whole; c += step) add(inner);
  };
  int64_t c = 0;
  if constexpr (kBy == Reciprocals::shared) {
    auto three = [&](auto where) __attribute__((always_inline)) {
      for (int j = 0; j < NK; ++j) {
        const Vec<T> e1 = key(j, c, where), e2 = key(j, c + w, where), e3 = key(j, c + 2 * w, where);
        for (int i = 0; i < NQ; ++i) {
          const Vec<T> d1 = denominator(c, i, e1), d2 = denominator(c + w, i, e2), d3 = denominator(c + 2 * w, i, e3);
          const Vec<T> product = d1 * d2;
          acc[i * NK + j] += ((d1 + d2) * d3 + product) / (product * d3);
        }
      }
    };
    whole_vectors(c, 3 * w, three);
    if (c + 3 * w <= units.size) {
      three(last);
      c += 3 * w;
    }
    if (c + 2 * w <= units.size) {
      for (int j = 0; j < NK; ++j) {
        const Vec<T> e1 = key(j, c, last), e2 = key(j, c + w, last);
        for (int i = 0; i < NQ; ++i) {
          const Vec<T> d1 = denominator(c, i, e1), d2 = denominator(c + w, i, e2);
          acc[i * NK + j] += (d1 + d2) / (d1 * d2);
        }
      }
      c += 2 * w;
    }
  }
  auto one = [&](auto where) __attribute__((always_inline)) {
    for (int j = 0; j < NK; ++j) {
      const Vec<T> e = key(j, c, where);
      for (int i = 0; i < NQ; ++i) {
        const Vec<T> d = denominator(c, i, e);
        acc[i * NK + j] += kBy == Reciprocals::estimated ? reciprocal_estimate(d) : T(1) / d;
      }
    }
  };
  if constexpr (kBy != Reciprocals::shared)
    if (in_parts || kBy == Reciprocals::estimated) whole_vectors(c, w, one);
  for (; c < units.size; c += w) one(last);
}

// out[i * out_ld + j]: the scores of NQ queries and NK steps. next: rows that will be read soon, or null.
template <typename T, int NQ, int NK, Reciprocals kBy>
ATTN_INLINE void factored_tile(const Units<T>& units, const T* q, int64_t ld, const T* const* k, T* out, int64_t out_ld,
                               const T* const* next = nullptr) {
  Vec<T> acc[NQ * NK];
  if (next != nullptr)
    factored_sums<T, NQ, NK, kBy>(
        units, q, ld,
        [&](int j, int64_t c, auto) __attribute__((always_inline)) {
          prefetch(next[j] + c);
          return load(k[j] + c);
        },
        acc);
  else
    factored_sums<T, NQ, NK, kBy>(
        units, q, ld, [&](int j, int64_t c, auto) __attribute__((always_inline)) { return load(k[j] + c); }, acc);
  sums<T, NQ * NK>(acc, [&](int i, T s) __attribute__((always_inline)) {
    out[i / NK * out_ld + i % NK] = units.sum_v - units.scale * s;
  });
}

// Scores of NQ queries and NK steps: by the form kBy if all are in its range, otherwise each by one that is. direct(a,
// b) is the score of query i + a and step j + b by tanh itself.
template <typename T, int NQ, int NK, Reciprocals kBy, class Direct>
ATTN_INLINE void score_tile(const Units<T>& units, const QueryRows<T>& q, int64_t i, const KeyRows<T>& k, int64_t j,
                            T* out, int64_t out_ld, const Direct& direct, const T* const* next = nullptr) {
  const int64_t ld = q.ld;
  bool in_range = units.factored;
  for (int a = 0; a < NQ; ++a)
    for (int b = 0; b < NK; ++b) in_range = in_range && units.template in_range<kBy>(q.top[i + a] + k.top[j + b]);
  if (in_range) return factored_tile<T, NQ, NK, kBy>(units, q.e + i * ld, ld, k.e + j, out, out_ld, next);
  for (int a = 0; a < NQ; ++a)
    for (int b = 0; b < NK; ++b) {
      T* to = out + a * out_ld + b;
      const T* qe = q.e + (i + a) * ld;
      const T reach = q.top[i + a] + k.top[j + b];
      if (units.three(reach))
        factored_tile<T, 1, 1, Reciprocals::shared>(units, qe, ld, k.e + j + b, to, out_ld);
      else if (units.single(reach))
        factored_tile<T, 1, 1, Reciprocals::single>(units, qe, ld, k.e + j + b, to, out_ld);
      else
        *to = direct(i + a, j + b);
    }
}

template <typename T, int NQ, int NK, Reciprocals kBy, class Direct>
void score_strip(const Units<T>& units, const QueryRows<T>& q, int64_t i, const KeyRows<T>& k, int64_t n, T* out,
                 int64_t out_ld, const Direct& direct, bool ahead = false) {
  int64_t j = 0;
  if (ahead)
    for (; j + 2 * NK <= n; j += NK)
      score_tile<T, NQ, NK, kBy>(units, q, i, k, j, out + j, out_ld, direct, k.e + j + NK);
  for (; j + NK <= n; j += NK) score_tile<T, NQ, NK, kBy>(units, q, i, k, j, out + j, out_ld, direct);
  for (; j < n; ++j) score_tile<T, NQ, 1, kBy>(units, q, i, k, j, out + j, out_ld, direct);
}

template <typename T>
struct AdditiveScore {
  const AdditiveScores& op;
  const Units<T>& units;

  using Queries = QueryRows<T>;

  int64_t cost() const { return op.A; }

  Queries queries(int64_t b, int64_t first, int64_t n, Scratch& scratch) const {
    Queries q{first, n, units.size, take<T>(scratch, n * units.size), take<T>(scratch, n)};
    ScratchScope scope(scratch);
    T* buffer = take<T>(scratch, op.A);
    for (int64_t i = 0; i < n; ++i) {
      prefetch_row(op.query, b, first + smaller(i + 1, n - 1), op.A);
      q.top[i] = row_exponentials(op.query, b, first + i, op.A, q.e + i * q.ld, buffer, units.bias,
                                  units.factored ? units.factor : nullptr);
    }
    return q;
  }

  // The score of query i and step j by tanh itself.
  T direct(int64_t b, int64_t i, int64_t j, T* query_buffer, T* key_buffer) const {
    const T* query = read_row(op.query, b, i, op.A, query_buffer);
    const T* key = read_row(op.keys, b, j, op.A, key_buffer);
    constexpr int64_t part = kTermsOfSum * width<T>;
    Vec<T> total{};
    for (int64_t first = 0; first < op.A; first += part) {
      Vec<T> acc{};
      for (int64_t c = first, end = smaller(first + part, op.A); c < end; c += width<T>) {  // past A, 0 * tanh(0)
        const Vec<T> x = load_upto(query + c, op.A - c) + load(units.bias + c) + load_upto(key + c, op.A - c);
        acc += load(units.v + c) * tanh_any(x);
      }
      total += acc;
    }
    return sum<T>(total);
  }

  void block(const Queries& q, int64_t b, const int32_t* list, int64_t n, T* out, int64_t ld, Scratch& scratch) const {
    ScratchScope scope(scratch);
    T* key_buffer = take<T>(scratch, 2 * units.size);
    T* query_buffer = take<T>(scratch, op.A);
    if constexpr (sizeof(T) == 4) {
      const Array3& keys = op.prepared ? op.prepared : op.keys;
      if (q.n == 1 && units.factored && keys.stride[2] == 1)
        return by_element<T>(keys.dtype, [&](auto* element) {
          using E = std::remove_cv_t<std::remove_pointer_t<decltype(element)>>;
          const ListedRows<E> rows(keys, b, list);
          constexpr Reciprocals low = sizeof(E) == 2 && kHasEstimate ? Reciprocals::estimated : Reciprocals::shared;
          if (op.prepared)
            units.estimated ? walk<E, true, low>(q, b, rows, n, out, query_buffer, key_buffer)
                            : walk<E, true, Reciprocals::shared>(q, b, rows, n, out, query_buffer, key_buffer);
          else
            walk<E, false, Reciprocals::shared>(q, b, rows, n, out, query_buffer, key_buffer);
        });
    }
    // The exponentials of a block of keys stay in L2 for many queries, in L1 for few.
    const int64_t row_bytes = units.size * static_cast<int64_t>(sizeof(T));
    const bool in_place = op.prepared && op.prepared.dtype == native<T>;
    const int64_t most = smaller(n, larger(4, (q.n > 2 || in_place ? 1 << 18 : 1 << 14) / larger(row_bytes, 1)));
    T* copies = take<T>(scratch, most * units.size);
    const KeyRows<T> k{take<const T*>(scratch, most), take<T>(scratch, most)};
    for (int64_t j = 0; j < n; j += most) {
      const int64_t count = smaller(most, n - j);
      for (int64_t r = 0; r < count; ++r) {
        if (!op.prepared) prefetch_row(op.keys, b, list[smaller(j + r + 1, n - 1)], op.A);
        set_key(k, r, b, list[j + r], copies + r * units.size, key_buffer);
      }
      auto direct = [&](int64_t i, int64_t r) {
        return this->direct(b, q.first + i, list[j + r], query_buffer, key_buffer);
      };
      int64_t i = 0;
      if constexpr (sizeof(T) == 4 && kHasEstimate) {
        constexpr Reciprocals by = Reciprocals::estimated;
        for (; units.estimated && i + 8 <= q.n; i += 8)
          score_strip<T, 8, 2, by>(units, q, i, k, count, out + i * ld + j, ld, direct);
        for (; units.estimated && i + 2 <= q.n; i += 2)
          score_strip<T, 2, 4, by>(units, q, i, k, count, out + i * ld + j, ld, direct);
      }
      constexpr Reciprocals by = Reciprocals::shared;
      while (i < q.n) {
        const int64_t left = q.n - i;
        const bool ahead = i == 0 && in_place;  // the first to read the rows
        auto strip = [&](auto queries, auto steps) {
          constexpr int NQ = decltype(queries)::value, NK = decltype(steps)::value;
          score_strip<T, NQ, NK, by>(units, q, i, k, count, out + i * ld + j, ld, direct, ahead);
          i += NQ;
        };
        constexpr std::integral_constant<int, 1> one{};
        constexpr std::integral_constant<int, 2> two{};
        constexpr std::integral_constant<int, 4> four{};
        constexpr std::integral_constant<int, 5> five{};
        if (left == 1)
          strip(one, four);
        else if (left < 4)
          strip(two, two);
        else if (left == 5 || left == 9 || left == 10)
          strip(five, two);
        else
          strip(four, two);
      }
    }
  }

  // Row r of k: step j of sentence b, made in copy unless it is prepared as it is needed.
  void set_key(const KeyRows<T>& k, int64_t r, int64_t b, int64_t j, T* copy, T* buffer) const {
    k.e[r] = copy;
    if constexpr (sizeof(T) == 4) {
      if (op.prepared) {
        const int64_t at = b * op.prepared.stride[0] + j * op.prepared.stride[1];
        k.top[r] = prepared_tops(b)[j];
        if (op.prepared.dtype == Dtype::float32) {
          k.e[r] = static_cast<const float*>(op.prepared.data) + at;
        } else {
          const BFloat16* row = static_cast<const BFloat16*>(op.prepared.data) + at;
          for (int64_t c = 0; c < units.size; c += width<T>) store(copy + c, load_element(row + c));
        }
        return;
      }
    }
    k.top[r] = row_exponentials(op.keys, b, j, op.A, copy, buffer);
  }

  const float* prepared_tops(int64_t b) const {
    const int64_t at = b * op.prepared.stride[0] + op.Tk * op.prepared.stride[1];
    return reinterpret_cast<const float*>(static_cast<const char*>(op.prepared.data) +
                                          at * item_size(op.prepared.dtype));
  }

  // The scores of one query: each row of keys, raw or prepared, is read once and in order, and nothing of it is stored.
  template <class E, bool kPrepared, Reciprocals kBy>
  void walk(const Queries& q, int64_t b, const ListedRows<E>& rows, int64_t n, T* out, T* query_buffer,
            T* key_buffer) const {
    const int64_t whole = units.n / width<T> * width<T>;
    const float* tops = kPrepared ? prepared_tops(b) : nullptr;
    // The sums of 1 / d of NK rows, where top becomes the largest |k| met in each.
    auto row_sums = [&](auto rows_at_once, int64_t j, Vec<T>* acc, IntVec<T>* top) __attribute__((always_inline)) {
      constexpr int NK = decltype(rows_at_once)::value;
      const E *row[NK], *next[NK];
      for (int r = 0; r < NK; ++r) {
        row[r] = rows[j + r];
        next[r] = rows[smaller(j + NK + r, n - 1)];
      }
      factored_sums<T, 1, NK, kBy>(
          units, q.e, q.ld,
          [&](int r, int64_t c, auto last) __attribute__((always_inline)) {
            prefetch(next[r] + c);
            if constexpr (kPrepared) {
              return load_element(row[r] + c);
            } else {
              const bool part = decltype(last)::value && c >= whole;
              const Vec<T> k = part ? load_element(row[r] + c, units.n - c) : load_element(row[r] + c);
              top[r] = larger_magnitude<T>(top[r], k);
              return exp_in_range(k + k);
            }
          },
          acc);
    };
    // A row out of range: one division each, or tanh itself.
    auto again = [&](int64_t j, T reach) {
      if (!units.single(reach)) return direct(b, q.first, rows.list[j], query_buffer, key_buffer);
      T score, top;
      T* copy = key_buffer + units.size;
      const T* e;
      set_key({&e, &top}, 0, b, rows.list[j], copy, key_buffer);
      factored_tile<T, 1, 1, Reciprocals::single>(units, q.e, q.ld, &e, &score, 1);
      return score;
    };
    for (int64_t j = 0; j < n; j += kRowsAtOnce) {
      const int count = static_cast<int>(smaller(kRowsAtOnce, n - j));
      Vec<T> acc[kRowsAtOnce];
      T reach[kRowsAtOnce], score[kRowsAtOnce];
      IntVec<T> top[kRowsAtOnce];
      clear(acc);
      clear(top);
      int r = 0;
      // Exponentials keep the arithmetic busy enough; without them a query's factors are loaded once for several rows.
      constexpr int kTogether = kPrepared ? 4 : 1;
      for (; r + kTogether <= count; r += kTogether)
        row_sums(std::integral_constant<int, kTogether>(), j + r, acc + r, top + r);
      for (; r < count; ++r) row_sums(std::integral_constant<int, 1>(), j + r, acc + r, top + r);
      for (r = 0; r < count; ++r)
        reach[r] = q.top[0] + (kPrepared ? tops[rows.list[j + r]] : largest_magnitude<T>(top[r]));
      sums<T, kRowsAtOnce>(
          acc, [&](int r, T s) __attribute__((always_inline)) { score[r] = units.sum_v - units.scale * s; });
      for (r = 0; r < count; ++r)
        out[j + r] = units.template in_range<kBy>(reach[r]) ? score[r] : again(j + r, reach[r]);
    }
  }
};

// op.prepared from op.keys.
template <typename T>
void additive_prepare(const AdditivePrepare& op) {
  const PreparedSizes sizes(op.A, op.Tk, op.dtype);
  for_each_task(op.B, op.Tk * op.A * 4, [&](int64_t b, Scratch& scratch) {
    T* e = take<T>(scratch, padded<T>(op.A));
    T* buffer = take<T>(scratch, op.A);
    char* rows = static_cast<char*>(op.prepared) + b * sizes.rows * sizes.columns * item_size(op.dtype);
    float* tops = reinterpret_cast<float*>(rows + op.Tk * sizes.columns * item_size(op.dtype));
    for (int64_t j = 0; j < op.Tk; ++j) {
      tops[j] = static_cast<float>(row_exponentials(op.keys, b, j, op.A, e, buffer));
      write_row(rows, op.dtype, j * sizes.columns, e, op.A);
      fill_zero<T>(rows, j * sizes.columns + op.A, sizes.columns - op.A, op.dtype);
    }
    char* end = rows + sizes.rows * sizes.columns * item_size(op.dtype);
    memset(tops + op.Tk, 0, end - reinterpret_cast<char*>(tops + op.Tk));
  });
}

template <typename T>
void additive_attention(const AdditiveAttentionForward& op) {
  ScratchScope scope(thread_scratch());
  const Units<T> units(op, thread_scratch());
  const Problem problem{op.B, op.Tq, op.Tk, op.D, op.query.dtype, op.values, op.attended};
  attention_forward<T>(problem, op.context, op.alignments, AdditiveScore<T>{op, units});
}

template <typename T>
void additive_scores(const AdditiveScoresForward& op) {
  ScratchScope scope(thread_scratch());
  const Units<T> units(op, thread_scratch());
  const AdditiveScore<T> score{op, units};
  const Chunks chunks(op.B, op.Tq, op.Tk, false);
  for_each_task(chunks.tasks, chunks.size * op.Tk * op.A, [&](int64_t task, Scratch& scratch) {
    const int64_t b = task / chunks.per_sentence, first = task % chunks.per_sentence * chunks.size;
    const int64_t nq = smaller(chunks.size, op.Tq - first), ld = padded<T>(op.Tk);
    int32_t* list = take<int32_t>(scratch, op.Tk);
    list_steps(Attended{}, b, first, op.Tk, list);
    T* scores = take<T>(scratch, nq * ld);
    score.block(score.queries(b, first, nq, scratch), b, list, op.Tk, scores, ld, scratch);
    for (int64_t i = 0; i < nq; ++i)
      write_row(op.scores, op.query.dtype, (b * op.Tq + first + i) * op.Tk, scores + i * ld, op.Tk);
  });
}

}  // namespace ATTN_LEVEL
}  // namespace attn
