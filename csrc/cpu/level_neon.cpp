// NEON, which every aarch64 CPU has. The vectors are those of the portable level; the reciprocal estimate is not.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "kernels.h"

#define ATTN_LEVEL neon
#define ATTN_VECTOR_BYTES 16
#define ATTN_NEON
#define ATTN_FLOAT64_LEVEL portable
#include "level.h"
#endif
