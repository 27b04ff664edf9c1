"""The Triton kernels, compiled for AMD GPUs (MI200, MI300) without one: registers, scratch memory, LDS, instructions.

As in tests/test_triton_aot.py for NVIDIA GPUs, the launchers choose tiles and arguments. The resources of a kernel are
read from the metadata in its assembly listing. These kernels have not run on an AMD GPU.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import test_triton_aot as aot
from ahead import run_ahead
from matrix import slow_if

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or importlib.util.find_spec("triton.backends.amd") is None,
    reason="triton is not installed, or without its backend for AMD GPUs",
)

TARGETS = ("gfx942", "gfx90a")  # MI300, MI200
WAVE = 64
REGISTERS = 512  # vector registers of a SIMD for each of its lanes, those of accumulators included
LDS = 64 * 1024
# For MI200: the hot kernels; one of them in make test. For MI300 make test-all compiles everything.
QUICK = {"small": ("tiled_scores_kernel",), "dot-decode": ("decode_kernel",)}


@slow_if(lambda name, target, **_: (name, target) != ("dot-decode", "gfx942"))
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", QUICK)
def test_hot_kernels(name: str, target: str, tmp_path: Path) -> None:
    check(run_here(tmp_path, name, target, *QUICK[name]))


# gated-long: 5 loads of 4 bytes beside 2 of 16; relu-beams: some of 8.
READS_LESS = ("relu-beams", "gated-long")
NARROW = pytest.mark.xfail(reason="the decoding step reads keys less than 16 bytes at a time", strict=True)
# What MI300 compiles by itself differs little between the cases: these, and in turn a third of the others.
DISTINCT = ("additive", "decode", "dot", "relu", "gated", "options", "packed-decode", *READS_LESS)


@pytest.mark.long(20)
@pytest.mark.slow
@pytest.mark.left_out_if(lambda name: name not in DISTINCT and list(aot.CASES).index(name) % 3)
@pytest.mark.parametrize("name", [pytest.param(n, marks=NARROW if n in READS_LESS else ()) for n in aot.CASES])
def test_machine_code(name: str, tmp_path: Path) -> None:
    check(run_here(tmp_path, name, "gfx942"))


def test_no_instruction_of_nvidia_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inline PTX is behind has_approximate_reciprocal, which is false on an AMD GPU."""
    import torch

    from attn_kernels.triton import launch

    class OnGpu:
        is_cuda, dtype = True, torch.float32  # PyTorch calls an AMD GPU "cuda", too

    assert launch.has_approximate_reciprocal(OnGpu())
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not launch.has_approximate_reciprocal(OnGpu())


def run_here(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    return run_ahead("test_triton_hip", "compile_case", *arguments, TRITON_CACHE_DIR=str(folder))


def check(compiled: list[dict[str, Any]]) -> None:
    assert compiled
    problems = [f"{k['name']} {k['target']} {k['constants']}: {p}" for k in compiled for p in problems_of(k)]
    assert not problems, "\n".join(problems)


def problems_of(kernel: dict[str, Any]) -> list[str]:
    """What is wrong with the machine code of a kernel."""
    facts, problems = kernel["facts"], []
    # A few scalars kept across a whole loop cost nothing; vector registers are 64 times as much.
    if (
        facts["vgpr_spill_count"]
        or facts["private_segment_fixed_size"] > 32
        or any(count(loop, "scratch_") for loop in kernel["loops"])
    ):
        problems.append(f"scratch memory: {facts}")
    if facts["group_segment_fixed_size"] > LDS // 2 or kernel["shared"] > LDS // 2:
        problems.append(f"{kernel['shared']} bytes of LDS leave fewer than two programs to a processor")
    if facts["wavefront_size"] != WAVE or facts["max_flat_workgroup_size"] != WAVE * kernel["warps"]:
        problems.append(f"compiled for other wavefronts: {facts}")
    if facts["vgpr_count"] > REGISTERS:
        problems.append(f"{facts['vgpr_count']} registers")
    size = kernel["constants"]
    if kernel["name"] == "tiled_scores_kernel":
        if facts["vgpr_count"] > REGISTERS // 2:
            problems.append(f"{facts['vgpr_count']} registers leave fewer than two waves to a SIMD")
        pairs = size["BLOCK_Q"] * size["BLOCK_K"] / (WAVE * kernel["warps"]) * kernel["chunk"]
        shared = [loop for loop in kernel["loops"] if count(loop, "v_rcp_f32") and not count(loop, "v_exp_f32")]
        if size["ACTIVATION"] != "tanh":
            if len(kernel["loops"]) != 1 or count(kernel["loops"][0], "v_rcp", "v_exp", "v_div"):
                problems.append("more than one loop, or one with exponentials or divisions")
        elif len(shared) != 3:  # by three units, and compensated with and without clamping, by two
            problems.append(f"{len(shared)} loops with reciprocals and without exponentials, expected three")
        elif (reciprocals := max(count(loop, "v_rcp_f32") for loop in shared) / pairs) > 0.34:
            problems.append(f"{reciprocals:.3f} reciprocals for a unit of a pair, expected 1/3")
    if kernel["name"] == "decode_kernel" and kernel["wide"]:
        loads = Counter({name: n for name, n in kernel["all"].items() if re.match(r"(global|buffer|flat)_load_", name)})
        if count(loads, "global_load_dwordx4", "buffer_load_dwordx4") < sum(loads.values()) / 2:
            problems.append(f"keys and values are not read 16 bytes at a time: {dict(loads)}")
    if kernel["name"] in aot.PRODUCTS and not size["SMALL_M"] and kernel["dtype"] in ("bfloat16", "float16"):
        if not count(kernel["all"], "v_mfma"):
            problems.append("no matrix instruction")
    return problems


def count(loop: dict[str, int], *names: str) -> int:
    return sum(number for name, number in loop.items() if name.startswith(names))


# In the process that compiles -----------------------------------------------------------------------------------------


def compile_case(name: str, target: str, *kernels: str) -> list[dict[str, Any]]:
    import triton
    from triton.backends.compiler import GPUTarget

    case = aot.CASES[name]
    compiled, seen = [], set()
    for kernel, args, constants in aot.launches(**case, nvidia=False):
        kernel_name = kernel.fn.__name__
        wanted = kernels or case.get("kernels", ())
        source, options = aot.source_of(kernel, args, constants)
        if (wanted and kernel_name not in wanted) or source.hash() in seen:
            continue
        seen.add(source.hash())
        binary = triton.compile(source, target=GPUTarget("hip", target, WAVE), options=options)
        listing = binary.asm["amdgcn"]
        compiled.append(
            {
                "name": kernel_name,
                "target": target,
                "dtype": case["dtype"],
                # A bias of the scores and a mask are read, too, with options: one number for a pair.
                "wide": case["sizes"][3] % 16 == 0 and not case.get("options"),
                "chunk": sys.modules["attn_kernels.triton.additive_attention_exponentials"].CHUNK.value,
                "constants": {key: value for key, value in constants.items() if key.isupper()},
                "warps": binary.metadata.num_warps,
                "shared": binary.metadata.shared,
                "facts": {key: int(value) for key, value in re.findall(r"^\s+(?:- )?\.(\w+):\s+(\d+)$", listing, re.M)},
                **aot.instructions_of(listing, r"\s+([a-z]+_[a-z0-9_]+)(.*)", r"\.LBB\d+_\d+", "s_cbranch"),
            }
        )
    return compiled
