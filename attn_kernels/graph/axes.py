"""Index variables: where the elements of a tensor come from.

An element of a node's result is named by an index: for each dimension a group of axes (index variables), the major one
first. The dimension ``B*T`` of a folded tensor has the group ``(b, t)``; a dimension of size 1 has the empty group. A
step back through a view maps the index of its result to the index of its input. Axes that are lacking there are those
along which the input is repeated. Nothing here knows about attention.

Sizes are ints or SymInts. They are compared by what is known for all sizes the graph is valid for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true


class Axis:
    """An index variable. ``size``: its range. ``parts``: the axes it was split into, if it was; major first."""

    __slots__ = ("parts", "size")

    def __init__(self, size: Any) -> None:
        if isinstance(size, torch.SymInt) and size.node.expr.is_Integer:
            size = int(size.node.expr)
        self.size = size
        self.parts: tuple[Axis, ...] | None = None

    def split(self, *sizes: Any) -> tuple[Axis, ...]:
        self.parts = tuple(Axis(size) for size in sizes)
        return self.parts


Group = tuple[Axis, ...]
Index = tuple[Group, ...]  # of an element: a group for each dimension


class NoMatch(Exception):
    """What is looked for is not there, with the reason."""


def fresh(shape: Sequence[Any]) -> Index:
    """A new axis for each dimension but those of size 1."""
    return tuple(() if one(size) else (Axis(size),) for size in shape)


def resolve(group: Group) -> Group:
    """The group with axes that were split replaced by their parts."""
    if all(axis.parts is None for axis in group):
        return group
    result: list[Axis] = []
    for axis in group:
        result.extend((axis,) if axis.parts is None else resolve(axis.parts))
    return tuple(result)


def settle(index: Index) -> Index:
    return tuple(resolve(group) for group in index)


def axes_of(index: Index) -> list[Axis]:
    """All axes of an index, each once, in order."""
    return list(dict.fromkeys(axis for group in index for axis in resolve(group)))


def same(a: Any, b: Any) -> bool:
    return a is b or statically_known_true(a == b)


def one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def product(sizes: Any) -> Any:
    return math.prod(sizes)


# Reading nodes --------------------------------------------------------------------------------------------------------


def name_of(node: Node) -> str:
    """The name of the function or method that a node calls: "add" for ``a + b``, ``torch.add`` and ``a.add(b)``."""
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_function":
        return getattr(node.target, "__name__", str(node.target))
    return node.op


def value_of(node: Any) -> Any:
    """The fake tensor or number that stands for a node's result; other arguments stand for themselves."""
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
    """A number that is the same in every call; None for all else."""
    value = value_of(value)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def sizes_of(node: Node, position: int, name: str) -> tuple[Any, ...]:
    """Sizes given as several arguments or as one sequence, with SymInts for nodes."""
    given = node.args[position:] if len(node.args) > position else (node.kwargs[name],)
    if len(given) == 1 and isinstance(given[0], (tuple, list)):
        given = tuple(given[0])
    return tuple(value_of(size) for size in given)


# Steps back through views ---------------------------------------------------------------------------------------------


def pull(node: Node, index: Index) -> tuple[Node, Index] | None:
    """The input of a view and the index there; None where the node is no view that is understood.

    Views here are all calls whose result has the elements of one input, unchanged: expands, repeats, casts that cast
    nothing and inactive dropout, too.
    """
    step = _VIEWS.get(name_of(node))
    source = argument(node, 0, "input")
    if step is None or not is_tensor(node):
        return None
    if isinstance(source, (tuple, list)):
        source = source[0] if source and all(part is source[0] for part in source) else None
    if not is_tensor(source):
        return None
    try:
        result = step(node, source, settle(index))
    except NoMatch:
        return None
    return None if result is None else (source, result)


def regroup(factors: Sequence[Axis], shape: Sequence[Any]) -> Index:
    """An index of ``shape`` from the axes of all its elements, major first: splits axes where sizes ask for it."""
    rest = list(resolve(tuple(factors)))[::-1]
    groups = []
    for size in shape:
        group: list[Axis] = []
        while not one(size):
            if not rest:
                raise NoMatch("sizes of a view")
            axis = rest.pop()
            if same(axis.size, size):
                group.append(axis)
                break
            if statically_known_true(size % axis.size == 0):
                group.append(axis)
                size = size // axis.size
            elif statically_known_true(axis.size % size == 0):
                major, minor = axis.split(size, axis.size // size)
                rest.append(minor)
                group.append(major)
                break
            else:
                raise NoMatch("sizes of a view")
        groups.append(tuple(group))
    if rest:
        raise NoMatch("sizes of a view")
    return tuple(groups)


def broadcast(index: Index, node: Node) -> Index:
    """The index of an operand, given that of the broadcast result."""
    shape = shape_of(node)
    tail = index[len(index) - len(shape) :] if shape else ()
    return tuple(() if one(size) else group for size, group in zip(shape, tail, strict=True))


def _complete(index: Index, shape: Sequence[Any]) -> bool:
    return all(group or one(size) for group, size in zip(index, shape, strict=True))


def _dim(node: Node, position: int, name: str, rank: int, default: Any = None) -> int:
    dim = argument(node, position, name, default)
    if not isinstance(dim, int):
        raise NoMatch("a dimension that is no constant")
    return dim % rank if rank else 0


def _reshape(node: Node, source: Node, index: Index) -> Index:
    if not _complete(index, shape_of(node)):
        raise NoMatch("a view of a selection")
    return regroup([axis for group in index for axis in group], shape_of(source))


def _view(node: Node, source: Node, index: Index) -> Index:
    if value_of(node).dtype != value_of(source).dtype:
        raise NoMatch("a view of another dtype")
    return _reshape(node, source, index)


def _permute(node: Node, source: Node, index: Index) -> Index:
    dims = sizes_of(node, 1, "dims")
    result: list[Group] = [()] * len(index)
    for group, dim in zip(index, dims, strict=True):
        result[dim % len(index)] = group
    return tuple(result)


def _swap(index: Index, a: int, b: int) -> Index:
    result = list(index)
    result[a], result[b] = result[b], result[a]
    return tuple(result)


def _transpose(node: Node, source: Node, index: Index) -> Index:
    rank = len(index)
    first = "dim0" if "dim0" in node.kwargs else "axis0"
    return _swap(index, _dim(node, 1, first, rank), _dim(node, 2, first[:-1] + "1", rank))


def _movedim(node: Node, source: Node, index: Index) -> Index:
    rank = len(index)
    starts, ends = argument(node, 1, "source"), argument(node, 2, "destination")
    starts, ends = [[d] if isinstance(d, int) else list(d) for d in (starts, ends)]
    order: list[int | None] = [None] * rank  # of the source's dimensions in the result
    for start, end in zip(starts, ends, strict=True):
        order[end % rank] = start % rank
    rest = iter(d for d in range(rank) if d not in order)
    result: list[Group] = [()] * rank
    for group, dim in zip(index, order, strict=True):
        result[next(rest) if dim is None else dim] = group
    return tuple(result)


def _reverse(node: Node, source: Node, index: Index) -> Index:
    return index[::-1]


def _matrix(node: Node, source: Node, index: Index) -> Index:
    return _swap(index, len(index) - 2, len(index) - 1)


def _attribute(node: Node, source: Node, index: Index) -> Index:
    name = node.args[1]
    if name in ("T", "mT"):
        return (_reverse if name == "T" else _matrix)(node, source, index)
    raise NoMatch("an attribute")


def _unsqueeze(node: Node, source: Node, index: Index) -> Index:
    dim = _dim(node, 1, "dim", len(index))
    return index[:dim] + index[dim + 1 :]


def _squeeze(node: Node, source: Node, index: Index) -> Index:
    shape = shape_of(source)
    given = argument(node, 1, "dim")
    dims = range(len(shape)) if given is None else [given] if isinstance(given, int) else given
    squeezed = {d % len(shape) for d in dims if one(shape[d])} if shape else set()
    groups = iter(index)
    return tuple(() if d in squeezed else next(groups) for d in range(len(shape)))


def _expand(node: Node, source: Node, index: Index) -> Index:
    return broadcast(index, source)


def _repeat(node: Node, source: Node, index: Index) -> Index:
    shape = shape_of(source)
    position, name = (1, "dims") if name_of(node) == "tile" else (1, "repeats")
    counts = sizes_of(node, position, name)
    counts = (1,) * (len(shape) - len(counts)) + counts
    offset = len(counts) - len(shape)
    return tuple(
        _within(group, (count, size))[1]
        for group, count, size in zip(index[offset:], counts[offset:], shape, strict=True)
    )


def _within(group: Group, sizes: tuple[Any, Any]) -> tuple[Group, Group]:
    """The groups of two digits, major first, that an index of ``sizes[0] * sizes[1]`` has."""
    if one(sizes[0]):
        return (), group
    if one(sizes[1]):
        return group, ()
    major, minor = regroup(group, sizes)
    return major, minor


def _repeat_interleave(node: Node, source: Node, index: Index) -> Index:
    count, dim = value_of(argument(node, 1, "repeats")), argument(node, 2, "dim")
    if isinstance(count, torch.Tensor) or not isinstance(dim, int):
        raise NoMatch("repeats that differ")
    dim %= len(index)
    inner = _within(index[dim], (shape_of(source)[dim], count))[0]
    return (*index[:dim], inner, *index[dim + 1 :])


def _stack(node: Node, source: Node, index: Index) -> Index:
    """Of one tensor, several times."""
    dim = _dim(node, 1, "dim", len(index), 0)
    return index[:dim] + index[dim + 1 :]


def _cat(node: Node, source: Node, index: Index) -> Index:
    """Of one tensor, several times."""
    dim = _dim(node, 1, "dim", len(index), 0)
    inner = _within(index[dim], (len(arguments(node)[0]), shape_of(source)[dim]))[1]
    return (*index[:dim], inner, *index[dim + 1 :])


def _getitem(node: Node, source: Node, index: Index) -> Index:
    given = arguments(node)[1]
    items = list(given) if isinstance(given, tuple) else [given]
    if any(not (item is None or item is Ellipsis or item == 0 or _is_all(item)) for item in items):
        raise NoMatch("a selection")
    if any(item is True or item is False for item in items):
        raise NoMatch("a selection")
    shape = shape_of(source)
    taken = sum(item is not None and item is not Ellipsis for item in items)
    if Ellipsis not in items:
        items.append(Ellipsis)
    result: list[Group] = []
    groups = iter(index)
    for item in items:
        if item is None:
            next(groups)
        elif item is Ellipsis:
            result.extend(next(groups) for _ in range(len(shape) - taken))
        elif isinstance(item, slice):
            result.append(next(groups))
        else:
            if not one(shape[len(result)]):
                raise NoMatch("a selection")
            result.append(())
    return tuple(result)


def _is_all(item: Any) -> bool:
    return isinstance(item, slice) and item == slice(None)


def _select(node: Node, source: Node, index: Index) -> Index:
    dim = _dim(node, 1, "dim", len(shape_of(source)))
    if not one(shape_of(source)[dim]):
        raise NoMatch("a selection")
    return (*index[:dim], (), *index[dim:])


def _same_elements(node: Node, source: Node, index: Index) -> Index:
    if value_of(node).dtype != value_of(source).dtype or value_of(node).device != value_of(source).device:
        raise NoMatch("a cast")
    return index


def _inactive_dropout(node: Node, source: Node, index: Index) -> Index:
    probability, training = argument(node, 1, "p", 0.5), argument(node, 2, "training", True)
    if probability != 0 and training is not False:
        raise NoMatch("dropout")
    return index


_VIEWS: dict[str, Callable[[Node, Node, Index], Index]] = {
    "view": _view,
    "reshape": _reshape,
    "_unsafe_view": _reshape,
    "flatten": _reshape,
    "unflatten": _reshape,
    "view_as": _reshape,
    "reshape_as": _reshape,
    "permute": _permute,
    "transpose": _transpose,
    "swapaxes": _transpose,
    "swapdims": _transpose,
    "movedim": _movedim,
    "moveaxis": _movedim,
    "t": _reverse,
    "numpy_T": _reverse,
    "getattr": _attribute,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "expand_as": _expand,
    "broadcast_to": _expand,
    "repeat": _repeat,
    "tile": _repeat,
    "repeat_interleave": _repeat_interleave,
    "stack": _stack,
    "cat": _cat,
    "concat": _cat,
    "getitem": _getitem,
    "select": _select,
    **dict.fromkeys(
        ("contiguous", "clone", "to", "float", "double", "half", "bfloat16", "type", "type_as", "alias"), _same_elements
    ),
    **dict.fromkeys(("dropout", "dropout_", "alpha_dropout", "feature_dropout"), _inactive_dropout),
}


# Contractions ---------------------------------------------------------------------------------------------------------


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


def contraction(node: Node, index: Index, read: Callable[[Node, Node], Node]) -> Contraction | None:
    """What a product sums over, or None. ``read(source, at)``: the node whose result ``source`` holds at ``at``."""
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
    """A sum over a product of two tensors, through views between."""
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


def trace(node: Node, index: Index, read: Callable[[Node, Node], Node]) -> tuple[Node, Index]:
    """Back through all views."""
    while True:
        step = pull(node, index)
        if step is None:
            return node, settle(index)
        source, index = step
        node = read(source, node)
