"""Random sizes, dtypes, masks and strides against the reference in float64.

``ATTN_KERNELS_FUZZ_CASES`` is the number of cases for one backend (and for each SIMD level of the C++ kernels), all ops
together; ``make fuzz`` runs 10,000 new ones. By default it is 60 in ``make test`` and 300 in ``make test-all``, the
same ones each time. The interpreter and the reference get a fifteenth.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from matrix import DTYPES, MAIN, OPS, Case, Op, check, interpreted, is_slow, of_variants

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
        note(f"{op.name} {case} {dtype} seed {seed}")
        check(op, case, dtype, backend, seed=seed)

    fuzz()
