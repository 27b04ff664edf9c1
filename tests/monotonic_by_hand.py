"""The recursions of monotonic, chunkwise and stepwise monotonic attention, of one sentence, step by step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stepwise import UNITS, Parameters, Q


def expected_stops(p_choose: list[Any], previous: list[Any]) -> list[Any]:
    """Raffel et al. 2017, equation 8: over all k at which the step before stopped, those between it and j passed by."""
    return [
        p_choose[j] * sum(previous[k] * math.prod(1 - p_choose[i] for i in range(k, j)) for k in range(j + 1))
        for j in range(len(p_choose))
    ]


def energy_of(p: Parameters, q: Tensor, m: Tensor, rows: slice = slice(None), of: str = "") -> Tensor:
    """rows: those of the projections that are of this energy."""
    key = p["memory_projection.weight"][rows] @ m
    if "v" not in p:
        return (p["g"] if "g" in p and not of else 1.0) * (q @ key)
    hidden = p["query_projection.weight"][rows] @ q + key
    if of:
        return p[f"{of}_v"] @ torch.tanh(hidden + p[f"{of}_bias"])
    if "g" not in p:
        return p["v"] @ torch.tanh(hidden)
    return p["g"] * (p["v"] @ torch.tanh(hidden + p["bias"])) / p["v"].square().sum().sqrt()


def choices(p: Parameters, q: Tensor, memory: list[Tensor], allow: list[bool], rows: slice) -> list[Any]:
    energies = [energy_of(p, q, m, rows) + p["score_bias"] for m in memory]
    return [1 / (1 + torch.exp(-e)) if a else 0.0 for e, a in zip(energies, allow, strict=True)]


def monotonic(
    p: Parameters, queries: list[Tensor], memory: list[Tensor], allow: list[bool], rows: slice = slice(UNITS)
) -> list[list[Any]]:
    steps: list[list[Any]] = []
    previous: list[Any] = [1.0] + [0.0] * (len(memory) - 1)
    for q in queries:
        previous = expected_stops(choices(p, q, memory, allow, rows), previous)
        steps.append(previous)
    return steps


def monotonic_dot(p: Parameters, *rest: Any) -> list[list[Any]]:
    return monotonic(p, *rest, rows=slice(Q))


def chunkwise(
    p: Parameters,
    queries: list[Tensor],
    memory: list[Tensor],
    allow: list[bool],
    width: int | None = 3,
    units: int = UNITS,
) -> list[list[Any]]:
    """Chiu, Raffel 2018: the sum over all ends of chunks of the softmax in that chunk."""
    steps = []
    for q, stops in zip(queries, monotonic(p, queries, memory, allow, slice(units)), strict=True):
        exponentials = [torch.exp(energy_of(p, q, m, slice(units, 2 * units), "chunk")) for m in memory]
        row: list[Any] = [0.0] * len(memory)
        for k, stop in enumerate(stops):
            chunk = [j for j in range(0 if width is None else max(0, k - width + 1), k + 1) if allow[j]]
            if allow[k]:
                for j in chunk:
                    row[j] = row[j] + stop * exponentials[j] / sum(exponentials[i] for i in chunk)
        steps.append(row)
    return steps


def stepwise(
    p: Parameters, queries: list[Tensor], memory: list[Tensor], allow: list[bool], units: int = UNITS
) -> list[list[Any]]:
    """He et al. 2019, equation 8, of the steps that may be attended alone."""
    places = [j for j, a in enumerate(allow) if a]
    previous: list[Any] = [1.0] + [0.0] * (len(places) - 1)
    steps = []
    for q in queries:
        stay = choices(p, q, [memory[j] for j in places], [True] * len(places), slice(units))
        previous = [
            previous[j] * stay[j] + (previous[j - 1] * (1 - stay[j - 1]) if j else 0.0) for j in range(len(places))
        ]
        row: list[Any] = [0.0] * len(memory)
        for j, x in zip(places, previous, strict=True):
            row[j] = x
        steps.append(row)
    return steps


def walk(stop: list[bool], start: int | None) -> list[float]:
    """From start on to the first step that stops."""
    row = [0.0] * len(stop)
    for j in range(len(stop) if start is None else start, len(stop)):
        if stop[j]:
            row[j] = 1.0
            break
    return row
