"""Writing this package's ops into a captured graph, in place of the attention that match.py finds."""

from __future__ import annotations

import operator
import re
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node

from . import runtime
from .axes import (
    PRODUCTS,
    Axis,
    Group,
    Index,
    NoMatch,
    axes_of,
    is_tensor,
    name_of,
    product,
    resolve,
    same,
    settle,
    value_of,
)
from .dead import remove_dead
from .dot import check_query, roles_of
from .keeping import keep_node
from .match import Matcher, roles, softmax_dim, start
from .parts import Context, Leaf, Mask, Products, Projection, Roles, Scores, Softmax, Term
from .writes import written

CONTEXT, ALIGNMENTS, SCORES = "context", "alignments", "scores"  # what is computed by one op, all up to there


class Found(NamedTuple):
    """Attention that was rewritten.

    kind: CONTEXT, ALIGNMENTS or SCORES. where: the qualified name of the module that computes it, "" for the one that
    was captured. reason: why no more of it. steady: nodes that may be the same in many calls.
    """

    kind: str
    where: str
    reason: str
    steady: tuple[Node, ...]


class Outcome(NamedTuple):
    """found: what was rewritten. reasons: why the rest that looks like attention was not."""

    found: list[Found]
    reasons: list[str]


def rewrite(graph_module: GraphModule, parameters: set[Node], branches: bool = True) -> Outcome:
    """Rewrites a graph in place.

    parameters: its placeholders that are parameters or buffers of modules. branches: whether what is written may depend
    on elements of tensors (whether every row of a mask attends something), and may be kept from call to call.
    """
    graph = graph_module.graph
    found, reasons = _Writer(graph, Matcher(graph, parameters), branches).run()
    if found:
        remove_dead(graph)
        if branches:
            for node in dict.fromkeys(node for one in found for node in one.steady):
                keep_node(graph, node, parameters)
            remove_dead(graph)
        graph_module.recompile()
    return Outcome(found, list(dict.fromkeys(reasons)))


class _Writer:
    def __init__(self, graph: Graph, matcher: Matcher, branches: bool) -> None:
        self.graph, self.matcher, self.writes, self._branches = graph, matcher, matcher.writes, branches
        self._written: dict[Any, Node] = {}  # calls that are written already, by function and arguments
        self._replaced: dict[Node, Node] = {}
        self._sizes: dict[Axis, tuple[Node, int]] = {}
        self._done: set[Node] = set()  # tanhs that are computed by an op now

    def run(self) -> tuple[list[Found], list[str]]:
        nodes = [node for node in self.graph.nodes if node.op in ("call_function", "call_method")]
        found: list[Found] = []
        reasons: list[str] = []
        if not any(name_of(node) in ("tanh", "tanh_", "softmax") for node in nodes):
            return found, reasons
        products = [node for node in nodes if name_of(node) in PRODUCTS and is_tensor(node)]
        contexts = self._contexts(products)
        for node in nodes:
            if softmax_dim(node) is None:
                continue
            attempts: list[Any] = [lambda c=c: self._context(c) for c in contexts.get(node, ())]
            attempts.append(lambda node=node: self._alignments(node))
            for attempt in attempts:
                try:
                    found.append(attempt())
                    break
                except NoMatch as error:
                    reasons.append(str(error))
        for node in products:
            try:
                scores = self.matcher.scores(node, start(node))
                if scores.tanh not in self._done:
                    found.append(self._scores(scores, "; ".join(dict.fromkeys(reasons))))
            except NoMatch as error:
                reasons.append(str(error))
        return found, [reason for reason in reasons if reason not in _ORDINARY]

    def _contexts(self, products: list[Node]) -> dict[Node, list[Context]]:
        """By the softmax that they take their alignments from."""
        contexts: dict[Node, list[Context]] = {}
        for node in products:
            try:
                context = self.matcher.context(node, start(node))
            except NoMatch:
                continue
            contexts.setdefault(context.softmax.node, []).append(context)
        return contexts

    # The three things that are written ------------------------------------------------------------------------------

    def _context(self, context: Context) -> Found:
        softmax, values = context.softmax, context.values
        part = self._roles(softmax)
        inner = {*part.batch, *resolve(part.steps)}
        width = tuple(axis for axis in values.axes if axis not in inner)
        if not width and value_of(values.node).dim() < len(part.batch) + len(part.steps) + 1:
            raise NoMatch("a sum of numbers, no context")
        if set(width) & set(part.queries):
            raise NoMatch("values that differ from query to query")
        if set(axes_of(settle(context.index))) != {*part.batch, *part.queries, *width}:
            raise NoMatch("a context with other axes")
        device = value_of(values.node).device.type
        if value_of(values.node).dtype != self._dtype(softmax.scores) and not torch.is_autocast_enabled(device):
            raise NoMatch("values of another dtype than the scores")
        alone = self._exclusive(softmax.node, {context.node})
        at = context.node if alone else softmax.node
        if not alone and self.writes.position[values.node] >= self.writes.position[softmax.node]:
            raise NoMatch("values that are not known yet where the alignments are used")
        call, steady = self._attention(softmax, part, (values, width), at, {softmax.node, context.node})
        result = self._call(at, operator.getitem, call, 0)
        have = (part.batch, part.queries, width) if part.queries else (part.batch, width)
        self._replace(context.node, self._arrange(result, have, settle(context.index), at), at)
        if not alone:
            self._replace_softmax(softmax, part, call, at)
        return self._found(CONTEXT, softmax.scores, "", steady)

    def _alignments(self, node: Node) -> Found:
        softmax = self.matcher.softmax(node, start(node))
        if isinstance(softmax.scores, Products):
            check_query(softmax.scores, None)
        part = self._roles(softmax)
        call, steady = self._attention(softmax, part, None, node, {node})
        self._replace_softmax(softmax, part, call, node)
        return self._found(ALIGNMENTS, softmax.scores, "", steady)

    def _scores(self, scores: Scores, reason: str) -> Found:
        part = roles(scores, None, self.matcher)
        at = scores.node
        self._check(scores, {at}, at)
        query, keys, bias, steady = self._operands(scores, part, at)
        v = self._score_vector(scores, scores.scale, at)
        shift = None if scores.shift is None else self._arrange_leaf(scores.shift, ((),), at)
        call = self._call(at, runtime.scores, query, keys, v, bias, shift)
        have = (part.batch, part.queries, part.steps) if part.queries else (part.batch, part.steps)
        self._replace(at, self._arrange(call, have, settle(scores.index), at), at)
        return self._found(SCORES, scores, reason, steady)

    def _roles(self, softmax: Softmax) -> Roles:
        if isinstance(softmax.scores, Products):
            return roles_of(softmax.scores, softmax.steps)
        return roles(softmax.scores, softmax.steps, self.matcher)

    def _found(self, kind: str, scores: Scores | Products, reason: str, steady: tuple[Node, ...]) -> Found:
        if isinstance(scores, Scores):
            self._done.add(scores.tanh)
        stack = list((scores.node.meta.get("nn_module_stack") or {}).values())
        return Found(kind, _where(stack), reason, steady)

    def _replace_softmax(self, softmax: Softmax, part: Roles, call: Node, at: Node) -> None:
        have = (part.batch, part.queries, part.steps) if part.queries else (part.batch, part.steps)
        result = self._call(at, operator.getitem, call, 1)
        self._replace(softmax.node, self._arrange(result, have, settle(softmax.index), at), at)

    def _attention(
        self, softmax: Softmax, part: Roles, values: tuple[Leaf, Group] | None, at: Node, roots: set[Node]
    ) -> tuple[Node, tuple[Node, ...]]:
        scores = softmax.scores
        if softmax.masks and not self._branches:
            raise NoMatch("a mask in torch.compile, where a row without anything to attend cannot be seen")
        if isinstance(scores, Products):
            self._check_products(scores, roots, at)
        else:
            self._check(scores, roots, at)
        for leaf in (*(mask.leaf for mask in softmax.masks), *softmax.shifts, *(() if values is None else values[:1])):
            self._check_leaf(leaf, at)
        if any(set(mask.leaf.axes) - {*part.batch, *part.queries, *part.steps} for mask in softmax.masks):
            raise NoMatch("a mask with other axes")
        scale, shifts = self._scale(softmax, at), tuple(self._current(shift.node) for shift in softmax.shifts)
        if isinstance(scores, Products):
            query, keys = self._operands_of_products(scores, part, at)
            steady: tuple[Node, ...] = (keys,)
        else:
            query, keys, bias, steady = self._operands(scores, part, at)
            v = self._score_vector(scores, scale, at, shifts)
        x = None
        if values is not None:
            x = self._arrange_leaf(values[0], (part.batch, part.steps, values[1]), at)
            steady = (*steady, x)
        masks = tuple(self._mask(mask, softmax.masks, part, at) for mask in softmax.masks)
        if isinstance(scores, Products):
            return self._call(at, runtime.dot, query, keys, x, scale, shifts, masks), steady
        return self._call(at, runtime.attention, query, keys, x, v, bias, masks), steady

    def _scale(self, softmax: Softmax, at: Node) -> float | Node:
        scale: Any = softmax.scale
        for factor in softmax.factors:
            operation = operator.truediv if factor.is_divisor else operator.mul
            scale = self._call(at, operation, scale, self._current(factor.node))
        return scale

    def _mask(self, mask: Mask, all_masks: list[Mask], part: Roles, at: Node) -> runtime.Mask:
        by_query = any(set(other.leaf.axes) & set(part.queries) for other in all_masks)
        groups = (part.batch, part.queries, part.steps) if by_query else (part.batch, part.steps)
        tensor: Any = self._arrange_leaf(mask.leaf, groups, at)
        return runtime.Mask(tensor, mask.keep, mask.fill, mask.is_hidden, mask.is_added)

    # Whether it may be written ----------------------------------------------------------------------------------------

    def _check(self, scores: Scores, roots: set[Node], at: Node) -> None:
        for term in scores.terms:
            self._check_leaf(term.leaf, at)
            if term.projection is not None:
                self._check_leaf(term.projection.weight, at)
        self._check_leaf(scores.v, at)
        if not self.writes.same_mode(scores.node, at):
            raise NoMatch("grad mode or autocast is switched between")
        if not self._exclusive(scores.tanh, roots):
            raise NoMatch("scores or their tanh are used for something else, too")

    def _check_products(self, scores: Products, roots: set[Node], at: Node) -> None:
        if not self._branches:
            raise NoMatch("dot attention is left to inductor")
        if value_of(scores.node).device.type != "cpu":
            raise NoMatch("dot attention on a GPU, where the two are not timed")
        for leaf in (scores.query, scores.keys):
            self._check_leaf(leaf, at)
        if not self.writes.same_mode(scores.node, at):
            raise NoMatch("grad mode or autocast is switched between")
        if not self._exclusive(scores.node, roots):
            raise NoMatch("scores are used for something else, too")

    def _check_leaf(self, leaf: Leaf, at: Node) -> None:
        if not self.writes.unchanged(leaf.node, leaf.reader, at):
            raise NoMatch("a value is written to in place before it would be used")

    def _exclusive(self, node: Node, roots: set[Node]) -> bool:
        """Whether a value is used for the roots only."""
        reached, waiting = {node}, [node]
        while waiting:
            current = waiting.pop()
            for user in current.users:
                if user in roots or user in reached:
                    continue
                if user.op == "output":
                    return False
                reached.add(user)
                waiting.append(user)
                for target in written(user):
                    if target not in reached and not self._dead_storage(target, reached):
                        return False
        return True

    def _dead_storage(self, target: Node, reached: set[Node]) -> bool:
        """Whether what is written to was made of the value itself: a view of it, which is as unused."""
        while target not in reached:
            sources = [source for source in target.all_input_nodes if is_tensor(source)]
            if len(sources) != 1 or target.op == "placeholder":
                return False
            target = sources[0]
        return True

    # Operands ---------------------------------------------------------------------------------------------------------

    def _dtype(self, scores: Scores | Products) -> torch.dtype:
        return value_of(scores.node if isinstance(scores, Products) else scores.tanh).dtype

    def _operands_of_products(self, scores: Products, part: Roles, at: Node) -> tuple[Node, Node]:
        """query (B, Tq, A) or (B, A), and keys (B, Tk, A)."""
        for leaf in (scores.query, scores.keys):
            self._note_sizes(leaf.node, leaf.index)
        units = resolve(scores.units)
        by_query = (part.batch, part.queries, units) if part.queries else (part.batch, units)
        return self._arrange_leaf(scores.query, by_query, at), self._arrange_leaf(
            scores.keys, (part.batch, part.steps, units), at
        )

    def _operands(self, scores: Scores, part: Roles, at: Node) -> tuple[Node, Node, Node | None, tuple[Node, ...]]:
        """query (B, Tq, A) or (B, A), keys (B, Tk, A), bias (A,) or None; and the summands of the keys."""
        leaves = [term.leaf for term in scores.terms] + [scores.v]
        leaves += [term.projection.weight for term in scores.terms if term.projection is not None]
        for leaf in leaves:
            self._note_sizes(leaf.node, leaf.index)
        units = resolve(scores.units)
        by_query = (part.batch, part.queries, units) if part.queries else (part.batch, units)
        query, _ = self._total(part.query_terms, by_query, scores, at)
        keys, steady = self._total(part.key_terms, (part.batch, part.steps, units), scores, at)
        bias = self._total(part.bias_terms, (units,), scores, at)[0] if part.bias_terms else None
        return query, keys, bias, steady

    def _score_vector(self, scores: Scores, scale: Any, at: Node, shifts: tuple[Node, ...] = ()) -> Node:
        v = self._cast(self._arrange_leaf(scores.v, (resolve(scores.units),), at), self._dtype(scores), at)
        if scale == 1.0 and not shifts:
            return v
        return self._call(at, runtime.score_vector, v, scale, shifts)

    def _total(
        self, terms: list[Term], groups: tuple[Group, ...], scores: Scores, at: Node
    ) -> tuple[Node, tuple[Node, ...]]:
        """The sum of terms, arranged as ``groups``; and its parts, each of the terms that have the same arguments."""
        dtype = self._dtype(scores)
        if len(terms) == 1:
            node, index = self._term(terms[0], at)
            node = self._cast(self._arrange(node, index, groups, at), dtype, at)
            return node, (node,)
        apart = tuple((axis,) for group in groups for axis in resolve(group))
        parts: dict[frozenset[Node], Node] = {}
        for term in terms:
            node, index = self._term(term, at)
            present = set(axes_of(index))
            node = self._arrange(node, index, tuple(g if g[0] in present else () for g in apart), at)
            node = self._cast(node, dtype, at)
            made_of = self.matcher.arguments_of(term.leaf.node)
            known = parts.get(made_of)
            parts[made_of] = node if known is None else self._call(at, torch.add, known, node)
        total = None
        for node in parts.values():
            total = node if total is None else self._call(at, torch.add, total, node)
        present = {axis for term in terms for axis in term.axes}
        index = tuple(g if g[0] in present else () for g in apart)
        total = self._arrange(total, index, groups, at)
        return total, (total,) if len(parts) == 1 else tuple(parts.values())

    def _term(self, term: Term, at: Node) -> tuple[Node, Index]:
        leaf, projection = term.leaf, term.projection
        node, index = self._current(leaf.node), settle(leaf.index)
        if projection is not None:
            summed, rows = resolve(projection.axis), resolve(projection.rows)
            weight = self._arrange_leaf(projection.weight, (rows, resolve(projection.whole)), at)
            size = product(axis.size for axis in summed)
            if not same(size, product(axis.size for axis in resolve(projection.whole))):
                weight = self._columns(weight, projection, at)
            kept = tuple(axis for axis in axes_of(index) if axis not in summed)
            node = self._arrange(node, index, (*((axis,) for axis in kept), summed), at)
            node = self._call(at, torch._C._nn.linear, node, weight)
            index = (*((axis,) for axis in kept), rows)
        if term.coefficient != 1.0:
            node = self._call(at, torch.mul, node, term.coefficient)
        return node, index

    def _columns(self, weight: Node, projection: Projection, at: Node) -> Node:
        """The columns of a weight that a part of joined rows is multiplied with."""
        start: Any = 0
        for axis in resolve(projection.before):
            size = self._size(axis, at)
            if isinstance(start, int) and isinstance(size, int):
                start += size
            else:
                start = size if start == 0 else self._call(at, operator.add, start, size)
        (axis,) = resolve(projection.axis)
        return self._call(at, torch.narrow, weight, 1, start, self._size(axis, at))

    def _cast(self, node: Node, dtype: torch.dtype, at: Node) -> Node:
        value = value_of(node)
        if isinstance(value, torch.Tensor) and value.dtype != dtype:
            return self._call(at, torch.Tensor.to, node, dtype)
        return node

    # Writing ----------------------------------------------------------------------------------------------------------

    def _arrange_leaf(self, leaf: Leaf, groups: tuple[Group, ...], at: Node) -> Node:
        self._note_sizes(leaf.node, leaf.index)
        return self._arrange(self._current(leaf.node), settle(leaf.index), groups, at)

    def _arrange(self, node: Node, index: Index, groups: Index, at: Node) -> Node:
        """``node`` with dimensions as ``groups`` say; along axes that it lacks it is repeated."""
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
            node = self._call(at, torch.reshape, node, tuple(self._size(axis, at) for axis in have))
        if order != have:
            node = self._call(at, torch.permute, node, tuple(have.index(axis) for axis in order))
        if tuple((axis,) for axis in order) == groups:
            return node
        if order != want:
            node = self._insert_axes(node, order, tuple((axis,) for axis in want), at)
        if tuple((axis,) for axis in want) == groups:
            return node
        shape = []
        for group in groups:
            sizes = [self._size(axis, at) for axis in group]
            size: Any = 1
            for factor in sizes:
                size = (
                    size * factor
                    if isinstance(size, int) and isinstance(factor, int)
                    else (factor if size == 1 else self._call(at, operator.mul, size, factor))
                )
            shape.append(size)
        return self._call(at, torch.reshape, node, tuple(shape))

    def _insert_axes(self, node: Node, have: list[Axis], groups: Index, at: Node) -> Node:
        """Groups of one axis or none: those that are lacking are inserted."""
        sizes: list[Any] = []
        for dim, group in enumerate(groups):
            if group and group[0] in have:
                sizes.append(-1)
                continue
            node = self._call(at, torch.unsqueeze, node, dim)
            sizes.append(self._size(group[0], at) if group else 1)
        if all(size == -1 or size == 1 for size in sizes):
            return node
        return self._call(at, torch.Tensor.expand, node, *sizes)

    def _note_sizes(self, node: Node, index: Index) -> None:
        for dim, group in enumerate(settle(index)):
            if len(group) == 1:
                self._sizes.setdefault(group[0], (node, dim))

    def _size(self, axis: Axis, at: Node) -> Any:
        if isinstance(axis.size, int):
            return axis.size
        node, dim = self._sizes.get(axis) or self._sized_alike(axis.size)
        return self._call(at, torch.Tensor.size, self._current(node), dim)

    def _sized_alike(self, size: Any) -> tuple[Node, int]:
        """An argument of the graph that has a dimension of that size in all calls."""
        for node in self.graph.nodes:
            if node.op == "placeholder" and is_tensor(node):
                for dim, other in enumerate(value_of(node).shape):
                    if same(size, other):
                        return node, dim
        raise NoMatch(f"a size that no tensor has: {size}")

    def _current(self, node: Node) -> Node:
        while node in self._replaced:
            node = self._replaced[node]
        return node

    def _call(self, at: Node, function: Any, *args: Any) -> Node:
        """A call before ``at``; one that is written there already is used again."""
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

    def _replace(self, old: Node, new: Node, at: Node) -> None:
        value, other = value_of(old), value_of(new)
        if isinstance(other, torch.Tensor) and other.dtype != value.dtype:
            new = self._cast(new, value.dtype, at)
        old.replace_all_uses_with(new)
        self._replaced[old] = new


# Reasons that all products have which are no attention.
_ORDINARY = ("no tanh", "no product", "no softmax", "no alignments", "no query and keys", "the keys are weights")


def _where(stack: list[Any]) -> str:
    """The name of a module within the one that was captured, from what Dynamo notes with a call."""
    if not stack:
        return ""
    path = stack[-1][0] if isinstance(stack[-1], tuple) else ""
    return re.sub(r"^L\['\w+'\]", "", path).replace("._modules['", ".").replace("']", "").strip(".")


def _example(function: Any, args: tuple[Any, ...]) -> Any:
    """The fake result of a call that was written."""
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
