"""Reads the nodes of a captured graph: names, arguments, and the fake tensors of their results."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node


def name_of(node: Node) -> str:
    """The name of the function or method that a node calls: "add" for ``a + b``, ``torch.add`` and ``a.add(b)``."""
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_function":
        return getattr(node.target, "__name__", str(node.target))
    return node.op


def value_of(node: Any) -> Any:
    """The fake tensor or number of a node's result; any other argument is returned unchanged."""
    return node.meta.get("example_value", node.meta.get("val")) if isinstance(node, Node) else node


def is_tensor(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(value_of(node), torch.Tensor)


def shape_of(node: Node) -> tuple[Any, ...]:
    return tuple(value_of(node).shape)


def arguments(node: Node) -> tuple[Any, ...]:
    """The positional arguments of a call."""
    return node.args


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def constant(value: Any) -> float | None:
    """A number that is the same in every call; None for everything else."""
    value = value_of(value)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def sizes_of(node: Node, position: int, name: str) -> tuple[Any, ...]:
    """Sizes given as several arguments or as one sequence, with SymInts for nodes."""
    given = node.args[position:] if len(node.args) > position else (node.kwargs[name],)
    if len(given) == 1 and isinstance(given[0], (tuple, list)):
        given = tuple(given[0])
    return tuple(value_of(size) for size in given)
