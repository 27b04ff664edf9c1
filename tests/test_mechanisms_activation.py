"""``activation=`` of stateful mechanisms: with the identity as activation they are the limit of small weights.

leaky_relu with a slope of 1 is the identity, and tanh(e x) / e is x + O(e^2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_kernels import memory_gradient
from attn_kernels.mechanisms import (
    CoverageAttention,
    ForwardAttention,
    LocalAttention,
    LocationSensitiveAttention,
    MonotonicAttention,
    MonotonicChunkwiseAttention,
    StatefulAttention,
    StepwiseMonotonicAttention,
)
from attn_kernels.seq2seq import Seq2Seq
from attn_kernels.seq2seq.fused.eligibility import can_fuse_sequence

pytestmark = pytest.mark.usefixtures("one_thread")

B, K, TK, Q, M, UNITS, STEPS = 3, 2, 6, 5, 7, 8, 3
SMALL = 1e-4
MAKE: dict[str, Callable[..., StatefulAttention]] = {
    "location": lambda **k: LocationSensitiveAttention(Q, M, UNITS, 2, 3, cumulative=True, **k),
    "coverage": lambda **k: CoverageAttention(Q, M, UNITS, scale=2.0, **k),
    "forward": lambda **k: ForwardAttention(Q, M, UNITS, True, **k),
    "forward-location": lambda **k: ForwardAttention(Q, M, UNITS, False, 2, 3, **k),
    "monotonic": lambda **k: MonotonicAttention(Q, M, UNITS, **k),
    "mocha": lambda **k: MonotonicChunkwiseAttention(Q, M, UNITS, 2, **k),
    "stepwise": lambda **k: StepwiseMonotonicAttention(Q, M, UNITS, **k),
    "local": lambda **k: LocalAttention(Q, M, UNITS, 1, "local-m", **k),
}
mechanisms = pytest.mark.parametrize("mechanism", MAKE)


def make(mechanism: str, **options: Any) -> StatefulAttention:
    torch.manual_seed(0)
    return MAKE[mechanism](dtype=torch.float64, **options)


def take(module: StatefulAttention, queries: Tensor, outputs: Tensor) -> list[Tensor]:
    """Contexts, alignments and gradients. queries: (B, T, Q) or (T, B, K, Q)."""
    memory = module.memory(outputs, torch.tensor([6, 0, 4]))
    state = module.initial_state(memory, queries.shape[2]) if queries.dim() == 4 else module.initial_state(memory)
    results = []
    for query in queries if queries.dim() == 4 else queries.unbind(1):
        context, alignments, state = module(query, memory, state)
        results += [context, alignments]
    return [*results, *torch.autograd.grad(sum(x.square().sum() for x in results), (queries, outputs))]


@pytest.mark.parametrize("hypotheses", [None, K])
@mechanisms
def test_identity(mechanism: str, hypotheses: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    identity, tanh = make(mechanism, activation="leaky_relu", negative_slope=1.0), make(mechanism)
    with torch.no_grad():
        for name, parameter in tanh.named_parameters():
            if name in ("v", "chunk_v"):
                parameter /= SMALL
            elif name not in ("score_bias", "transition.weight", "transition.bias", "location_convolution.weight"):
                parameter *= SMALL
    shape = (B, STEPS, Q) if hypotheses is None else (STEPS, B, hypotheses, Q)
    queries = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    outputs = torch.randn(B, TK, M, dtype=torch.float64, requires_grad=True)
    expected = take(tanh, queries, outputs)
    torch.testing.assert_close(take(identity, queries, outputs), expected, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(memory_gradient, "_MIN_BYTES", 0)  # the gradients of the memory are gathered
    torch.testing.assert_close(take(identity, queries, outputs), expected, rtol=1e-5, atol=1e-6)
    relu = take(make(mechanism, activation="relu"), queries, outputs)
    assert not torch.allclose(relu[-1], take(make(mechanism), queries, outputs)[-1])


@pytest.mark.parametrize("attention", [LocationSensitiveAttention, CoverageAttention])
def test_loop_of_a_decoder(attention: Any) -> None:
    """One op of autograd for a target, with the results of the steps."""
    torch.manual_seed(0)
    module = attention(6, 12, UNITS, activation="relu", dtype=torch.float64)
    model = Seq2Seq(11, 9, 5, 6, attention=module, dtype=torch.float64)
    source, lengths, target = torch.randint(3, 11, (3, 6)), torch.tensor([6, 0, 4]), torch.randint(2, 9, (3, 4))
    memory, state = model.encode(source, lengths)
    assert can_fuse_sequence(model.decoder, model.decoder.embedding(target), state, memory)
    found = []
    for loop in (True, False):
        model.decoder.loop = loop
        logits, alignments = model(source, lengths, target)
        loss = logits.square().sum() + alignments.square().sum()
        found.append((logits, alignments, torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(*found)


@mechanisms
def test_errors(mechanism: str) -> None:
    with pytest.raises(ValueError, match="activation must be one of 'tanh', 'relu', 'leaky_relu', got 'sigmoid'"):
        make(mechanism, activation="sigmoid")
    assert "activation='leaky_relu', negative_slope=0.2" in repr(
        make(mechanism, activation="leaky_relu", negative_slope=0.2)
    )


def test_a_dot_product_has_no_activation() -> None:
    with pytest.raises(ValueError, match=r"MonotonicAttention: activation must be 'tanh'.* score='dot', got 'relu'"):
        MonotonicAttention(Q, M, score="dot", activation="relu")
