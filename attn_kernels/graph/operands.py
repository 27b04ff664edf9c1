"""Writes the operands of an op into a captured graph: query, keys, bias and score vector."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from . import runtime
from .axes import Group, Index, axes_of, product, resolve, same, settle
from .dataflow import Dataflow
from .emit import Emitter
from .nodes import value_of
from .parts import Products, Projection, Roles, Scores, Term


def dtype_of(scores: Scores | Products) -> torch.dtype:
    dtype: torch.dtype = value_of(scores.node if isinstance(scores, Products) else scores.tanh).dtype
    return dtype


def dot_operands(emit: Emitter, scores: Products, part: Roles, at: Node) -> tuple[Node, Node]:
    """query (B, Tq, A) or (B, A), and keys (B, Tk, A)."""
    for leaf in (scores.query, scores.keys):
        emit.note_sizes(leaf.node, leaf.index)
    units = resolve(scores.units)
    by_query = part.by_query(units)
    return emit.arrange_leaf(scores.query, by_query, at), emit.arrange_leaf(
        scores.keys, (part.batch, part.steps, units), at
    )


def additive_operands(
    emit: Emitter, flow: Dataflow, scores: Scores, part: Roles, at: Node
) -> tuple[Node, Node, Node | None, tuple[Node, ...]]:
    """query (B, Tq, A) or (B, A), keys (B, Tk, A), bias (A,) or None; and the terms of the keys."""
    leaves = [term.leaf for term in scores.terms] + [scores.v]
    leaves += [term.projection.weight for term in scores.terms if term.projection is not None]
    for leaf in leaves:
        emit.note_sizes(leaf.node, leaf.index)
    units = resolve(scores.units)
    by_query = part.by_query(units)
    query, _ = _total(emit, flow, part.query_terms, by_query, scores, at)
    keys, steady = _total(emit, flow, part.key_terms, (part.batch, part.steps, units), scores, at)
    bias = _total(emit, flow, part.bias_terms, (units,), scores, at)[0] if part.bias_terms else None
    return query, keys, bias, steady


def score_vector(emit: Emitter, scores: Scores, scale: Any, at: Node, shifts: tuple[Node, ...] = ()) -> Node:
    v = emit.cast(emit.arrange_leaf(scores.v, (resolve(scores.units),), at), dtype_of(scores), at)
    if scale == 1.0 and not shifts:
        return v
    return emit.call(at, runtime.score_vector, v, scale, shifts)


def _total(
    emit: Emitter, flow: Dataflow, terms: list[Term], groups: tuple[Group, ...], scores: Scores, at: Node
) -> tuple[Node, tuple[Node, ...]]:
    """The sum of terms, arranged as ``groups``; and its parts: one for all terms that depend on the same arguments."""
    dtype = dtype_of(scores)
    if len(terms) == 1:
        node, index = _term(emit, terms[0], at)
        node = emit.cast(emit.arrange(node, index, groups, at), dtype, at)
        return node, (node,)
    apart = tuple((axis,) for group in groups for axis in resolve(group))
    parts: dict[frozenset[Node], Node] = {}
    for term in terms:
        node, index = _term(emit, term, at)
        present = set(axes_of(index))
        node = emit.arrange(node, index, tuple(g if g[0] in present else () for g in apart), at)
        node = emit.cast(node, dtype, at)
        made_of = flow.arguments_of(term.leaf.node)
        known = parts.get(made_of)
        parts[made_of] = node if known is None else emit.call(at, torch.add, known, node)
    total, *others = parts.values()
    for node in others:
        total = emit.call(at, torch.add, total, node)
    present = {axis for term in terms for axis in term.axes}
    index = tuple(g if g[0] in present else () for g in apart)
    total = emit.arrange(total, index, groups, at)
    return total, (total,) if len(parts) == 1 else tuple(parts.values())


def _term(emit: Emitter, term: Term, at: Node) -> tuple[Node, Index]:
    leaf, projection = term.leaf, term.projection
    node, index = emit.current(leaf.node), settle(leaf.index)
    if projection is not None:
        summed, rows = resolve(projection.axis), resolve(projection.rows)
        weight = emit.arrange_leaf(projection.weight, (rows, resolve(projection.whole)), at)
        size = product(axis.size for axis in summed)
        if not same(size, product(axis.size for axis in resolve(projection.whole))):
            weight = _columns(emit, weight, projection, at)
        kept = tuple(axis for axis in axes_of(index) if axis not in summed)
        node = emit.arrange(node, index, (*((axis,) for axis in kept), summed), at)
        node = emit.call(at, torch._C._nn.linear, node, weight)
        index = (*((axis,) for axis in kept), rows)
    if term.coefficient != 1.0:
        node = emit.call(at, torch.mul, node, term.coefficient)
    return node, index


def _columns(emit: Emitter, weight: Node, projection: Projection, at: Node) -> Node:
    """The columns of a weight that are multiplied with one part of concatenated rows."""
    start: Any = 0
    for axis in resolve(projection.before):
        size = emit.size(axis, at)
        if isinstance(start, int) and isinstance(size, int):
            start += size
        else:
            start = size if start == 0 else emit.call(at, operator.add, start, size)
    (axis,) = resolve(projection.axis)
    return emit.call(at, torch.narrow, weight, 1, start, emit.size(axis, at))
