// Portable: SSE2 on x86-64, NEON without its own instructions on aarch64, whatever the compiler makes of 16-byte vectors elsewhere.
#include "kernels.h"

#define ATTN_LEVEL portable
#define ATTN_VECTOR_BYTES 16
#include "level.h"
