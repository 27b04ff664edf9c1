#include "checksum.h"

#include <cstring>

namespace attn {
namespace {

constexpr int kLanes = 8;  // chains of a multiplication each: one alone would wait for its result most of the time
constexpr size_t kWord = sizeof(uint64_t);

// Invertible in h for each word and in the word for each h: what differs once differs at the end of a lane, too.
inline uint64_t add(uint64_t h, uint64_t word) {
  h = (h ^ word) * 0x9E3779B97F4A7C15u;
  return h ^ (h >> 32);
}

inline uint64_t load(const unsigned char* data) {
  uint64_t word;
  std::memcpy(&word, data, kWord);
  return word;
}

}  // namespace

uint64_t checksum(const void* data, size_t bytes) {
  const auto* at = static_cast<const unsigned char*>(data);
  uint64_t lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = add(bytes, static_cast<uint64_t>(i));
  for (; bytes >= kLanes * kWord; bytes -= kLanes * kWord, at += kLanes * kWord)
    for (int i = 0; i < kLanes; ++i) lanes[i] = add(lanes[i], load(at + i * kWord));
  uint64_t h = lanes[0];
  for (int i = 1; i < kLanes; ++i) h = add(h, lanes[i]);
  for (; bytes >= kWord; bytes -= kWord, at += kWord) h = add(h, load(at));
  uint64_t last = 0;
  if (bytes > 0) std::memcpy(&last, at, bytes);
  return add(h, last);
}

}  // namespace attn
