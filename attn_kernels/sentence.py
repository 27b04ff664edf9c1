"""What an adapter of patches/ makes of the sentences at hand once, and uses again in the steps that follow.

The modules of other libraries are called a step at a time with the same memory, and have nowhere to put what could be
made of it once. Here it is put beside a module (not in it: copies and pickles of the module hold what they held). Each
time, the tensors that it was made from are compared with those of the step: they must be the same objects, and none of
them written to since, as far as autograd notices (``.data`` hides it). Of each kind only the last is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

T = TypeVar("T")


class _Kept(NamedTuple):
    sources: tuple[Tensor | None, ...]
    state: tuple[Any, ...]
    result: Any


_kept: WeakKeyDictionary[Any, dict[str, _Kept]] = WeakKeyDictionary()


def once(module: Any, what: str, sources: tuple[Tensor | None, ...], make: Callable[[], T]) -> T:
    """``make()``, or what that returned the last time, if the sources are what they were then.

    Args:
        module: what it is kept for. what: one of several things that are kept for it.
        sources: all tensors that ``make`` reads; the first is not None.
        make: makes nothing whose backward works only once: the result may be used again after a backward pass.
    """
    if is_compiling():
        return make()
    of_module = _kept.setdefault(module, {})
    kept = of_module.get(what)
    state = _state(sources)
    if kept is None or kept.state != state or not all(map(_is, kept.sources, sources)):
        kept = of_module[what] = _Kept(sources, state, make())
    return kept.result


def project(module: Any, layer: Any, rows: Tensor) -> Tensor:
    """``layer(rows)``; without gradients, rows that it was given the last time are not projected again.

    layer: a ``nn.Linear``; another module is just called. rows: (B, Tk, M), encoder outputs. Returns (B, Tk, A).

    A beam search may give it the rows re-ordered, a copy for each hypothesis: then all elements are compared.
    """
    if is_compiling():
        return layer(rows)
    of_module = _kept.setdefault(module, {})
    last = of_module.pop("projection", None)
    if torch.is_grad_enabled() or not is_plain(layer):
        return layer(rows)
    keys = None
    if last is not None and last.state == _state(last.sources):
        among, weight, bias, their_keys = last.sources
        if weight is layer.weight and bias is layer.bias:
            keys = _select(rows, among, their_keys)
    if keys is None:
        keys = layer(rows)
    sources = (rows, layer.weight, layer.bias, keys)
    of_module["projection"] = _Kept(sources, _state(sources), None)
    return keys


def is_plain(layer: Any) -> bool:
    """Whether a layer does what its weight and bias say, and nothing else."""
    return type(layer) is nn.Linear and not (layer._forward_pre_hooks or layer._forward_hooks)


def as_of_softmax(alignments: Tensor) -> Tensor:
    """Alignments in the dtype that a softmax has under autocast: on a GPU float32, whatever its argument."""
    if alignments.is_cuda and torch.is_autocast_enabled("cuda") and alignments.dtype != torch.float64:
        return alignments.float()
    return alignments


def _is(a: Any, b: Any) -> bool:
    return a is b


def _state(tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """Differs where one of the tensors was written to, or something else would be made of them. The first is one."""
    device = tensors[0].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return (torch.is_grad_enabled(), autocast, *map(_version, tensors))


def _version(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    if tensor.is_inference():
        return object()  # writes to it are not counted: each time it may be another
    return tensor._version, tensor.data_ptr(), tensor.requires_grad


def _select(rows: Tensor, among: Any, keys: Any) -> Tensor | None:
    """For each of ``rows`` (B, Tk, M) the keys of an equal one of ``among``; None where one has none."""
    if rows is among:
        return keys
    if rows.shape[1:] != among.shape[1:] or (rows.dtype, rows.device) != (among.dtype, among.device):
        return None
    if torch.equal(rows, among):
        return keys
    indices = _find(rows, among)
    if indices is None or not torch.equal(rows, among.index_select(0, indices)):
        return None
    return keys.index_select(0, indices)


def _find(rows: Tensor, among: Tensor) -> Tensor | None:
    """(B,): for each of ``rows`` one of ``among`` that has some elements in common with it, or None."""
    if 0 in rows.shape or 0 in among.shape:
        return None
    step = max(1, rows.shape[1] // 8)  # at the last unit, which an encoder of two directions makes of all that follows
    alike = (rows[:, None, ::step, -1] == among[None, :, ::step, -1]).all(2)
    return alike.byte().argmax(1) if alike.any(1).all() else None
