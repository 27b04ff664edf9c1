// Checksums of bytes, to detect whether a tensor has changed. Not cryptographic.
#pragma once

#include <cstddef>
#include <cstdint>

namespace attn {

// Computes the checksums of `pieces` pieces of `bytes` bytes each. A change within eight aligned bytes of a piece
// always changes its checksum. Any other change is missed with a probability of about 2^-64.
void checksums(const void* data, size_t bytes, int64_t pieces, uint64_t* sums);

}  // namespace attn
