"""TensorFlow Addons 0.23.0: what its monotonic attention gave with TensorFlow 2.15.1. Neither has to be installed."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from attn_kernels.mechanisms import MonotonicAttention, monotonic_alignments

B, T, TK, Q, M, UNITS = 2, 4, 7, 3, 4, 6
LENGTHS = torch.tensor([7, 5])


def numbers(first: int, *shape: int) -> Tensor:
    """sin(first), sin(first + 1), ...: the weights and inputs that it was given, too."""
    count = int(torch.tensor(shape).prod())
    return torch.sin(torch.arange(first, first + count, dtype=torch.float64)).view(shape).float()


class Peer(NamedTuple):
    """score, normalize (the scale=True of Luong's), score_bias, first of the queries.

    stops: where the four steps of the two sentences stop with mode="hard".
    """

    score: str
    normalize: bool
    score_bias: float
    first: int
    stops: list[list[int | None]]


CASES = {
    "BahdanauMonotonicAttention": Peer("additive", False, -0.5, 110, [[2, 4], [2, 4], [2, None], [5, None]]),
    "BahdanauMonotonicAttention(normalize=True)": Peer("additive", True, -0.5, 110, [[1, 0], [1, 0], [1, 0], [1, 0]]),
    "LuongMonotonicAttention": Peer("dot", False, -1.0, 130, [[0, 0], [0, 3], [None, None], [None, None]]),
    "LuongMonotonicAttention(scale=True)": Peer("dot", True, -1.0, 130, [[0, 0], [0, 0], [1, 1], [1, 1]]),
}
# Alignments of the fourth step with mode="recursive": of each case in turn, of two sentences.
ALIGNMENTS = torch.tensor(
    [
        [0.027175, 0.053215, 0.163169, 0.100740, 0.081848, 0.201065, 0.084727],
        [0.020134, 0.066433, 0.035533, 0.086915, 0.133614, 0.0, 0.0],
        [0.111720, 0.215570, 0.278377, 0.140231, 0.087818, 0.099660, 0.031528],
        [0.116899, 0.224554, 0.120736, 0.120884, 0.145136, 0.0, 0.0],
        [0.007991, 0.236133, 0.015747, 0.043107, 0.253101, 0.008162, 0.088111],
        [0.003277, 0.249350, 0.005873, 0.032971, 0.256272, 0.0, 0.0],
        [0.003657, 0.535184, 0.004246, 0.021326, 0.270956, 0.000614, 0.048497],
        [0.000978, 0.548526, 0.000656, 0.015760, 0.268420, 0.0, 0.0],
    ]
).view(len(CASES), 2, -1)


def alignments_of_steps(name: str, mode: str) -> Tensor:
    """(T, B, Tk)"""
    score, normalize, score_bias, first, _ = CASES[name]
    units = UNITS if score == "additive" else None
    module = MonotonicAttention(Q, M, units, mode, score_bias_init=score_bias, score=score, normalize=normalize)
    weights: dict[str, Any] = {"memory_projection.weight": numbers(300, units or Q, M)}
    weights["score_bias"] = module.score_bias
    if score == "additive":
        weights |= {"query_projection.weight": numbers(200, UNITS, Q), "v": numbers(400, UNITS)}
    if normalize:
        weights["g"] = torch.tensor(1.75)
        if score == "additive":
            weights["bias"] = numbers(500, UNITS)
    module.load_state_dict(weights)
    memory = module.memory(numbers(1, B, TK, M), LENGTHS)
    state = module.initial_state(memory)
    steps = []
    for query in 2 * numbers(first, T, B, Q):
        _, alignments, state = module(query, memory, state)
        steps.append(alignments.detach())
    return torch.stack(steps)


@pytest.mark.parametrize("mode", ["recursive", "parallel"])
@pytest.mark.parametrize("name", CASES)
def test_soft(name: str, mode: str) -> None:
    """Here its mode="parallel" gave the same within 1.2e-7."""
    expected = ALIGNMENTS[list(CASES).index(name)]
    torch.testing.assert_close(alignments_of_steps(name, mode)[-1], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_hard(name: str) -> None:
    stops = [
        [row.tolist().index(1.0) if row.any() else None for row in step] for step in alignments_of_steps(name, "hard")
    ]
    assert stops == CASES[name].stops


def test_parallel_where_products_vanish() -> None:
    """Of its function ``monotonic_attention``: the exact mode, and what the other loses."""
    p_choose = torch.tensor(
        [[0.5, 0.9999, 0.99999, 0.99999, 0.5, 0.25, 0.5], [0, 1, 0.5, 0.25, 1, 0.5, 0.5]], dtype=torch.float32
    )
    previous = torch.tensor([[0.25, 0.125, 0.125, 0, 0, 0.5, 0], [0.5, 0, 0.25, 0.25, 0, 0, 0]])
    recursive = [
        [0.125, 0.249975, 0.12502375, 1.2519354e-06, 6.2682403e-12, 0.125, 0.1875],
        [0, 0.5, 0.125, 0.09375, 0.28125, 0, 0],
    ]
    parallel = [
        [0.125, 0.249975, 0.12502375, 1.2519358e-06, 6.268232e-12, 3.1340135e-06, 4.7010226e-06],
        [0, 0.5, 0, 0, 0, 0, 0],
    ]
    for mode, expected in (("recursive", recursive), ("parallel", parallel)):
        result = monotonic_alignments(p_choose, previous, mode)
        # Of a logarithm of -28, float32 rounds 2e-6 off. TensorFlow's denormal numbers are 0.
        torch.testing.assert_close(result, torch.tensor(expected), rtol=1e-5, atol=1e-25)
