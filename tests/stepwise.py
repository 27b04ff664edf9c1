"""What tests of mechanisms with a state share: sizes, masks, sequences of steps, and the loop over sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import formulas
from attn_kernels import mechanisms
from formulas import assert_same, gradients, randomize

B, K, T, TK, Q, M, UNITS = 4, 2, 3, 6, 5, 7, 8

MASKS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "lengths": {"memory_lengths": torch.tensor([6, 0, 3, 1])},
    "mask": {
        "mask": torch.tensor([[0, 1, 1, 0, 0, 1], [1, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    },
    "mask per hypothesis": {"mask": torch.rand(B, K, TK, generator=torch.Generator().manual_seed(1)) < 0.6},
    "both": {
        "memory_lengths": torch.tensor([6, 5, 3, 0], dtype=torch.int32),
        "mask": torch.rand(B, TK, generator=torch.Generator().manual_seed(3)) < 0.7,
    },
}

Parameters = dict[str, Tensor]
# The alignments of each step of one sentence, of parameters, queries, memory vectors and which of those are allowed.
ByHand = Callable[[Parameters, list[Tensor], list[Tensor], list[bool]], list[list[Tensor]]]


MECHANISMS: dict[str, Callable[..., nn.Module]] = {
    "monotonic": lambda **k: mechanisms.MonotonicAttention(Q, M, UNITS, normalize=True, **k),
    "monotonic-parallel": lambda **k: mechanisms.MonotonicAttention(Q, M, UNITS, "parallel", **k),
    "monotonic-dot": lambda **k: mechanisms.MonotonicAttention(Q, M, score="dot", **k),
    "mocha": lambda **k: mechanisms.MonotonicChunkwiseAttention(Q, M, UNITS, 3, **k),
    "mocha-dot": lambda **k: mechanisms.MonotonicChunkwiseAttention(Q, M, None, 3, score="dot", normalize=True, **k),
    "milk": lambda **k: mechanisms.MonotonicChunkwiseAttention(Q, M, UNITS, None, **k),
    "stepwise": lambda **k: mechanisms.StepwiseMonotonicAttention(Q, M, UNITS, **k),
    "local-p": lambda **k: mechanisms.LocalAttention(Q, M, UNITS, 3, normalize=True, **k),
    "local-m": lambda **k: mechanisms.LocalAttention(Q, M, None, 2, "local-m", score="dot", **k),
    "gmm-0": lambda **k: mechanisms.GMMAttention(Q, M, None, 3, 0, initial_sigma=2.0, **k),
    "gmm-1": lambda **k: mechanisms.GMMAttention(Q, M, UNITS, 3, 1, initial_sigma=2.0, **k),
    "gmm-2": lambda **k: mechanisms.GMMAttention(Q, M, UNITS, 3, 2, initial_sigma=2.0, **k),
    "dynamic convolution": lambda **k: mechanisms.DynamicConvolutionAttention(Q, M, UNITS, 2, 5, 3, 3, **k),
}
WITH_BACKEND = [name for name in MECHANISMS if not name.startswith("gmm")]


def make(name: str, scale: float = 0.4, **options: Any) -> nn.Module:
    return make_of(MECHANISMS, name, scale, **options)


def make_of(
    mechanisms: Mapping[str, Callable[..., nn.Module]], name: str, scale: float = 0.4, **options: Any
) -> nn.Module:
    """One of a table, in float64, always the same; no parameter has its initial value."""
    torch.manual_seed(0)
    return randomize(mechanisms[name](**{"dtype": torch.float64, **options}), scale)


def allowed(masks: dict[str, Tensor]) -> Tensor:
    """(B, K, Tk)"""
    return formulas.allowed(masks, (B, K, TK))


def inputs(dtype: torch.dtype = torch.float64, memory_size: int = M) -> tuple[Tensor, Tensor]:
    """queries (T, B, K, Q) and encoder outputs."""
    queries = torch.randn(T, B, K, Q, dtype=dtype, requires_grad=True)
    return queries, torch.randn(B, TK, memory_size, dtype=dtype, requires_grad=True)


def decode(module: nn.Module, queries: Tensor, outputs: Tensor, **masks: Tensor) -> tuple[Tensor, Tensor]:
    """Contexts (T, B, K, D) and alignments (T, B, K, Tk) of steps one after the other."""
    memory = module.memory(outputs, **masks)
    state = module.initial_state(memory, queries.shape[2] if queries.dim() == 4 else 1)
    steps = []
    for query in queries:
        context, alignments, state = module(query, memory, state)
        steps.append((context, alignments))
    contexts, alignments = zip(*steps, strict=True)
    return torch.stack(contexts), torch.stack(alignments)


def decode_by_hand(
    by_hand: ByHand, module: nn.Module, queries: Tensor, outputs: Tensor, allow: Tensor
) -> tuple[Tensor, Tensor]:
    """As decode, sentence by sentence and hypothesis by hypothesis, each by itself."""
    parameters = dict(module.named_parameters()) | dict(module.named_buffers())
    alignments = torch.stack(
        [
            torch.stack(
                [
                    _rows(by_hand(parameters, list(queries[:, b, k]), list(outputs[b]), allow[b, k].tolist()), outputs)
                    for k in range(queries.shape[2])
                ],
                1,
            )
            for b in range(queries.shape[1])
        ],
        1,
    )
    products = alignments[..., None] * outputs[None, :, None]
    return products.sum(3), alignments


def _rows(steps: Sequence[Sequence[Tensor | float]], like: Tensor) -> Tensor:
    return torch.stack([torch.stack([torch.as_tensor(x, dtype=like.dtype) for x in row]) for row in steps])


def check_formula(by_hand: ByHand, module: nn.Module, masks: str) -> None:
    """Contexts, alignments and all gradients of a sequence of steps, against a loop over single source steps."""
    queries, outputs = inputs()
    got = decode(module, queries, outputs, **MASKS[masks])
    expected = decode_by_hand(by_hand, module, queries, outputs, allowed(MASKS[masks]))
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])
    named: dict[str, Any] = {"queries": queries, "outputs": outputs}
    assert_same(gradients(module, got, **named), gradients(module, expected, **named))
