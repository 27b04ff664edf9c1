"""Replaces the attention in a captured graph by this package's ops."""

from __future__ import annotations

import operator
import re
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node

from ..scores import AdditiveScore
from . import runtime
from .additive import match_additive, roles
from .axes import Group, NoMatch, axes_of, fresh, resolve, settle
from .contractions import PRODUCTS
from .dataflow import Dataflow
from .dead import remove_dead
from .dot import check_query, roles_of
from .emit import Emitter
from .guards import check_additive, check_leaf, check_products, is_exclusive
from .keeping import keep_node
from .nodes import is_tensor, name_of, shape_of, value_of
from .operands import additive_operands, dot_operands, dtype_of, score_vector
from .parts import Context, Leaf, Mask, Products, Roles, Scores, Softmax
from .softmax import match_context, match_softmax, softmax_dim

CONTEXT, ALIGNMENTS, SCORES = "context", "alignments", "scores"  # the last result that the op computes


class Found(NamedTuple):
    """Attention that was rewritten.

    kind: CONTEXT, ALIGNMENTS or SCORES. where: the qualified name of the module that computes it, "" for the captured
    module. reason: why no more of it was rewritten. steady: nodes that may have the same value in many calls.
    """

    kind: str
    where: str
    reason: str
    steady: tuple[Node, ...]


class Outcome(NamedTuple):
    """found: the attention that was rewritten. reasons: why other code that looks like attention was not."""

    found: list[Found]
    reasons: list[str]


def rewrite(graph_module: GraphModule, parameters: set[Node], branches: bool = True) -> Outcome:
    """Rewrites a graph in place.

    parameters: its placeholders that are parameters or buffers of modules. branches: whether the new code may branch on
    elements of tensors (whether every row of a mask attends something), and may cache results between calls.
    """
    graph = graph_module.graph
    found, reasons = _Writer(graph, Dataflow(graph, parameters), branches).run()
    if found:
        remove_dead(graph)
        if branches:
            for node in dict.fromkeys(node for one in found for node in one.steady):
                keep_node(graph, node, parameters)
            remove_dead(graph)
        graph_module.recompile()
    return Outcome(found, list(dict.fromkeys(reasons)))


class _Writer:
    def __init__(self, graph: Graph, flow: Dataflow, branches: bool) -> None:
        self.graph, self.flow, self.writes, self._branches = graph, flow, flow.writes, branches
        self.emit = Emitter(graph, flow.writes)
        self._done: set[Node] = set()  # tanh nodes that an op has replaced

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
                scores = match_additive(self.flow, node, fresh(shape_of(node)))
                if scores.tanh not in self._done:
                    found.append(self._scores(scores, "; ".join(dict.fromkeys(reasons))))
            except NoMatch as error:
                reasons.append(str(error))
        return found, [reason for reason in reasons if reason not in _ORDINARY]

    def _contexts(self, products: list[Node]) -> dict[Node, list[Context]]:
        """The contexts, grouped by the softmax of their alignments."""
        contexts: dict[Node, list[Context]] = {}
        for node in products:
            try:
                context = match_context(self.flow, node, fresh(shape_of(node)))
            except NoMatch:
                continue
            contexts.setdefault(context.softmax.node, []).append(context)
        return contexts

    # The three kinds of replacements --------------------------------------------------------------------------------

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
        if value_of(values.node).dtype != dtype_of(softmax.scores) and not torch.is_autocast_enabled(device):
            raise NoMatch("values of another dtype than the scores")
        alone = is_exclusive(softmax.node, {context.node})
        at = context.node if alone else softmax.node
        if not alone and self.writes.position[values.node] >= self.writes.position[softmax.node]:
            raise NoMatch("values that are not known yet where the alignments are used")
        call, steady = self._attention(softmax, part, (values, width), at, {softmax.node, context.node})
        result = self.emit.call(at, operator.getitem, call, 0)
        have = part.by_query(width)
        self.emit.replace(context.node, self.emit.arrange(result, have, settle(context.index), at), at)
        if not alone:
            self._replace_softmax(softmax, part, call, at)
        return self._found(CONTEXT, softmax.scores, "", steady)

    def _alignments(self, node: Node) -> Found:
        softmax = match_softmax(self.flow, node, fresh(shape_of(node)))
        if isinstance(softmax.scores, Products):
            check_query(softmax.scores, None)
        part = self._roles(softmax)
        call, steady = self._attention(softmax, part, None, node, {node})
        self._replace_softmax(softmax, part, call, node)
        return self._found(ALIGNMENTS, softmax.scores, "", steady)

    def _scores(self, scores: Scores, reason: str) -> Found:
        part = roles(scores, None, self.flow)
        at = scores.node
        check_additive(self.writes, scores, {at}, at)
        query, keys, bias, steady = additive_operands(self.emit, self.flow, scores, part, at)
        v = score_vector(self.emit, scores, scores.scale, at)
        shift = None if scores.shift is None else self.emit.arrange_leaf(scores.shift, ((),), at)
        call = self.emit.call(at, runtime.scores, query, keys, v, bias, shift)
        have = part.by_query(part.steps)
        self.emit.replace(at, self.emit.arrange(call, have, settle(scores.index), at), at)
        return self._found(SCORES, scores, reason, steady)

    def _roles(self, softmax: Softmax) -> Roles:
        if isinstance(softmax.scores, Products):
            return roles_of(softmax.scores, softmax.steps)
        return roles(softmax.scores, softmax.steps, self.flow)

    def _found(self, kind: str, scores: Scores | Products, reason: str, steady: tuple[Node, ...]) -> Found:
        if isinstance(scores, Scores):
            self._done.add(scores.tanh)
        stack = list((scores.node.meta.get("nn_module_stack") or {}).values())
        return Found(kind, _where(stack), reason, steady)

    def _replace_softmax(self, softmax: Softmax, part: Roles, call: Node, at: Node) -> None:
        have = part.by_query(part.steps)
        result = self.emit.call(at, operator.getitem, call, 1)
        self.emit.replace(softmax.node, self.emit.arrange(result, have, settle(softmax.index), at), at)

    def _attention(
        self, softmax: Softmax, part: Roles, values: tuple[Leaf, Group] | None, at: Node, roots: set[Node]
    ) -> tuple[Node, tuple[Node, ...]]:
        scores = softmax.scores
        if softmax.masks and not self._branches:
            raise NoMatch("a mask in torch.compile, where a row without anything to attend cannot be seen")
        if isinstance(scores, Products):
            if not self._branches:
                raise NoMatch("dot attention is left to inductor")
            check_products(self.writes, scores, roots, at)
        else:
            check_additive(self.writes, scores, roots, at)
        for leaf in (*(mask.leaf for mask in softmax.masks), *softmax.shifts, *(() if values is None else values[:1])):
            check_leaf(self.writes, leaf, at)
        if any(set(mask.leaf.axes) - {*part.batch, *part.queries, *part.steps} for mask in softmax.masks):
            raise NoMatch("a mask with other axes")
        scale, shifts = self._scale(softmax, at), tuple(self.emit.current(shift.node) for shift in softmax.shifts)
        if isinstance(scores, Products):
            query, keys = dot_operands(self.emit, scores, part, at)
            steady: tuple[Node, ...] = (keys,)
        else:
            query, keys, bias, steady = additive_operands(self.emit, self.flow, scores, part, at)
            of_score: Any = score_vector(self.emit, scores, scale, at, shifts), bias
            score = AdditiveScore(*of_score)
        x = None
        if values is not None:
            x = self.emit.arrange_leaf(values[0], (part.batch, part.steps, values[1]), at)
            steady = (*steady, x)
        masks = tuple(self._mask(mask, softmax.masks, part, at) for mask in softmax.masks)
        if isinstance(scores, Products):
            return self.emit.call(at, runtime.dot, query, keys, x, scale, shifts, masks), steady
        return self.emit.call(at, runtime.attention, query, keys, x, score, masks), steady

    def _scale(self, softmax: Softmax, at: Node) -> float | Node:
        scale: float | Node = softmax.scale
        for factor in softmax.factors:
            operation = operator.truediv if factor.is_divisor else operator.mul
            scale = self.emit.call(at, operation, scale, self.emit.current(factor.node))
        return scale

    def _mask(self, mask: Mask, all_masks: list[Mask], part: Roles, at: Node) -> runtime.Mask:
        by_query = any(set(other.leaf.axes) & set(part.queries) for other in all_masks)
        groups = (part.batch, part.queries, part.steps) if by_query else (part.batch, part.steps)
        tensor: Any = self.emit.arrange_leaf(mask.leaf, groups, at)
        return runtime.Mask(tensor, mask.keep, mask.fill, mask.is_hidden, mask.is_added)


# Reasons of products that have nothing to do with attention; they are not reported.
_ORDINARY = ("no tanh", "no product", "no softmax", "no alignments", "no query and keys", "the keys are weights")


def _where(stack: list[Any]) -> str:
    """The name of a module within the captured one, from the module stack that Dynamo records with a call."""
    if not stack:
        return ""
    path = stack[-1][0] if isinstance(stack[-1], tuple) else ""
    return re.sub(r"^L\['\w+'\]", "", path).replace("._modules['", ".").replace("']", "").strip(".")
