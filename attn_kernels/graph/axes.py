"""Index variables: where the elements of a tensor come from.

An element of a node's result is named by an index: for each dimension a group of axes (index variables), the major one
first. The dimension ``B*T`` of a folded tensor has the group ``(b, t)``; a dimension of size 1 has the empty group. A
step back through a view (views.py) maps the index of its result to the index of its input. Axes that are lacking there
are those along which the input is repeated. Nothing here knows about attention.

Sizes are ints or SymInts. They are compared by what is known for all sizes the graph is valid for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true


class Axis:
    """An index variable. ``size``: its range. ``parts``: the axes it was split into, if it was; major first."""

    __slots__ = ("parts", "size")

    def __init__(self, size: Any) -> None:
        if isinstance(size, torch.SymInt) and size.node.expr.is_Integer:
            size = int(size.node.expr)
        self.size: Any = size
        self.parts: tuple[Axis, ...] | None = None

    def split(self, *sizes: Any) -> tuple[Axis, ...]:
        self.parts = tuple(Axis(size) for size in sizes)
        return self.parts


Group = tuple[Axis, ...]
Index = tuple[Group, ...]  # of an element: a group for each dimension


class NoMatch(Exception):
    """The graph does not have the form that is looked for. The message is the reason."""


def fresh(shape: Sequence[Any]) -> Index:
    """A new axis for each dimension but those of size 1."""
    return tuple(() if one(size) else (Axis(size),) for size in shape)


def resolve(group: Group) -> Group:
    """The group with axes that were split replaced by their parts."""
    if all(axis.parts is None for axis in group):
        return group
    result: list[Axis] = []
    for axis in group:
        result.extend((axis,) if axis.parts is None else resolve(axis.parts))
    return tuple(result)


def settle(index: Index) -> Index:
    return tuple(resolve(group) for group in index)


def axes_of(index: Index) -> list[Axis]:
    """All axes of an index, each once, in order."""
    return list(dict.fromkeys(axis for group in index for axis in resolve(group)))


def same(a: Any, b: Any) -> bool:
    return a is b or statically_known_true(a == b)


def one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def product(sizes: Any) -> Any:
    return math.prod(sizes)
