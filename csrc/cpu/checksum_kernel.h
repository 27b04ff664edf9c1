// The checksum of one piece of memory. It is the same on every level, since the level may change between two calls.
#pragma once

#include "simd.h"

namespace attn {
namespace ATTN_LEVEL {

typedef uint64_t Words __attribute__((vector_size(ATTN_VECTOR_BYTES)));

// Invertible in h for each word, and in the word for each h: a single difference persists to the end of a lane.
template <typename T>
ATTN_INLINE T add_word(T h, T word) {
  h = (h ^ word) * uint64_t{0x9E3779B97F4A7C15u};
  return h ^ (h >> 32);
}

inline uint64_t checksum(const void* data, size_t bytes) {
  // Independent chains of multiplications: a single chain would be bound by the latency of a multiplication.
  constexpr size_t kLanes = 32, kWord = sizeof(uint64_t), kBlock = kLanes * kWord;
  constexpr int kVectors = static_cast<int>(kBlock / ATTN_VECTOR_BYTES);
  // Hardware prefetchers stop at the end of a page. With this prefetch distance, the throughput is that of a plain sum.
  constexpr size_t kAhead = 4096, kLine = 64;
  const auto* at = static_cast<const unsigned char*>(data);
  uint64_t lanes[kLanes];
  for (size_t i = 0; i < kLanes; ++i) lanes[i] = add_word<uint64_t>(bytes, i);
  if (bytes >= kBlock) {
    Words h[kVectors];
    memcpy(h, lanes, kBlock);
    for (; bytes >= kBlock; bytes -= kBlock, at += kBlock) {
      for (size_t i = 0; i < kBlock; i += kLine) __builtin_prefetch(at + kAhead + i);
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; ++i) {
        Words word;
        memcpy(&word, at + static_cast<size_t>(i) * ATTN_VECTOR_BYTES, ATTN_VECTOR_BYTES);
        h[i] = add_word(h[i], word);
      }
    }
    memcpy(lanes, h, kBlock);
  }
  uint64_t sum = lanes[0];
  for (size_t i = 1; i < kLanes; ++i) sum = add_word(sum, lanes[i]);
  for (; bytes >= kWord; bytes -= kWord, at += kWord) {
    uint64_t word;
    memcpy(&word, at, kWord);
    sum = add_word(sum, word);
  }
  uint64_t last = 0;
  if (bytes > 0) memcpy(&last, at, bytes);
  return add_word(sum, last);
}

}  // namespace ATTN_LEVEL
}  // namespace attn
