// Additive attention, forward: scores of blocks of queries and steps, prepared keys, and the ops. additive_factored.h
// has the forms without a tanh per pair. Part of a SIMD level: see simd.h.
#pragma once

#include "additive_compensated.h"

namespace attn {
namespace ATTN_LEVEL {

// The largest |k| of each step, stored after the prepared keys of a sentence.
inline const float* prepared_abs_max(const StridedView3& prepared, int64_t steps, int64_t b) {
  const int64_t at = b * prepared.stride[0] + steps * prepared.stride[1];
  return reinterpret_cast<const float*>(static_cast<const char*>(prepared.data) + at * item_size(prepared.dtype));
}

template <typename T>
struct AdditiveScore {
  const AdditiveScores& op;
  const FactoredV<T>& units;

  using Queries = QueryRows<T>;

  int64_t cost() const { return op.A; }

  Queries queries(int64_t b, int64_t first, int64_t n, Scratch& scratch) const {
    const int64_t ld = units.size;
    Queries q{
        first, n, ld, alloc<T>(scratch, n * ld), alloc<T>(scratch, n * ld), alloc<T>(scratch, n), alloc<T>(scratch, n)};
    ScratchScope scope(scratch);
    T* buffer = alloc<T>(scratch, op.A);
    for (int64_t i = 0; i < n; ++i) {
      prefetch_row(op.query, b, first + min(i + 1, n - 1), op.A);
      T *e = q.e + i * ld, *plain = q.plain + i * ld;
      if constexpr (sizeof(T) == 4) {
        if (units.needs_rest(T(0))) {  // a query may need its rest
          q.abs_max[i] = compensated_row(units, op.query, b, first + i, plain, q.rest + i, buffer, units.bias, e);
          continue;
        }
      }
      q.abs_max[i] = row_exponentials(op.query, b, first + i, op.A, e, buffer, units.bias,
                                      units.v_in_range ? units.factor : nullptr, plain);
    }
    return q;
  }

  // The score of query i and step j in the exact form, with a tanh per unit.
  T exact(int64_t b, int64_t i, int64_t j, T* query_buffer, T* key_buffer) const {
    const T* query = read_row(op.query, b, i, op.A, query_buffer);
    const T* key = read_sum(op.keys, op.extra, b, j, op.A, key_buffer);
    constexpr int64_t part = kTermsOfSum * width<T>;
    Vec<T> total{};
    for (int64_t first = 0; first < op.A; first += part) {
      Vec<T> acc{};
      for (int64_t c = first, end = min(first + part, op.A); c < end; c += width<T>) {  // adds 0 * tanh(0) past A
        const Vec<T> x = load_upto(query + c, op.A - c) + load(units.bias + c) + load_upto(key + c, op.A - c);
        acc += load(units.v + c) * tanh_any(x);
      }
      total += acc;
    }
    return sum<T>(total);
  }

  void score_block(const Queries& q, int64_t b, const int32_t* list, int64_t n, T* out, int64_t ld,
                   Scratch& scratch) const {
    if (n == 0) return;
    ScratchScope scope(scratch);
    T* key_buffer = alloc<T>(scratch, 3 * units.size);
    T* query_buffer = alloc<T>(scratch, op.A);
    if constexpr (sizeof(T) == 4) {
      const StridedView3& keys = op.prepared ? op.prepared : op.keys;
      // If other forms are likely to be needed, the exponentials of a block of keys are computed first.
      const T typical = q.abs_max[0] + (op.prepared ? prepared_abs_max(op.prepared, op.Tk, b)[list[0]] : T(0));
      const bool likely = units.needs_rest(typical) || q.abs_max[0] > kMaxBoundThree / 2;
      if (q.n == 1 && units.factored && !likely && keys.stride[2] == 1 && (!op.extra || op.extra.stride[2] == 1))
        return by_element<T>(keys.dtype, [&](auto* element) {
          using E = std::remove_cv_t<std::remove_pointer_t<decltype(element)>>;
          const ListedRows<E> rows(keys, b, list);
          auto scores = [&](auto of, auto by) {
            single_query<E, decltype(of)::value, decltype(by)::value>(q, b, rows, n, out, query_buffer, key_buffer);
          };
          constexpr std::integral_constant<Keys, Keys::prepared> prepared{};
          if constexpr (sizeof(E) == 2 && kHasEstimate)
            if (op.prepared && units.estimated)
              return scores(prepared, std::integral_constant<Reciprocals, Reciprocals::estimate>());
          units.by_three([&](auto by) {
            if (op.prepared)
              scores(prepared, by);
            else if (op.extra)
              scores(std::integral_constant<Keys, Keys::sums>(), by);
            else
              scores(std::integral_constant<Keys, Keys::raw>(), by);
          });
        });
    }
    // The block size: the exponentials of a block of keys fit L2 for many queries, L1 for few.
    const int64_t row_bytes = units.size * static_cast<int64_t>(sizeof(T));
    const bool in_place = op.prepared && op.prepared.dtype == native<T>;
    const int64_t most = min(n, max(4, (q.n > 2 || in_place ? 1 << 18 : 1 << 14) / max(row_bytes, 1)));
    T* copies = alloc<T>(scratch, 2 * most * units.size);
    const KeyRows<T> k{alloc<const T*>(scratch, most), alloc<const T*>(scratch, most), alloc<T>(scratch, most),
                       alloc<T>(scratch, most)};
    T least = T(INFINITY);  // the smallest of the queries' largest |q|
    for (int64_t i = 0; i < q.n; ++i) least = q.abs_max[i] < least ? q.abs_max[i] : least;
    for (int64_t j = 0; j < n; j += most) {
      const int64_t count = min(most, n - j);
      for (int64_t r = 0; r < count; ++r) {
        if (!op.prepared) prefetch_row(op.keys, b, list[min(j + r + 1, n - 1)], op.A);
        if (op.extra) prefetch_row(op.extra, b, list[min(j + r + 1, n - 1)], op.A);
        load_key(k, r, b, list[j + r], copies + 2 * r * units.size, key_buffer, least);
      }
      auto exact = [&](int64_t i, int64_t r) {
        return this->exact(b, q.first + i, list[j + r], query_buffer, key_buffer);
      };
      int64_t i = 0;
      if constexpr (sizeof(T) == 4 && kHasEstimate) {
        constexpr Reciprocals by = Reciprocals::estimate;
        for (; units.estimated && i + 8 <= q.n; i += 8)
          score_strip<T, 8, 2, by>(units, q, i, k, count, out + i * ld + j, ld, exact);
        for (; units.estimated && i + 2 <= q.n; i += 2)
          score_strip<T, 2, 4, by>(units, q, i, k, count, out + i * ld + j, ld, exact);
      }
      while (i < q.n) {
        const int64_t left = q.n - i;
        const bool ahead = i == 0 && in_place;  // the first strip that reads the rows prefetches them
        auto strip = [&](auto queries, auto steps) {
          constexpr int NQ = decltype(queries)::value, NK = decltype(steps)::value;
          units.by_three([&](auto by) {
            score_strip<T, NQ, NK, decltype(by)::value>(units, q, i, k, count, out + i * ld + j, ld, exact, ahead);
          });
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

  // Sets row r of k to step j of sentence b. A key that is not prepared in the needed form is computed into copies,
  // which has room for two rows. least: the smallest of the largest |q| of the queries that use it.
  void load_key(const KeyRows<T>& k, int64_t r, int64_t b, int64_t j, T* copies, T* buffer, T least) const {
    auto from = [&](const StridedView3& keys, int64_t b, int64_t j) {
      const bool alone = units.v_in_range && !units.factored;  // only the compensated form is used
      k.e[r] = copies;
      if (op.prepared)
        load_prepared(k, r, b, j, copies);
      else if (!alone)
        k.abs_max[r] = row_exponentials(keys, b, j, op.A, copies, buffer);
      k.plain[r] = k.e[r];
      if constexpr (sizeof(T) == 4)
        if (alone || units.needs_rest(least + k.abs_max[r])) {
          k.plain[r] = copies + units.size;
          if (alone) k.e[r] = k.plain[r];
          k.abs_max[r] = compensated_row(units, keys, b, j, copies + units.size, k.rest + r, buffer);
        }
    };
    if (op.extra)
      from({read_sum(op.keys, op.extra, b, j, op.A, buffer), native<T>, {0, 0, 1}}, 0, 0);
    else
      from(op.keys, b, j);
  }

  // Loads the prepared key of step j of sentence b into row r of k.
  void load_prepared(const KeyRows<T>& k, int64_t r, int64_t b, int64_t j, T* copy) const {
    if constexpr (sizeof(T) == 4) {
      const int64_t at = b * op.prepared.stride[0] + j * op.prepared.stride[1];
      k.abs_max[r] = prepared_abs_max(op.prepared, op.Tk, b)[j];
      if (op.prepared.dtype == Dtype::float32) {
        k.e[r] = static_cast<const float*>(op.prepared.data) + at;
        return;
      }
      k.e[r] = copy;
      const BFloat16* row = static_cast<const BFloat16*>(op.prepared.data) + at;
      for (int64_t c = 0; c < units.size; c += width<T>) store(copy + c, load_element(row + c));
    }
  }

  // The score of one query and step j that are outside the limits of the factored form.
  T other_form(const Queries& q, int64_t b, int64_t j, T* query_buffer, T* key_buffer) const {
    T score, abs_max, rest;
    const T *e, *plain;
    const KeyRows<T> k{&e, &plain, &abs_max, &rest};
    load_key(k, 0, b, j, key_buffer + units.size, key_buffer, q.abs_max[0]);
    auto exact = [&](int64_t, int64_t) { return this->exact(b, q.first, j, query_buffer, key_buffer); };
    units.by_three([&](auto by) { mixed_tile<T, 1, 1, decltype(by)::value>(units, q, 0, k, 0, &score, 1, exact); });
    return score;
  }

  // The inputs of a step: its key, its prepared key, or its key and extra.
  enum class Keys { raw, prepared, sums };

  // The scores of one query: each row of keys is read once and in order, and no exponentials are stored.
  template <class E, Keys kKeys, Reciprocals kBy>
  void single_query(const Queries& q, int64_t b, const ListedRows<E>& rows, int64_t n, T* out, T* query_buffer,
                    T* key_buffer) const {
    constexpr bool kPrepared = kKeys == Keys::prepared, kSums = kKeys == Keys::sums;
    const int64_t whole = units.n / width<T> * width<T>;
    const ListedRows<E> extra(op.extra, b, rows.list);  // read for Keys::sums only
    const float* step_abs_max = kPrepared ? prepared_abs_max(op.prepared, op.Tk, b) : nullptr;
    // The sums of 1 / d of NK rows. abs_max accumulates the largest |k| of each row.
    auto row_sums = [&](auto rows_at_once, int64_t j, Vec<T>* acc, IntVec<T>* abs_max) __attribute__((always_inline)) {
      constexpr int NK = decltype(rows_at_once)::value;
      const E *row[NK], *next[NK], *addend[NK], *next_addend[NK];
      for (int r = 0; r < NK; ++r) {
        row[r] = rows[j + r];
        next[r] = rows[min(j + NK + r, n - 1)];
        if constexpr (kSums) {
          addend[r] = extra[j + r];
          next_addend[r] = extra[min(j + NK + r, n - 1)];
        }
      }
      factored_sums<T, 1, NK, kBy>(
          units, q.e, q.ld,
          [&](int r, int64_t c, auto last) __attribute__((always_inline)) {
            prefetch(next[r] + c);
            if constexpr (kPrepared) {
              return load_element(row[r] + c);
            } else {
              const bool part = decltype(last)::value && c >= whole;
              Vec<T> k = part ? load_element(row[r] + c, units.n - c) : load_element(row[r] + c);
              if constexpr (kSums) {
                prefetch(next_addend[r] + c);
                k += part ? load_element(addend[r] + c, units.n - c) : load_element(addend[r] + c);
              }
              abs_max[r] = larger_magnitude<T>(abs_max[r], k);
              return exp_of_twice(k);
            }
          },
          acc);
    };
    for (int64_t j = 0; j < n; j += kRowsAtOnce) {
      const int count = static_cast<int>(min(kRowsAtOnce, n - j));
      Vec<T> acc[kRowsAtOnce];
      T bound[kRowsAtOnce], score[kRowsAtOnce];
      IntVec<T> abs_max[kRowsAtOnce];
      clear(acc);
      clear(abs_max);
      int r = 0;
      // With prepared keys, the query's factors are loaded once for several rows. Without them the exponentials are the
      // bottleneck, and one row at a time is fast enough.
      constexpr int kRowsPerLoad = kPrepared ? 4 : 1;
      for (; r + kRowsPerLoad <= count; r += kRowsPerLoad)
        row_sums(std::integral_constant<int, kRowsPerLoad>(), j + r, acc + r, abs_max + r);
      for (; r < count; ++r) row_sums(std::integral_constant<int, 1>(), j + r, acc + r, abs_max + r);
      for (r = 0; r < count; ++r)
        bound[r] = q.abs_max[0] + (kPrepared ? step_abs_max[rows.list[j + r]] : largest_magnitude<T>(abs_max[r]));
      sums<T, kRowsAtOnce>(
          acc, [&](int r, T s) __attribute__((always_inline)) { score[r] = units.sum_v - units.scale * s; });
      for (r = 0; r < count; ++r)
        out[j + r] = units.template in_range<kBy>(bound[r])
                         ? score[r]
                         : other_form(q, b, rows.list[j + r], query_buffer, key_buffer);
    }
  }
};

// Computes op.prepared from op.keys.
template <typename T>
void additive_prepare(const AdditivePrepare& op) {
  const PreparedSizes sizes(op.A, op.Tk, op.dtype);
  for_each_task(op.B, op.Tk * op.A * 4, [&](int64_t b, Scratch& scratch) {
    T* e = alloc<T>(scratch, padded<T>(op.A));
    T* buffer = alloc<T>(scratch, op.A);
    char* rows = static_cast<char*>(op.prepared) + b * sizes.rows * sizes.columns * item_size(op.dtype);
    float* step_abs_max = reinterpret_cast<float*>(rows + op.Tk * sizes.columns * item_size(op.dtype));
    for (int64_t j = 0; j < op.Tk; ++j) {
      step_abs_max[j] = static_cast<float>(row_exponentials(op.keys, b, j, op.A, e, buffer));
      write_row(rows, op.dtype, j * sizes.columns, e, op.A);
      fill_zero<T>(rows, j * sizes.columns + op.A, sizes.columns - op.A, op.dtype);
    }
    char* end = rows + sizes.rows * sizes.columns * item_size(op.dtype);
    memset(step_abs_max + op.Tk, 0, end - reinterpret_cast<char*>(step_abs_max + op.Tk));
  });
}

template <typename T, class Op>
void additive_forward(const Op& op) {
  ScratchScope scope(thread_scratch());
  const FactoredV<T> units(op, thread_scratch());
  forward<T>(op, AdditiveScore<T>{op, units});
}

}  // namespace ATTN_LEVEL
}  // namespace attn
