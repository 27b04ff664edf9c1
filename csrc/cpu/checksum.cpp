#include "checksum.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "runtime.h"

namespace attn {
namespace {

constexpr int kLanes = 8;  // chains of a multiplication each: one alone would wait for its result most of the time
constexpr size_t kWord = sizeof(uint64_t);
constexpr size_t kShare = 1 << 18;  // bytes that are worth a thread

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

void each_checksum(const void* data, size_t bytes, int64_t pieces, uint64_t* sums) {
  struct Job {
    const unsigned char* data;
    size_t bytes;
    uint64_t* sums;
  } job{static_cast<const unsigned char*>(data), bytes, sums};
  const auto body = [](int64_t begin, int64_t end, void* context) {
    const Job& of = *static_cast<Job*>(context);
    for (int64_t i = begin; i < end; ++i) of.sums[i] = checksum(of.data + static_cast<size_t>(i) * of.bytes, of.bytes);
  };
  parallel_for(pieces, static_cast<int64_t>(std::max<size_t>(1, kShare / std::max<size_t>(1, bytes))), body, &job);
}

}  // namespace

void checksums(const void* data, size_t bytes, int64_t pieces, uint64_t* sums) {
  if (pieces > 1 || bytes < 2 * kShare) return each_checksum(data, bytes, pieces, sums);
  const size_t shares = bytes / kShare;
  std::vector<uint64_t> of(shares + 1);
  each_checksum(data, kShare, static_cast<int64_t>(shares), of.data());
  of[shares] = checksum(static_cast<const unsigned char*>(data) + shares * kShare, bytes % kShare);
  if (pieces == 1) sums[0] = checksum(of.data(), of.size() * kWord);
}

}  // namespace attn
