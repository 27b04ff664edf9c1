"""Scores that are products of query and keys: dot, general (one side is projected before) and linear pooling."""

from __future__ import annotations

from torch.fx import Node

from .axes import Group, Index, NoMatch, axes_of, resolve, settle
from .contractions import PRODUCTS, contraction
from .dataflow import Dataflow
from .nodes import name_of
from .parts import Leaf, Products, Roles


def match_products(flow: Dataflow, node: Node, index: Index, steps: Group) -> Products:
    """The operand with the axis of steps is the keys, the other one is the query."""
    found = contraction(node, index, flow.writes.read)
    if found is None or not found.axes:
        raise NoMatch("no product")
    a = flow.leaf(Leaf(found.a, found.a_index, found.node))
    b = flow.leaf(Leaf(found.b, found.b_index, found.node))
    units, along = set(resolve(found.axes)), set(resolve(steps))
    for query, keys in ((a, b), (b, a)):
        if along <= set(keys.axes) and not along & set(query.axes):
            break
    else:
        raise NoMatch("no query and keys")
    if not along or not units <= set(query.axes) & set(keys.axes):
        raise NoMatch("no query and keys")
    if flow.is_constant(keys.node):
        raise NoMatch("the keys are weights")
    shift = None if found.bias is None else flow.leaf(Leaf(found.bias, found.bias_index, found.node))
    return Products(node, index, found.axes, query, keys, shift, flow.is_constant(query.node))


def check_query(scores: Products, values: Leaf | None) -> None:
    """Pooling by a weight vector is matched for plain or projected keys, not for features of them (tanh, gates)."""
    if scores.is_pooling and (values is None or (scores.keys.node is not values.node and not _is_product(scores.keys))):
        made_by = name_of(scores.keys.node)
        if "tanh" in made_by:
            raise NoMatch("no product")  # probably additive: match_additive reports why it did not match
        raise NoMatch(
            f"no query: scores are weights times features of {made_by}, an op computes those of tanh of a sum"
        )


def _is_product(leaf: Leaf) -> bool:
    return name_of(leaf.node) in PRODUCTS


def roles_of(scores: Products, steps: Group) -> Roles:
    """Assigns the axes like :func:`attn_kernels.graph.additive.roles`."""
    units, keys = set(resolve(scores.units)), set(scores.keys.axes)
    index = axes_of(settle(scores.index))
    if {*scores.query.axes, *keys} - {*index, *units}:
        raise NoMatch("axes that the scores do not have")
    batch = tuple(axis for axis in index if axis in keys and axis not in steps)
    return Roles(batch, tuple(axis for axis in index if axis not in keys and axis not in steps), steps)
