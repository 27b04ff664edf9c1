"""Random sizes, dtypes, masks and strides against the reference in float64.

``ATTN_KERNELS_FUZZ_CASES`` is the number of cases for one backend (and for each SIMD level of the C++ kernels), for all
ops together. ``make fuzz`` runs 10,000 new cases. The default is 60 in ``make test`` and 300 in ``make test-all``, the
same cases each time. The interpreter and the reference run a fifteenth of them.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from matrix import (
    DTYPES,
    MAIN,
    OPS,
    VARIANTS,
    Case,
    Op,
    baseline,
    check,
    device_of,
    interpreted,
    is_slow,
    make,
    of_variants,
    oracle,
    run,
    slow_if,
)

pytestmark = [pytest.mark.every_level, pytest.mark.every_form]

WANTED = os.environ.get("ATTN_KERNELS_FUZZ_CASES")
USUAL = 60  # and in the emulator of CUDA small
COUNTS = [int(WANTED)] if WANTED else [USUAL, pytest.param(300, marks=pytest.mark.slow)]
LIMITS = {"B": 65, "Tq": 33, "Tk": 513, "A": 300, "D": 300}
LIMITS_INTERPRETED = LIMITS | {"B": 4, "Tq": 17, "Tk": 129}
PRODUCT = 1_000_000  # of B, Tq, Tk and max(A, D): what a case costs, of which the oracle takes most
PRODUCT_INTERPRETED = 8_000

LAYOUTS = ("contiguous", "transposed", "columns", "sliced", "misaligned", "expanded", "repeated", "scalar")


def sizes(axis: str, limit: int) -> st.SearchStrategy[int]:
    """Small ones, any, and those at the edges of vectors and blocks; 0 also where an op must bear it."""
    smallest = 1 if axis in "AD" else 0
    edges = [n for power in range(3, 10) for n in (2**power - 1, 2**power, 2**power + 1) if n <= limit] or [limit]
    return st.one_of(st.integers(1, min(9, limit)), st.integers(smallest, limit), st.sampled_from([*edges, limit]))


@st.composite
def cases(draw: st.DrawFn, op: Op, limits: dict[str, int], product: int) -> Case:
    size = {axis: draw(sizes(axis, limit)) for axis, limit in limits.items()}
    while math.prod((size["B"], size["Tq"], size["Tk"], max(size["A"], size["D"]))) > product:
        largest = max(draw(st.permutations(list(size))), key=lambda axis: size[axis] / limits[axis])
        size[largest] = (size[largest] + 1) // 2
    case = Case(
        **size,
        layout=draw(st.sampled_from(LAYOUTS)),
        grad_layout=draw(st.sampled_from(LAYOUTS)),
        without=op.optional if draw(st.booleans()) else (),
    )
    if size["Tq"] == 1:
        case = case._replace(query_2d=draw(st.booleans()))
    if len(op.outputs) > 1:
        case = case._replace(receives=draw(st.sampled_from([op.outputs, *((name,) for name in op.outputs)])))
    if op.masked:
        case = case._replace(
            lengths=draw(st.sampled_from(["", "random", "random32", "zero", "full"])),
            mask=draw(st.sampled_from(["", "steps", "pairs", "none", "all"])),
            mask_layout=draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded"])),
        )
    return case


@pytest.mark.parametrize("count", COUNTS)
@of_variants()
def test_fuzz(op: Op, backend: str, count: int) -> None:
    few = is_slow(backend) or backend == "reference"
    small = is_slow(backend) or (interpreted(backend) and count == USUAL)
    bounds = (LIMITS_INTERPRETED, PRODUCT_INTERPRETED) if small else (LIMITS, PRODUCT)
    long_run = WANTED is not None

    @settings(
        max_examples=math.ceil(count / len(OPS) / (15 if few else 1 if op in MAIN.values() else 3)),
        derandomize=not long_run,
        database=None,
        deadline=None,
        print_blob=True,
        phases=[Phase.generate, Phase.shrink] if long_run else [Phase.generate],  # shrinking may take minutes
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(op, *bounds), st.sampled_from(DTYPES), st.integers(0, 2**31))
    def fuzz(case: Case, dtype: torch.dtype, seed: int) -> None:
        if case.A == 1 and dtype.itemsize == 2:  # test_gradients_of_one_unit
            case = case._replace(A=2)
        note(f"{op.name} {case} {dtype} seed {seed}")
        check(op, case, dtype, backend, seed=seed)

    fuzz()


@slow_if(lambda fused, dtype, **_: interpreted(fused) and dtype == torch.float16)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@of_variants([name for name, op in VARIANTS.items() if {"v", "query"} <= set(op.inputs) and op.vectors in (None, 1)])
def test_gradients_of_one_unit(op: Op, fused: str, dtype: torch.dtype) -> None:
    """dv and dbias of a single unit in 16 bits: one number each, a sum over all pairs of what is rounded.

    In one draw eager may err 50 times less than in the next, by luck, so its error there is no measure. Over several
    draws it is: the factors are those of ``tolerance``, of the root of the mean square.
    """
    case, draws = Case(B=8, Tq=3, Tk=33, A=1, D=1, lengths="random"), 4 if is_slow(fused) else 16
    square: dict[str, list[float]] = {name: [0.0, 0.0, 0.0] for name in ("dv", "dbias")}
    for seed in range(draws):
        arguments = make(op, case, dtype, device_of(fused), seed)
        exact, eager = oracle(op, arguments), baseline(op, arguments)
        ours = run(op.function, op, arguments, backend=fused)
        for name in square:
            right = exact[name].item()
            for i, value in enumerate((ours[name].item() - right, eager[name].item() - right, right)):
                square[name][i] += value**2 / draws
    for name, (of_ours, of_eager, size) in square.items():
        allowed = 3 * of_eager**0.5 + torch.finfo(dtype).eps * size**0.5 + 1e-6 * max(size**0.5, 1.0)
        assert of_ours**0.5 <= allowed, name
