"""Maps an index of the result of a view to the index of its input, which has the same elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .axes import Axis, Group, Index, NoMatch, one, resolve, same, settle
from .nodes import argument, arguments, is_tensor, name_of, shape_of, sizes_of, value_of


def pull(node: Node, index: Index) -> tuple[Node, Index] | None:
    """The input of a view and the index there; None if the node is not a supported view.

    Views here are all calls whose result consists of unchanged elements of one input. These include expand, repeat, a
    cast to the same dtype and inactive dropout.
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
    """An index of ``shape`` from the axes of all its elements, major first. Axes are split if the sizes require it."""
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
    """The index of an operand from the index of the broadcast result."""
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
    order: list[int | None] = [None] * rank  # the source's dimensions in the order of the result
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
    """Splits the group of a dimension of size ``sizes[0] * sizes[1]`` into two groups, major first."""
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
    """``torch.stack`` of copies of one tensor."""
    dim = _dim(node, 1, "dim", len(index), 0)
    return index[:dim] + index[dim + 1 :]


def _cat(node: Node, source: Node, index: Index) -> Index:
    """``torch.cat`` of copies of one tensor."""
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


def trace(node: Node, index: Index, read: Callable[[Node, Node], Node]) -> tuple[Node, Index]:
    """Follows an index back through all views."""
    while True:
        step = pull(node, index)
        if step is None:
            return node, settle(index)
        source, index = step
        node = read(source, node)
