"""NaN and Inf that are attended, and magnitudes where shortcuts in the arithmetic would overflow or lose their digits.

The kernels compute tanh(q + k) from products of e^2q and e^2k, which hold only within guards: the sizes of |q| + |k|
around 14.5, 22, 43 and 88, and of v around the smallest and the largest, are where a guard that is off shows.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from matrix import OPS, Arguments, Case, Op, check, interpreted, make, run

ops = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
additive_ops = pytest.mark.parametrize("op", [op for op in OPS.values() if "v" in op.inputs], ids=lambda op: op.name)


def check_arguments(op: Op, case: Case, backend: str, arguments: Arguments) -> None:
    """Against the oracle, with the tolerance widened by the size of the scores where it is above 1."""
    dtype = arguments.tensors["query"].dtype
    check(op, case, dtype, backend, arguments=arguments, condition=max(1.0, largest_score(op, arguments)))


def largest_score(op: Op, arguments: Arguments) -> float:
    """What the terms of a score amount to: the error of a sum is relative to them."""
    t = {name: x.double().cpu().nan_to_num(0, 0, 0).abs() for name, x in arguments.tensors.items()}
    if "v" in t:
        return t["v"].sum().item()
    return op.options.get("scale", 1.0) * t["query"].amax().item() * t["keys"].amax().item() * t["query"].shape[-1]


# NaN and Inf ----------------------------------------------------------------------------------------------------------

PLACES = {"query": (0, 1, 2), "keys": (0, 3, 2), "values": (0, 3, 2), "v": (2,), "bias": (2,)}


@pytest.mark.parametrize("masks", [{}, {"lengths": "full"}, {"mask": "pairs"}], ids=["all", "lengths", "pairs"])
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@ops
def test_nan_and_inf_spread_as_the_formula_says(op: Op, backend: str, device: str, special: float, masks: dict) -> None:
    if interpreted(backend) and "lengths" in masks:
        pytest.skip("the other masks are enough for Triton's interpreter")
    case = Case(B=2, Tq=3, Tk=6, A=9, D=5, **masks)
    for name in op.inputs:
        if name in ("v", "bias") and "mask" in masks:
            continue  # they take part in every pair, padding too: whether 0 * NaN is 0 there is left open
        for dtype in (torch.float32, torch.bfloat16)[: 1 if interpreted(backend) else 2]:
            arguments = make(op, case, dtype, device)
            arguments.tensors[name][PLACES[name]] = special
            try:
                check_arguments(op, case, backend, arguments)
            except AssertionError as error:
                raise AssertionError(f"{special} in {name}, {dtype}\n{error}") from None


@pytest.mark.parametrize("pair", [(math.inf, -math.inf), (-math.inf, math.inf), (math.inf, math.inf)])
@ops
def test_inf_meets_inf(op: Op, backend: str, device: str, pair: tuple[float, float]) -> None:
    """inf - inf is NaN, and tanh(inf) is 1, whatever e^inf would make of it."""
    case = Case(B=2, Tq=3, Tk=6, A=9, D=5)
    arguments = make(op, case, torch.float32, device)
    arguments.tensors["query"][PLACES["query"]], arguments.tensors["keys"][PLACES["keys"]] = pair
    check_arguments(op, case, backend, arguments)


@ops
def test_nan_stays_in_its_row(op: Op, backend: str, device: str) -> None:
    """One sentence of a batch that is NaN leaves the others as they were."""
    case = Case(B=3, Tq=3, Tk=6, A=9, D=5)
    arguments = make(op, case, torch.float32, device)
    arguments.tensors["keys"][1] = math.nan
    check_arguments(op, case, backend, arguments)
    results = run(op.function, op, arguments, backend=backend)
    for name in (*op.outputs, "dquery", "dkeys"):
        assert results[name][[0, 2]].isfinite().all(), name
        assert results[name][1].isnan().all(), name


# Magnitudes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10.0, 100.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@ops
def test_large_inputs(op: Op, backend: str, device: str, dtype: torch.dtype, size: float) -> None:
    case = Case(B=2, Tq=5, Tk=19, A=35, D=8, lengths="random")
    arguments = make(op, case, dtype, device)
    for name in ("query", "keys"):
        arguments.tensors[name].mul_(size)
    check_arguments(op, case, backend, arguments)


def _vectors(size: int) -> dict[str, Tensor]:
    signs = torch.tensor([1.0, -1.0]).repeat(size)[:size]
    steps = torch.arange(size)
    return {
        "zero": torch.zeros(size),
        "some zeros": signs * (steps % 3 > 0),
        "negative zeros": -torch.zeros(size),
        "denormal": signs * 1e-40,
        "tiny": signs * 1e-30,
        "large": signs * 1e4,
        "all sizes": signs * 10.0 ** (steps % 9 - 4.0),
        "all sizes and zeros": signs * 10.0 ** (steps % 13 - 8.0) * (steps % 4 > 0),
        "one large": torch.where(steps == 4, 1e4, 1e-3),
        "denormal and large": torch.where(steps % 2 == 0, 1e-40, 1e4),
    }


@pytest.mark.parametrize("size", [1.0, 8.0, 20.0])
@pytest.mark.parametrize("vector", _vectors(1))
@additive_ops
def test_score_vector(op: Op, backend: str, device: str, vector: str, size: float) -> None:
    for units in (1, 5, 19, 48):
        case = Case(B=2, Tq=3, Tk=9, A=units, D=6)
        arguments = make(op, case, torch.float32, device)
        arguments.tensors["v"].copy_(_vectors(units)[vector])
        arguments.tensors["query"].mul_(size)
        try:
            check_arguments(op, case, backend, arguments)
        except AssertionError as error:
            raise AssertionError(f"{units} units\n{error}") from None


def edges(step: float) -> list[float]:
    return [a + step * i for a, b in ((5, 46), (78, 92)) for i in range(int((b - a) / step) + 1)]


@pytest.mark.parametrize("vector", ["one", "all sizes"])
@pytest.mark.parametrize("cancel", [False, True], ids=["same sign", "opposite signs"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@additive_ops
def test_edges_of_guards(op: Op, backend: str, device: str, share: float, cancel: bool, vector: str) -> None:
    """|q| + |k| in small steps, all in q, all in k or half and half; with opposite signs q + k is of the order of 1."""
    for total in edges(step=8 if interpreted(backend) else 0.25):
        case = Case(B=1, Tq=3, Tk=9, A=21, D=6, without=("bias",))
        arguments = make(op, case, torch.float32, device)
        query, keys = arguments.tensors["query"], arguments.tensors["keys"]
        signs = torch.where(query[:, :1] > 0, 1.0, -1.0)  # of each unit
        for t, part, sign in ((query, share, 1), (keys, 1 - share, -1 if cancel else 1)):
            room = torch.rand(t.shape, generator=torch.Generator().manual_seed(1)).to(device)
            t.copy_(sign * signs * (part * total - 0.5 * room * min(part, 1)))
        if vector != "one":
            arguments.tensors["v"].copy_(_vectors(21)[vector])
        try:
            check_arguments(op, case, backend, arguments)
        except AssertionError as error:
            raise AssertionError(f"|q| + |k| = {total}\n{error}") from None


@pytest.mark.parametrize("size", [10.0, 40.0, 86.0, 90.0, 1e4])
@additive_ops
def test_bias_counts_in_guards(op: Op, backend: str, device: str, size: float) -> None:
    """A large bias, alone and against a query that takes it back."""
    for query in (0.0, -1.0):
        case = Case(B=2, Tq=3, Tk=9, A=21, D=6)
        arguments = make(op, case, torch.float32, device)
        arguments.tensors["bias"].fill_(size)
        arguments.tensors["query"].add_(query * size)
        check_arguments(op, case, backend, arguments)


@pytest.mark.parametrize("score", [80.0, 200.0, 1e4, 1e30])
@ops
def test_softmax_does_not_overflow(op: Op, backend: str, device: str, score: float) -> None:
    """Scores beyond the range of exp, of both signs, in one row."""
    case = Case(B=2, Tq=3, Tk=40, A=8, D=6, lengths="random")
    arguments = make(op, case, torch.float32, device)
    name = "v" if "v" in op.inputs else "query"
    arguments.tensors[name].mul_(score)
    check_arguments(op, case, backend, arguments)
