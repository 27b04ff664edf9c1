"""The oracle: the reference in float64 against loops over single pairs of vectors, which never read padding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from matrix import CASES, CORE, DTYPES, OPS, Case, Op, assert_close, eager_errors, make, oracle, run, slow_if

SMALL = {name: case for name, case in CASES.items() if case.pairs <= 4000}


def loops(op: Op, tensors: dict[str, Tensor], masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """The formulas read off the paper, one pair at a time, over the steps that may be attended and no others."""
    query, keys = tensors["query"], tensors["keys"]
    if query.dim() == 2:
        masks = {name: m[:, 0] if m.dim() == 3 else m for name, m in masks.items()}
        outputs = loops(op, tensors | {"query": query[:, None]}, masks)
        return {name: t[:, 0] for name, t in outputs.items()}
    (B, Tq, _), Tk = query.shape, keys.shape[1]
    units = {name: tensors[name] for name in ("v", "bias") if name in tensors}
    zero = 0 * query.sum()  # with a gradient, where there is nothing else
    scores = query.new_zeros(B, Tq, Tk) + zero
    alignments = query.new_zeros(B, Tq, Tk) + zero
    context = query.new_zeros(B, Tq, tensors["values"].shape[2]) + zero if op.masked else None
    for b in range(B):
        for i in range(Tq):
            steps = [j for j in range(Tk) if _allowed(masks, b, i, j)]
            for j in steps:
                scores[b, i, j] = op.score(query[b, i], keys[b, j], **units, **op.options)
            if op.masked and steps:
                weights = scores[b, i, steps].exp()  # no maximum taken out: scores here are small
                weights = weights / weights.sum()
                alignments[b, i, steps] = weights
                context[b, i] = (weights[:, None] * tensors["values"][b, steps]).sum(0)
    return {"context": context, "alignments": alignments} if op.masked else {"scores": scores}


def _allowed(masks: dict[str, Tensor], b: int, i: int, j: int) -> bool:
    lengths, mask = masks.get("memory_lengths"), masks.get("mask")
    if lengths is not None and j >= lengths[b]:
        return False
    return mask is None or bool(mask[b, j] if mask.dim() == 2 else mask[b, i, j])


def loops_as_op(op: Op):
    """loops() with the signature of the op."""

    def function(*tensors, memory_lengths=None, mask=None, **_):
        named = {name: t for name, t in zip(op.inputs, tensors, strict=True) if t is not None}
        masks = {n: m for n, m in (("memory_lengths", memory_lengths), ("mask", mask)) if m is not None}
        return tuple(loops(op, named, masks)[name] for name in op.outputs)

    return function


@slow_if(lambda case, **_: case not in CORE and case.pairs > 1000)
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_reference_is_the_formula(op: Op, case: Case) -> None:
    arguments = make(op, case, torch.float64)
    expected = run(loops_as_op(op), op, arguments)
    assert_close(run(op.reference, op, arguments), expected, dict.fromkeys(expected, 0.0), torch.float64)


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.masked], ids=lambda op: op.name)
def test_alignments_sum_to_one(op: Op) -> None:
    arguments = make(op, CASES["lengths and mask per query"], torch.float64)
    alignments = run(op.reference, op, arguments)["alignments"]
    sums = alignments.sum(-1)
    assert ((sums == 0) | ((sums - 1).abs() < 1e-12)).all() and (sums == 0).any() and (sums != 0).any()


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_special_values_are_where_eager_has_them(op: Op, special: float) -> None:
    for name in op.inputs:
        arguments = make(op, Case(B=2, Tq=3, Tk=6, A=9, D=5), torch.float32)
        arguments.tensors[name].flatten()[3] = special
        results, eager = run(op.reference, op, arguments), run(op.eager, op, arguments)
        for key, expected in eager.items():
            finite = expected.isfinite()
            assert torch.equal(results[key].isfinite(), finite), f"{special} in {name}: {key}"
            assert torch.equal(results[key][~finite].nan_to_num(7, 8, 9), expected[~finite].nan_to_num(7, 8, 9))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_the_tests_would_notice(op: Op, dtype: torch.dtype) -> None:
    """The comparison fails on a few roundings in one element, on a gradient that is missing, on a NaN too many."""
    arguments = make(op, CASES["lengths"], dtype)
    exact = oracle(op, arguments)
    errors = eager_errors(op, arguments, exact)
    good = {name: t.to(dtype) for name, t in exact.items()}
    assert_close(good, exact, errors, dtype)
    # bfloat16 and float16 are allowed the error of eager, which amounts to a few dozen roundings
    size = 40 * torch.finfo(dtype).eps if dtype in (torch.float32, torch.bfloat16, torch.float16) else 1e-8
    for name, t in good.items():
        place = t.abs().argmax()
        for wrong in (float(t.flatten()[place]) + size * max(1.0, float(t.abs().max())), math.nan, math.inf):
            bad = t.clone()
            bad.view(-1)[place] = wrong
            with pytest.raises(AssertionError, match=f"^{name}: "):
                assert_close(good | {name: bad}, exact, errors, dtype)
        with pytest.raises(AssertionError, match=f"^{name}: error"):
            assert_close(good | {name: torch.zeros_like(t)}, exact, errors, dtype)
