"""The parts of attention that are matched in a captured graph: scores, masks, softmax and context."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.fx import Node

from .axes import Axis, Group, Index, axes_of, resolve
from .nodes import arguments, constant, is_tensor, name_of, value_of

# A finite fill of masked scores must be so far below all other scores that its exponential is 0.
LOWEST_FILL = -1e6
LOWEST_FILL_OF_PRODUCTS = -1e9  # weights do not bound products


@dataclass(frozen=True)
class Leaf:
    """A tensor of the graph, ``node[index]``, with the value that ``reader`` reads."""

    node: Node
    index: Index
    reader: Node

    @property
    def axes(self) -> list[Axis]:
        return axes_of(self.index)


class Projection(NamedTuple):
    """A product of a leaf with columns of a weight, summed over the leaf's ``axis``.

    rows, whole: the axes of the weight. before: the axes whose sizes add up to the index of the first column.
    """

    weight: Leaf
    axis: Group
    rows: Group
    before: Group
    whole: Group


class Term(NamedTuple):
    """A summand in the tanh: ``coefficient * leaf``, or a projection of that leaf."""

    leaf: Leaf
    coefficient: float = 1.0
    projection: Projection | None = None

    @property
    def axes(self) -> list[Axis]:
        if self.projection is None:
            return self.leaf.axes
        summed = resolve(self.projection.axis)
        rows = resolve(self.projection.rows)
        return [axis for axis in self.leaf.axes if axis not in summed] + list(rows)


@dataclass
class Scores:
    """``node[index] = v . tanh(sum of terms) * scale + shift``, for all elements."""

    node: Node
    index: Index
    units: Group
    v: Leaf
    terms: list[Term]
    tanh: Node
    scale: float
    shift: Leaf | None


@dataclass
class Products:
    """``node[index] = query . keys + shift``, a sum over ``units``, for all elements."""

    node: Node
    index: Index
    units: Group
    query: Leaf
    keys: Leaf
    shift: Leaf | None
    is_pooling: bool  # the query is a weight
    scale: float = 1.0


class Mask(NamedTuple):
    """Scores are set to ``fill`` where ``leaf`` is True; with ``keep``, where it is False.

    With ``is_added``, ``fill * leaf`` is added to the scores instead.
    """

    leaf: Leaf
    keep: bool
    fill: float
    is_hidden: bool = False  # autograd does not see it, such as a write through ``.data``
    is_added: bool = False


class Factor(NamedTuple):
    """A number that is computed in the graph, such as the root of a size. is_divisor: scores are divided by it."""

    node: Node
    is_divisor: bool


class Peeled(NamedTuple):
    """The operations between a softmax and its scores, starting at the softmax."""

    masks: tuple[Mask, ...] = ()
    shifts: tuple[Leaf, ...] = ()
    scale: float = 1.0
    factors: tuple[Factor, ...] = ()


@dataclass
class Softmax:
    """A softmax over ``steps`` of masked scores."""

    node: Node
    index: Index
    steps: Group
    scores: Scores | Products
    masks: list[Mask]  # the first is applied first
    scale: float
    factors: list[Factor]  # of the scores, besides the scale
    shifts: list[Leaf]


@dataclass
class Context:
    """A sum over all steps of alignments times values."""

    node: Node
    index: Index
    softmax: Softmax
    values: Leaf


@dataclass
class Roles:
    """The roles of axes and terms. batch, queries, steps: axes; together they are the axes of the scores."""

    batch: Group
    queries: Group
    steps: Group
    query_terms: list[Term] = field(default_factory=list)
    key_terms: list[Term] = field(default_factory=list)
    bias_terms: list[Term] = field(default_factory=list)

    def by_query(self, last: Group) -> Index:
        """The dimensions of a tensor with one row per query: (B, Tq, last), or (B, last) without an axis of queries."""
        return (self.batch, self.queries, last) if self.queries else (self.batch, last)


def computed_factor_of(node: Node) -> tuple[Node, Factor] | None:
    """A tensor and the number that it is multiplied with or divided by, if that is computed in the graph."""
    name = name_of(node)
    is_divisor = name in ("div", "itruediv", "truediv", "divide", "div_")
    if not (is_divisor or name in ("mul", "imul", "multiply", "mul_")) or node.kwargs or len(node.args) != 2:
        return None
    for tensor, number in (arguments(node), arguments(node)[::-1])[: 1 if is_divisor else 2]:
        if is_tensor(tensor) and isinstance(value_of(number), (torch.SymInt, torch.SymFloat)):
            return tensor, Factor(number, is_divisor)
    return None


def factor_of(node: Node) -> tuple[Node, float] | None:
    """A tensor and the number that it is multiplied by."""
    name = name_of(node)
    if name in ("mul", "mul_", "imul", "multiply") and len(node.args) == 2 and not node.kwargs:
        for tensor, number in (arguments(node), arguments(node)[::-1]):
            factor = constant(number)
            if is_tensor(tensor) and factor is not None:
                return tensor, factor
    if name in ("div", "div_", "itruediv", "truediv", "divide") and len(node.args) == 2 and not node.kwargs:
        tensor, number = arguments(node)
        divisor = constant(number)
        if is_tensor(tensor) and divisor:
            return tensor, 1.0 / divisor
    if name in ("neg", "neg_") and is_tensor(arguments(node)[0]):
        return arguments(node)[0], -1.0
    return None
