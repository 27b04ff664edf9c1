"""In-place writes in a captured graph, and which value a tensor has at each read.

Tensors that share memory (views, ``.data``, ``detach``) are recognised by the storage of the fake tensors. A write
through a tensor with the same shape and strides is followed like any other operation. A write through another view of
the memory is not followed, and a node that reads the result is not matched.
"""

from __future__ import annotations

import bisect
from typing import Any

import torch
from torch.fx import Graph, Node

from .axes import NoMatch
from .nodes import argument, is_tensor, name_of, value_of

# Calls that change grad mode, autocast or inference mode for the calls after them.
MODES = ("_set_grad_enabled", "_enter_autocast", "_exit_autocast", "inference_mode", "_enter_inference_mode")
_AUGMENTED = ("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")

_BEFORE_INPLACE = {"relu": 1, "leaky_relu": 2, "dropout": 3}  # arguments before ``inplace``
_RANDOM = frozenset(("rand", "randn", "rand_like", "randn_like", "randint", "randint_like", "randperm", "bernoulli"))
_RANDOM |= {"normal", "uniform", "multinomial", "exponential", "gumbel_softmax", "rrelu", "log_normal", "cauchy"}
_RANDOM |= {"geometric"}


class Writes:
    """The in-place writes of a captured graph, and the original order of its nodes."""

    def __init__(self, graph: Graph) -> None:
        self.position: dict[Node, int] = {}
        self._region: dict[Node, int] = {}
        self._writers: dict[int, list[tuple[int, Node, Node]]] = {}  # storage -> position, writer, what it writes to
        region = 0
        for place, node in enumerate(graph.nodes):
            self.position[node] = place
            region += name_of(node) in MODES
            self._region[node] = region
            for target in written(node):
                self._writers.setdefault(storage(target), []).append((place, node, target))

    def read(self, source: Node, at: Node) -> Node:
        """The node whose result ``source`` holds when ``at`` reads it: ``source``, or the last write to it before."""
        found = self._last(source, self.position[source], self.position[at])
        if found is None:
            return source
        writer, target = found
        if not _alike(target, source):
            raise NoMatch("its memory is written to through another view")
        return writer

    def unchanged(self, source: Node, since: Node, until: Node) -> bool:
        """Whether ``source`` still has at ``until`` the value that ``since`` reads."""
        start = max(self.position[source], self.position[since] - 1)
        return self._last(source, start, self.position[until]) is None

    def same_mode(self, *nodes: Node) -> bool:
        """Whether grad mode and autocast are the same for all."""
        return len({self._region[node] for node in nodes if node.op != "placeholder"}) <= 1

    def adopt(self, node: Node, at: Node) -> None:
        """Registers a node that was inserted before ``at``."""
        self.position[node], self._region[node] = self.position[at], self._region[at]

    def writers_of(self, source: Node) -> list[Node]:
        return [node for _, node, _ in self._writers.get(storage(source), ())]

    def _last(self, source: Node, after: int, before: int) -> tuple[Node, Node] | None:
        writers = self._writers.get(storage(source))
        if not writers:
            return None
        place = bisect.bisect_left(writers, before, key=lambda writer: writer[0]) - 1
        if place < 0 or writers[place][0] <= after:
            return None
        return writers[place][1:]


def storage(node: Node) -> int:
    storage: int = value_of(node).untyped_storage()._cdata
    return storage


def written(node: Node) -> list[Node]:
    """The tensors that a call writes to."""
    if node.op not in ("call_method", "call_function"):
        return []
    name = name_of(node)
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return [arg for arg in node.all_input_nodes if is_tensor(arg)]  # its body is not inspected
    targets: list[Any] = [node.kwargs.get("out")]
    if isinstance(node.target, torch._ops.OpOverload):
        arguments = node.target._schema.arguments
        targets += [
            argument(node, i, a.name)
            for i, a in enumerate(arguments)
            if a.alias_info is not None and a.alias_info.is_write
        ]
    elif (
        (name.endswith("_") and not name.endswith("__"))
        or name in _AUGMENTED
        or name == "setitem"
        or node.kwargs.get("inplace") is True
        or (
            name in ("relu", "leaky_relu", "dropout")
            and node.args[-1] is True
            and len(node.args) > _BEFORE_INPLACE[name]
        )
    ):
        targets.append(argument(node, 0, "input"))
    elif name in ("batch_norm", "instance_norm"):
        targets += [argument(node, 1, "running_mean"), argument(node, 2, "running_var")]
    return [target for target in targets if is_tensor(target)]


def is_random(node: Node) -> bool:
    """Whether a call draws random numbers, so that it must run even if its result is not used."""
    name = name_of(node)
    if "dropout" in name:
        return argument(node, 1, "p", 0.5) != 0 and argument(node, 2, "training", True) is not False
    return name.rstrip("_") in _RANDOM


def _alike(a: Node, b: Node) -> bool:
    """Whether two tensors on one storage have the same elements at the same places."""
    x, y = value_of(a), value_of(b)
    return a is b or (
        x.dtype == y.dtype
        and tuple(x.shape) == tuple(y.shape)
        and x.stride() == y.stride()
        and x.storage_offset() == y.storage_offset()
    )
