"""Padding and uninitialized memory must not change any bit of the results, whatever they contain.

Poison values are in steps that no query attends, in fully masked queries, in the gradient of padding alignments,
between and beyond the elements of strided views, and in memory from ``torch.empty`` and ``malloc``.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attn_kernels.types import attention_mask
from conftest import BEST_LEVEL, LOWER_LEVELS, available
from matrix import (
    DTYPES,
    OPS,
    VARIANTS,
    Arguments,
    Case,
    Op,
    assert_bit_equal,
    is_slow,
    lay_out,
    make,
    of_variants,
    run,
    slow_interpreted,
)

POISONS = (math.nan, math.inf, -math.inf, 3e38)
COUNTS = [100, pytest.param(1000, marks=pytest.mark.slow)]  # of all ops together, for one backend

pytestmark = pytest.mark.every_level
ops = of_variants()
MASKED = {name: op for name, op in OPS.items() if op.masked} | {"extra": VARIANTS["extra"]}
masked_ops = pytest.mark.parametrize("op", MASKED.values(), ids=MASKED)


def random_cases(op: Op, count: int, limits: dict[str, int]) -> Iterator[tuple[Case, torch.dtype]]:
    rng = random.Random(op.name)
    for _ in range(count):
        masks = {"lengths": rng.choice(["", "random", "random32"]), "mask": rng.choice(["", "steps", "pairs"])}
        sizes = {axis: rng.randint(1, limit) for axis, limit in limits.items()}
        layouts = rng.choice(["contiguous", "misaligned", "sliced", "transposed", "columns"])
        yield Case(**sizes, **(masks if op.masked else {}), layout=layouts), rng.choice(DTYPES)


def padded_with(op: Op, case: Case, dtype: torch.dtype, device: str, fill: float) -> Arguments:
    """The arguments of a case with ``fill`` in and around everything that is padding."""
    fill = fill if not math.isfinite(fill) else min(fill, torch.finfo(dtype).max)
    arguments = make(op, case._replace(layout="contiguous"), dtype, device)
    unused: dict[str, Tensor] = {}
    if arguments.masks:
        keys = arguments.tensors["keys"]
        allowed = attention_mask(keys, arguments.masks.get("memory_lengths"), arguments.masks.get("mask"))
        allowed = allowed.expand(-1, case.Tq, -1)
        alone = ~allowed if op.vectors is None else ~allowed[:, :, None]
        unused = {"query": ~allowed.any(2), "alignments": alone, "score_bias": ~allowed}
        unused |= dict.fromkeys(("keys", "values", "extra", "gate"), ~allowed.any(1))

    def pad(name: str, t: Tensor) -> Tensor:
        if name in unused:
            pairs = name in ("alignments", "score_bias")
            t = t.masked_fill(unused[name] if pairs else unused[name][..., None], fill)
        return lay_out(t, case.layout, fill)

    tensors, grads = ({name: pad(name, t) for name, t in part.items()} for part in (arguments.tensors, arguments.grads))
    return Arguments(tensors, arguments.masks, grads)


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """``torch.empty`` gives memory full of NaN; kernels ask for theirs in the same way."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("count", COUNTS)
@ops
def test_poison_changes_nothing(op: Op, backend: str, device: str, count: int) -> None:
    count = 1 + count // 125 if is_slow(backend) else count // len(OPS) + 1
    rows = {"B": 2, "Tq": 2} if is_slow(backend) else {"B": 5, "Tq": 6}
    cases = random_cases(op, count, rows | {"Tk": 40, "A": 40, "D": 40})
    for (case, dtype), poison in zip(cases, itertools.cycle(POISONS)):
        clean = run(op.function, op, padded_with(op, case, dtype, device, fill=0.5), backend=backend)
        with poisoned_empty():
            poisoned = run(op.function, op, padded_with(op, case, dtype, device, poison), backend=backend)
        try:
            assert_bit_equal(poisoned, clean)
            assert all(t.isfinite().all() for t in poisoned.values()), "not finite"
        except AssertionError as error:
            raise AssertionError(f"{error}\n{case}, {dtype}, poison {poison}") from None


# Whole vectors and tiles: a decode step, many queries, many units, more steps than are read at a time.
LARGE = (
    Case(B=3, Tq=1, Tk=130, A=256, D=64, lengths="random", mask="steps"),
    Case(B=3, Tq=1, Tk=33, A=600, D=35, lengths="random"),
    Case(B=3, Tq=9, Tk=33, A=100, D=40, lengths="random"),
    Case(B=2, Tq=17, Tk=70, A=48, D=80, mask="steps"),
    Case(B=2, Tq=13, Tk=21, A=130, D=33, mask="pairs"),
)


@slow_interpreted()
@pytest.mark.parametrize("case", LARGE, ids=lambda case: f"Tq {case.Tq}, A {case.A}")
@masked_ops
def test_poison_changes_nothing_in_large_tiles(op: Op, backend: str, device: str, case: Case) -> None:
    if is_slow(backend):
        pytest.skip("the small cases are enough for Triton's interpreter")
    for dtype in DTYPES:
        clean = run(op.function, op, padded_with(op, case, dtype, device, fill=0.5), backend=backend)
        for poison in POISONS:
            with poisoned_empty():
                poisoned = run(op.function, op, padded_with(op, case, dtype, device, poison), backend=backend)
            assert_bit_equal(poisoned, clean)


@slow_interpreted("pairs")
@pytest.mark.parametrize("mask", ["", "steps", "pairs"])
@pytest.mark.parametrize("lengths", ["random", "zero"])
@masked_ops
def test_nothing_attended_gives_zeros(op: Op, backend: str, device: str, lengths: str, mask: str) -> None:
    """Exactly 0: alignments that are padding, rows with nothing to attend, gradients of what no query attends."""
    case = Case(B=8, Tq=3, Tk=7, lengths=lengths, mask=mask)
    arguments = padded_with(op, case, torch.float32, device, fill=math.nan)
    results = run(op.function, op, arguments, backend=backend)
    masks = arguments.masks
    allowed = attention_mask(arguments.tensors["keys"], masks.get("memory_lengths"), masks.get("mask")).expand(
        -1, case.Tq, -1
    )
    assert (~allowed.any(2)).any(), "the case has no empty row"
    for name in ("context", "dquery"):
        assert (results[name][~allowed.any(2)] == 0).all(), name
    for name in ("dkeys", "dvalues", "dextra"):
        assert name not in results or (results[name][~allowed.any(1)] == 0).all(), name
    assert (results["alignments"][~allowed] == 0).all()
    if lengths == "zero":
        assert all((t == 0).all() for t in results.values())


SCRATCH = """
import hashlib, sys
import torch
from attn_kernels import _C
from matrix import CASES, OPS, make, run
for level in sys.argv[1:]:
    _C.use_simd(level)
    digest = hashlib.sha256()
    for op in OPS.values():
        for name in ("decode, long", "33 queries", "lengths and mask per query", "sliced", "many units", "D = 0"):
            for dtype in (torch.float32, torch.bfloat16):
                for t in run(op.function, op, make(op, CASES[name], dtype), backend="cpu").values():
                    digest.update((t + 0.0).double().numpy().tobytes())
    print(level, digest.hexdigest())
"""


@pytest.mark.long(25)
@pytest.mark.slow
def test_fresh_memory_changes_nothing() -> None:
    """Scratch memory of the C++ kernels: malloc's own, then full of 0x7f (3.4e38), then NaN each time it is taken."""
    available("cpu")
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), *sys.path])
    digests = set()
    for fill in ({}, {"MALLOC_PERTURB_": "128"}, {"ATTN_KERNELS_POISON": "1"}):
        environment = os.environ | fill | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", SCRATCH, BEST_LEVEL, *LOWER_LEVELS],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    (digests_of_levels,) = digests
    assert len(digests_of_levels.splitlines()) == 1 + len(LOWER_LEVELS)
