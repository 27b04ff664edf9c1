"""A softmax over masked scores, and the sum of values weighted by it.

The search goes backwards: from the sum to the alignments, and through masks, factors and addends to the scores. If the
scores have no tanh, the two operands of their product are query and keys: see dot.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from .additive import match_additive
from .axes import Group, Index, NoMatch, one, resolve, settle
from .contractions import contraction
from .dataflow import Dataflow
from .dot import check_query, match_products
from .nodes import argument, arguments, constant, is_tensor, name_of, shape_of, value_of
from .parts import (
    LOWEST_FILL,
    LOWEST_FILL_OF_PRODUCTS,
    Context,
    Leaf,
    Mask,
    Peeled,
    Products,
    Scores,
    Softmax,
    computed_factor_of,
    factor_of,
)
from .views import broadcast, pull, trace
from .writes import written

_NOT_ADDITIVE = ("no tanh", "no product")  # with these reasons, the scores may still be of another kind


def match_softmax(flow: Dataflow, node: Node, index: Index) -> Softmax:
    dim = softmax_dim(node)
    if dim is None:
        raise NoMatch("no softmax")
    steps = index[dim]  # read with ``resolve``: the search may split axes
    scores: Scores | Products
    start = Leaf(argument(node, 0, "input"), index, node)
    try:
        peeled, scores = _peel(flow, start, Peeled(), steps, lambda x, at: match_additive(flow, x, at))
    except NoMatch as error:
        try:
            peeled, scores = _peel(flow, start, Peeled(), steps, lambda x, at: match_products(flow, x, at, steps))
        except NoMatch as other:
            raise (other if str(error) in _NOT_ADDITIVE else error) from None
    flow.check_one_mode(node, scores.node, *(mask.leaf.reader for mask in peeled.masks))
    shifts = [*peeled.shifts, *(() if scores.shift is None else (scores.shift,))]
    if any(set(shift.axes) & set(resolve(steps)) for shift in shifts):
        raise NoMatch("what is added to the scores differs from step to step")
    lowest = LOWEST_FILL_OF_PRODUCTS if isinstance(scores, Products) else LOWEST_FILL
    for mask in peeled.masks:
        if not mask.is_added and not mask.fill <= lowest:
            raise NoMatch(f"masked scores are {mask.fill:g}, which is not far below all others")
    masks, factors = list(peeled.masks[::-1]), list(peeled.factors)
    return Softmax(node, index, resolve(steps), scores, masks, peeled.scale * scores.scale, factors, shifts)


def _peel(
    flow: Dataflow, current: Leaf, peeled: Peeled, steps: Group, find: Callable[[Node, Index], Any]
) -> tuple[Peeled, Any]:
    """Walks from a softmax back to the scores that ``find`` recognises, through masks, factors and addends."""
    while True:
        inner, index = flow.writes.read(current.node, current.reader), current.index
        step = pull(inner, index)
        if step is not None:
            current = Leaf(*step, inner)
            continue
        masked = _mask(flow, inner, index, current.node)
        if masked is not None:
            mask, current = masked
            if peeled.factors:
                raise NoMatch("masked scores are multiplied by a number that is computed")
            peeled = peeled._replace(masks=(*peeled.masks, mask._replace(fill=mask.fill * peeled.scale)))
            continue
        factor = factor_of(inner)
        if factor is not None:
            if not factor[1] > 0 and peeled.masks:
                raise NoMatch("masked scores change their sign")
            peeled = peeled._replace(scale=peeled.scale * factor[1])
            current = Leaf(factor[0], index, inner)
            continue
        computed = computed_factor_of(inner)
        if computed is not None:
            peeled = peeled._replace(factors=(*peeled.factors, computed[1]))
            current = Leaf(computed[0], index, inner)
            continue
        break
    reason: NoMatch | None = None
    for scores, added in _sums(flow, inner, index, peeled, steps):
        try:
            return _peel(flow, scores, added, steps, find)
        except NoMatch as error:
            reason = reason or error
    if reason is not None:
        raise reason
    if not _whole(inner, index):
        raise NoMatch("a softmax of some of the scores")
    return peeled, find(inner, settle(index))


def _sums(flow: Dataflow, node: Node, index: Index, peeled: Peeled, steps: Group) -> list[tuple[Leaf, Peeled]]:
    """The operand of a sum that may be scores; the other operand is recorded as a shift or an additive mask."""
    name = name_of(node)
    if name not in ("add", "iadd", "add_", "sub", "isub", "sub_") or node.kwargs or len(node.args) != 2:
        return []
    found = []
    for scores, added in (arguments(node), arguments(node)[::-1])[: 1 if "sub" in name else 2]:
        if not (is_tensor(scores) and is_tensor(added)) or len(shape_of(scores)) != len(index):
            continue
        leaf = flow.leaf(Leaf(added, broadcast(index, added), node))
        if not set(leaf.axes) & set(resolve(steps)):
            more = peeled._replace(shifts=(*peeled.shifts, leaf))
        elif peeled.factors or not value_of(scores).dtype == value_of(added).dtype == value_of(node).dtype:
            continue
        else:
            mask = Mask(leaf, False, -peeled.scale if "sub" in name else peeled.scale, is_added=True)
            more = peeled._replace(masks=(*peeled.masks, mask))
        found.append((Leaf(scores, broadcast(index, scores), node), more))
    return found


def _mask(flow: Dataflow, node: Node, index: Index, read: Node) -> tuple[Mask, Leaf] | None:
    """A mask and the scores that it was applied to. node: ``read``, or the node that wrote to it."""
    name = name_of(node)
    if name in ("masked_fill", "masked_fill_"):
        source, mask, fill = _arguments(node, "input", "mask", "value")
        keep = False
    elif name == "where" and node.op == "call_function":
        mask, source, fill = _arguments(node, "condition", "input", "other")
        keep = True
        if is_tensor(fill):
            if constant(source) is not None or _is_filled(source) is not False:
                source, fill, keep = fill, source, False
    elif name == "where":
        source, mask, fill = _arguments(node, "input", "condition", "other")
        keep = True
    elif name == "setitem":
        source, mask, fill = arguments(node)
        keep = False
    else:
        return None
    hidden = False
    if node is not read:  # written to in place: the previous value is the scores
        hidden = value_of(read).requires_grad and not value_of(source).requires_grad
        source = read
    return _masked(flow, node, index, source, mask, fill, keep, hidden)


def _masked(
    flow: Dataflow, node: Node, index: Index, source: Any, mask: Any, fill: Any, keep: bool, hidden: bool
) -> tuple[Mask, Leaf] | None:
    number = constant(fill) if constant(fill) is not None else _is_filled(fill)
    if not (is_tensor(source) and is_tensor(mask)) or number is None or number is False:
        return None
    if value_of(mask).dtype != torch.bool:
        return None
    if name_of(node) == "setitem" and len(shape_of(mask)) != len(shape_of(source)):
        return None
    while name_of(mask) in ("invert", "bitwise_not", "logical_not"):
        if not flow.writes.unchanged(mask, mask, node) or not is_tensor(mask.args[0]):
            break
        if value_of(mask.args[0]).dtype != torch.bool or not flow.writes.unchanged(mask.args[0], mask, node):
            break
        mask, keep = mask.args[0], not keep
    leaf = flow.leaf(Leaf(mask, broadcast(index, mask), node))
    return Mask(leaf, keep, number, hidden), Leaf(source, broadcast(index, source), node)


def match_context(flow: Dataflow, node: Node, index: Index) -> Context:
    found = contraction(node, index, flow.writes.read)
    if found is None or not found.axes:
        raise NoMatch("no product")
    for a, a_index, x, x_index in found.sides:
        alignments, inner = trace(flow.writes.read(a, found.node), a_index, flow.writes.read)
        if softmax_dim(alignments) is None:
            continue
        if not _whole(alignments, inner):
            raise NoMatch("a sum over some of the alignments")
        softmax = match_softmax(flow, alignments, settle(inner))
        if set(softmax.steps) != set(resolve(found.axes)):
            raise NoMatch("a sum over other axes than the steps")
        values = flow.leaf(Leaf(x, x_index, found.node))
        if isinstance(softmax.scores, Products):
            check_query(softmax.scores, values)
        return Context(node, index, softmax, values)
    raise NoMatch("no alignments")


def softmax_dim(node: Node) -> int | None:
    """The dimension of a softmax in the dtype of its argument; None for another node."""
    if name_of(node) != "softmax" or not is_tensor(node) or not is_tensor(argument(node, 0, "input")):
        return None
    if value_of(node).dtype != value_of(argument(node, 0, "input")).dtype:
        return None
    rank = len(shape_of(node))
    dim = argument(node, 1, "dim")
    if dim is None:
        dim = 0 if rank in (0, 1, 3) else 1
    return dim % rank if isinstance(dim, int) and rank else None


def _whole(node: Node, index: Index) -> bool:
    """Whether an index runs over all elements, each once."""
    value = value_of(node) if is_tensor(node) else value_of(node.args[0])
    axes = [axis for group in settle(index) for axis in group]
    return len(set(axes)) == len(axes) and all(
        group or one(size) for group, size in zip(index, value.shape, strict=True)
    )


def _arguments(node: Node, *names: str) -> tuple[Any, ...]:
    return tuple(argument(node, i, name) for i, name in enumerate(names))


def _is_filled(node: Any) -> Any:
    """The number that all elements of a tensor have; False if that is not known."""
    if not is_tensor(node):
        return False
    name = name_of(node)
    if name in ("full", "full_like", "new_full"):
        number = constant(argument(node, 1, "fill_value"))
        if name == "new_full":
            number = constant(argument(node, 2, "fill_value"))
        return False if number is None or (node.users and any(_writes_to(node))) else number
    if name in ("tensor", "scalar_tensor"):
        number = constant(argument(node, 0, "data"))
        return False if number is None else number
    factor = factor_of(node)  # torch.ones_like(e) * -1e9
    if factor is not None:
        if name_of(factor[0]) in ("ones_like", "ones", "new_ones") and not any(_writes_to(factor[0])):
            return factor[1]
    return False


def _writes_to(node: Node) -> list[Node]:
    return [user for user in node.users if node in written(user)]
