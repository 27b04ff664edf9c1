"""Instructions of a decoding step in Triton for each form of tanh, read from machine code for sm_90.

    python -m tools.cuda_check.decode_forms    # the tables of docs/design.md, "On GPUs"; needs triton and no GPU

``decode_kernel`` computes tanh itself. ``_form_kernel`` is its loop over the units with the other forms of
additive_attention_fwd.py, without the guards that would choose between them.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attn_kernels.triton.additive_attention_fwd import _numerator
from attn_kernels.triton.additive_math import exp2x_and_rest, exp2x_in_range
from attn_kernels.triton.device import reciprocal

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
import test_triton_aot as aot

TARGET = GPUTarget("cuda", 90, 32)
FORMS = ("fast", "compensated", "clamped")
A = 1024
BYTES_PER_CYCLE = 3.35e12 / (132 * 1.7e9)  # of an H100 and one multiprocessor
INSTRUCTIONS_PER_CYCLE = 128  # of single threads


@triton.jit
def _form_kernel(
    scores,  # (B, BLOCK_Q, Tk)
    query,  # (B, BLOCK_Q, A): exp(2 (query + bias)) / v
    keys,  # (B, Tk, A)
    v,  # (A,)
    inverse,  # (A,): 1 / v
    Tk, A, stride_q, stride_k,
    FORM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """The scores of BLOCK_Q queries; units u and u + BLOCK_A share a reciprocal."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_Q).to(tl.int64)
    units = tl.broadcast_to(tl.arange(0, BLOCK_A)[None, None, :], [1, BLOCK_K, BLOCK_A])
    query += b * stride_q * BLOCK_Q + i[:, None, None] * stride_q
    keys += b * Tk * stride_k
    for start in range(0, Tk, BLOCK_K):
        j = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        in_steps = (j < Tk)[None, :, None]
        total = tl.zeros([BLOCK_Q, BLOCK_K, BLOCK_A], dtype=tl.float32)
        rests = tl.zeros([1, BLOCK_K, BLOCK_A], dtype=tl.float32)
        for first in range(0, A, 2 * BLOCK_A):
            in_units, in_units2 = first + units < A, first + BLOCK_A + units < A
            u = (first + units).to(tl.int64)
            u2 = u + BLOCK_A
            k = tl.load(keys + j[None, :, None] * stride_k + u, mask=in_steps & in_units, other=0.0).to(tl.float32)
            k2 = tl.load(keys + j[None, :, None] * stride_k + u2, mask=in_steps & in_units2, other=0.0).to(tl.float32)
            eq = tl.load(query + u, mask=(i < BLOCK_Q)[:, None, None] & in_units, other=0.0)
            eq2 = tl.load(query + u2, mask=(i < BLOCK_Q)[:, None, None] & in_units2, other=0.0)
            x = tl.load(v + u, mask=in_units, other=0.0).to(tl.float32)
            x2 = tl.load(v + u2, mask=in_units2, other=0.0).to(tl.float32)
            c = tl.load(inverse + u, mask=in_units, other=0.0)
            c2 = tl.load(inverse + u2, mask=in_units2, other=0.0)
            if FORM == "fast":
                d = c + eq * exp2x_in_range(k)
                d2 = c2 + eq2 * exp2x_in_range(k2)
                total += (d + d2) * reciprocal(d * d2, True)
            else:
                ek, rest = exp2x_and_rest(k)
                ek2, rest2 = exp2x_and_rest(k2)
                rests += x * rest + x2 * rest2
                n = _numerator(eq, ek, c, FORM == "clamped")
                n2 = _numerator(eq2, ek2, c2, FORM == "clamped")
                numerator = n * ((x + x2) * n2 + 2.0 * x * c2) + (2.0 * x2 * c) * n2
                total += numerator * reciprocal((n + 2.0 * c) * (n2 + 2.0 * c2), True)
        row = tl.sum(total, axis=2) + tl.sum(rests, axis=2)
        tl.store(scores + (b * BLOCK_Q + i[:, None]) * Tk + j[None, :], row, mask=(j < Tk)[None, :])


def instructions_of_step(queries: int, dtype: str) -> tuple[float, float, dict[str, Any]]:
    """Of decode_kernel: per unit of a pair in the loop over units; others per step and unit; its constants, warps."""
    launched = aot.launches(op="additive", sizes=(64, queries, 200, A), dtype=dtype, lengths=True)
    kernel, arguments, constants = next(launch for launch in launched if launch[0].fn.__name__ == "decode_kernel")
    source, options = aot.source_of(kernel, arguments, constants)
    walk, around = _walk(triton.compile(source, target=TARGET, options=options))
    steps_and_units = constants["BLOCK_K"] * constants["BLOCK_A"] / (32 * options["num_warps"])
    return walk / steps_and_units / queries, (around - walk) / steps_and_units, constants | options


def instructions_of_form(form: str, queries: int, dtype: str, tile: dict[str, Any]) -> float:
    """Of _form_kernel, with the tile of decode_kernel."""
    names = ("scores", "query", "keys", "v", "inverse", "Tk", "A", "stride_q", "stride_k")
    short = {"float32": "*fp32", "bfloat16": "*bf16"}[dtype]
    types = ("*fp32", "*fp32", short, short, "*fp32", *("i32",) * 4)
    values = {(9,): form, (10,): queries, (11,): tile["BLOCK_K"], (12,): tile["BLOCK_A"] // 2}
    signature = dict(zip(names, types, strict=True)) | dict.fromkeys(_form_kernel.arg_names[9:], "constexpr")
    attributes = {(index,): [["tt.divisibility", 16]] for index in range(len(names)) if names[index] != "Tk"}
    source = ASTSource(_form_kernel, signature, values, attributes)
    walk, _ = _walk(triton.compile(source, target=TARGET, options={"num_warps": tile["num_warps"]}))
    return walk * 32 * tile["num_warps"] / (queries * tile["BLOCK_K"] * tile["BLOCK_A"])


def _walk(binary: Any) -> tuple[int, int]:
    """The numbers of instructions of the loop over units, and of the loop around it."""
    found = aot._resources(binary.asm["cubin"])
    both = zip(found["loops"], found["around"], strict=True)
    walk, around = max(both, key=lambda loop: aot._count(loop[0], "MUFU"))
    return sum(walk.values()), around


if __name__ == "__main__":
    print(
        "per unit of a pair: tanh itself,", ", ".join(FORMS), "| per step and unit: all of a step, what memory allows"
    )
    for queries, dtype in itertools.product((1, 2, 4), ("float32", "bfloat16")):
        tanh, others, tile = instructions_of_step(queries, dtype)
        forms = [instructions_of_form(form, queries, dtype, tile) for form in FORMS]
        allowed = 2 * {"float32": 4, "bfloat16": 2}[dtype] / BYTES_PER_CYCLE * INSTRUCTIONS_PER_CYCLE
        row = " ".join(f"{each:.1f}" for each in (tanh, *forms))
        print(f"{queries} {dtype}: {row} | {queries * tanh + others:.0f} {allowed:.0f}")
