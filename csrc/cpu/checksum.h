// Checksums of bytes: whether a tensor holds what it held. Not cryptographic.
#pragma once

#include <cstddef>
#include <cstdint>

namespace attn {

// Of `pieces` pieces, of so many bytes each. A change within eight aligned bytes of a piece always changes its checksum;
// other changes go unnoticed with a probability of about 2^-64.
void checksums(const void* data, size_t bytes, int64_t pieces, uint64_t* sums);

}  // namespace attn
