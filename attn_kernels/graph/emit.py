"""Writes nodes into a captured graph: calls, tensors with re-ordered axes, sizes."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from . import runtime
from .axes import Axis, Group, Index, NoMatch, same, settle
from .nodes import is_tensor, value_of
from .parts import Leaf
from .writes import Writes


class Emitter:
    """Writes nodes into a graph. An equal call that was already written, before the place of use, is reused."""

    def __init__(self, graph: Graph, writes: Writes) -> None:
        self.graph = graph
        self.writes = writes
        self._written: dict[Any, Node] = {}  # by function and arguments
        self._replaced: dict[Node, Node] = {}
        self._sizes: dict[Axis, tuple[Node, int]] = {}

    def arrange_leaf(self, leaf: Leaf, groups: tuple[Group, ...], at: Node) -> Node:
        self.note_sizes(leaf.node, leaf.index)
        return self.arrange(self.current(leaf.node), settle(leaf.index), groups, at)

    def arrange(self, node: Node, index: Index, groups: Index, at: Node) -> Node:
        """``node`` with the dimensions of ``groups``; it is expanded along axes that it does not have."""
        index, groups = settle(index), settle(groups)
        if index == groups:
            return node
        have = [axis for group in index for axis in group]
        want = [axis for group in groups for axis in group]
        if len(set(have)) != len(have) or not set(have) <= set(want):
            raise NoMatch("a diagonal or another axis of a tensor")
        order = [axis for axis in want if axis in have]
        if not any(len(group) > 1 for group in (*index, *groups)) and order == have and len(have) == len(index):
            return self._insert_axes(node, have, groups, at)
        if index != tuple((axis,) for axis in have):
            node = self.call(at, torch.reshape, node, tuple(self.size(axis, at) for axis in have))
        if order != have:
            node = self.call(at, torch.permute, node, tuple(have.index(axis) for axis in order))
        if tuple((axis,) for axis in order) == groups:
            return node
        if order != want:
            node = self._insert_axes(node, order, tuple((axis,) for axis in want), at)
        if tuple((axis,) for axis in want) == groups:
            return node
        shape = []
        for group in groups:
            sizes = [self.size(axis, at) for axis in group]
            size: Any = 1
            for factor in sizes:
                size = (
                    size * factor
                    if isinstance(size, int) and isinstance(factor, int)
                    else (factor if size == 1 else self.call(at, operator.mul, size, factor))
                )
            shape.append(size)
        return self.call(at, torch.reshape, node, tuple(shape))

    def _insert_axes(self, node: Node, have: list[Axis], groups: Index, at: Node) -> Node:
        """Inserts the missing axes. Each group has one axis or none."""
        sizes: list[Any] = []
        for dim, group in enumerate(groups):
            if group and group[0] in have:
                sizes.append(-1)
                continue
            node = self.call(at, torch.unsqueeze, node, dim)
            sizes.append(self.size(group[0], at) if group else 1)
        if all(size == -1 or size == 1 for size in sizes):
            return node
        return self.call(at, torch.Tensor.expand, node, *sizes)

    def note_sizes(self, node: Node, index: Index) -> None:
        for dim, group in enumerate(settle(index)):
            if len(group) == 1:
                self._sizes.setdefault(group[0], (node, dim))

    def size(self, axis: Axis, at: Node) -> Any:
        if isinstance(axis.size, int):
            return axis.size
        node, dim = self._sizes.get(axis) or self._sized_alike(axis.size)
        return self.call(at, torch.Tensor.size, self.current(node), dim)

    def _sized_alike(self, size: Any) -> tuple[Node, int]:
        """A graph argument that has a dimension of this size in all calls."""
        for node in self.graph.nodes:
            if node.op == "placeholder" and is_tensor(node):
                for dim, other in enumerate(value_of(node).shape):
                    if same(size, other):
                        return node, dim
        raise NoMatch(f"a size that no tensor has: {size}")

    def current(self, node: Node) -> Node:
        while node in self._replaced:
            node = self._replaced[node]
        return node

    def call(self, at: Node, function: Any, *args: Any) -> Node:
        """Writes a call before ``at``, or reuses an equal call that is already there."""
        key = (function, args)
        known = self._written.get(key)
        if known is not None and self.writes.position[known] <= self.writes.position[at]:
            return known
        with self.graph.inserting_before(at):
            node = self.graph.call_function(function, args)
        node.meta["example_value"] = _example(function, args)
        self.writes.adopt(node, at)
        self._written[key] = node
        return node

    def replace(self, old: Node, new: Node, at: Node) -> None:
        value, other = value_of(old), value_of(new)
        if isinstance(other, torch.Tensor) and other.dtype != value.dtype:
            new = self.cast(new, value.dtype, at)
        old.replace_all_uses_with(new)
        self._replaced[old] = new

    def cast(self, node: Node, dtype: torch.dtype, at: Node) -> Node:
        value = value_of(node)
        if isinstance(value, torch.Tensor) and value.dtype != dtype:
            return self.call(at, torch.Tensor.to, node, dtype)
        return node


def _example(function: Any, args: tuple[Any, ...]) -> Any:
    """The fake result of a written call."""
    if function in (runtime.attention, runtime.dot, runtime.scores):
        query, keys = value_of(args[0]), value_of(args[1])
        device = query.device.type
        dtype = query.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        rows = query.shape[:-1]
        alignments = query.new_empty((*rows, keys.shape[1]), dtype=dtype)
        if function is runtime.scores:
            return alignments
        context = None if args[2] is None else query.new_empty((*rows, value_of(args[2]).shape[2]), dtype=dtype)
        return context, alignments

    def given(arg: Any) -> Any:
        if isinstance(arg, (tuple, list)):
            return type(arg)(given(x) for x in arg)
        return value_of(arg)

    return function(*(given(arg) for arg in args))
