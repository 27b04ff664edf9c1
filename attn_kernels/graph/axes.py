"""Index variables: where the elements of a tensor come from.

An index names an element of a node's result. For each dimension it has a group of axes (index variables), the major one
first. The dimension ``B*T`` of a folded tensor has the group ``(b, t)``; a dimension of size 1 has the empty group. A
step back through a view (views.py) maps the index of its result to the index of its input. If the input is repeated
along an axis, its index does not have that axis. This module knows nothing about attention.

Sizes are ints or SymInts. Two sizes are equal only if they are equal for all sizes for which the graph is valid.
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
Index = tuple[Group, ...]  # a group for each dimension


class NoMatch(Exception):
    """The graph does not have the form that the matcher looks for. The message is the reason."""


def fresh(shape: Sequence[Any]) -> Index:
    """A new axis for each dimension, except those of size 1."""
    return tuple(() if one(size) else (Axis(size),) for size in shape)


def resolve(group: Group) -> Group:
    """The group, with each split axis replaced by its parts."""
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
