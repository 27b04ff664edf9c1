"""Decides which results of a rewritten graph are cached between calls: see kept.py."""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule, Node

from .contractions import PRODUCTS
from .dead import has_effects
from .kept import keep
from .nodes import is_tensor, name_of, value_of
from .writes import storage, written


def keep_node(graph: Graph, node: Node, parameters: set[Node]) -> None:
    """Replaces ``node`` by a call that caches its result, if that may save time.

    The node must depend on arguments, not only on parameters. It must not depend on random numbers or on tensors that
    are written to in place. Results that the graph returns are not cached, because the caller may write to them.
    """
    if node.op == "placeholder" or not is_tensor(node) or node.graph is not graph or not node.users:
        return
    cone = _cone(node)
    if cone is None or not any(x.op == "placeholder" and is_tensor(x) and x not in parameters for x in cone):
        return
    nodes = list(graph.nodes)
    touched = {storage(target) for other in nodes for target in written(other)}
    returned = {storage(x) for x in next(x for x in nodes if x.op == "output").all_input_nodes if is_tensor(x)}
    inside = [x for x in cone if x.op != "placeholder" and not _is_number(x)]
    if any(is_tensor(x) and storage(x) in touched for x in cone):
        return
    outside = {storage(x) for x in cone if x.op == "placeholder" and is_tensor(x)}
    if storage(node) in returned and storage(node) not in outside:
        return
    shared = [x for x in inside if x is not node and _is_expensive(x) and not set(x.users) <= set(inside)]
    for other in shared:  # also used by other nodes, such as projected keys that are the values, too
        keep_node(graph, other, parameters)
    if shared:
        return
    is_view = not any(_is_expensive(x) for x in inside)
    if is_view and storage(node) not in outside:
        return
    _write(graph, node, cone, is_view)


def _cone(node: Node) -> list[Node] | None:
    """All nodes that a result is computed from, in order; None if it is not a function of tensors only."""
    found: set[Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current in found:
            continue
        if _is_number(current):  # a size: it does not depend on the elements of the tensor it was read from
            found.add(current)
            continue
        if current.op not in ("placeholder", "call_function", "call_method") or has_effects(current):
            return None
        if isinstance(current.target, torch._ops.OpOverload) and current.target._schema.is_mutable:
            return None
        found.add(current)
        waiting += current.all_input_nodes
    return [x for x in node.graph.nodes if x in found]


def _is_expensive(node: Node) -> bool:
    return name_of(node) in PRODUCTS and name_of(node) != "sum"


def _is_number(node: Node) -> bool:
    return isinstance(value_of(node), (int, torch.SymInt))


def _write(graph: Graph, node: Node, cone: list[Node], is_view: bool) -> None:
    inputs = [x for x in cone if x.op == "placeholder" or _is_number(x)]
    tensors, numbers = [x for x in inputs if is_tensor(x)], [x for x in inputs if not is_tensor(x)]
    inner = Graph()
    copies = {x: inner.placeholder(x.name) for x in (*tensors, *numbers)}
    for x in cone:
        if x not in inputs:
            copies[x] = inner.node_copy(x, lambda old: copies[old])
    inner.output(copies[node])
    for x in inner.nodes:
        x.meta.clear()
    function = keep(GraphModule({}, inner).forward, len(tensors), is_view, f"kept_{node.name}")
    with graph.inserting_after(node):
        call = graph.call_function(function, (*tensors, *numbers))
    call.meta["example_value"] = value_of(node)
    node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
