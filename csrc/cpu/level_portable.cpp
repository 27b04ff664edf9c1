// Portable: SSE2 on x86-64, NEON without intrinsics on aarch64, elsewhere what the compiler generates for 16-byte
// vectors.
#include "kernels.h"

#define ATTN_LEVEL portable
#define ATTN_VECTOR_BYTES 16
#include "level.h"
