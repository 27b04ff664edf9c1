"""The ops as compilers see them: opcheck, torch.compile without graph breaks or recompilations, torch.export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import attn_kernels
from attn_kernels.ops import kernel
from matrix import (
    CASES,
    OPS,
    SHAPES,
    Case,
    Op,
    assert_close,
    call,
    eager_errors,
    is_slow,
    make,
    oracle,
    slow_if,
    slow_interpreted,
)

ops = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# opcheck --------------------------------------------------------------------------------------------------------------

# opcheck and torch.compile take a second or two each time: one case of each op and backend is in make test.
USUAL = "masked per query, strided"
OPCHECK = {
    "plain": Case(B=2, Tq=3, Tk=5, A=4, D=3),
    "no bias": Case(B=2, Tq=3, Tk=5, A=4, D=3, without=("bias",)),
    "masked": Case(B=3, Tq=3, Tk=5, A=4, D=3, lengths="random", mask="steps"),
    "masked per query, strided": Case(B=3, Tq=3, Tk=5, A=4, D=3, lengths="random32", mask="pairs", layout="transposed"),
    "empty": Case(B=0, Tq=3, Tk=5, A=4, D=3, lengths="random"),
}


def op_arguments(op: Op, case: Case, dtype: torch.dtype, device: str, requires_grad: bool) -> list[Any]:
    """In the order of the schema: query, keys, values, the other tensors, options, masks, need_alignments."""
    arguments = make(op, case, dtype, device)
    tensors = [t.requires_grad_(requires_grad) for t in arguments.tensors.values()]
    tensors += [None] * (len(op.inputs) - len(tensors))
    if not op.masked:
        return tensors
    if op.name == "additive_attention":
        tensors.append(None)  # prepared
    return [*tensors, *op.options.values(), arguments.masks.get("memory_lengths"), arguments.masks.get("mask"), True]


def skip_if_many(backend: str, name: str) -> None:
    if is_slow(backend) and name in ("no bias", "masked"):
        pytest.skip("the other cases are enough for Triton's interpreter")


@slow_if(lambda name, requires_grad, **_: name != USUAL or not requires_grad)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "requires grad"])
@pytest.mark.parametrize("name", OPCHECK)
@ops
def test_opcheck(op: Op, fused: str, device: str, name: str, requires_grad: bool) -> None:
    skip_if_many(fused, name)
    arguments = op_arguments(op, OPCHECK[name], torch.float32, device, requires_grad)
    torch.library.opcheck(kernel(op.name, fused), tuple(arguments))


@slow_if(lambda name, dtype, **_: name != USUAL or dtype != torch.float32)
@pytest.mark.parametrize("name", OPCHECK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@ops
def test_opcheck_of_backward(op: Op, fused: str, device: str, dtype: torch.dtype, name: str) -> None:
    skip_if_many(fused, name)
    arguments = op_arguments(op, OPCHECK[name], dtype, device, requires_grad=False)
    grads = list(make(op, OPCHECK[name], dtype, device).grads.values())
    backward = kernel(f"{op.name}_backward", fused)
    if not op.masked:
        torch.library.opcheck(backward, (*grads, *arguments))
        return
    _, alignments = kernel(op.name, fused)(*arguments)
    for given in (tuple(grads), (grads[0], None), (None, grads[1]))[: 1 if is_slow(fused) else 3]:
        torch.library.opcheck(backward, (*given, *arguments[:-1], alignments))


@ops
def test_fake_kernel(op: Op, fused: str, device: str) -> None:
    """Shapes, dtypes and strides as torch.compile foresees them are those of the results, with symbolic sizes too."""
    arguments = op_arguments(op, CASES["lengths and mask"], torch.bfloat16, device, requires_grad=False)
    results = kernel(op.name, fused)(*arguments)
    meta = [t.to("meta") if isinstance(t, Tensor) else t for t in arguments]
    foreseen = kernel(op.name, fused)(*meta)
    for real, fake in zip(*(x if isinstance(x, tuple) else (x,) for x in (results, foreseen)), strict=True):
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


# torch.compile --------------------------------------------------------------------------------------------------------


def compiled(op: Op, backend: str, dynamic: bool | None) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    """A function around the op, as user code is; and what counts its compilations."""
    counter = CompileCounterWithBackend("aot_eager")  # everything of torch.compile but the generation of code

    def function(tensors: dict[str, Tensor], masks: dict[str, Tensor]) -> dict[str, Tensor]:
        doubled = tensors | {"query": tensors["query"] * 2}
        return call(op.function, op, doubled, **masks, backend=backend)

    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter), counter


def check_compiled(function: Callable[..., Any], op: Op, case: Case, device: str) -> None:
    arguments = make(op, case, torch.float32, device)
    leaves = {name: t.requires_grad_() for name, t in arguments.tensors.items()}
    outputs = function(leaves, arguments.masks)
    loss = sum((outputs[name] * grad).sum() for name, grad in arguments.grads.items())
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"d{name}": g / (2 if name == "query" else 1) for name, g in zip(leaves, gradients, strict=True)}
    tensors = {name: t.detach() for name, t in leaves.items()}
    expected = arguments._replace(tensors=tensors | {"query": 2 * tensors["query"]})
    exact = oracle(op, expected)
    assert_close(outputs | named, exact, eager_errors(op, expected, exact), torch.float32)


@slow_if(lambda name, dynamic, **_: name != "lengths and mask" or dynamic is not None)
@pytest.mark.parametrize("name", ["plain", "no bias", "lengths and mask", "mask (B, Tq, Tk)", "query 2-D, masked"])
@pytest.mark.parametrize("dynamic", [False, True, None], ids=["static", "dynamic", "automatic"])
@ops
def test_compile(op: Op, backend: str, device: str, dynamic: bool | None, name: str) -> None:
    function, counter = compiled(op, backend, dynamic)
    check_compiled(function, op, CASES[name], device)
    first = counter.frame_count
    check_compiled(function, op, CASES[name], device)
    assert counter.frame_count == first <= 2  # 2 where a dynamic scale is found out to be a constant


@slow_if(lambda backend, **_: backend != "cpu")
@ops
def test_no_recompilation(op: Op, backend: str, device: str) -> None:
    """Ten lengths of the memory, in batches and with numbers of queries that change too: two compilations at most."""
    function, counter = compiled(op, backend, dynamic=None)
    for i, steps in enumerate((7, 12, 5, 33, 18, 21, 9, 40, 11, 28)[: 5 if is_slow(backend) else 10]):
        check_compiled(function, op, Case(B=2 + i % 3, Tq=3 + i % 2, Tk=steps, A=8, D=6, lengths="random"), device)
        if i == 1:
            before = counter.frame_count
    assert counter.frame_count == before <= 2


@slow_interpreted()
@ops
def test_compile_without_gradients(op: Op, backend: str, device: str) -> None:
    function, counter = compiled(op, backend, dynamic=None)
    arguments = make(op, CASES["lengths"], torch.float32, device)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            outputs = function(arguments.tensors, arguments.masks)
            doubled = arguments.tensors | {"query": 2 * arguments.tensors["query"]}
            expected = call(op.reference, op, doubled, **arguments.masks)
            for key, t in expected.items():
                torch.testing.assert_close(outputs[key], t)
    assert counter.frame_count <= 2


@slow_interpreted()
@ops
def test_compile_autocast(op: Op, backend: str, device: str) -> None:
    function, _ = compiled(op, backend, dynamic=False)
    arguments = make(op, CASES["lengths"], torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        outputs = function(arguments.tensors, arguments.masks)
    assert all(t.dtype == torch.bfloat16 for t in outputs.values())


def test_compile_generates_code() -> None:
    """Once through Inductor with the default backend, between other operations."""

    def function(query: Tensor, keys: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        context, alignments = attn_kernels.additive_attention(query.relu(), keys, keys, v, memory_lengths=lengths)
        return context.tanh().sum() + alignments.square().sum()

    query, keys, v = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 5, 4, requires_grad=True), torch.randn(4)
    lengths = torch.tensor([5, 2])
    expected = function(query, keys, v, lengths)
    actual = torch.compile(function, fullgraph=True)(query, keys, v, lengths)
    torch.testing.assert_close(actual, expected)
    gradients = torch.autograd.grad(actual, (query, keys)), torch.autograd.grad(expected, (query, keys))
    torch.testing.assert_close(*gradients)


# torch.export ---------------------------------------------------------------------------------------------------------


@slow_interpreted()
@ops
def test_export(op: Op, backend: str, device: str) -> None:
    """Exported with the sizes of batch and memory free, and run with others."""

    class Model(nn.Module):
        def forward(self, tensors: dict[str, Tensor], masks: dict[str, Tensor]) -> dict[str, Tensor]:
            return call(op.function, op, tensors, **masks, backend=backend)

    batch, steps = torch.export.Dim("batch", min=2), torch.export.Dim("steps", min=2)
    axes = {"B": batch, "Tk": steps}
    case = Case(B=4, Tq=3, Tk=7, lengths="random")
    arguments = make(op, case, torch.float32, device)
    shapes = {
        "tensors": {n: {i: axes[a] for i, a in enumerate(SHAPES[n]) if a in axes} for n in arguments.tensors},
        "masks": {name: {0: batch} for name in arguments.masks},
    }
    program = torch.export.export(Model(), (arguments.tensors, arguments.masks), dynamic_shapes=shapes)
    for other in (case, case._replace(B=9, Tk=33)):
        arguments = make(op, other, torch.float32, device)
        outputs = program.module()(arguments.tensors, arguments.masks)
        expected = call(op.reference, op, arguments.tensors, **arguments.masks)
        for name, t in expected.items():
            torch.testing.assert_close(outputs[name], t)
