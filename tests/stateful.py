"""Stateful mechanisms for tests: how each is constructed, and its formula, one step and one pair at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import formulas
from attn_kernels import Memory
from attn_kernels.mechanisms import (
    CoverageAttention,
    ForwardAttention,
    LocationSensitiveAttention,
    StatefulAttention,
)
from formulas import assert_same as assert_same

B, T, TK, Q, M, UNITS = 4, 3, 5, 6, 7, 8
SCALE = 1.5

Row = list[Tensor]  # one number for each step of a memory
Parameters = dict[str, Tensor]


def convolved(p: Parameters, rows: list[Row], j: int) -> Tensor:
    """(units,): U f_j, where f_j is the convolution of the rows at j."""
    weight = p["location_convolution.weight"]
    channels, inputs, taps = weight.shape
    features = weight.new_zeros(channels)
    for i, tap in itertools.product(range(inputs), range(taps)):
        if 0 <= j + tap - taps // 2 < len(rows[i]):
            features = features + weight[:, i, tap] * rows[i][j + tap - taps // 2]
    return p["location_projection.weight"] @ features


def probabilities(scores: dict[int, Tensor], zero: Tensor) -> Row:
    """Softmax over the steps that have a score; 0 elsewhere."""
    total = sum(score.exp() for score in scores.values())
    return [scores[j].exp() / total if j in scores else zero for j in range(TK)]


def add(a: Row, b: Row) -> Row:
    return [x + y for x, y in zip(a, b, strict=True)]


class Mechanism(NamedTuple):
    """make: returns the module. extra: a function of parameters, state and a memory step. follow: the next state.

    A state is a list: the rows of the module's state and, for forward attention, u. first: the initial state.
    """

    make: Callable[..., StatefulAttention]
    extra: Callable[[Parameters, list[Any], int], Tensor | float]
    follow: Callable[[list[Any], Row], list[Any]]
    parameters: dict[str, tuple[int, ...]]
    first: str = "zeros"
    agent: bool = False

    @property
    def is_forward(self) -> bool:
        return self.first == "forward"


COMMON = {
    "query_projection.weight": (UNITS, Q),
    "memory_projection.weight": (UNITS, M),
    "v": (UNITS,),
    "bias": (UNITS,),
}
PROJECTION = {"location_projection.weight": (UNITS, 2)}
AGENT = {"transition.weight": (1, M + Q), "transition.bias": (1,)}
MECHANISMS = {
    "location": Mechanism(
        lambda **k: LocationSensitiveAttention(Q, M, UNITS, 2, 3, scale=SCALE, **k),
        lambda p, known, j: convolved(p, known, j),
        lambda known, row: [row],
        COMMON | PROJECTION | {"location_convolution.weight": (2, 1, 3)},
    ),
    "location-cumulative": Mechanism(
        lambda **k: LocationSensitiveAttention(Q, M, UNITS, 2, 3, cumulative=True, scale=SCALE, initial="uniform", **k),
        lambda p, known, j: convolved(p, known, j),
        lambda known, row: [row, add(known[1], row)],
        COMMON | PROJECTION | {"location_convolution.weight": (2, 2, 3)},
        "uniform",
    ),
    "coverage": Mechanism(
        lambda **k: CoverageAttention(Q, M, UNITS, scale=SCALE, **k),
        lambda p, known, j: p["coverage_weight"] * known[0][j],
        lambda known, row: [add(known[0], row)],
        COMMON | {"coverage_weight": (UNITS,)},
    ),
    "coverage-uniform": Mechanism(
        lambda **k: CoverageAttention(Q, M, UNITS, scale=SCALE, initial="uniform", **k),
        lambda p, known, j: p["coverage_weight"] * known[0][j],
        lambda known, row: [add(known[0], row)],
        COMMON | {"coverage_weight": (UNITS,)},
        "uniform",
    ),
    "forward": Mechanism(
        lambda **k: ForwardAttention(Q, M, UNITS, scale=SCALE, **k),
        lambda p, known, j: 0.0,
        lambda known, row: [row, known[1]],
        COMMON,
        "forward",
    ),
    "forward-agent": Mechanism(
        lambda **k: ForwardAttention(Q, M, UNITS, transition_agent=True, scale=SCALE, **k),
        lambda p, known, j: 0.0,
        lambda known, row: [row, known[1]],
        COMMON | AGENT,
        "forward",
        True,
    ),
    "forward-location": Mechanism(
        lambda **k: ForwardAttention(Q, M, UNITS, True, 2, 3, scale=SCALE, **k),
        lambda p, known, j: convolved(p, known[:1], j),
        lambda known, row: [row, known[1]],
        COMMON | AGENT | PROJECTION | {"location_convolution.weight": (2, 1, 3)},
        "forward",
        True,
    ),
}

GENERATOR = torch.Generator().manual_seed(1)
MASKS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "lengths": {"memory_lengths": torch.tensor([5, 0, 2, 1])},
    "mask": {"mask": torch.rand(B, TK, generator=GENERATOR) < 0.6},
    "mask per hypothesis": {"mask": torch.rand(B, 2, TK, generator=GENERATOR) < 0.6},
    "both": {
        "memory_lengths": torch.tensor([4, 5, 3, 0], dtype=torch.int32),
        "mask": torch.rand(B, TK, generator=GENERATOR) < 0.6,
    },
}


def make(mechanism: Mechanism, **options: Any) -> StatefulAttention:
    return formulas.randomize(mechanism.make(**{"dtype": torch.float64, **options}))


def inputs(hypotheses: int = 2, steps: int = T, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Queries (T, B, K, Q) and encoder outputs (B, Tk, M)."""
    queries = torch.randn(steps, B, hypotheses, Q, dtype=dtype, requires_grad=True)
    return queries, torch.randn(B, TK, M, dtype=dtype, requires_grad=True)


def allowed(masks: dict[str, Tensor], hypotheses: int) -> Tensor:
    """(B, K, Tk)"""
    return formulas.allowed(masks, (B, hypotheses, TK))


def take(
    module: StatefulAttention, queries: Tensor, memory: Memory, state: Any = None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Contexts (T, B, K, M) and alignments (T, B, K, Tk) of all steps, and the final state."""
    state = module.initial_state(memory, queries.shape[2]) if state is None else state
    results = []
    for query in queries:
        context, alignments, state = module(query, memory, state)
        results.append((context, alignments))
    contexts, alignments = (torch.stack(parts) for parts in zip(*results, strict=True))
    return contexts, alignments, list(state)


def by_hand(
    mechanism: Mechanism, module: nn.Module, queries: Tensor, outputs: Tensor, allow: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Like ``take``, but computes each hypothesis of each sentence separately. allow: (B, K, Tk)."""
    p = dict(module.named_parameters())
    steps, batch, hypotheses = queries.shape[:3]
    results: list[tuple[Tensor, Tensor]] = []
    ends = []
    zero = outputs.new_zeros(())
    for b, k in itertools.product(range(batch), range(hypotheses)):
        may = allow[b, k].nonzero().flatten().tolist()
        for_any = allow[b].any(0).nonzero().flatten().tolist()
        first = [zero] * TK
        if mechanism.first == "uniform":
            first = [zero + (1 / len(for_any) if j in for_any else 0) for j in range(TK)]
        elif mechanism.is_forward and for_any:
            first[for_any[0]] = zero + 1
        known: list[Any] = [first, zero + 0.5] if mechanism.is_forward else [first, first]
        for t in range(steps):
            query = p["query_projection.weight"] @ queries[t, b, k]
            scores = {}
            for j in may:
                extra = mechanism.extra(p, known, j)
                hidden = query + p["memory_projection.weight"] @ outputs[b, j] + extra + p["bias"]
                scores[j] = SCALE * (p["v"] @ hidden.tanh())
            row = probabilities(scores, zero)
            if mechanism.is_forward:
                before, u = known
                row = [((1 - u) * before[j] + u * (before[j - 1] if j > 0 else 0)) * row[j] for j in range(TK)]
                total = sum(row)
                row = [x / total for x in row] if total > 0 else [zero] * TK
            context = sum((row[j] * outputs[b, j] for j in may), outputs.new_zeros(M))
            known = mechanism.follow(known, row)
            if mechanism.agent:
                joined = torch.cat([context, queries[t, b, k]])
                known[1] = torch.sigmoid(p["transition.weight"][0] @ joined + p["transition.bias"][0])
            results.append((context, torch.stack(row)))
        ends.append(known)
    shape = (batch, hypotheses)
    contexts, rows = (torch.stack(x).unflatten(0, (*shape, steps)) for x in zip(*results, strict=True))
    states = [
        torch.stack([torch.stack(x) if isinstance(x, list) else x[None] for x in of]).unflatten(0, shape)
        for of in zip(*ends, strict=True)
    ]
    return contexts.movedim(2, 0), rows.movedim(2, 0), states


def gradients(module: nn.Module, results: Sequence[Tensor], **tensors: Tensor) -> dict[str, Tensor]:
    """Like ``formulas.gradients``, with names that begin with "d"."""
    return {f"d{name}": gradient for name, gradient in formulas.gradients(module, results, **tensors).items()}
