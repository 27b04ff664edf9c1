"""Kernels that measure a GPU: only one kind of instruction, in independent chains."""

from __future__ import annotations

import triton
import triton.language as tl

WARPS = 8
BLOCK = 32 * WARPS * 8  # eight chains for each thread
UNROLLED = 8  # operations of each chain in one iteration of the loop


@triton.jit
def chains(out, turns, SPECIAL: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = at.to(tl.float32) * 1e-9
    for _ in range(turns):
        if SPECIAL:
            # Each operation is a single instruction of the special function unit. tl.exp2 compiles to more.
            x = tl.inline_asm_elementwise(
                "{ .reg .f32 a, b, c, d, e, f, g; ex2.approx.ftz.f32 a, $1; ex2.approx.ftz.f32 b, a; "
                "ex2.approx.ftz.f32 c, b; ex2.approx.ftz.f32 d, c; ex2.approx.ftz.f32 e, d; "
                "ex2.approx.ftz.f32 f, e; ex2.approx.ftz.f32 g, f; ex2.approx.ftz.f32 $0, g; }",
                "=f,f",
                [x],
                dtype=tl.float32,
                is_pure=True,
                pack=1,
            )
        else:
            x = tl.inline_asm_elementwise(
                "{ .reg .f32 a, b, c, d, e, f, g; fma.rn.f32 a, $1, 0f3F7FFFFF, 0f33000000; "
                "fma.rn.f32 b, a, 0f3F7FFFFF, 0f33000000; fma.rn.f32 c, b, 0f3F7FFFFF, 0f33000000; "
                "fma.rn.f32 d, c, 0f3F7FFFFF, 0f33000000; fma.rn.f32 e, d, 0f3F7FFFFF, 0f33000000; "
                "fma.rn.f32 f, e, 0f3F7FFFFF, 0f33000000; fma.rn.f32 g, f, 0f3F7FFFFF, 0f33000000; "
                "fma.rn.f32 $0, g, 0f3F7FFFFF, 0f33000000; }",
                "=f,f",
                [x],
                dtype=tl.float32,
                is_pure=True,
                pack=1,
            )
    tl.store(out + at, x)
