"""The ops with a gate and several score vectors in plain PyTorch: the reference, with its results in the op's layout.

v is (R, A). The R rows of a query are consecutive: (B, Tq R, Tk).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import reference
from .activations import ACTIVATIONS

# For each number of the op, a function that turns it into keyword arguments of the reference.
NUMBERS: tuple[Callable[[Any], dict[str, Any]], ...] = (
    lambda i: dict(activation=ACTIVATIONS[i]),
    lambda slope: dict(negative_slope=slope),
)


def scores(*arguments: Any) -> tuple[Tensor]:
    """arguments: query, keys, v, bias, gate, extra, activation, negative_slope."""
    *inputs, gate, extra, activation, negative_slope = arguments
    keywords: dict[str, Any] = dict(activation=ACTIVATIONS[activation], negative_slope=negative_slope)
    return (reference.additive_scores(*inputs, gate=gate, extra=extra, **keywords).flatten(1, 2),)


def attention(*arguments: Any, score_bias: Tensor | None, **keywords: Any) -> tuple[Tensor, ...]:
    """arguments: query, keys, values, v, bias, gate. keywords: keyword arguments of the reference."""
    *inputs, gate = arguments
    query, _, _, v, _ = inputs
    if score_bias is not None:
        score_bias = score_bias.unflatten(1, (query.shape[1], len(v)))
    keywords |= dict(gate=gate, score_bias=score_bias)
    found = reference.additive_attention(*inputs, **keywords)
    return tuple(result.flatten(1, 2) for result in found if result is not None)
