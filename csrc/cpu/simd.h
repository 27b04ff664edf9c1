// One SIMD layer for all levels.
//
// The vectors are GCC/Clang vector extensions. The same source is compiled to SSE2 or NEON (portable), AVX2 or AVX-512
// code, depending on the target that the including file sets (see level_*.cpp). Include it only from there, after
// defining
//   ATTN_LEVEL          namespace of this level: code compiled for one level must not be linked into another
//   ATTN_VECTOR_BYTES   16, 32 or 64
//   ATTN_BFLOAT16_DOT   only if the target has vdpbf16ps
//   ATTN_NEON           only in the NEON level
// and outside any namespace. Code of a level must not use std:: templates, since the linker could share them between
// levels.
#pragma once

#include "elements.h"
#include "vector_math.h"
#include "vectors.h"
