// NEON, as every aarch64 has it. The vectors are those of the portable level; the estimate of a reciprocal is not.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "kernels.h"

#define ATTN_LEVEL neon
#define ATTN_VECTOR_BYTES 16
#define ATTN_NEON
#define ATTN_FLOAT64_LEVEL portable
#include "level.h"
#endif
