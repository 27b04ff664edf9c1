"""Triton's kernels for a gate, several score vectors and extra: the rules that select kernels; what they allocate."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attn_kernels import additive_attention
from conftest import available
from matrix import ACTIVATIONS, OPS, Case, Op, assert_bit_equal, check, device_of, make, run, slow_if
from test_gated import MASKS, TK, TQ, A, B, finite, tensors
from test_padding import padded_with, poisoned_empty
from test_triton import launches_of_decode, splitting

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'attn_kernels[triton]'"
    ),
]


def op_of(name: str, vectors: int | None, by_name: tuple[str, ...] = ("gate",), **options: Any) -> Op:
    op = OPS[name]
    return op._replace(inputs=(*op.inputs, *by_name), by_name=by_name, vectors=vectors, options=options)


@slow_if(lambda splits, **_: splits != 3)
@pytest.mark.parametrize(
    ("case", "splits", "dtype"),
    [
        (Case(B=2, Tq=1, Tk=45, A=17, D=33, mask="steps", lengths="random"), 3, torch.float32),
        (Case(B=2, Tq=2, Tk=37, A=8, D=9, mask="pairs"), 2, torch.float64),
        (Case(B=2, Tq=3, Tk=20, A=8, D=9), 1, torch.bfloat16),
    ],
    ids=["steps", "pairs", "plain"],
)
def test_long_bags(case: Case, splits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many score vectors in blocks of at most 8, over whose steps one program walks or several do."""
    available("triton")
    gated = importlib.import_module("attn_kernels.triton.gated_additive_attention")
    monkeypatch.setattr(gated, "MIN_LONG", 1)
    launched = launches_of_decode(monkeypatch, programs=2 * case.B * case.Tq * splits)
    with splitting():
        check(op_of("additive_attention", 10), case, dtype, "triton")
    assert "decode_kernel" in launched
    assert ("combine_kernel" in launched) == (splits > 1)


def test_more_units_than_a_block() -> None:
    """The scores of which are added up in memory, in float32."""
    available("triton")
    check(op_of("additive_scores", 2), Case(B=1, Tq=2, Tk=3, A=1030, D=3), torch.bfloat16, "triton")


@slow_if(lambda dtype, **_: dtype != torch.float32)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_more_vectors_than_registers(dtype: torch.dtype) -> None:
    """The gradients of which are added up in memory."""
    available("triton")
    check(op_of("additive_attention", 35, activation="relu"), Case(B=1, Tq=2, Tk=18, A=5, D=3), dtype, "triton")


@slow_if(lambda masks, **_: masks != "pairs")
@pytest.mark.parametrize(
    ("masks", "own_bias", "normalizer", "vectors"),
    [
        ("pairs", True, "softmax", 3),
        ("all", False, "sigmoid", 2),
        ("lengths", True, "sigmoid", 3),
        ("pairs", False, "sigmoid", 2),
    ],
)
def test_options(masks: str, own_bias: bool, normalizer: str, vectors: int) -> None:
    """A score bias for all vectors or each, dropout, a normalizer and log_total, against the formula."""
    device = device_of(available("triton"))
    shape = (B, TQ, vectors, TK) if own_bias else (B, TQ, TK)
    given = {name: t.detach().to(device).requires_grad_() for name, t in tensors(vectors, score_bias=shape).items()}
    options: dict[str, Any] = dict(dropout_p=0.4, normalizer=normalizer, need_log_total=True)
    options["clip"] = 1.5 if own_bias else None
    options |= {name: t.to(device) for name, t in MASKS[masks].items()}
    compare_with_formula(given, options)


def compare_with_formula(given: dict[str, torch.Tensor], options: dict[str, Any]) -> None:
    """Results and gradients of an additive attention in float64, with the same dropout."""
    found = []
    for backend in ("triton", "reference"):
        torch.manual_seed(3)
        found.append(additive_attention(**given, **options, backend=backend))
    grads = [torch.randn_like(t) for t in finite(found[0])]
    gradients = [torch.autograd.grad(finite(result), list(given.values()), grads) for result in found]
    for ours, exact in zip((*finite(found[0]), *gradients[0]), (*finite(found[1]), *gradients[1]), strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-11 * max(1.0, exact.abs().max().item()))


@slow_if(lambda special, **_: special == special)
@pytest.mark.parametrize(
    ("activation", "name", "special"),
    [
        ("tanh", "gate", torch.nan),
        ("tanh", "keys", torch.inf),
        ("sigmoid", "gate", -torch.inf),
        ("leaky_relu", "query", -torch.inf),
        ("relu", "v", torch.inf),
    ],
)
def test_special_values_are_where_the_formula_has_them(activation: str, name: str, special: float) -> None:
    device = device_of(available("triton"))
    given = {name: t.detach().to(device) for name, t in tensors(3, torch.float32).items()}
    given[name].view(-1)[3] = special
    given = {name: t.requires_grad_() for name, t in given.items()}
    outcomes = []
    for backend in ("triton", "reference"):
        results = tuple(additive_attention(**given, activation=activation, backend=backend))
        grads = [torch.ones_like(x) for x in results]
        outcomes.append((*results, *torch.autograd.grad(results, list(given.values()), grads)))
    for one, other in zip(*outcomes, strict=True):
        assert torch.equal(one.isfinite(), other.isfinite())


LEAKY = ACTIVATIONS["leaky_relu"]
WITH_EXTRA: dict[str, tuple[Op, Case, torch.dtype]] = {
    "1 query, gate": (
        op_of("additive_attention", None, ("gate", "extra")),
        Case(Tq=1, lengths="random", layout="columns"),
        torch.float32,
    ),
    "3 queries, 3 vectors": (
        op_of("additive_attention", 3, ("extra",)),
        Case(Tq=3, lengths="random", mask="pairs", layout="sliced"),
        torch.bfloat16,
    ),
    "9 queries": (op_of("additive_attention", None, ("extra",)), Case(2, 9, lengths="random"), torch.float32),
    "20 queries": (
        op_of("additive_attention", None, ("extra",)),
        Case(2, 20, 11, lengths="random", layout="transposed"),
        torch.float32,
    ),
    "20 queries, bfloat16": (
        op_of("additive_attention", None, ("extra",)),
        Case(2, 20, 11, lengths="random", layout="sliced"),
        torch.bfloat16,
    ),
    "20 queries, float64": (
        op_of("additive_attention", None, ("extra",)),
        Case(1, 20, 3, A=300, mask="pairs", layout="columns"),  # several blocks of units
        torch.float64,
    ),
    "20 queries, options": (
        op_of("additive_attention", None, ("extra", "score_bias"), clip=2.0),
        Case(2, 20, 11, lengths="random", layout="columns"),
        torch.float32,
    ),
    "1 query, options": (
        op_of("additive_attention", None, ("extra", "score_bias"), clip=2.0, **LEAKY),
        Case(Tq=1, lengths="random", layout="sliced"),
        torch.bfloat16,
    ),
    "20 queries, leaky_relu": (
        op_of("additive_attention", None, ("extra",), **LEAKY),
        Case(2, 20, 11, mask="pairs", layout="columns"),
        torch.float32,
    ),
    "20 queries, 2 vectors, gate": (
        op_of("additive_attention", 2, ("gate", "extra"), **LEAKY),
        Case(2, 20, 5, lengths="random", layout="sliced"),
        torch.float32,
    ),
    "scores, 10 vectors": (op_of("additive_scores", 10, ("extra",)), Case(2, 3, 5, layout="sliced"), torch.float32),
    "scores, gate": (op_of("additive_scores", None, ("gate", "extra")), Case(2, 9, 5), torch.bfloat16),
}


@slow_if(lambda name, **_: "leaky_relu" in name or "float64" in name or "gate" in name)
@pytest.mark.parametrize("name", WITH_EXTRA)
def test_extra(name: str) -> None:
    """Results and gradients; where there is padding, NaN in it changes no bit."""
    device = device_of(available("triton"))
    op, case, dtype = WITH_EXTRA[name]
    check(op, case, dtype, "triton")
    if case.lengths:
        clean, poisoned = (padded_with(op, case, dtype, device, fill) for fill in (0.5, torch.nan))
        expected = run(op.function, op, clean, backend="triton")
        with poisoned_empty():
            assert_bit_equal(run(op.function, op, poisoned, backend="triton"), expected)


@slow_if(lambda size, **_: size != 30.0)
@pytest.mark.parametrize("size", [8.0, 12.0, 30.0, 60.0])
def test_the_sum_with_extra_selects_the_form(size: float) -> None:
    """Keys within and extra beyond the limits of each form, and the other way round."""
    op, case = op_of("additive_attention", None, ("extra",)), Case(1, 9, 5, lengths="full")
    for name in ("keys", "extra"):
        arguments = make(op, case, torch.float32, device_of(available("triton")))
        arguments.tensors[name][0, 1::2] *= size
        arguments.tensors["v"][:] *= 20.0
        check(op, case, torch.float32, "triton", arguments=arguments)


def test_options_with_extra() -> None:
    """A score bias for each of 2 vectors, dropout, a clip, a normalizer and log_total, against the formula."""
    device = device_of(available("triton"))
    shapes = dict(score_bias=(B, TQ, 2, TK), extra=(B, TK, A))
    given = {name: t.detach().to(device).requires_grad_() for name, t in tensors(2, **shapes).items()}
    options: dict[str, Any] = dict(dropout_p=0.4, normalizer="sigmoid", need_log_total=True, clip=1.5)
    options |= {name: t.to(device) for name, t in MASKS["lengths"].items()}
    compare_with_formula(given, options)


class Allocations(TorchDispatchMode):
    """The sizes of all tensors that calls of PyTorch make."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.made: list[torch.UntypedStorage] = []  # and still there: so each has a place of its own

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            if all(storage._cdata != one._cdata for one in self.made):
                self.made.append(storage)
                self.sizes.append(result.numel())
        return result


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers on tensors without memory, for what they allocate."""
    available("triton")
    for name in ("additive_attention", "gated_additive_attention", "decode", "softmax", "products"):
        module = importlib.import_module(f"attn_kernels.triton.{name}")
        monkeypatch.setattr(module, "launch", lambda *args: None)


def kernels_of(op: str) -> list[Any]:
    kernels = importlib.import_module("attn_kernels.triton.attention").KERNELS
    return [kernels[op], kernels[f"{op}_backward"]]


@pytest.mark.parametrize("Tq", [1, 20])
@pytest.mark.parametrize("vectors", [1, 30])
def test_no_temporary_is_as_large_as_the_memory(vectors: int, Tq: int, no_launch: None) -> None:
    """As large as keys are the gradients of keys, values and gate; the rest goes by rows of scores and by splits.

    The gradient of extra is that of keys.
    """
    attend, attend_backward = kernels_of("gated_additive_attention")
    B, Tk, A = 2, 10_000, 2048
    shapes = ((B, Tq, A), (B, Tk, A), (B, Tk, A), (vectors, A), (A,), (B, Tk, A))
    inputs = [torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in shapes]
    inputs += [None, torch.empty_like(inputs[1]), 0, 0.0, 0.0, 0, 0.0, None, None, None]
    with Allocations() as forward:
        context, alignments, log_total = attend(*inputs, True)
    with Allocations() as backward:
        attend_backward(context, alignments, None, *inputs, alignments, log_total, True, True)
    assert 0 < max(forward.sizes) <= B * Tk * A // 2
    assert sum(size > B * Tk * A // 2 for size in backward.sizes) == 3


@pytest.mark.parametrize("Tq", [1, 20])
def test_extra_is_added_in_the_kernels(Tq: int, no_launch: None) -> None:
    """As large as keys are the gradient of both and, for many queries, their rows in float32."""
    attend, attend_backward = kernels_of("activated_attention_with_extra")
    B, Tk, A = 2, 1000, 256
    shapes = ((B, Tq, A), (B, Tk, A), (B, Tk, A), (A,), (A,), (B, Tk, A))
    inputs = [torch.empty(shape, device="meta") for shape in shapes] + [1, 0.0, None, None]
    with Allocations() as forward:
        context, alignments = attend(*inputs, True)
    with Allocations() as backward:
        attend_backward(context, alignments, *inputs, alignments, True, True, False)
    assert sum(size >= B * Tk * A for size in forward.sizes) == (Tq > 8)
    assert sum(size >= B * Tk * A for size in backward.sizes) == 1
