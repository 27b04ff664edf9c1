"""The Triton kernels, compiled for NVIDIA GPUs without a GPU: what the machine code must and must not contain.

The launchers run on meta tensors with the launch replaced, so that each kernel is compiled with exactly the tiles and
arguments that they choose. The tests check local memory (spills), registers, shared memory, and the number of special
functions per pair of a query and a step, which the factored method reduces. Each case compiles in a process without
Triton's interpreter (ahead.py).
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ahead import run_ahead

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'attn_kernels[triton]'"
    ),
]

TARGETS = (80, 90, 100)
OLDEST_PACKING = (3, 8)  # the release of Triton from which on the bounds hold for sm_100 too
HOT = ("tiled_scores_kernel", "backward_kernel")
HOT_OF_RELU = (*HOT, "exponentials_kernel")
SMALL_M = ("decode_kernel", "backward_kernel", "_product_kernel", "_weighted_sum_kernel")
SMALL_Q = ("small_q_scores_kernel", "backward_kernel")
SPLIT_DECODE = ("decode_kernel", "combine_kernel")
PRODUCTS = ("_product_kernel", "_attend_kernel", "_weighted_sum_kernel")
GATED = ("gated_scores_kernel", "gated_backward_kernel")
OPTIONS = ("score_bias", "dropout", "sigmoid", "clip")
SOFTMAX_OPTIONS = ("score_bias", "dropout", "softmax", "clip")
WITH_OPTIONS = ("_attend_kernel", "_softmax_backward_kernel")


def _case(op: str, sizes: tuple[int, ...], dtype: str, **settings: Any) -> dict[str, Any]:
    """sizes: (B, Tq, Tk, A).

    Settings: lengths, whether there are some; mask, its number of dimensions; slope, of activated_attention and
    activated_scores; options, which of an attention; packed, whether the B sentences with Tk steps are; kernels to
    compile, all by default; targets, all by default.
    """
    return {"op": op, "sizes": sizes, "dtype": dtype, **settings}


# The first two compile every kernel once; the others those in which their tiles, dtypes or masks make a difference.
CASES: dict[str, dict[str, Any]] = {
    "additive": _case("additive", (1024, 128, 128, 512), "float32"),
    "masked": _case("additive", (256, 74, 75, 1024), "bfloat16", lengths=True, mask=3),
    "small": _case("additive", (16, 100, 100, 512), "float32", lengths=True, kernels=HOT),
    "beams": _case("additive", (32, 5, 200, 512), "float32", lengths=True, kernels=HOT),
    "odd": _case("additive", (7, 9, 33, 17), "float16", mask=2, kernels=HOT, targets=(90,)),
    "decode": _case("additive", (64, 1, 50, 512), "float32", lengths=True, kernels=SMALL_M),
    "decode-bfloat16": _case("additive", (64, 1, 200, 1024), "bfloat16", lengths=True, kernels=SMALL_M, targets=(90,)),
    "four": _case("additive", (64, 4, 200, 1024), "float32", mask=3, kernels=SMALL_M, targets=(90,)),
    "beams-decode": _case("additive", (2, 5, 200, 512), "float32", lengths=True, kernels=("decode_kernel",)),
    "dot-decode": _case("dot", (64, 1, 200, 1024), "bfloat16", lengths=True, kernels=("decode_kernel",)),
    "float64": _case("additive", (4, 9, 33, 128), "float64", mask=2, kernels=(*SMALL_Q, *PRODUCTS), targets=(90,)),
    "scores": _case("scores", (64, 17, 100, 512), "float16", kernels=HOT, targets=(90,)),
    "relu": _case("activated", (1024, 128, 128, 512), "float32", kernels=HOT_OF_RELU),
    "relu-masked": _case(
        "activated", (256, 74, 75, 1024), "bfloat16", lengths=True, mask=3, kernels=HOT_OF_RELU, targets=(90,)
    ),
    "relu-small": _case("activated", (16, 100, 100, 512), "float32", lengths=True, kernels=HOT, targets=(90,)),
    "relu-decode": _case("activated", (64, 1, 200, 1024), "bfloat16", lengths=True, kernels=SMALL_M[:2]),
    "relu-beams": _case("activated", (2, 5, 200, 512), "float32", mask=2, kernels=SMALL_M[:2], targets=(90,)),
    "relu-float64": _case("activated", (4, 9, 33, 128), "float64", mask=2, kernels=SMALL_Q, targets=(90,)),
    "relu-scores": _case("relu scores", (64, 17, 100, 512), "float16", kernels=HOT, targets=(90,)),
    "leaky_relu": _case(
        "activated", (256, 74, 75, 1024), "bfloat16", mask=2, slope=0.2, kernels=HOT_OF_RELU, targets=(90,)
    ),
    "leaky_relu-decode": _case("activated", (64, 1, 50, 512), "float32", slope=0.2, kernels=SMALL_M[:2], targets=(90,)),
    "leaky_relu-scores": _case("relu scores", (64, 3, 100, 512), "float32", slope=0.2, kernels=SMALL_Q, targets=(90,)),
    "dot": _case("dot", (64, 100, 100, 512), "bfloat16", lengths=True, kernels=PRODUCTS),
    "dot-masked": _case("dot", (64, 16, 100, 512), "float32", mask=3, kernels=PRODUCTS, targets=(90,)),
    # Pooling of a long bag, of sentences by several vectors, and several vectors for each of many queries.
    "gated": _case("gated", (1, 1, 50000, 256), "float32", kernels=("decode_kernel", GATED[1])),
    "gated-bfloat16": _case(
        "gated", (64, 1, 500, 512), "bfloat16", vectors=30, gate=False, lengths=True, kernels=GATED
    ),
    "gated-long": _case(
        "gated",
        (1, 1, 50000, 512),
        "bfloat16",
        vectors=10,
        mask=2,
        activation="sigmoid",
        kernels=(*SPLIT_DECODE, GATED[1]),
        targets=(90,),
    ),
    "gated-many": _case("gated", (64, 74, 75, 1024), "float32", vectors=4, mask=3, kernels=GATED),
    "gated-float64": _case(
        "gated", (4, 9, 33, 128), "float64", vectors=3, activation="leaky_relu", kernels=GATED, targets=(90,)
    ),
    "gated-scores": _case(
        "gated scores", (64, 17, 100, 512), "float16", activation="relu", kernels=GATED, targets=(90,)
    ),
    "extra": _case("extra", (64, 1, 200, 512), "float32", lengths=True, kernels=("decode_kernel", GATED[1])),
    "extra-many": _case(
        "extra",
        (64, 100, 100, 512),
        "bfloat16",
        lengths=True,
        kernels=("exponentials_kernel", "key_exponentials_kernel", *HOT),
        targets=(90,),
    ),
    "extra-gated": _case(
        "gated",
        (64, 1, 200, 512),
        "float32",
        extra=True,
        lengths=True,
        kernels=("decode_kernel", GATED[1]),
        targets=(90,),
    ),
    "packed": _case("additive", (64, 100, 100, 512), "float32", packed=True),
    "packed-decode": _case("additive", (64, 1, 200, 1024), "bfloat16", packed=True, kernels=SMALL_M, targets=(80, 90)),
    "packed-beams-decode": _case(
        "activated", (2, 5, 200, 512), "float32", packed=True, kernels=(*SPLIT_DECODE, "backward_kernel"), targets=(90,)
    ),
    "packed-dot": _case("dot", (64, 100, 100, 512), "bfloat16", packed=True, kernels=PRODUCTS, targets=(90,)),
    "options": _case(
        "additive", (256, 74, 75, 1024), "bfloat16", lengths=True, mask=3, kernels=WITH_OPTIONS, options=OPTIONS
    ),
    "options-dropout": _case(
        "dot", (16, 100, 100, 512), "float32", kernels=WITH_OPTIONS, options=("dropout",), targets=(90,)
    ),
    "options-decode": _case(
        "additive",
        (64, 1, 50, 512),
        "float32",
        lengths=True,
        kernels=("decode_kernel", "_softmax_backward_kernel"),
        options=SOFTMAX_OPTIONS,
        targets=(80, 90),
    ),
    "options-beams-decode": _case(
        "dot",
        (2, 5, 200, 512),
        "float32",
        lengths=True,
        mask=3,
        kernels=SPLIT_DECODE,
        options=OPTIONS,
        targets=(80, 90),
    ),
    "options-float64": _case(
        "activated", (4, 9, 33, 128), "float64", mask=2, slope=0.2, kernels=WITH_OPTIONS, options=OPTIONS, targets=(90,)
    ),
}


@pytest.mark.long(30)
@pytest.mark.parametrize("name", CASES)
def test_machine_code(name: str, tmp_path: Path) -> None:
    compiled = run_ahead("test_triton_aot", "compile_case", name, TRITON_CACHE_DIR=str(tmp_path))
    assert {kernel["name"] for kernel in compiled} >= set(CASES[name].get("kernels", ())), "a kernel was not launched"
    problems = [f"{_title(kernel)}: {problem}" for kernel in compiled for problem in _problems(kernel)]
    assert not problems, "\n".join(problems)


# (Tq, Tk). First a long one and a short one: each rule that looks at lengths has taken both its ways then.
LENGTHS = [(199, 333), (33, 19), (200, 200), (48, 64), (77, 50), (100, 100), (64, 81), (65, 128), (90, 37), (160, 75)]


@pytest.mark.parametrize("queries", ["many", "beams", "one"])
@pytest.mark.parametrize("op", ["additive", "activated", "dot", "additive with options", "gated"])
def test_lengths_do_not_compile_again(op: str, queries: str) -> None:
    """Over ten lengths, whatever is compiled after the first two was compiled for them."""
    lengths = [(Tq if queries == "many" else 5 if queries == "beams" else 1, Tk) for Tq, Tk in LENGTHS]
    for variants in run_ahead("test_triton_aot", "variants_of", op, lengths):
        new = set().union(*variants[2:]) - set(variants[0]) - set(variants[1])
        assert not new, "\n".join(sorted(new))


def _title(kernel: dict[str, Any]) -> str:
    return f"{kernel['name']} sm_{kernel['target']} {kernel['constants']} {kernel['warps']} warps"


def _problems(kernel: dict[str, Any]) -> list[str]:
    """What is wrong with the machine code of a kernel."""
    problems = []
    # A few bytes kept across a whole loop cost nothing: that is for ptxas to choose, but not where speed is decided.
    most = 0 if kernel["name"] == "tiled_scores_kernel" else 32
    if kernel["stack"] > most or any(_count(loop, "LDL", "STL") for loop in kernel["loops"]):
        problems.append(f"local memory: {kernel['stack']} bytes")
    if -(-kernel["registers"] // 8) * 8 * 32 * kernel["warps"] > 65536:
        problems.append(f"cannot be launched with {kernel['registers']} registers")
    if kernel["shared"] > 48 * 1024:
        problems.append(f"{kernel['shared']} bytes of shared memory leave few programs to a processor")
    check = {
        "tiled_scores_kernel": _problems_of_many_scores,
        "small_q_scores_kernel": _problems_of_few_scores,
        "decode_kernel": _problems_of_decode,
        "backward_kernel": _problems_of_backward,
        **dict.fromkeys(GATED, _problems_of_gated),
    }.get(kernel["name"], _problems_of_products if kernel["name"] in PRODUCTS else None)
    return problems + ([] if check is None else check(kernel))


def _problems_of_many_scores(kernel: dict[str, Any]) -> list[str]:
    """A loop shares a reciprocal among three units and needs no other special function.

    Two are for the compensated form, in which two units share one; one takes tanh.
    """
    size = kernel["constants"]
    pairs = size["THREAD_Q"] * size["THREAD_K"]
    if size["ACTIVATION"] != "tanh":
        return _problems_of_many_scores_of_relu(kernel, pairs)
    shared = [loop for loop in kernel["loops"] if _count(loop, "MUFU.RCP") and not _count(loop, "MUFU.EX2")]
    if len(shared) != 3:
        return [f"{len(shared)} loops with reciprocals and without exponentials, expected three"]
    units = kernel["chunk"]
    shared.sort(key=lambda loop: -_count(loop, "MUFU.RCP"))
    special = _count(shared[0], "MUFU")
    problems = []
    if special / (pairs * units) > 0.34:
        problems.append(f"{special / (pairs * units):.3f} special functions for a unit of a pair, expected 1/3")
    instructions = sum(shared[0].values()) / (pairs * units)
    # Sharing and summing take 3.1; the rest are three loads for each unit, of 16 pairs or of 8.
    if instructions > (3.5 if pairs >= 16 else 3.7) and not kernel["old"]:
        problems.append(f"{instructions:.2f} instructions for a unit of a pair")
    # Two units share a reciprocal; the compiler decides whether their loop is unrolled.
    of_compensated = sorted(sum(loop.values()) / (2 * _count(loop, "MUFU.RCP")) for loop in shared[1:])
    for instructions, most in zip(of_compensated, (6.0, 7.9) if pairs >= 16 else (6.6, 9.1), strict=True):
        if instructions > most and not kernel["old"]:
            problems.append(f"compensated: {instructions:.2f} instructions for a unit of a pair")
    if _count(shared[0], "LDG") > 3 * units + 1:
        problems.append(f"{_count(shared[0], 'LDG')} loads: not all queries and all steps of a thread at once")
    most = 136 if pairs >= 16 else 80
    if kernel["registers"] > most and not kernel["old"]:
        problems.append(f"{kernel['registers']} registers leave fewer than {65536 // (most * 32)} warps to a processor")
    return problems


def _problems_of_many_scores_of_relu(kernel: dict[str, Any], pairs: int) -> list[str]:
    """One loop, of an addition, a maximum and a multiply-add for a unit of a pair; with a slope, one more."""
    (loop,) = kernel["loops"]
    units, problems = kernel["chunk"], []
    if _count(kernel["all"], "MUFU.EX2") or _count(loop, "MUFU"):
        problems.append("exponentials or divisions")
    instructions = sum(loop.values()) / (pairs * units)
    most = (3.5 if pairs >= 16 else 3.7) + (kernel["constants"]["ACTIVATION"] == "leaky_relu")
    if instructions > most and not kernel["old"]:
        problems.append(f"{instructions:.2f} instructions for a unit of a pair")
    if _count(loop, "LDG") > 3 * units:
        problems.append(f"{_count(loop, 'LDG')} loads: not all queries and all steps of a thread at once")
    if kernel["registers"] > (96 if pairs >= 16 else 80):
        problems.append(f"{kernel['registers']} registers")
    return problems


def _problems_of_few_scores(kernel: dict[str, Any]) -> list[str]:
    """One exponential and one reciprocal for a tanh, none for others."""
    size, elements = kernel["constants"], _per_thread(kernel, "BLOCK_Q", "BLOCK_K", "BLOCK_A")
    if size["FLOAT64"]:
        return []
    most = max(_count(loop, "MUFU") for loop in kernel["loops"])
    expected = 2 if size["ACTIVATION"] == "tanh" else 0
    return [] if most == expected * elements else [f"{most / elements:.2f} special functions, expected {expected}"]


def _problems_of_decode(kernel: dict[str, Any]) -> list[str]:
    """Keys, and all that is read beside them, are read 16 bytes at a time and not exchanged between the threads."""
    size = kernel["constants"]
    walk = max(kernel["loops"], key=lambda loop: _count(loop, "LDG.E.128"))
    loads, wide = _count(walk, "LDG"), _count(walk, "LDG.E.128")
    if size["VECTORS"] is not None:  # a tile of activations for 8 of them is small: a thread reads 8 bytes of it
        problems = [] if wide >= loads / 2 > 0 else [f"{wide} of {loads} loads are of 16 bytes"]
    else:
        problems = [] if loads == wide > 0 else [f"{wide} of {loads} loads of the walk over the units are of 16 bytes"]
        if _count(walk, "STS", "LDS", "BAR"):
            problems.append("threads exchange what they have loaded")
    bytes_of_element = 2 if kernel["dtype"] == "bfloat16" else 4
    values = _per_thread(kernel, "BLOCK_K", "BLOCK_D") * bytes_of_element // 16
    if _count(kernel["all"], "LDG.E.128") < wide + values:
        problems.append("values are not read 16 bytes at a time")
    elements = _per_thread(kernel, "BLOCK_Q", "BLOCK_K", "BLOCK_A")
    expected = (2 if size["SCORE"] in ("tanh", "sigmoid") else 0) + (2 if kernel["gate"] else 0)
    if size["VECTORS"] is not None:
        elements //= size["BLOCK_Q"]  # one activation for all score vectors
    if _count(walk, "MUFU") != expected * elements:
        problems.append(f"{_count(walk, 'MUFU') / elements:.2f} special functions for a unit, expected {expected}")
    elif (
        size["SCORE"] == "tanh" and not kernel["gate"] and _count(walk, "FSETP") > elements
    ):  # 1 is for small arguments
        problems.append(f"{_count(walk, 'FSETP') / elements:.2f} comparisons for a unit: exponentials are guarded")
    return problems + _too_few_fit(kernel, 8 // kernel["warps"])


def _problems_of_gated(kernel: dict[str, Any]) -> list[str]:
    """An activation and a gate for all score vectors: two special functions each for a unit of a pair; enough warps."""
    size = kernel["constants"]
    if size["FLOAT64"]:
        return []
    elements = _per_thread(kernel, "BLOCK_K", "BLOCK_A")
    expected = ((2 if size["ACTIVATION"] in ("tanh", "sigmoid") else 0) + (2 if kernel["gate"] else 0)) * elements
    if kernel["name"] == "gated_backward_kernel" and not size["SMALL_M"]:
        expected *= 2  # Triton makes activations again in the layout of the product that takes them
    special = _count(kernel["all"], "MUFU.EX2", "MUFU.RCP")
    problems = _too_few_fit(kernel, 8 // kernel["warps"])
    if special > expected + 8:  # a few of them for divisions of indices
        problems.append(f"{special} special functions, expected {expected}")
    return problems


def _problems_of_backward(kernel: dict[str, Any]) -> list[str]:
    """One reciprocal for a unit of a pair and no exponential, unless the inputs are large or the queries few.

    For keys in float32 the exponential of these is a polynomial and no special function.
    """
    size, elements = kernel["constants"], _per_thread(kernel, "BLOCK_Q", "BLOCK_K", "BLOCK_A")
    if size["FLOAT64"]:
        return []
    if size["ACTIVATION"] != "tanh":
        return _problems_of_backward_of_relu(kernel, elements)
    counts = {(_count(loop, "MUFU.RCP"), _count(loop, "MUFU")) for loop in kernel["loops"]} - {(0, 0)}
    special = elements if kernel["dtype"] == "float32" else 2 * elements
    expected = {(elements, special)} | ({(elements, elements)} if size["GUARDED"] else set())
    if counts != expected:
        return [f"(reciprocals, special functions) of the loops are {counts}, expected {expected}"]
    problems = []
    if size["GUARDED"]:
        factored = min(
            (loop for loop in kernel["loops"] if _count(loop, "MUFU") == elements), key=lambda loop: sum(loop.values())
        )
        instructions = sum(factored.values()) / elements
        # 8 for each pair, and about 30 for each step: its loads, pointers and store. With at most 16 queries a step
        # makes the exponential of its key, too.
        if instructions > (9.0 if elements >= 32 else 10.5):
            problems.append(f"{instructions:.2f} instructions for a unit of a pair")
        problems += _too_few_fit(kernel, 2)
    return problems


def _problems_of_backward_of_relu(kernel: dict[str, Any], elements: int) -> list[str]:
    """With many queries 7 instructions for a unit of a pair, no more under a mask, and about 30 for each step."""
    problems = []
    if _count(kernel["all"], "MUFU.EX2", "MUFU.TANH"):
        problems.append("exponentials")
    if elements < 16:  # few queries
        return problems
    walks = [sum(loop.values()) / elements for loop in kernel["loops"] if _count(loop, "FSETP") >= elements]
    if not walks:
        problems.append("no loop over the steps")
    elif min(walks) > (8.5 if elements >= 32 else 9.5) and not kernel["old"]:
        problems.append(f"{min(walks):.2f} instructions for a unit of a pair")
    return problems + _too_few_fit(kernel, 2)


def _problems_of_products(kernel: dict[str, Any]) -> list[str]:
    """Products of 16-bit numbers run on tensor cores."""
    if kernel["constants"]["SMALL_M"] or kernel["dtype"] not in ("bfloat16", "float16"):
        return []
    found = any(_count(loop, "HMMA", "HGMMA", "UTCHMMA") for loop in [*kernel["loops"], kernel["all"]])
    return [] if found else ["no tensor core instruction"]


def _per_thread(kernel: dict[str, Any], *axes: str) -> int:
    """The elements of a block that one thread has. axes: the constants with its sizes."""
    return math.prod(kernel["constants"][axis] for axis in axes) // (32 * kernel["warps"])


def _too_few_fit(kernel: dict[str, Any], programs: int) -> list[str]:
    """The registers, if they leave room for fewer programs than these on a processor."""
    if kernel["registers"] * 32 * kernel["warps"] <= 65536 // programs:
        return []
    return [f"{kernel['registers']} registers leave fewer than {programs} programs to a processor"]


def _count(loop: dict[str, int], *names: str) -> int:
    """The instructions of a loop whose name starts with one of names."""
    return sum(number for name, number in loop.items() if name.startswith(names))


# In the process that compiles -----------------------------------------------------------------------------------------


def launches(
    op, sizes, dtype, lengths=False, mask=0, slope=0.0, options=(), kernels=(), targets=TARGETS, nvidia=True,
    vectors=1, gate=True, extra=False, activation="tanh", packed=False,
) -> list[tuple[Any, tuple, dict]]:  # fmt: skip
    """The launches of forward and backward: (kernel, arguments, constants and options)."""
    import torch
    from triton.runtime.jit import JITFunction

    from attn_kernels.activations import ACTIVATIONS
    from attn_kernels.triton import attention, packed_attention

    for name in ("additive_attention", "gated_additive_attention", "decode"):
        module = sys.modules[f"attn_kernels.triton.{name}"]
        module.has_approximate_reciprocal = lambda tensor: nvidia and tensor.dtype != torch.float64
    found = []
    JITFunction.run = lambda self, *args, grid, warmup, **constants: found.append((self, args, constants))

    kernels = {**attention.KERNELS, **packed_attention.KERNELS}

    def both_of(op: str) -> tuple[Any, Any]:
        return kernels[op], kernels[f"{op}_backward"]

    def empty(*shape: int, dtype: str = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    B, Tq, Tk, A = sizes
    query, keys, values, v, bias = empty(B, Tq, A), empty(B, Tk, A), empty(B, Tk, A), empty(A), empty(A)
    activated = (ACTIVATIONS.index("leaky_relu" if slope else "relu"), slope)
    memory_lengths = empty(B, dtype="int64") if lengths else None
    allowed = {0: None, 2: empty(B, Tk, dtype="bool"), 3: empty(B, Tq, Tk, dtype="bool")}[mask]
    gradients, alignments = (empty(B, Tq, A), empty(B, Tq, Tk)), empty(B, Tq, Tk)
    added = empty(B, Tk, A) if extra else None
    if op.startswith("gated"):
        of_score = (empty(vectors, A), bias, empty(B, Tk, A) if gate else None)
        numbers = (ACTIVATIONS.index(activation), 0.2)
        gradients, alignments = (empty(B, Tq * vectors, A), empty(B, Tq * vectors, Tk)), empty(B, Tq * vectors, Tk)
        if op == "gated scores":
            forward, backward = both_of("gated_additive_scores")
            forward(query, keys, *of_score, added, *numbers)
            backward(alignments, query, keys, *of_score, added, *numbers, True, True)
            return found
        inputs = (query, keys, values, *of_score, None, added, *numbers, 0.0, 0, 0.0, None, memory_lengths, allowed)
        forward, backward = both_of("gated_additive_attention")
        log_total = forward(*inputs, True)[2]
        for needed in ((True, True), (True, False), (False, True)):
            backward(*gradients, None, *inputs, alignments, log_total, *needed)
    elif op == "extra":
        name, numbers = ("activated", activated) if slope else ("additive", ())
        inputs = (query, keys, values, v, bias, empty(B, Tk, A), *numbers, memory_lengths, allowed)
        forward, backward = both_of(f"{name}_attention_with_extra")
        forward(*inputs, True)
        backward(*gradients, *inputs, alignments, True, True, False)
    elif packed:
        own = {"additive": (v, bias), "activated": (v, bias, *activated), "dot": (0.5,)}[op]
        inputs = (query, keys.flatten(0, 1), values.flatten(0, 1), *own, Tk, empty(B + 1, dtype="int64"))
        forward, backward = both_of(f"{op}_attention_packed")
        forward(*inputs, True)
        backward(*gradients, *inputs, alignments, True, True)
    elif options:
        own, numbers = {"additive": ((v, bias), ()), "activated": ((v, bias), activated), "dot": ((), (0.5,))}[op]
        dropout, seed = (0.3, empty(dtype="int64")) if "dropout" in options else (0.0, None)
        score_bias = alignments if "score_bias" in options else None
        own = (*own, score_bias) if op == "dot" else (*own, score_bias, added)
        inputs = (query, keys, values, *own, *numbers, dropout, int("sigmoid" in options))
        inputs = (*inputs, 10.0 if "clip" in options else 0.0, seed)
        inputs = (*inputs, memory_lengths, allowed)
        forward, backward = both_of(f"{op}_attention_with_options")
        log_total = forward(*inputs, True)[2]
        backward(*gradients, log_total, *inputs, alignments, log_total, True, True)
    elif op in ("scores", "relu scores"):
        name, numbers = ("additive", ()) if op == "scores" else ("activated", activated)
        forward, backward = both_of(f"{name}_scores")
        forward(query, keys, v, bias, *numbers)
        backward(alignments, query, keys, v, bias, *numbers, True, True)
    else:
        own = {"additive": (v, bias, None), "activated": (v, bias, *activated), "dot": (0.5,)}[op]
        forward, backward = both_of(f"{op}_attention")
        inputs = (query, keys, values, *own, memory_lengths, allowed)
        forward(*inputs, True)
        for needed in ((True, True),) if op == "dot" else ((True, True), (True, False), (False, True)):
            backward(*gradients, *inputs, alignments, *needed)
    return found


def source_of(kernel, args: tuple, constants: dict[str, Any]):
    """What Triton would compile for these arguments, as its launcher classifies them; and the options."""
    import torch
    from triton.compiler import ASTSource

    names = {torch.bfloat16: "bf16", torch.uint8: "u8"}
    options = {name: value for name, value in constants.items() if name not in kernel.arg_names}
    bound = dict(zip(kernel.arg_names, args, strict=False)) | constants
    signature, values, attributes = {}, {}, {}
    for index, (parameter, name) in enumerate(zip(kernel.params, kernel.arg_names, strict=True)):
        value = bound[name]
        if parameter.is_constexpr or value is None or (_specialized(parameter, value) and value == 1):
            signature[name], values[index,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            short = names.get(value.dtype) or str(value.dtype).removeprefix("torch.").replace("float", "fp").replace(
                "int", "i"
            )
            signature[name], attributes[index,] = f"*{short}", [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and _specialized(parameter, value) and not parameter.do_not_specialize_on_alignment:
                attributes[index,] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, values, attributes), options


def _specialized(parameter, value: object) -> bool:
    return isinstance(value, int) and not parameter.do_not_specialize


def _resources(cubin: bytes) -> dict[str, Any]:
    """Registers, bytes of stack, and the instructions of each innermost loop, by name."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    instruction = r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)"
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        **instructions_of(code, instruction, r"\.L_x_\d+", "BRA"),
    }


def instructions_of(code: str, instruction: str, label: str, branch: str) -> dict[str, Any]:
    """How often each instruction is in each innermost loop and in all of the code, and the sizes of the loops around.

    instruction, label: patterns of a line, with groups for name and operands, and of a place that branches name.
    """
    names: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in code.splitlines():
        if place := re.match(rf"\s*({label}):", line):
            labels[place[1]] = len(names)
        elif found := re.match(instruction, line):
            target = re.search(label, found[2]) if found[1].startswith(branch) else None
            if target and labels.get(target[0], len(names)) < len(names):  # not a branch to itself
                loops.append((labels[target[0]], len(names)))
            names.append(found[1])
    assert names, "no instructions were found"
    inner = [
        (start, end)
        for start, end in set(loops)
        if not any((a, b) != (start, end) and start <= a and b <= end for a, b in loops)
    ]
    around = [[d - c + 1 for c, d in set(loops) if (c, d) != (a, b) and c <= a and b <= d] for a, b in inner]
    return {
        "loops": [Counter(names[start : end + 1]) for start, end in inner],
        "around": [min(sizes, default=0) for sizes in around],
        "all": Counter(names),
    }


def targets_of(name: str, kernel: str, before: list[str]) -> tuple[int, ...]:
    """Of a kernel of a case, after those that were compiled before it.

    All targets for what the case is about, the first time. Another form of a kernel, for fewer gradients, and what only
    comes along where every kernel is compiled, have one of the targets in turn.
    """
    case = CASES[name]
    targets = case.get("targets", TARGETS)
    if (kernel in case.get("kernels", HOT) and kernel not in before) or os.environ.get("ATTN_WHOLE_MATRIX") == "1":
        return targets
    return (targets[(list(CASES).index(name) + len(before)) % len(targets)],)


def compile_case(name: str) -> list[dict[str, Any]]:
    import triton
    from triton.backends.compiler import GPUTarget

    case = CASES[name]
    compiled, seen = [], set()
    for kernel, args, constants in launches(**case):
        kernel_name = kernel.fn.__name__
        source, options = source_of(kernel, args, constants)
        if (case.get("kernels") and kernel_name not in case["kernels"]) or source.hash() in seen:
            continue
        seen.add(source.hash())
        for target in targets_of(name, kernel_name, [one["name"] for one in compiled]):
            binary = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
            compiled.append(
                {
                    "name": kernel_name,
                    "target": target,
                    "dtype": case["dtype"],
                    # The assembler of older releases packs two float32 into one operation there, and moves more for it.
                    "old": target == 100 and tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_PACKING,
                    "chunk": sys.modules["attn_kernels.triton.additive_attention_exponentials"].CHUNK.value,
                    "gate": case["op"].startswith("gated") and case.get("gate", True),
                    "constants": {key: value for key, value in constants.items() if key.isupper()},
                    "warps": binary.metadata.num_warps,
                    "shared": binary.metadata.shared,
                    **_resources(binary.asm["cubin"]),
                }
            )
    return compiled


def variants_of(op: str, lengths: list[tuple[int, int]]) -> list[list[list[str]]]:
    """For each kind of input and each of the lengths, (Tq, Tk), what Triton would compile, described."""
    kinds = [  # rows that are aligned in memory, of 16 bits, and not aligned
        dict(A=512, dtype="float32"),
        dict(A=512, dtype="bfloat16", lengths=True),
        dict(A=100, dtype="float32", lengths=True, mask=3),
    ]
    found = []
    for kind in kinds:
        options = {key: value for key, value in kind.items() if key != "A"}
        found.append([])
        for Tq, Tk in lengths:
            plain = op.removesuffix(" with options")
            chosen = () if op == plain else ("score_bias", "dropout", "sigmoid", "clip")
            vectors = 3 if op == "gated" else 1
            launched = launches(plain, (64, Tq, Tk, kind["A"]), options=chosen, vectors=vectors, **options)
            sources = [
                (kernel.fn.__name__, *source_of(kernel, args, constants)) for kernel, args, constants in launched
            ]
            found[-1].append(
                [
                    f"{name} {source.signature} {source.constants} {source.attrs} {options}"
                    for name, source, options in sources
                ]
            )
    return found
