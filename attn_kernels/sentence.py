"""What an adapter of patches/ makes of the sentences at hand once, and uses again in the steps that follow.

The modules of other libraries are called a step at a time with the same memory, and have nowhere to put what could be
made of it once. Here it is put beside a module (not in it: copies and pickles of the module hold what they held). Each
time, the tensors that it was made from are compared with those of the step: they must be the same objects, and none of
them written to since, as far as autograd notices (``.data`` hides it). Of each kind only the last is kept, until the
next, and not longer than the module; see also :func:`keeps`.
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


def keeps(source: Any) -> bool:
    """Whether what is made of a tensor is kept.

    On the CPU only: a GPU's tensors are also written to by replays of CUDA graphs, which autograd does not notice. And
    not in ``torch.compile``: what is kept would be constants of the graph.
    """
    return source.is_cpu and not is_compiling()


def once(module: Any, what: str, sources: tuple[Tensor | None, ...], make: Callable[[], T]) -> T:
    """``make()``, or what that returned the last time, if the sources are what they were then.

    Args:
        module: what it is kept for. what: one of several things that are kept for it.
        sources: all tensors that ``make`` reads; the first is not None.
        make: makes nothing whose backward works only once: the result may be used again after a backward pass.
    """
    if not keeps(sources[0]):
        return make()
    of_module = _kept.get(module)
    if of_module is None:
        of_module = _kept[module] = {}
    state = _state(sources)
    kept = of_module.get(what)
    if kept is None or kept.state != state or not _same(kept.sources, sources):
        kept = of_module[what] = _Kept(sources, state, make())
    return kept.result


def project(module: Any, layer: Any, rows: Tensor) -> Tensor:
    """``layer(rows)``; without gradients, rows that it was given the last time are not projected again.

    layer: a ``nn.Linear``; another module is just called. rows: (B, Tk, M), encoder outputs. Returns (B, Tk, A).

    A beam search may give it the rows re-ordered, a copy for each hypothesis: then all elements are compared.
    """
    if not keeps(rows) or torch._C._are_functorch_transforms_active():
        return layer(rows)
    of_module = _kept.setdefault(module, {})
    last = of_module.pop("projection", None)
    if torch.is_grad_enabled() or not is_plain(layer):
        return layer(rows)
    parameters = (layer.weight, layer.bias)
    places = [None if x is None else x.data_ptr() for x in parameters]  # ``x.data = ...`` counts as no write
    keys = None
    if last is not None and last.state == _state(last.sources) and last.result == places:
        if _same(last.sources[2:], parameters):
            keys = _select(rows, *last.sources[:2])
    if keys is None:
        keys = layer(rows)
    sources = (rows, keys, *parameters)
    of_module["projection"] = _Kept(sources, _state(sources), places)
    return keys


def forget(module: Any) -> None:
    """Keeps nothing of a module any more."""
    _kept.pop(module, None)


def is_plain(layer: Any) -> bool:
    """Whether a layer does what its weight and bias say, and nothing else."""
    hooks = layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and not hooks


def attended_steps(module: Any, mask: Tensor, keep: bool) -> Tensor | None:
    """(B, Tk) bool, True = attend, of a bool mask in which ``keep`` means that; None if a row may attend nothing.

    That is looked up once for a mask: such rows give NaN in most libraries, and in ours zeros.
    """
    return once(module, "attended", (mask,), lambda: _attended_steps(mask, keep))


def _attended_steps(mask: Tensor, keep: bool) -> Tensor | None:
    allowed = mask if keep else ~mask
    return allowed if bool(allowed.any(1).all()) else None


def as_of_softmax(alignments: Tensor) -> Tensor:
    """Alignments in the dtype that a softmax has under autocast: on a GPU float32, whatever its argument."""
    if alignments.is_cuda and torch.is_autocast_enabled("cuda") and alignments.dtype != torch.float64:
        return alignments.float()
    return alignments


def _same(some: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    for a, b in zip(some, others, strict=True):  # noqa: SIM110 - all() of a generator takes four times as long
        if a is not b:
            return False
    return True


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
    return tensor._version, tensor.requires_grad


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
