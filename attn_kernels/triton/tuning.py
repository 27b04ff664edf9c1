"""``python -m attn_kernels tune``: finds the fastest candidates of configurations.py on the current GPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..scores import AdditiveScore
from ..types import Masks
from .attention import KERNELS
from .configurations import CANDIDATES, device_name, overriding, path, write
from .decode import decode
from .inputs import Inputs as AttentionInputs
from .products import product, weighted_sum

WORTH = 0.02  # a candidate must be faster than the shipped configuration by this share, which is above noise

Sizes = tuple[int, int, int, int]


class Workload(NamedTuple):
    """The benchmark of an entry: a function of inputs of these sizes, (B, Tq, Tk, A)."""

    entry: str
    run: Callable[..., Any]
    dtype: torch.dtype
    sizes: Sequence[Sizes]
    masked: bool = False


_MANY = ((32, 50, 50, 512), (16, 100, 100, 512), (256, 74, 75, 1024))
_STEPS = ((64, 1, 50, 512), (64, 1, 200, 1024), (1, 1, 1000, 512), (1280, 1, 66, 1024), (8, 5, 200, 512))


def _scores(i: Inputs) -> Tensor:
    scores: Tensor = KERNELS["additive_scores"](i.query, i.keys, i.v, None)
    return scores


def _scores_backward(i: Inputs) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = KERNELS["additive_scores_backward"](
        i.weights, i.query, i.keys, i.v, None, True, True
    )[:3]
    return gradients


def _product(i: Inputs) -> Tensor:
    return product(i.query, i.keys, 1.0, None)


def _sums(i: Inputs) -> tuple[Tensor, ...]:
    context, _ = KERNELS["dot_attention"](i.query, i.keys, i.keys, 0.05, None, i.mask, False)
    return context, weighted_sum(i.weights, i.query, 1.0, Masks(None, i.mask), transposed=True)


def _decode(i: Inputs) -> tuple[Tensor, ...]:
    return decode(AttentionInputs(AdditiveScore(i.v), i.query, i.keys, i.keys, Masks()), True)


class Inputs(NamedTuple):
    query: Tensor  # (B, Tq, A)
    keys: Tensor  # (B, Tk, A)
    v: Tensor  # (A,)
    weights: Tensor  # (B, Tq, Tk)
    mask: Tensor | None  # (B, Tq, Tk)


def workloads() -> list[Workload]:
    single, half = torch.float32, torch.bfloat16
    return [
        Workload("scores, many tiles", _scores, single, _MANY[2:]),
        Workload("scores, few tiles", _scores, single, _MANY[:2]),
        Workload("backward", _scores_backward, single, _MANY),
        Workload("product", _product, single, _MANY),
        Workload("product 16", _product, half, _MANY),
        Workload("sum", _sums, single, _MANY),
        Workload("sum 16", _sums, half, _MANY),
        Workload("sum, masked", _sums, single, _MANY, True),
        Workload("sum 16, masked", _sums, half, _MANY, True),
        Workload("decode", _decode, single, _STEPS),
    ]


def milliseconds(function: Callable[[], Any]) -> float:
    """The median time of a call on the GPU, with cold caches."""
    median: float = triton.testing.do_bench(function, warmup=25, rep=100, return_mode="median")
    return median


def tune(
    device: torch.device,
    output: Path | None = None,
    time: Callable[[Callable[[], Any]], float] = milliseconds,
    loads: Sequence[Workload] | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Times all candidates, selects the fastest, and writes them to output (by default the user's table)."""
    name, file = device_name(device), output or path()
    say(f"tuning for {name}")
    chosen = {}
    for number, load in enumerate(loads := workloads() if loads is None else loads, 1):
        inputs = [_inputs(load, sizes, device) for sizes in load.sizes]
        shipped = CANDIDATES[load.entry][0]
        seconds = {}
        with overriding(load.entry, shipped):
            expected = [load.run(i) for i in inputs]
        for index, candidate in enumerate(CANDIDATES[load.entry]):
            with overriding(load.entry, candidate):
                try:
                    wrong = _difference([load.run(i) for i in inputs], expected)
                except (RuntimeError, triton.runtime.errors.OutOfResources) as error:  # the tile is too large
                    say(f"[{number}/{len(loads)}] {load.entry}: {_text(candidate)} does not run: {error}")
                    continue
                if wrong > _rounding(load):
                    raise RuntimeError(f"{load.entry}: {_text(candidate)} differs by {wrong:.1e}: please report this")
                seconds[index] = [time(functools.partial(load.run, i)) for i in inputs]
        # The mean over the sizes of the time relative to that of the shipped configuration.
        relative = {
            index: math.exp(sum(math.log(a / b) for a, b in zip(times, seconds[0], strict=True)) / len(times))
            for index, times in seconds.items()
        }
        best = min(relative, key=lambda index: relative[index])
        if relative[best] > 1 - WORTH:
            best = 0
        chosen[load.entry] = CANDIDATES[load.entry][best]
        say(f"[{number}/{len(loads)}] {load.entry}: {_text(chosen[load.entry])}, {relative[best]:.2f} of the time")
    write(name, chosen, file)
    say(f"written to {file}")
    return file


def _inputs(load: Workload, sizes: Sizes, device: torch.device) -> Inputs:
    B, Tq, Tk, A = sizes
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, load.dtype)

    mask = (torch.rand((B, Tq, Tk), generator=generator) < 0.8).to(device) if load.masked else None
    weights = random(B, Tq, Tk).abs() / Tk
    if mask is not None:
        weights = weights * mask
    return Inputs(random(B, Tq, A), random(B, Tk, A), random(A) / A**0.5, weights, mask)


def _rounding(load: Workload) -> float:
    """The tolerance between two orders of summation: float32 sums differ, 16-bit results by their own rounding."""
    longest = max(max(sizes[1:]) for sizes in load.sizes)
    return 4 * torch.finfo(load.dtype).eps * (longest**0.5 if load.dtype == torch.float32 else 1)


def _difference(results: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest difference between tensors, relative to the largest element of each."""
    largest = 0.0
    for a, b in zip(results, expected, strict=True):
        for x, y in zip((a,) if isinstance(a, Tensor) else a, (b,) if isinstance(b, Tensor) else b, strict=True):
            largest = max(largest, ((x.double() - y.double()).abs().max() / y.double().abs().max()).item())
    return largest


def _text(candidate: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in candidate.items())
