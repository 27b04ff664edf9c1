"""Contractions: products and sums of products, as sums over axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch.fx import Node

from .axes import Axis, Group, Index, NoMatch, one, resolve, settle
from .nodes import argument, arguments, is_tensor, name_of, shape_of
from .views import broadcast, trace


class Contraction(NamedTuple):
    """``node[index] = sum over axes of a[a_index] * b[b_index] (+ bias[bias_index])``."""

    node: Node
    axes: Group
    a: Node
    a_index: Index
    b: Node
    b_index: Index
    bias: Node | None = None
    bias_index: Index = ()

    @property
    def sides(self) -> tuple[tuple[Node, Index, Node, Index], tuple[Node, Index, Node, Index]]:
        """The two operands, in both orders."""
        a, b = (self.a, self.a_index), (self.b, self.b_index)
        return (*a, *b), (*b, *a)


def contraction(node: Node, index: Index, read: Callable[[Node, Node], Node]) -> Contraction | None:
    """A node as a contraction, or None. read(source, at): the node whose result ``source`` holds when ``at`` runs."""
    make = _CONTRACTIONS.get(name_of(node))
    if make is None or not is_tensor(node):
        return None
    try:
        return make(node, settle(index), read)
    except NoMatch:
        return None


def _group(size: Any) -> Group:
    return () if one(size) else (Axis(size),)


def _linear(node: Node, index: Index, read: Any) -> Contraction:
    x, weight = argument(node, 0, "input"), argument(node, 1, "weight")
    bias = argument(node, 2, "bias")
    k = _group(shape_of(x)[-1])
    last = (index[-1],)
    return Contraction(node, k, x, (*index[:-1], k), weight, (*last, k), bias, last if bias is not None else ())


def _conv(node: Node, index: Index, read: Any) -> Contraction:
    x, weight, bias = argument(node, 0, "input"), argument(node, 1, "weight"), argument(node, 2, "bias")
    kernel = shape_of(weight)[2:]
    strides = [argument(node, 3, "stride", 1), argument(node, 5, "dilation", 1), argument(node, 6, "groups", 1)]
    padding = argument(node, 4, "padding", 0)
    if not all(one(size) for size in kernel) or not _all_are(strides, 1) or not _all_are([padding], 0):
        raise NoMatch("a convolution of several positions")
    channels = len(index) - len(kernel) - 1
    k = _group(shape_of(weight)[1])
    x_index = (*index[:channels], k, *index[channels + 1 :])
    out = index[channels]
    w_index = (out, k, *((),) * len(kernel))
    return Contraction(node, k, x, x_index, weight, w_index, bias, (out,) if bias is not None else ())


def _all_are(values: list[Any], wanted: int) -> bool:
    return all(v == wanted or (isinstance(v, (tuple, list)) and all(x == wanted for x in v)) for v in values)


def _matmul(node: Node, index: Index, read: Any) -> Contraction:
    a, b = argument(node, 0, "input"), argument(node, 1, "other", node.kwargs.get("mat2", node.kwargs.get("vec")))
    if not (is_tensor(a) and is_tensor(b)):
        raise NoMatch("a product")
    return _product(node, index, a, b)


def _product(node: Node, index: Index, a: Node, b: Node, bias: Node | None = None) -> Contraction:
    rows, columns = len(shape_of(a)), len(shape_of(b))
    k = _group(shape_of(a)[-1])
    row: Index = (index[len(index) - (2 if columns > 1 else 1)],) if rows > 1 else ()
    column: Index = (index[-1],) if columns > 1 else ()
    batch = index[: len(index) - len(row) - len(column)]
    a_index = (*_batch_of(batch, a), *row, k)
    b_index = (*_batch_of(batch, b), k, *column)
    return Contraction(node, k, a, a_index, b, b_index, bias, broadcast(index, bias) if bias is not None else ())


def _batch_of(batch: Index, node: Node) -> Index:
    shape = shape_of(node)[:-2]
    tail = batch[len(batch) - len(shape) :] if shape else ()
    return tuple(() if one(size) else group for size, group in zip(shape, tail, strict=True))


def _add_product(node: Node, index: Index, read: Any) -> Contraction:
    if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
        raise NoMatch("a scaled product")
    bias, a, b = arguments(node)[:3]
    return _product(node, index, a, b, bias)


def _sum(node: Node, index: Index, read: Any) -> Contraction:
    """A sum over a product of two tensors, with views between sum and product."""
    source = argument(node, 0, "input")
    if not is_tensor(source) or argument(node, 3, "dtype") is not None:
        raise NoMatch("a sum")
    shape = shape_of(source)
    given = argument(node, 1, "dim", node.kwargs.get("axis"))
    if given is None:
        raise NoMatch("a sum of everything")
    dims = {d % len(shape) for d in ([given] if isinstance(given, int) else given)}
    keep = argument(node, 2, "keepdim", False)
    groups = iter(index)
    summed: list[Axis] = []
    result: list[Group] = []
    for d, size in enumerate(shape):
        if d not in dims:
            result.append(next(groups))
            continue
        if keep:
            next(groups)
        new = _group(size)
        summed.extend(new)
        result.append(new)
    factor, inner = trace(read(source, node), tuple(result), read)
    if name_of(factor) not in ("mul", "multiply") or factor.kwargs:
        raise NoMatch("a sum")
    a, b = arguments(factor)
    if not (is_tensor(a) and is_tensor(b)):
        raise NoMatch("a sum")
    inner = settle(inner)
    axes = resolve(tuple(summed))
    return Contraction(factor, axes, a, broadcast(inner, a), b, broadcast(inner, b))


def _einsum(node: Node, index: Index, read: Any) -> Contraction:
    equation, *operands = arguments(node)
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or "." in equation or "->" not in equation or len(operands) != 2:
        raise NoMatch("an einsum")
    left, out = equation.replace(" ", "").split("->")
    names = left.split(",")
    groups = dict(zip(out, index, strict=True))
    if len(groups) != len(out) or any(len(set(name)) != len(name) for name in names):
        raise NoMatch("an einsum")
    summed: list[Axis] = []
    for operand, letters in zip(operands, names, strict=True):
        for letter, size in zip(letters, shape_of(operand), strict=True):
            if letter not in groups:
                groups[letter] = _group(size)
                summed.extend(groups[letter])
    indices = []
    for operand, letters in zip(operands, names, strict=True):
        sizes = shape_of(operand)
        indices.append(tuple(() if one(s) else groups[x] for x, s in zip(letters, sizes, strict=True)))
    (a, b), (a_index, b_index) = operands, indices
    return Contraction(node, tuple(summed), a, a_index, b, b_index)


def _tensordot(node: Node, index: Index, read: Any) -> Contraction:
    a, b = argument(node, 0, "a"), argument(node, 1, "b")
    dims = argument(node, 2, "dims", 2)
    rank = len(shape_of(a))
    if isinstance(dims, int):
        dims = (list(range(rank - dims, rank)), list(range(dims)))
    if not isinstance(dims, (tuple, list)) or len(dims) != 2:
        raise NoMatch("a tensordot")
    pairs = [
        (d % rank, e % len(shape_of(b)))
        for d, e in zip(*([x] if isinstance(x, int) else list(x) for x in dims), strict=True)
    ]
    groups = {d: _group(shape_of(a)[d]) for d, _ in pairs}
    others = {e: groups[d] for d, e in pairs}
    rest = iter(index)
    a_index = tuple(groups[d] if d in groups else next(rest) for d in range(rank))
    b_index = tuple(others[e] if e in others else next(rest) for e in range(len(shape_of(b))))
    return Contraction(node, tuple(x for g in groups.values() for x in g), a, a_index, b, b_index)


_CONTRACTIONS: dict[str, Callable[[Node, Index, Any], Contraction]] = {
    "linear": _linear,
    "conv1d": _conv,
    "conv2d": _conv,
    "matmul": _matmul,
    "bmm": _matmul,
    "mm": _matmul,
    "mv": _matmul,
    "dot": _matmul,
    "addmm": _add_product,
    "baddbmm": _add_product,
    "sum": _sum,
    "einsum": _einsum,
    "tensordot": _tensordot,
}

PRODUCTS = frozenset(_CONTRACTIONS)  # names of calls that may sum over products
