"""Derivatives as numbers, derivatives of derivatives, and PyTorch's function transforms: right, or a clear error."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from matrix import CASES, OPS, Case, Op, assert_close, call, is_slow, make, slow_interpreted

ops = pytest.mark.parametrize("op", OPS.values(), ids=OPS)

SIZES = Case(B=2, Tq=2, Tk=4, A=3, D=2)
VARIANTS = {
    "plain": SIZES,
    "no bias": SIZES._replace(without=("bias",)),
    "lengths": SIZES._replace(B=3, lengths="random"),
    "mask": SIZES._replace(mask="steps"),
    "mask per query": SIZES._replace(mask="pairs"),
    "both": SIZES._replace(lengths="random32", mask="pairs"),
    "2-D": SIZES._replace(Tq=1, query_2d=True),
}


def function_of_leaves(op: Op, case: Case, backend: str, device: str) -> tuple[Callable[..., Any], list[Tensor]]:
    arguments = make(op, case, torch.float64, device)
    names = list(arguments.tensors)
    leaves = [t.requires_grad_() for t in arguments.tensors.values()]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(names, tensors, strict=True))
        return tuple(call(op.function, op, named, **arguments.masks, backend=backend).values())

    return function, leaves


@slow_interpreted(VARIANTS["both"])
@pytest.mark.parametrize("case", VARIANTS.values(), ids=VARIANTS)
@ops
def test_gradcheck(op: Op, backend: str, device: str, case: Case) -> None:
    if is_slow(backend) and case not in (VARIANTS["plain"], VARIANTS["both"], VARIANTS["2-D"]):
        pytest.skip("the other variants are enough for Triton's interpreter")
    function, leaves = function_of_leaves(op, case, backend, device)
    fast = backend == "triton"  # one direction for each output instead of every element
    assert gradcheck(function, leaves, fast_mode=fast, nondet_tol=1e-12 if device == "cuda" else 0.0)


@pytest.mark.parametrize("case", VARIANTS.values(), ids=VARIANTS)
@ops
def test_double_backward_of_reference(op: Op, case: Case) -> None:
    assert gradgradcheck(*function_of_leaves(op, case, "reference", "cpu"), fast_mode=True)


@ops
def test_double_backward_is_refused(op: Op, fused: str, device: str) -> None:
    function, leaves = function_of_leaves(op, SIZES, fused, device)
    gradients = torch.autograd.grad(sum(t.sum() for t in function(*leaves)), leaves, create_graph=True)
    for name, gradient in zip(op.inputs, gradients, strict=True):
        with pytest.raises(RuntimeError, match="twice"):
            gradient.sum().backward()
        assert gradient.requires_grad, f"d{name} pretends to be a constant"


@ops
def test_forward_mode_is_refused(op: Op, fused: str, device: str) -> None:
    """A tangent must not vanish: the derivative is right, or there is an error."""
    function, leaves = function_of_leaves(op, SIZES, fused, device)
    tangents = [torch.ones_like(leaf) for leaf in leaves]
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(function, tuple(leaf.detach() for leaf in leaves), tuple(tangents))


@pytest.mark.parametrize("transform", ["vmap", "grad", "vmap of grad"])
@ops
def test_function_transforms(op: Op, backend: str, device: str, transform: str) -> None:
    """torch.func: the result of a loop, or an error that says so; never something else."""
    cases = [make(op, CASES["lengths"], torch.float64, device, seed) for seed in range(3)]
    stacked = {name: torch.stack([c.tensors[name] for c in cases]) for name in cases[0].tensors}
    masks = cases[0].masks

    def one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return call(op.function, op, tensors, **masks, backend=backend)

    def gradient(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return torch.func.grad(lambda t: sum(x.square().sum() for x in one(t).values()))(tensors)

    function = {"vmap": torch.vmap(one), "grad": gradient, "vmap of grad": torch.vmap(gradient)}[transform]
    arguments = cases[0].tensors if transform == "grad" else stacked
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that vmap falls back to a loop
            results = function(arguments)
    except (RuntimeError, NotImplementedError) as error:
        assert any(word in str(error) for word in ("vmap", "functorch", "setup_context")), error
        assert backend != "reference"
        pytest.xfail(f"refused: {str(error).splitlines()[0][:80]}")

    def loop(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if transform == "vmap":
            return call(op.reference, op, tensors, **masks)
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        loss = sum(x.square().sum() for x in call(op.reference, op, leaves, **masks).values())
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    expected = loop(arguments) if transform == "grad" else {}
    if not expected:
        parts = [loop(c.tensors) for c in cases]
        expected = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    expected = {name: t.detach() for name, t in expected.items()}
    assert_close(results, expected, dict.fromkeys(expected, 0.0), torch.float64)
