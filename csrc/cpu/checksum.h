// A checksum of bytes: whether a tensor holds what it held. Not cryptographic.
#pragma once

#include <cstddef>
#include <cstdint>

namespace attn {

// Any change within eight aligned bytes changes it; other changes go unnoticed with a probability of about 2^-64.
uint64_t checksum(const void* data, size_t bytes);

}  // namespace attn
