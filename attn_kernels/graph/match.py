"""What a captured graph computes: scores, a softmax over them, a weighted sum of values.

All is found backwards, by meaning: from a sum over some axes to a product with a score vector, to a tanh, to the terms
of a sum. Which term is a query and which a key follows from the axes that they have; see axes.py. Where there is no
tanh, the two sides of the product are query and keys themselves: dot.py. Nothing here changes the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from .axes import (
    PRODUCTS,
    Axis,
    Contraction,
    Group,
    Index,
    NoMatch,
    argument,
    arguments,
    axes_of,
    broadcast,
    constant,
    contraction,
    fresh,
    is_tensor,
    name_of,
    one,
    pull,
    resolve,
    settle,
    shape_of,
    trace,
    value_of,
)
from .dot import check_query, products
from .parts import (
    LOWEST_FILL,
    LOWEST_FILL_OF_PRODUCTS,
    Context,
    Leaf,
    Mask,
    Peeled,
    Products,
    Projection,
    Roles,
    Scores,
    Softmax,
    Term,
    computed_factor_of,
    factor_of,
)
from .writes import Writes, written


class Matcher:
    """Finds attention in a graph."""

    def __init__(self, graph: Graph, parameters: set[Node]) -> None:
        """``parameters``: the placeholders that are parameters or buffers of modules."""
        self.graph = graph
        self.writes = Writes(graph)
        self._constant_in_calls = _constants(graph, parameters)
        self._arguments = _arguments_of(graph, parameters)

    # Scores -----------------------------------------------------------------------------------------------------------

    def scores(self, node: Node, index: Index) -> Scores:
        found = contraction(node, index, self.writes.read)
        if found is None or not found.axes:
            raise NoMatch("no product")
        sides = ((found.a, found.a_index, found.b, found.b_index), (found.b, found.b_index, found.a, found.a_index))
        for x, x_index, w, w_index in sides:
            try:
                return self._scores(node, index, found, Leaf(x, x_index, found.node), Leaf(w, w_index, found.node))
            except _NoTanh:
                continue
        raise NoMatch("no tanh")

    def _scores(self, node: Node, index: Index, found: Contraction, x: Leaf, w: Leaf) -> Scores:
        scale, current, at = 1.0, x, node
        while True:
            inner, inner_index = current.node, current.index
            inner = self.writes.read(inner, current.reader)
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
        v = self.leaf(w)
        units = resolve(found.axes)
        if set(v.axes) != set(units) or len(v.axes) != sum(len(group) for group in settle(v.index)):
            raise NoMatch("several score vectors")
        inside = Leaf(argument(inner, 0, "input"), inner_index, inner)
        terms = self._terms(inside, 1.0, set(units))
        shift = None
        if found.bias is not None:
            shift = self.leaf(Leaf(found.bias, found.bias_index, found.node))
        self._one_mode(at, inner, *(term.leaf.reader for term in terms))
        return Scores(node, index, units, v, terms, inner, scale, shift)

    def _terms(self, leaf: Leaf, coefficient: float, units: set[Axis]) -> list[Term]:
        """The summands of a tensor."""
        node, index = self.writes.read(leaf.node, leaf.reader), leaf.index
        name = name_of(node)
        step = pull(node, index)
        if step is not None:
            return self._terms(Leaf(*step, node), coefficient, units)
        if name in ("add", "iadd", "add_", "sub", "isub", "sub_") and not node.kwargs:
            terms = []
            for operand, sign in zip(arguments(node), (1.0, -1.0 if "sub" in name else 1.0), strict=False):
                number = constant(operand)
                if number is not None:
                    if number != 0:
                        raise NoMatch("a number is added within the tanh")
                    continue
                part = Leaf(operand, broadcast(index, operand), node)
                terms += self._terms(part, sign * coefficient, units)
            return terms
        if name == "neg":
            return self._terms(Leaf(arguments(node)[0], index, node), -coefficient, units)
        return self._projected(node, index, coefficient) or [Term(Leaf(node, settle(index), node), coefficient)]

    def _projected(self, node: Node, index: Index, coefficient: float) -> list[Term]:
        """Summands of a projection of rows that are joined of several parts, or that are repeated; else none."""
        found = contraction(node, index, self.writes.read)
        if found is None or not found.axes or name_of(node) == "sum":
            return []
        sides = ((found.a, found.a_index, found.b, found.b_index), (found.b, found.b_index, found.a, found.a_index))
        for x, x_index, w, w_index in sides:
            weight = self.leaf(Leaf(w, w_index, found.node))
            if weight.node not in self._constant_in_calls or not set(weight.axes) <= {*found.axes, *axes_of(index)}:
                continue
            rows = tuple(axis for axis in weight.axes if axis not in resolve(found.axes))
            whole = resolve(found.axes)
            pieces = self._pieces(Leaf(x, x_index, found.node), found.axes, ())
            wanted = {axis for axis in axes_of(index) if axis not in rows}
            present = [{axis for axis in leaf.axes if axis not in resolve(axis_)} for leaf, axis_, _ in pieces]
            if any(set(rows) & axes for axes in present):
                continue
            if len(pieces) == 1 and (present[0] == wanted or len(resolve(found.axes)) != 1):
                return []
            if len(rows) == 0 or not all(len(resolve(axis_)) == 1 for _, axis_, _ in pieces):
                return []
            terms = [
                Term(leaf, coefficient, Projection(weight, axis_, rows, before, whole))
                for leaf, axis_, before in pieces
            ]
            if found.bias is not None:
                terms += self._terms(Leaf(found.bias, found.bias_index, found.node), coefficient, set(rows))
            return terms
        return []

    def _pieces(self, leaf: Leaf, summed: Group, before: Group) -> list[tuple[Leaf, Group, Group]]:
        """The parts that rows are joined of along the summed axis: tensor, axis, and what is before it."""
        node, index = self.writes.read(leaf.node, leaf.reader), leaf.index
        step = pull(node, index)
        if step is not None:
            return self._pieces(Leaf(*step, node), summed, before)
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
                        more = self._pieces(inner, axis, before)
                        pieces += more
                        before = (*before, *(x for _, group, _ in more for x in group))
                    return pieces
        return [(Leaf(node, index, node), summed, before)]

    # Softmax and context ----------------------------------------------------------------------------------------------

    def softmax(self, node: Node, index: Index) -> Softmax:
        dim = softmax_dim(node)
        if dim is None:
            raise NoMatch("no softmax")
        steps = index[dim]  # read with ``resolve``: the search may split axes
        scores: Scores | Products
        start = Leaf(argument(node, 0, "input"), index, node)
        try:
            peeled, scores = self._peel(start, Peeled(), steps, self.scores)
        except NoMatch as error:
            try:
                peeled, scores = self._peel(start, Peeled(), steps, lambda x, at: products(self, x, at, steps))
            except NoMatch as other:
                raise (other if str(error) in _NOT_ADDITIVE else error) from None
        self._one_mode(node, scores.node, *(mask.leaf.reader for mask in peeled.masks))
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
        self, current: Leaf, peeled: Peeled, steps: Group, find: Callable[[Node, Index], Any]
    ) -> tuple[Peeled, Any]:
        """Back from a softmax to what ``find`` takes for scores, through masks, factors, and what is added."""
        while True:
            inner, index = self.writes.read(current.node, current.reader), current.index
            step = pull(inner, index)
            if step is not None:
                current = Leaf(*step, inner)
                continue
            masked = self._mask(inner, index, current.node)
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
        for scores, added in self._sums(inner, index, peeled, steps):
            try:
                return self._peel(scores, added, steps, find)
            except NoMatch as error:
                reason = reason or error
        if reason is not None:
            raise reason
        if not _whole(inner, index):
            raise NoMatch("a softmax of some of the scores")
        return peeled, find(inner, settle(index))

    def _sums(self, node: Node, index: Index, peeled: Peeled, steps: Group) -> list[tuple[Leaf, Peeled]]:
        """What may be scores in a sum of two tensors, with the other noted as a shift or a mask of numbers."""
        name = name_of(node)
        if name not in ("add", "iadd", "add_", "sub", "isub", "sub_") or node.kwargs or len(node.args) != 2:
            return []
        found = []
        for scores, added in (arguments(node), arguments(node)[::-1])[: 1 if "sub" in name else 2]:
            if not (is_tensor(scores) and is_tensor(added)) or len(shape_of(scores)) != len(index):
                continue
            leaf = self.leaf(Leaf(added, broadcast(index, added), node))
            if not set(leaf.axes) & set(resolve(steps)):
                more = peeled._replace(shifts=(*peeled.shifts, leaf))
            elif peeled.factors or not value_of(scores).dtype == value_of(added).dtype == value_of(node).dtype:
                continue
            else:
                mask = Mask(leaf, False, -peeled.scale if "sub" in name else peeled.scale, is_added=True)
                more = peeled._replace(masks=(*peeled.masks, mask))
            found.append((Leaf(scores, broadcast(index, scores), node), more))
        return found

    def _mask(self, node: Node, index: Index, read: Node) -> tuple[Mask, Leaf] | None:
        """A mask and the scores that it was applied to; ``node`` is ``read``, or what wrote to it."""
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
        if node is not read:  # written to in place: what was there before is the scores
            hidden = value_of(read).requires_grad and not value_of(source).requires_grad
            source = read
        return self._masked(node, index, source, mask, fill, keep, hidden)

    def _masked(
        self, node: Node, index: Index, source: Any, mask: Any, fill: Any, keep: bool, hidden: bool
    ) -> tuple[Mask, Leaf] | None:
        number = constant(fill) if constant(fill) is not None else _is_filled(fill)
        if not (is_tensor(source) and is_tensor(mask)) or number is None or number is False:
            return None
        if value_of(mask).dtype != torch.bool:
            return None
        if name_of(node) == "setitem" and len(shape_of(mask)) != len(shape_of(source)):
            return None
        while name_of(mask) in ("invert", "bitwise_not", "logical_not"):
            if not self.writes.unchanged(mask, mask, node) or not is_tensor(mask.args[0]):
                break
            if value_of(mask.args[0]).dtype != torch.bool or not self.writes.unchanged(mask.args[0], mask, node):
                break
            mask, keep = mask.args[0], not keep
        leaf = self.leaf(Leaf(mask, broadcast(index, mask), node))
        return Mask(leaf, keep, number, hidden), Leaf(source, broadcast(index, source), node)

    def context(self, node: Node, index: Index) -> Context:
        found = contraction(node, index, self.writes.read)
        if found is None or not found.axes:
            raise NoMatch("no product")
        sides = ((found.a, found.a_index, found.b, found.b_index), (found.b, found.b_index, found.a, found.a_index))
        for a, a_index, x, x_index in sides:
            alignments, inner = trace(self.writes.read(a, found.node), a_index, self.writes.read)
            if softmax_dim(alignments) is None:
                continue
            if not _whole(alignments, inner):
                raise NoMatch("a sum over some of the alignments")
            softmax = self.softmax(alignments, settle(inner))
            if set(softmax.steps) != set(resolve(found.axes)):
                raise NoMatch("a sum over other axes than the steps")
            values = self.leaf(Leaf(x, x_index, found.node))
            if isinstance(softmax.scores, Products):
                check_query(softmax.scores, values)
            return Context(node, index, softmax, values)
        raise NoMatch("no alignments")

    # ------------------------------------------------------------------------------------------------------------------

    def leaf(self, leaf: Leaf) -> Leaf:
        """The tensor behind all views."""
        index, reader = leaf.index, leaf.reader
        node = self.writes.read(leaf.node, reader)
        while True:
            step = pull(node, index)
            if step is None or not is_tensor(node):
                break
            source = self.writes.read(step[0], node)
            reader = node
            if not is_tensor(source):
                raise NoMatch("a value that is written to in place")
            node, index = source, step[1]
        if not is_tensor(node):
            raise NoMatch("a value that is written to in place")
        return Leaf(node, settle(index), reader)

    def _one_mode(self, *nodes: Node) -> None:
        if not self.writes.same_mode(*nodes):
            raise NoMatch("grad mode or autocast is switched between")

    def arguments_of(self, node: Node) -> frozenset[Node]:
        """The placeholders, parameters aside, that a value depends on."""
        return self._arguments[node]

    def is_constant(self, node: Node) -> bool:
        """Whether a value depends on parameters alone."""
        return node in self._constant_in_calls


class _NoTanh(NoMatch):
    pass


_NOT_ADDITIVE = ("no tanh", "no product")  # reasons of those scores that may be of another kind


def roles(scores: Scores, steps: Group | None, matcher: Matcher) -> Roles:
    """Divides axes and terms; ``steps`` are those of a softmax, or None where there is none."""
    units = set(resolve(scores.units))
    index = axes_of(settle(scores.index))
    if steps is None:
        varied = [set(term.axes) - units for term in scores.terms]
        largest = max(varied, key=lambda axes: (len(axes), _elements(axes)))
        others = [axes for axes in varied if axes]
        steps = tuple(a for a in index if a in largest and any(a not in axes for axes in others))
        if not steps and index:  # all have the same axes, and a vector for all may be the query
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
        elif axes or not matcher.is_constant(term.leaf.node):
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
    """Whether a term is neither an argument nor a product, such as what a normalisation makes of a sum."""
    return node.op in ("call_function", "call_method") and name_of(node) not in PRODUCTS


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


def start(node: Node) -> Index:
    return fresh(shape_of(node))


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
    """The number that all elements of a tensor have, False where that is not known."""
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


def _elements(axes: set[Axis]) -> int:
    count = 1
    for axis in axes:
        size = axis.size
        count *= size if isinstance(size, int) else size.node.hint or 1
    return count


def _constants(graph: Graph, parameters: set[Node]) -> set[Node]:
    """Nodes that depend on parameters alone; numbers are no inputs."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if node in parameters:
                found.add(node)
        elif node.op == "get_attr" or (
            node.op != "output" and node.all_input_nodes and all(x in found for x in node.all_input_nodes)
        ):
            if node.target is not operator.setitem:
                found.add(node)
    return found


def _arguments_of(graph: Graph, parameters: set[Node]) -> dict[Node, frozenset[Node]]:
    found: dict[Node, frozenset[Node]] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            found[node] = frozenset() if node in parameters or not is_tensor(node) else frozenset((node,))
        else:
            found[node] = frozenset().union(*(found[x] for x in node.all_input_nodes))
    return found
