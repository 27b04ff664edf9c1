"""Additive scores, v . tanh(sum of terms). The search goes backwards from the product with v, through the tanh, to the
terms.

The axes of a term decide whether it belongs to the query or to the keys: see axes.py.
"""

from __future__ import annotations

from torch.fx import Node

from .axes import Axis, Group, Index, NoMatch, axes_of, resolve, settle
from .contractions import PRODUCTS, Contraction, contraction
from .dataflow import Dataflow
from .nodes import argument, arguments, constant, name_of, shape_of
from .parts import Leaf, Projection, Roles, Scores, Term, factor_of
from .views import broadcast, pull


def match_additive(flow: Dataflow, node: Node, index: Index) -> Scores:
    found = contraction(node, index, flow.writes.read)
    if found is None or not found.axes:
        raise NoMatch("no product")
    for x, x_index, w, w_index in found.sides:
        try:
            return _scores(flow, node, index, found, Leaf(x, x_index, found.node), Leaf(w, w_index, found.node))
        except _NoTanh:
            continue
    raise NoMatch("no tanh")


def _scores(flow: Dataflow, node: Node, index: Index, found: Contraction, x: Leaf, w: Leaf) -> Scores:
    scale, current, at = 1.0, x, node
    while True:
        inner, inner_index = current.node, current.index
        inner = flow.writes.read(inner, current.reader)
        if name_of(inner) in ("tanh", "tanh_"):
            break
        step = pull(inner, inner_index)
        if step is not None:
            current = Leaf(*step, inner)
            continue
        factor = factor_of(inner)
        if factor is None:
            raise _NoTanh("no tanh")
        scale *= factor[1]
        current = Leaf(factor[0], inner_index, inner)
    v = flow.leaf(w)
    units = resolve(found.axes)
    if set(v.axes) != set(units) or len(v.axes) != sum(len(group) for group in settle(v.index)):
        raise NoMatch("several score vectors")
    inside = Leaf(argument(inner, 0, "input"), inner_index, inner)
    terms = _terms(flow, inside, 1.0, set(units))
    shift = None
    if found.bias is not None:
        shift = flow.leaf(Leaf(found.bias, found.bias_index, found.node))
    flow.check_one_mode(at, inner, *(term.leaf.reader for term in terms))
    return Scores(node, index, units, v, terms, inner, scale, shift)


def _terms(flow: Dataflow, leaf: Leaf, coefficient: float, units: set[Axis]) -> list[Term]:
    """The summands of a tensor."""
    node, index = flow.writes.read(leaf.node, leaf.reader), leaf.index
    name = name_of(node)
    step = pull(node, index)
    if step is not None:
        return _terms(flow, Leaf(*step, node), coefficient, units)
    if name in ("add", "iadd", "add_", "sub", "isub", "sub_") and not node.kwargs:
        terms = []
        for operand, sign in zip(arguments(node), (1.0, -1.0 if "sub" in name else 1.0), strict=False):
            number = constant(operand)
            if number is not None:
                if number != 0:
                    raise NoMatch("a number is added within the tanh")
                continue
            part = Leaf(operand, broadcast(index, operand), node)
            terms += _terms(flow, part, sign * coefficient, units)
        return terms
    if name == "neg":
        return _terms(flow, Leaf(arguments(node)[0], index, node), -coefficient, units)
    return _projected(flow, node, index, coefficient) or [Term(Leaf(node, settle(index), node), coefficient)]


def _projected(flow: Dataflow, node: Node, index: Index, coefficient: float) -> list[Term]:
    """The summands of a projection whose rows are concatenated or repeated; otherwise an empty list."""
    found = contraction(node, index, flow.writes.read)
    if found is None or not found.axes or name_of(node) == "sum":
        return []
    for x, x_index, w, w_index in found.sides:
        weight = flow.leaf(Leaf(w, w_index, found.node))
        if weight.node not in flow.constants or not set(weight.axes) <= {*found.axes, *axes_of(index)}:
            continue
        rows = tuple(axis for axis in weight.axes if axis not in resolve(found.axes))
        whole = resolve(found.axes)
        pieces = _pieces(flow, Leaf(x, x_index, found.node), found.axes, ())
        wanted = {axis for axis in axes_of(index) if axis not in rows}
        present = [{axis for axis in leaf.axes if axis not in resolve(axis_)} for leaf, axis_, _ in pieces]
        if any(set(rows) & axes for axes in present):
            continue
        if len(pieces) == 1 and (present[0] == wanted or len(resolve(found.axes)) != 1):
            return []
        if len(rows) == 0 or not all(len(resolve(axis_)) == 1 for _, axis_, _ in pieces):
            return []
        terms = [
            Term(leaf, coefficient, Projection(weight, axis_, rows, before, whole)) for leaf, axis_, before in pieces
        ]
        if found.bias is not None:
            terms += _terms(flow, Leaf(found.bias, found.bias_index, found.node), coefficient, set(rows))
        return terms
    return []


def _pieces(flow: Dataflow, leaf: Leaf, summed: Group, before: Group) -> list[tuple[Leaf, Group, Group]]:
    """The parts that are concatenated along the summed axis: tensor, axis, and the axes of the parts before it."""
    node, index = flow.writes.read(leaf.node, leaf.reader), leaf.index
    step = pull(node, index)
    if step is not None:
        return _pieces(flow, Leaf(*step, node), summed, before)
    index = settle(index)
    if name_of(node) in ("cat", "concat", "concatenate"):
        parts = argument(node, 0, "tensors")
        dim = argument(node, 1, "dim", node.kwargs.get("axis", 0))
        if isinstance(parts, (tuple, list)) and isinstance(dim, int):
            dim %= len(index)
            if index[dim] == resolve(summed):
                pieces = []
                for part in parts:
                    size = shape_of(part)[dim]
                    axis = (Axis(size),)
                    inner = Leaf(part, (*index[:dim], axis, *index[dim + 1 :]), node)
                    more = _pieces(flow, inner, axis, before)
                    pieces += more
                    before = (*before, *(x for _, group, _ in more for x in group))
                return pieces
    return [(Leaf(node, index, node), summed, before)]


class _NoTanh(NoMatch):
    pass


def roles(scores: Scores, steps: Group | None, flow: Dataflow) -> Roles:
    """Assigns axes and terms to query and keys. steps: the axes of a softmax, or None if there is none."""
    units = set(resolve(scores.units))
    index = axes_of(settle(scores.index))
    if steps is None:
        varied = [set(term.axes) - units for term in scores.terms]
        largest = max(varied, key=lambda axes: (len(axes), _elements(axes)))
        others = [axes for axes in varied if axes]
        steps = tuple(a for a in index if a in largest and any(a not in axes for axes in others))
        if not steps and index:  # all terms have the same axes; a vector shared by all may be the query
            steps = tuple(index[-1:])
    steps = resolve(steps)
    if len(scores.terms) == 1 and _is_elementwise(scores.terms[0].leaf.node):
        name = name_of(scores.terms[0].leaf.node)
        raise NoMatch(f"the tanh is of what {name!r} returns, not of a sum of query and keys")
    result = Roles((), (), steps)
    for term in scores.terms:
        axes = set(term.axes) - units
        if axes & set(steps):
            result.key_terms.append(term)
        elif axes or not flow.is_constant(term.leaf.node):
            result.query_terms.append(term)
        else:
            result.bias_terms.append(term)
    keys = {axis for term in result.key_terms for axis in term.axes}
    result.batch = tuple(axis for axis in index if axis in keys and axis not in steps)
    result.queries = tuple(axis for axis in index if axis not in keys and axis not in steps)
    if not result.key_terms or not result.query_terms:
        raise NoMatch("no query: nothing is added to the keys, so that fusing gains nothing")
    if any(axis not in index and axis not in units for term in scores.terms for axis in term.axes):
        raise NoMatch("axes that the scores do not have")
    if not set(steps) <= keys:
        raise NoMatch("steps that the keys do not have")
    return result


def _is_elementwise(node: Node) -> bool:
    """Whether a term is neither an argument nor a product, such as a normalised sum."""
    return node.op in ("call_function", "call_method") and name_of(node) not in PRODUCTS


def _elements(axes: set[Axis]) -> int:
    count = 1
    for axis in axes:
        size = axis.size
        count *= size if isinstance(size, int) else size.node.hint or 1
    return count
