"""Stateful mechanisms defer the gradient of a memory and compute it once: it equals the sum of per-step gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_kernels import Memory, memory_gradient
from attn_kernels.mechanisms import (
    DynamicConvolutionAttention,
    ForwardAttention,
    GMMAttention,
    LocalAttention,
    MonotonicAttention,
    MonotonicChunkwiseAttention,
    StatefulAttention,
    StepwiseMonotonicAttention,
    reading,
)
from conftest import available

B, TK, Q, M, UNITS, STEPS = 3, 6, 5, 7, 8, 4
F64 = torch.float64
MAKE: dict[str, Callable[..., StatefulAttention]] = {
    "forward": lambda **k: ForwardAttention(Q, M, UNITS, **k),
    "forward-location": lambda **k: ForwardAttention(Q, M, UNITS, True, 2, 3, **k),
    "monotonic": lambda **k: MonotonicAttention(Q, M, UNITS, normalize=True, **k),
    "monotonic-dot": lambda **k: MonotonicAttention(Q, M, score="dot", **k),
    "mocha": lambda **k: MonotonicChunkwiseAttention(Q, M, UNITS, 2, **k),
    "mocha-dot": lambda **k: MonotonicChunkwiseAttention(Q, M, chunk_size=2, score="dot", **k),
    "stepwise": lambda **k: StepwiseMonotonicAttention(Q, M, UNITS, **k),
    "local-m": lambda **k: LocalAttention(Q, M, UNITS, 1, "local-m", **k),
    "local-p": lambda **k: LocalAttention(Q, M, UNITS, 1, normalize=True, **k),
    "local-dot": lambda **k: LocalAttention(Q, M, None, 1, score="dot", **k),
    "gmm": lambda **k: GMMAttention(Q, M, UNITS, **k),
    "dynamic-convolution": lambda **k: DynamicConvolutionAttention(Q, M, UNITS, 2, 3, 2, 3, 4, **k),
}
mechanisms = pytest.mark.parametrize("mechanism", MAKE)


def run(mechanism: str, masks: dict[str, Tensor], take: Callable[..., Any], dtype: torch.dtype = F64) -> Any:
    """Of numbers that bfloat16 can represent."""
    torch.manual_seed(0)
    module = MAKE[mechanism](dtype=F64).bfloat16().to(dtype)
    queries, outputs = (torch.randn(B, n, m).bfloat16().to(dtype).requires_grad_() for n, m in ((STEPS, Q), (TK, M)))
    memory = module.memory(outputs, **masks)
    context, alignments, _ = module.sequence(queries, memory)
    leaves = [x for x in (*module.parameters(), queries, outputs) if x.requires_grad]
    return take(context, alignments, leaves, memory)


def gradients(context: Tensor, alignments: Tensor, leaves: list[Tensor], memory: Memory) -> Any:
    loss = sum((x * torch.randn(x.shape).bfloat16().to(x.dtype)).sum() for x in (context, alignments))
    return torch.autograd.grad(loss, leaves, allow_unused=True)


def second(context: Tensor, alignments: Tensor, leaves: list[Tensor], memory: Memory) -> Any:
    """Gradients of a norm of the gradients."""
    first = torch.autograd.grad(context.sin().sum(), leaves, create_graph=True, allow_unused=True)
    return torch.autograd.grad(sum(x.square().sum() for x in first if x is not None), leaves, allow_unused=True)


def both(monkeypatch: pytest.MonkeyPatch, *given: Any) -> tuple[Any, Any]:
    """With every memory large enough, and with none."""
    available("cpu")
    found = []
    for least in (0, 1 << 40):
        monkeypatch.setattr(memory_gradient, "_MIN_BYTES", least)
        found.append(run(*given))
    return found[0], found[1]


@pytest.mark.parametrize("masks", ["none", "lengths", "mask"])
@mechanisms
def test_gradients(mechanism: str, masks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.rand(B, TK, generator=torch.Generator().manual_seed(1)) < 0.7
    given = {"none": {}, "lengths": {"memory_lengths": torch.tensor([6, 0, 3])}, "mask": {"mask": mask}}[masks]
    torch.testing.assert_close(*both(monkeypatch, mechanism, given, gradients))


@pytest.mark.parametrize("mechanism", ["monotonic", "mocha-dot", "forward-location", "local-m"])
def test_gradients_of_gradients(mechanism: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.testing.assert_close(*both(monkeypatch, mechanism, {}, second))


@pytest.mark.parametrize("mechanism", ["forward", "monotonic", "gmm"])
def test_sums_over_steps_are_float32(mechanism: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 the gradient of the memory is at least as near to that of float64 as if each step rounded it."""
    exact = run(mechanism, {}, gradients)[-1]
    once, each = (found[-1] for found in both(monkeypatch, mechanism, {}, gradients, torch.bfloat16))
    assert once.dtype == torch.bfloat16
    assert (once - exact).norm() < 0.05 * exact.norm()
    assert (once - exact).norm() < 1.05 * (each - exact).norm()


@mechanisms
def test_no_step_makes_a_gradient_as_large_as_the_memory(mechanism: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the steps leave is joined, once for all of them, but for steps that add something to the keys."""
    joined: list[int] = []
    calls: dict[type, Callable[..., Any]] = {}

    def counted(self: Any, others: list[Any]) -> Any:
        joined.append(1 + len(others))
        return calls[type(self)](self, others)

    for kind in (memory_gradient._StepRecord, reading._Product, reading._Scores):
        calls[kind] = kind.joined_gradients
        monkeypatch.setattr(kind, "joined_gradients", counted)
    monkeypatch.setattr(memory_gradient, "_MIN_BYTES", 0)
    run(mechanism, {"memory_lengths": torch.tensor([6, 0, 3])}, gradients)
    assert joined and all(steps == STEPS for steps in joined)
    expected = {"mocha": 3, "mocha-dot": 3, "gmm": 1, "dynamic-convolution": 1, "local-m": 1}
    assert len(joined) == expected.get(mechanism, 2)
