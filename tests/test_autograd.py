"""Numerical gradient checks, second derivatives, and PyTorch's function transforms: correct, or a clear error."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attn_kernels
from attn_kernels.types import attention_mask
from matrix import CASES, OPS, Case, Op, assert_close, call, interpreted, is_slow, make, slow_if, slow_interpreted

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


@slow_if(lambda backend, case, **_: is_slow(backend) or (interpreted(backend) and case is not VARIANTS["both"]))
@pytest.mark.parametrize("case", VARIANTS.values(), ids=VARIANTS)
@ops
def test_second_derivatives(op: Op, backend: str, device: str, case: Case) -> None:
    """Reverse over reverse, also of several gradients at once, and forward over reverse."""
    if is_slow(backend) and case is not VARIANTS["both"]:
        pytest.skip("one variant is enough for Triton's interpreter: the formulas are the reference's")
    function, leaves = function_of_leaves(op, case, backend, device)
    checks = {} if is_slow(backend) else dict(check_batched_grad=True, check_fwd_over_rev=True)
    assert gradgradcheck(function, leaves, fast_mode=True, **checks)


@pytest.mark.parametrize("name", ["plain", "no bias", "both", "2-D"])
@ops
def test_forward_mode(op: Op, backend: str, device: str, name: str) -> None:
    if is_slow(backend) and name != "both":
        pytest.skip("one variant is enough for Triton's interpreter: the formulas are the reference's")
    function, leaves = function_of_leaves(op, VARIANTS[name], backend, device)
    checks = dict(check_forward_ad=True, check_backward_ad=False, check_undefined_grad=False)
    assert gradcheck(function, leaves, fast_mode=True, check_batched_forward_grad=True, **checks)


def test_second_derivative_of_padding(backend: str, device: str) -> None:
    """NaN in padding reaches no second derivative."""
    op = OPS["additive_attention"]
    function, leaves = function_of_leaves(op, VARIANTS["both"], backend, device)
    masks = make(op, VARIANTS["both"], torch.float64, device).masks
    padding = ~attention_mask(leaves[1], **masks).any(1)
    for leaf in leaves[1:3]:
        leaf.data[padding] = math.nan
    loss = sum(t.square().sum() for t in function(*leaves))
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    for second in torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves):
        assert second.isfinite().all()


class Steps(nn.Module):
    """Three decoding steps on one memory, the last with two queries; each but the first reads the context before it."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, queries: Tensor, outputs: Tensor, lengths: Tensor) -> Tensor:
        memory = self.attention.memory(outputs, lengths)
        first = self.attention(queries[:, 0], memory, need_weights=False).context
        second = self.attention(queries[:, 1] + first, memory)
        third = self.attention(queries[:, 2:] + second.context[:, None], memory)
        return third.context.square().sum() + second.alignments.square().sum() + third.alignments.square().sum()


MODULES = {
    "bahdanau": lambda **kw: attn_kernels.BahdanauAttention(3, 3, 4, **kw),
    "bahdanau normalized": lambda **kw: attn_kernels.BahdanauAttention(3, 3, 4, normalize=True, **kw),
    "luong dot": lambda **kw: attn_kernels.LuongAttention(3, 3, score="dot", **kw),
    "luong general": lambda **kw: attn_kernels.LuongAttention(3, 3, scale=True, **kw),
    "luong concat": lambda **kw: attn_kernels.LuongAttention(3, 3, 4, score="concat", **kw),
    "cosine": lambda **kw: attn_kernels.CosineAttention(3, 3, 4, **kw),
}


def steps_of(name: str, backend: str, device: str) -> tuple[Steps, tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(0)
    steps = Steps(MODULES[name](backend=backend, dtype=torch.float64, device=device))
    inputs = (torch.randn(2, 4, 3), torch.randn(2, 5, 3))
    return steps, (*(x.to(device, torch.float64) for x in inputs), torch.tensor([5, 2], device=device))


@pytest.mark.parametrize("deferred", [False, True], ids=["", "deferred"])
@pytest.mark.parametrize("name", MODULES)
def test_second_derivatives_of_modules(
    name: str, deferred: bool, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the reference, also where gradients of the memory are deferred."""
    if is_slow(backend) and (name != "bahdanau normalized" or not deferred):
        pytest.skip("one variant is enough for Triton's interpreter: the formulas are the reference's")
    if backend == "reference" and deferred:
        pytest.skip("the reference does not defer")
    monkeypatch.setattr("attn_kernels.memory_gradient._MIN_BYTES", 0 if deferred else 1 << 40)
    steps, (queries, outputs, lengths) = steps_of(name, backend, device)
    leaves = [queries.requires_grad_(), outputs.requires_grad_(), *steps.parameters()]
    seeds = [torch.randn_like(leaf) for leaf in leaves]

    def results() -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad(steps(queries, outputs, lengths), leaves, create_graph=True)
        return torch.autograd.grad(gradients, leaves, seeds)

    actual = results()
    steps.attention.backend = "reference"
    torch.testing.assert_close(actual, results())


def test_second_derivatives_of_zero_vectors() -> None:
    """Their cosine is 0, whatever they are compared with: so are all its derivatives, and not NaN."""
    attention = attn_kernels.CosineAttention(3, 3, dtype=torch.float64)
    query, outputs = torch.zeros(1, 3, dtype=torch.float64), torch.randn(1, 4, 3, dtype=torch.float64)
    outputs[0, 1] = 0.0
    outputs.requires_grad_()
    loss = attention(query, attention.memory(outputs)).context.square().sum()
    gradient = torch.autograd.grad(loss, outputs, create_graph=True)[0]
    second = torch.autograd.grad(gradient.square().sum(), outputs)[0]
    assert second.isfinite().all()


@pytest.mark.parametrize("name", [name for name in MODULES if name != "luong dot"])  # which has no parameters
def test_transforms_of_modules(name: str, fused: str, device: str) -> None:
    """Gradients for each sentence, and the Hessian's product with a vector, as those of the reference."""
    if is_slow(fused) and name != "bahdanau normalized":
        pytest.skip("one module is enough for Triton's interpreter")
    steps, (queries, outputs, lengths) = steps_of(name, fused, device)
    parameters = {n: p.detach() for n, p in steps.named_parameters()}

    def loss(parameters: dict[str, Tensor], query: Tensor, output: Tensor, length: Tensor) -> Tensor:
        return torch.func.functional_call(steps, parameters, (query[None], output[None], length[None]))

    def results() -> list[Any]:
        per_sentence = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))
        product = torch.func.jvp(
            lambda p: per_sentence(p, queries, outputs, lengths),
            (parameters,),
            ({n: torch.ones_like(p) for n, p in parameters.items()},),
        )
        return tree_leaves(product)

    actual = results()
    steps.attention.backend = "reference"
    for a, e in zip(actual, results(), strict=True):
        torch.testing.assert_close(a, e)


@slow_if(lambda backend, transform, **_: is_slow(backend) or (interpreted(backend) and transform != "vmap of grad"))
@pytest.mark.parametrize("transform", ["vmap", "grad", "vmap of grad"])
@ops
def test_function_transforms(op: Op, backend: str, device: str, transform: str) -> None:
    """torch.func: the result of a loop."""
    cases = [make(op, CASES["lengths"], torch.float64, device, seed) for seed in range(3)]
    stacked = {name: torch.stack([c.tensors[name] for c in cases]) for name in cases[0].tensors}
    masks = cases[0].masks

    def one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return call(op.function, op, tensors, **masks, backend=backend)

    def gradient(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return torch.func.grad(lambda t: sum(x.square().sum() for x in one(t).values()))(tensors)

    function = {"vmap": torch.vmap(one), "grad": gradient, "vmap of grad": torch.vmap(gradient)}[transform]
    arguments = cases[0].tensors if transform == "grad" else stacked
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that vmap falls back to a loop
        # Inf times 0 in NumPy, where Triton's interpreter computes as a GPU does.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")
        results = function(arguments)

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


def _sum(function: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda *tensors: sum(t.square().sum() for t in function(*tensors))


ALL = (0, 1, 2, 3, 4)
TRANSFORMS = {
    "grad": lambda f: torch.func.grad(_sum(f), ALL),
    "jacrev": lambda f: torch.func.jacrev(f, ALL),
    "jacfwd": lambda f: torch.func.jacfwd(f, (0, 3)),
    "hessian": lambda f: torch.func.hessian(_sum(f), (0, 3)),
    "reverse over reverse": lambda f: torch.func.jacrev(torch.func.jacrev(_sum(f), (0, 3)), (1, 3)),
    "grad of vmap": lambda f: torch.func.grad(_sum(torch.vmap(f, (None, None, None, 0, None)))),
    "vmap of one memory": lambda f: torch.vmap(f, (0, None, None, None, None), 1),
    "vmap of two": lambda f: torch.vmap(torch.vmap(f, (0, None, None, None, 1)), (1, None, None, 0, None)),
    "vmap of none": lambda f: torch.vmap(f, (0, None, None, 0, None)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_those_of_the_reference(transform: str, fused: str, device: str) -> None:
    if is_slow(fused) and transform not in ("grad", "grad of vmap"):
        pytest.skip("the other transforms are enough for Triton's interpreter")
    arguments = make(OPS["additive_attention"], VARIANTS["both"], torch.float64, device)
    tensors = dict(arguments.tensors)
    n = 0 if transform == "vmap of none" else 2
    if "vmap" in transform:
        tensors["v"] = torch.stack([tensors["v"]] * n) if n else tensors["v"].new_empty(0, 3)
    if "vmap of" in transform and transform != "grad of vmap":
        tensors["query"] = torch.stack([tensors["query"]] * 2)[:n]
    if transform == "vmap of one memory":
        tensors["v"] = arguments.tensors["v"]
    if transform == "vmap of two":
        tensors["query"] = torch.stack([tensors["query"], 2 * tensors["query"]], 1)
        tensors["bias"] = torch.stack([tensors["bias"]] * 2, 1)

    def results(backend: str) -> list[Tensor]:
        def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            return attn_kernels.additive_attention(*tensors, **arguments.masks, backend=backend)

        return tree_leaves(TRANSFORMS[transform](function)(*tensors.values()))

    for a, e in zip(results(fused), results("reference"), strict=True):
        torch.testing.assert_close(a, e)


def test_gradients_for_each_sentence_take_the_kernels(fused: str, device: str) -> None:
    """A backend that was named computes, forward and backward: nothing falls back without a word."""
    called = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "attn_kernels":
                called.append(tuple(function.name().removeprefix("attn_kernels::").split(".")))
            return function(*args, **(kwargs or {}))

    query, keys, lengths = torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.tensor([5, 2])
    query, keys, lengths, v = query.to(device), keys.to(device), lengths.to(device), torch.randn(4, device=device)

    def loss(query: Tensor, keys: Tensor, length: Tensor) -> Tensor:
        row = query[None], keys[None], keys[None]
        return attn_kernels.additive_attention(*row, v, memory_lengths=length[None], backend=fused).context.sum()

    with Calls():
        torch.vmap(torch.func.grad(loss))(query, keys, lengths)
    ops = ["additive_attention", "additive_attention_backward", "additive_attention_backward"]
    assert called == [(op, fused) for op in ops]


def test_lengths_out_of_range_are_still_refused_in_a_transform(fused: str, device: str) -> None:
    """Where they are not mapped they can be read."""
    if device != "cpu":
        pytest.skip("on a GPU the kernels clamp lengths")
    x = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match=r"in 0\.\.Tk = 0\.\.3, got 2\.\.4"):
        torch.func.grad(
            lambda q: attn_kernels.additive_attention(
                q, x, x, torch.ones(4), memory_lengths=torch.tensor([2, 4]), backend=fused
            ).context.sum()
        )(x)
