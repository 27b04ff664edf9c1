"""The data flow of a captured graph: which tensor is a view of which, and which values are constants."""

from __future__ import annotations

import operator

from torch.fx import Graph, Node

from .axes import NoMatch, settle
from .nodes import is_tensor
from .parts import Leaf
from .views import pull
from .writes import Writes


class Dataflow:
    """writes: which value a tensor has at each read. constants: nodes that depend only on parameters."""

    def __init__(self, graph: Graph, parameters: set[Node]) -> None:
        """``parameters``: the placeholders that are parameters or buffers of modules."""
        self.writes: Writes = Writes(graph)
        self.constants: set[Node] = _constants(graph, parameters)
        self._arguments = _arguments_of(graph, parameters)

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

    def check_one_mode(self, *nodes: Node) -> None:
        if not self.writes.same_mode(*nodes):
            raise NoMatch("grad mode or autocast is switched between")

    def arguments_of(self, node: Node) -> frozenset[Node]:
        """The placeholders that a value depends on, without parameters."""
        return self._arguments[node]

    def is_constant(self, node: Node) -> bool:
        """Whether a value depends only on parameters."""
        return node in self.constants


def _constants(graph: Graph, parameters: set[Node]) -> set[Node]:
    """Nodes that depend only on parameters; numbers do not count as inputs."""
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
