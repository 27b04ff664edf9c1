"""Triton's kernels for a gate and several score vectors: the rules that select other kernels for small problems."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attn_kernels import additive_attention
from conftest import available
from matrix import OPS, Case, Op, check, device_of, slow_if
from test_gated import MASKS, TK, TQ, B, finite, tensors
from test_triton import launches_of_decode, splitting

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'attn_kernels[triton]'"
    ),
]


def op_of(name: str, vectors: int | None, **options: Any) -> Op:
    op = OPS[name]
    return op._replace(inputs=(*op.inputs, "gate"), by_name=("gate",), vectors=vectors, options=options)


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
    for name in ("gated_additive_attention", "decode", "softmax", "products"):
        module = importlib.import_module(f"attn_kernels.triton.{name}")
        monkeypatch.setattr(module, "launch", lambda *args: None)


def kernels_of(op: str) -> list[Any]:
    kernels = importlib.import_module("attn_kernels.triton.attention").KERNELS
    return [kernels[op], kernels[f"{op}_backward"]]


@pytest.mark.parametrize("Tq", [1, 20])
@pytest.mark.parametrize("vectors", [1, 30])
def test_no_temporary_is_as_large_as_the_memory(vectors: int, Tq: int, no_launch: None) -> None:
    """As large as keys are the gradients of keys, values and gate; the rest goes by rows of scores and by splits."""
    attend, attend_backward = kernels_of("gated_additive_attention")
    B, Tk, A = 2, 10_000, 2048
    shapes = ((B, Tq, A), (B, Tk, A), (B, Tk, A), (vectors, A), (A,), (B, Tk, A))
    inputs = [torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in shapes]
    inputs += [None, None, 0, 0.0, 0.0, 0, 0.0, None, None, None]
    with Allocations() as forward:
        context, alignments, log_total = attend(*inputs, True)
    with Allocations() as backward:
        attend_backward(context, alignments, None, *inputs, alignments, log_total, True, True)
    assert 0 < max(forward.sizes) <= B * Tk * A // 2
    assert sum(size > B * Tk * A // 2 for size in backward.sizes) == 3


def test_extra_is_added_in_the_kernels(no_launch: None) -> None:
    attend, attend_backward = kernels_of("activated_attention_with_extra")
    B, Tk, A = 2, 1000, 256
    shapes = ((B, 1, A), (B, Tk, A), (B, Tk, A), (A,), (A,), (B, Tk, A))
    inputs = [torch.empty(shape, device="meta") for shape in shapes] + [1, 0.0, None, None]
    with Allocations() as forward:
        context, alignments = attend(*inputs, True)
    with Allocations() as backward:
        attend_backward(context, alignments, *inputs, alignments, True, True, False)
    assert 0 < max(forward.sizes) < B * Tk * A // 2
    assert sum(size > B * Tk * A // 2 for size in backward.sizes) == 1  # of both
