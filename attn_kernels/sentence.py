"""What adapters of ``patches/`` share: the memory is projected once for many steps, masks, dtypes of alignments."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .derived import are_readable, checksums, once, value_of
from .stock import is_stock


def project(module: Any, layer: Any, rows: Tensor, *, shown: bool = False) -> Tensor:
    """``layer(rows)``; without gradients, rows that it was given the last time are not projected again.

    module: what the projection is kept for. layer: a ``nn.Linear``; another module is just called. rows: (B, Tk, M),
    encoder outputs. shown: whether other code gets the result, and so may write to it. Returns (B, Tk, A).

    A beam search may give it the rows re-ordered, a copy for each hypothesis: then the keys are re-ordered.
    """
    if torch.is_grad_enabled() or not is_plain(layer) or not are_readable(rows):
        return layer(rows)
    return once(module, "projection", _Projection, read=(layer.weight, layer.bias))(layer, rows, shown)


class _Projected(NamedTuple):
    """Rows, by their layout and checksums, and what a layer made of them."""

    layout: tuple[Any, ...]
    sums: list[int]
    keys: Tensor
    value: Any  # of the keys, if they are shown


class _Projection:
    """A layer whose weights do not change, and the last rows that it was given."""

    def __init__(self) -> None:
        self._last: _Projected | None = None

    def __call__(self, layer: nn.Linear, rows: Tensor, shown: bool) -> Tensor:
        layout, sums = (rows.shape[1:], rows.dtype), checksums(rows, len(rows))
        keys = self._select(layout, sums)
        if keys is None:
            keys = layer(rows)
        if self._last is None or keys is not self._last.keys:
            self._last = _Projected(layout, sums, keys, value_of(keys) if shown else None)
        return keys

    def _select(self, layout: tuple[Any, ...], sums: list[int]) -> Tensor | None:
        """The keys of rows that are all among the last ones."""
        last = self._last
        if last is None or last.layout != layout or (last.value is not None and last.value != value_of(last.keys)):
            return None
        if last.sums == sums:
            return last.keys
        places = {x: i for i, x in enumerate(last.sums)}
        indices = [places.get(x) for x in sums]
        return None if None in indices else last.keys.index_select(0, torch.tensor(indices, dtype=torch.int64))


def is_plain(layer: Any) -> bool:
    """Whether a layer does what its weight and bias say, and nothing else."""
    if type(layer) is not nn.Linear:
        return False
    if not is_compiling():
        return is_stock(layer)
    # In terms that torch.compile can trace.
    hooks = layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks
    return type(layer.weight) is nn.Parameter and "forward" not in vars(layer) and not hooks


def attended_steps(module: Any, mask: Tensor, keep: bool) -> Tensor | None:
    """(B, Tk) bool, True = attend, of a bool mask in which ``keep`` means that; None if a row may attend nothing.

    Such rows give NaN in most libraries, and in ours zeros.
    """
    return once(module, "attended", lambda: _attended_steps(mask, keep), read=(mask,), held=(mask,) if keep else ())


def _attended_steps(mask: Tensor, keep: bool) -> Tensor | None:
    allowed = mask if keep else ~mask
    return allowed if bool(allowed.any(1).all()) else None


def as_of_softmax(alignments: Tensor) -> Tensor:
    """Alignments in the dtype that a softmax has under autocast: on a GPU float32, whatever its argument."""
    if alignments.is_cuda and torch.is_autocast_enabled("cuda") and alignments.dtype != torch.float64:
        return alignments.float()
    return alignments
