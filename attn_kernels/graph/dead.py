"""Removes dead code from a graph."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from .nodes import is_tensor, name_of
from .writes import MODES, is_random, storage, written


def remove_dead(graph: Graph) -> None:
    """Removes calls whose results are not used, and in-place writes that nothing reads afterwards."""
    nodes = list(graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    alive = {node for node in nodes if node.op in ("placeholder", "output") or has_effects(node)}
    outside = {storage(node) for node in nodes if node.op in ("placeholder", "get_attr") and is_tensor(node)}
    last_read: dict[int, int] = {}  # storage -> position of the last live node that reads or returns it
    while True:
        for node in reversed(nodes):
            if node in alive:
                for source in node.all_input_nodes:
                    alive.add(source)
                    if is_tensor(source):
                        key = storage(source)
                        last_read[key] = max(last_read.get(key, 0), place[node])
        more = {
            node
            for node in nodes
            if node not in alive
            and any(storage(t) in outside or last_read.get(storage(t), -1) > place[node] for t in written(node))
        }
        if not more:
            break
        alive |= more
    for node in reversed(nodes):
        if node not in alive:
            graph.erase_node(node)
    graph.lint()


def has_effects(node: Node) -> bool:
    """Whether a call has side effects besides in-place writes to tensors."""
    if node.op == "get_attr" or node.op not in ("call_function", "call_method"):
        return node.op == "call_module"
    name = name_of(node)
    return (
        isinstance(node.target, torch._ops.HigherOrderOperator)
        or name in MODES
        or name.startswith(("_assert", "_check", "sym_constrain", "register_hook", "__"))
        or is_random(node)
    )
