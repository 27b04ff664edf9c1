"""Per-module cache: values that adapters derive from the encoder outputs, reused by later decoding steps.

The modules of other libraries are called for one step at a time with the same memory, and have no place to store values
that could be computed from it once. This cache is outside the modules, so that copies and pickles are unaffected. An
entry is valid as long as computing it again would give the same result. Tensors that are read are compared by value:
see checksums.py. Tensors that a result only holds, or has views of, need no such check: they are read when the result
is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..checksums import are_readable, checksums, current_modes, value_of
from ..stock import is_stock_linear

T = TypeVar("T")
Sources = tuple[Tensor | None, ...]


class _Entry(NamedTuple):
    """A cached result of ``make``, and the tensors that must be unchanged for it to be valid."""

    result: Any
    values: tuple[Any, ...]  # of the tensors that were read: their layout and checksum
    held: Sources
    places: tuple[Any, ...]  # of the tensors held
    modes: tuple[Any, ...]


_entries: WeakKeyDictionary[Any, dict[str, _Entry]] = WeakKeyDictionary()


def cached(module: Any, what: str, make: Callable[[], T], *, read: Sources = (), held: Sources = ()) -> T:
    """``make()``, or its result of the last call, if it would return the same again.

    For each ``what`` the last result is cached, until another one is computed or the module is freed. It must not be
    written to, and must not hold a single-use autograd graph: it outlives a backward pass.

    Args:
        module: the module that the result belongs to.
        what: the name of the result, if a module has several.
        make: computes the result.
        read: all tensors whose values ``make`` reads. Compared by value: other tensors with equal values match.
        held: tensors that the result holds, or has views of. Compared by identity, storage and place in autograd's
            graph; their values may change.
    """
    if not are_readable(*read, *held):
        return make()
    of_module = _entries.get(module)
    if of_module is None:
        of_module = _entries[module] = {}
    entry = of_module.get(what)
    values, places, modes = tuple(map(value_of, read)), tuple(map(_place, held)), current_modes()
    if (
        entry is None
        or entry.values != values
        or entry.modes != modes
        or entry.places != places
        or not _are_same(entry.held, held)
    ):
        entry = of_module[what] = _Entry(make(), values, held, places, modes)
    kept: T = entry.result
    return kept


def clear(module: Any) -> None:
    """Drops all cached results of a module."""
    _entries.pop(module, None)


def _place(tensor: Tensor | None) -> Any:
    """A key that differs if a tensor has other storage, is another view, or has another node in autograd's graph."""
    if tensor is None:
        return None
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad, tensor.grad_fn


def _are_same(some: Sources, others: Sources) -> bool:
    for a, b in zip(some, others, strict=True):  # noqa: SIM110 - all() of a generator takes four times as long
        if a is not b:
            return False
    return True


# Projections ----------------------------------------------------------------------------------------------------------


def cached_projection(module: Any, layer: Any, rows: Tensor, *, is_shared: bool = False) -> Tensor:
    """``layer(rows)``; without gradients, the rows of the last call are not projected again.

    A beam search may pass a re-ordered copy of the rows, one for each hypothesis: then the keys are re-ordered.

    Args:
        module: the module that the projection belongs to.
        layer: a ``nn.Linear``; another module is just called.
        rows: (B, Tk, M), encoder outputs.
        is_shared: whether other code gets the result and may write to it.

    Returns:
        Keys, (B, Tk, A).
    """
    if torch.is_grad_enabled() or not is_stock_linear(layer) or not are_readable(rows):
        projected: Tensor = layer(rows)
        return projected
    return cached(module, "projection", _Projection, read=(layer.weight, layer.bias))(layer, rows, is_shared)


class _Projected(NamedTuple):
    """Rows, by their layout and checksums, and their projection."""

    layout: tuple[Any, ...]
    sums: list[int]
    keys: Tensor
    value: Any  # checksum of the keys, if they are shared


class _Projection:
    """A layer whose weights do not change, and the rows of the last call."""

    def __init__(self) -> None:
        self._last: _Projected | None = None

    def __call__(self, layer: nn.Linear, rows: Tensor, is_shared: bool) -> Tensor:
        layout, sums = (rows.shape[1:], rows.dtype), checksums(rows, len(rows))
        keys = self._gather_matching(layout, sums)
        if keys is None:
            keys = layer(rows)
        if self._last is None or keys is not self._last.keys:
            self._last = _Projected(layout, sums, keys, value_of(keys) if is_shared else None)
        return keys

    def _gather_matching(self, layout: tuple[Any, ...], sums: list[int]) -> Tensor | None:
        """The keys for rows that all occurred in the last call; otherwise None."""
        last = self._last
        if last is None or last.layout != layout or (last.value is not None and last.value != value_of(last.keys)):
            return None
        if last.sums == sums:
            return last.keys
        indices = _match_rows(last.sums, sums)
        return None if None in indices else last.keys.index_select(0, torch.tensor(indices, dtype=torch.int64))


def _match_rows(known: list[int], sums: list[int]) -> list[int | None]:
    """The index of each row among the known ones, by checksum; None for a new row."""
    places = {x: i for i, x in enumerate(known)}
    return [places.get(x) for x in sums]
