"""Device code that several kernels share. The conventions of all kernels:

- The grid has one axis, axis 0: the only one that is not limited to 65535.
- i, j, u are the indices of queries, steps and units (or value columns) of a tile, in 64 bits, because they are
  multiplied by strides. Strides are passed for every tensor of the caller, so no tensor has to be copied.
- Padding is removed by selection (tl.where), never by multiplication with zero: it may hold NaN.
- No atomics: partial sums of several programs are written separately and added in a fixed order.
- A 2-D mask is a 3-D mask with stride 0 along the queries.
- PACKED: keys and values are those of packed_attention.py, (1, N, *), and the batch stride equals the stride of a row.
  Tk is N, and ``lengths`` holds the offsets, (B + 1,), whose values have not been checked.
- SMALL_M: with few queries (and for float64, for which tensor cores do not help) a tile is multiplied and summed
  element by element, with units along the threads, so that keys and values are read at memory bandwidth. Otherwise it
  is a matrix product.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

INTERPRETER = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
# Triton compiles a kernel again for an integer argument that is 1 or a multiple of 16, except for these: all numbers
# that depend on lengths, and the numbers of dropout.
_LENGTHS = ["B", "Tq", "Tk", "M", "X", "padded_blocks", "padded_rows", "splits", "tiles", "columns"]
_LENGTHS += ["steps_per_split", "blocks_per_split", "rows_per_split"]
_LENGTHS += [f"stride_{tensor}b" for tensor in "qkvmgawrste"] + ["stride_mq", "stride_gq", "stride_aq", "stride_sq"]
_LENGTHS += ["seed", "least"]
# For these, Triton specialises on the value 1 only: it needs this to read along the axis. All other strides depend on
# lengths, or belong to no axis along which rows are read.
_UNITS = [
    f"stride_{name}" for name in ("qa", "ka", "ta", "ea", "vd", "rn", "mk", "gk", "ak", "sk", "mm", "mx", "wm", "wx")
]
kernel: Callable[..., Any] = triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_UNITS)


# Rows, masks and products ---------------------------------------------------------------------------------------------


@triton.jit
def batch_offset(b, stride, ALIGNED: tl.constexpr):
    """b * stride; ALIGNED: see rows_aligned."""
    offset = b * stride
    if ALIGNED:
        offset = tl.multiple_of(offset, 16)
    return offset


@triton.jit
def row_length(lengths, b, stride_lengths, Tk):
    """The steps of row b that may be attended: Tk, or its length, clamped to [0, Tk]."""
    length = Tk
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + b * stride_lengths), 0), Tk).to(tl.int32)
    return length


@triton.jit
def sentence_rows(lengths, b, stride_lengths, Tk, PACKED: tl.constexpr):
    """For sentence b: its first row among the rows of all sentences, the number of steps that may be attended, its
    number of rows, and the factor of the batch stride that gives the offset of its first row.
    """
    if PACKED:
        lengths += b * stride_lengths
        origin = tl.minimum(tl.maximum(tl.load(lengths).to(tl.int64), 0), Tk)
        end = tl.minimum(tl.maximum(tl.load(lengths + stride_lengths).to(tl.int64), origin), Tk)
        length = (end - origin).to(tl.int32)
        width = length
        place = origin
    else:
        origin = b * Tk
        length = row_length(lengths, b, stride_lengths, Tk)
        width = Tk
        place = b
    return origin, length, width, place


@triton.jit
def packed_tile(offsets, stride_offsets, tile, B, BLOCK: tl.constexpr):
    """The sentence of a tile of BLOCK steps, and the index of the tile in it, which may begin after its end.

    There are N // BLOCK + B tiles. Those of sentence b start at offsets[b] // BLOCK + b: as many as it needs, or one
    more. So the number of tiles is known without reading the offsets.
    """
    b = tile * 0
    after = b + B
    while after - b > 1:  # a binary search for the last sentence whose first tile is not after this one
        middle = (b + after) // 2
        before = tl.load(offsets + middle.to(tl.int64) * stride_offsets) // BLOCK + middle <= tile
        b = tl.where(before, middle, b)
        after = tl.where(before, after, middle)
    b = b.to(tl.int64)
    first = (tl.load(offsets + b * stride_offsets) // BLOCK + b).to(tl.int32)
    return b, tl.maximum(tile - first, 0)


@triton.jit
def split_steps(split, splits, steps_per_split, width, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """The begin and end of a split of the steps of a row. With PACKED, every sentence has that many equal splits."""
    if PACKED:
        steps_per_split = tl.cdiv(tl.cdiv(width, splits), BLOCK) * BLOCK
    begin = split * steps_per_split
    if PACKED:  # hides from LLVM that begin is a multiple of BLOCK: with this knowledge, ptxas spills registers
        begin = tl.minimum(begin, width)
    return begin, tl.minimum(begin + steps_per_split, width)


@triton.jit
def alignment_rows(b, Tq, origin, width, length, columns):
    """The offset of the alignments of sentence b, Tq rows; the size of a row: columns, or width if columns is 0 or
    None; and the length, which is clamped to the size of a row.
    """
    start = origin * Tq
    if columns is not None:
        start = tl.where(columns > 0, b * Tq * columns, start)
        width = tl.where(columns > 0, columns, width)
        length = tl.minimum(length, width)
    return start, width, length


@triton.jit
def tile_of_pairs(
    Tq, Tk, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, offsets=None, stride_offsets=0, B=0,
    PACKED: tl.constexpr = False,
):  # fmt: skip
    """The row of the batch, the first query and the first step of a program with one tile of pairs."""
    tiles_k = tl.cdiv(Tk, BLOCK_K)
    tiles_q = tl.cdiv(Tq, BLOCK_Q)
    program = tl.program_id(0)
    if PACKED:
        tiles_k = Tk // BLOCK_K + B
        b, tile_k = packed_tile(offsets, stride_offsets, program % tiles_k, B, BLOCK_K)
    else:
        b = (program // (tiles_k * tiles_q)).to(tl.int64)
        tile_k = program % tiles_k
    return b, program // tiles_k % tiles_q * BLOCK_Q, tile_k * BLOCK_K


@triton.jit
def attended(mask, i, j, Tq, length, stride_mq, stride_mk):
    """(Q, K): whether query i may attend step j, for i (Q,) and j (K,); mask points to the row's first element."""
    allowed = (i[:, None] < Tq) & (j[None, :] < length)
    if mask is not None:
        allowed = tl.load(mask + i[:, None] * stride_mq + j[None, :] * stride_mk, mask=allowed, other=0) != 0
    return allowed


@triton.jit
def dot(a, b, total):
    """total (M, N) + a (M, X) @ b (X, N), in float32 whatever the dtype of a and b."""
    if INTERPRETER:  # it interprets bfloat16 as integers here
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def load_rows(rows, x, n, X, N, stride_x, stride_n, SMALL_M: tl.constexpr):
    """rows[x, n], (X, N), 0 beyond X and N; with SMALL_M, (1, X, N): then threads run along n in the product, too."""
    if SMALL_M:
        x = x[None, :, None]
        n = n[None, None, :]
    else:
        x = x[:, None]
        n = n[None, :]
    return tl.load(rows + x * stride_x + n.to(tl.int64) * stride_n, mask=(x < X) & (n < N), other=0.0)


@triton.jit
def add_product(total, weights, rows, allowed, MASKED: tl.constexpr, SMALL_M: tl.constexpr):
    """total (M, N) + weights (M, X) @ rows (X, N) over the allowed (M, X) pairs.

    With SMALL_M, total is (M, X, N) and rows are (1, X, N).

    Weights are 0 where not allowed, but 0 * NaN is NaN: under a mask a row may be padding for one m, not for another.
    """
    if SMALL_M:
        product = weights[:, :, None] * rows.to(weights.dtype)
        if MASKED:
            product = tl.where(allowed[:, :, None], product, 0.0)
        total += product
    elif MASKED:
        used = tl.max(allowed.to(tl.int32), axis=0) > 0
        rows = tl.where(used[:, None], rows, 0.0)
        if tl.max(tl.where(tl.abs(rows.to(tl.float32)) < float("inf"), 0, 1)) == 0:  # all finite
            total = dot(weights.to(rows.dtype), rows, total)
        else:
            for x in range(weights.shape[1]):  # rare and slow: one column of weights at a time
                picked = tl.arange(0, weights.shape[1]) == x
                column = tl.sum(tl.where(picked[None, :], weights, 0.0), axis=1)
                column_allowed = tl.max(tl.where(picked[None, :], allowed.to(tl.int32), 0), axis=1) > 0
                row = tl.sum(tl.where(picked[:, None], rows.to(tl.float32), 0.0), axis=0)
                total += tl.where(column_allowed[:, None], column[:, None] * row[None, :], 0.0)
    else:
        total = dot(weights.to(rows.dtype), rows, total)
    return total


# Functions ------------------------------------------------------------------------------------------------------------


@triton.jit
def reciprocal(x, APPROXIMATE: tl.constexpr):
    """1 / x to one unit in the last place. The plain division of NVIDIA GPUs takes several times as long."""
    if APPROXIMATE:
        r = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        r = 1.0 / x
    return r


@triton.jit
def exp2_flushed(x):
    """2^x as one instruction of NVIDIA GPUs; 0 instead of a subnormal number, for which tl.exp2 takes three more."""
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def divide(a, b):
    """a / b, correctly rounded, for a tensor b. The plain division of NVIDIA GPUs is off by up to two units.

    Softmax needs it: the only alignment of a row must be exactly 1, so that the gradient of its score is 0.
    """
    if b.dtype == tl.float32:
        quotient = tl.div_rn(a, b)
    else:
        quotient = a / b
    return quotient
