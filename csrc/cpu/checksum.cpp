#include "checksum.h"

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "runtime.h"

namespace attn {
namespace {

constexpr size_t kShare = 1 << 18;  // bytes of a share: enough work for a thread

void each_checksum(const void* data, size_t bytes, int64_t pieces, uint64_t* sums) {
  struct Job {
    const unsigned char* data;
    size_t bytes;
    uint64_t* sums;
    uint64_t (*checksum)(const void*, size_t);
  } job{static_cast<const unsigned char*>(data), bytes, sums, level().kernels->checksum};
  const auto body = [](int64_t begin, int64_t end, void* context) {
    const Job& of = *static_cast<Job*>(context);
    for (int64_t i = begin; i < end; ++i)
      of.sums[i] = of.checksum(of.data + static_cast<size_t>(i) * of.bytes, of.bytes);
  };
  parallel_for(pieces, static_cast<int64_t>(std::max<size_t>(1, kShare / std::max<size_t>(1, bytes))), body, &job);
}

}  // namespace

void checksums(const void* data, size_t bytes, int64_t pieces, uint64_t* sums) {
  if (pieces > 1 || bytes < 2 * kShare) return each_checksum(data, bytes, pieces, sums);
  const size_t shares = bytes / kShare;
  std::vector<uint64_t> of(shares + 1);
  each_checksum(data, kShare, static_cast<int64_t>(shares), of.data());
  const auto checksum = level().kernels->checksum;
  of[shares] = checksum(static_cast<const unsigned char*>(data) + shares * kShare, bytes % kShare);
  if (pieces == 1) sums[0] = checksum(of.data(), of.size() * sizeof(uint64_t));
}

}  // namespace attn
