// One SIMD layer for every level of vectorisation.
//
// The vectors are GCC/Clang vector extensions: the same source becomes SSE2 or NEON (portable), AVX2 or AVX-512 code,
// depending on the target the including file has set (see level_*.cpp). Include it only from there, after defining
//   ATTN_LEVEL          namespace of this level: nothing compiled for one level may be linked into another
//   ATTN_VECTOR_BYTES   16, 32 or 64
//   ATTN_BFLOAT16_DOT   where the target has vdpbf16ps, else not at all
//   ATTN_NEON           in the level of that name, else not at all
// and outside of any namespace. No std:: templates in code of a level, for the same reason.
#pragma once

#include "elements.h"
#include "vector_math.h"
#include "vectors.h"
