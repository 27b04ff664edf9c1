// Prints the SIMD levels that kernels.cpp finds, the first choice first. Empty tables replace the kernels, so it
// compiles in a second and runs on an emulated processor.
#include <cstdio>

#include "cpu/kernels.h"

namespace attn {
#define ATTN_EMPTY(level)       \
  namespace level {             \
  extern const Kernels kernels; \
  const Kernels kernels = {};   \
  }
ATTN_EMPTY(portable)
ATTN_EMPTY(avx2)
ATTN_EMPTY(avx512)
ATTN_EMPTY(avx512bf16)
ATTN_EMPTY(neon)
}  // namespace attn

int main() {
  for (int i = 0; i < attn::levels().n; ++i) std::puts(attn::levels().list[i].name);
}
