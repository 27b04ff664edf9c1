"""Values derived from tensors and used again in later calls, for as long as making them again would give the same.

The modules of other libraries are called a step at a time with the same memory and have nowhere to put what could be
made of it once. Here it is kept beside a module (not in it: copies and pickles of the module are unaffected).

Nothing tells of every write to a tensor: autograd's version counter misses ``x.data.copy_(y)``, arrays of NumPy that
share the storage, and ``x.data = y``; the address misses writes in place. So values that were read are compared with
what they are now, by checksums of 64 bits, which takes about a fifteenth of the time of a linear layer over them.
Tensors that a result only holds, or has views of, need no such check: they are read when the result is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .backends import checksums as _find_checksums

T = TypeVar("T")
Sources = tuple[Tensor | None, ...]


class Derived(NamedTuple):
    """A value, and what is to be as it was for it to be used again. ``result`` is what ``make`` returned."""

    result: Any
    values: tuple[Any, ...]  # of the tensors that were read: their layout and checksum
    held: Sources
    places: tuple[Any, ...]  # of the tensors held
    modes: tuple[Any, ...]


_checksums = _find_checksums()  # None without the compiled module: then nothing that was read is kept
_derived: WeakKeyDictionary[Any, dict[str, Derived]] = WeakKeyDictionary()


def keeps(source: Any) -> bool:
    """Whether a tensor's values may be read in each call.

    On the CPU only: reading those of a GPU would wait for it. And not in ``torch.compile``, where what is kept would be
    a constant of the graph.
    """
    return source.is_cpu and not is_compiling()


def once(module: Any, what: str, make: Callable[[], T], *, read: Sources = (), held: Sources = ()) -> T:
    """``make()``, or what it returned the last time, if it would return the same again.

    Of each ``what`` the last result is kept, until another is made and not longer than the module. It must not be
    written to, nor have an autograd graph that a backward pass uses up.

    Args:
        module: what it is kept for. what: one of several things that are kept for it.
        read: all tensors whose values ``make`` reads. Compared by value: other tensors that are equal will do.
        held: tensors that the result holds, or has views of. Compared by identity, storage and place in autograd's
            graph; their values may change.
    """
    if not are_readable(*read, *held):
        return make()
    of_module = _derived.get(module)
    if of_module is None:
        of_module = _derived[module] = {}
    derived = of_module.get(what)
    values, places, modes = tuple(map(value_of, read)), tuple(map(_place, held)), current_modes()
    if (
        derived is None
        or derived.values != values
        or derived.modes != modes
        or derived.places != places
        or not _are_same(derived.held, held)
    ):
        derived = of_module[what] = Derived(make(), values, held, places, modes)
    return derived.result


def forget(module: Any) -> None:
    """Drops all that is kept for a module."""
    _derived.pop(module, None)


def value_of(tensor: Tensor | None) -> Any:
    """What differs where a tensor has other values, another shape, dtype or ``requires_grad``."""
    if tensor is None:
        return None
    return tensor.shape, tensor.dtype, tensor.requires_grad, checksums(tensor, 1)


def checksums(tensor: Tensor, pieces: int) -> Any:
    """64 bits for each of so many equal pieces along the first axis; for tensors that are readable."""
    if not tensor.is_contiguous():
        tensor = tensor.detach().contiguous()
    return _checksums(tensor.data_ptr(), tensor.nbytes // pieces if pieces else 0, pieces)


def current_modes() -> tuple[Any, ...]:
    """The modes under which the same values give another result."""
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast


def are_readable(*tensors: Tensor | None) -> bool:
    """Whether there are values to compare: of tensors in main memory, of no subclass, outside of transforms."""
    if _checksums is None or torch._C._are_functorch_transforms_active():
        return False
    for tensor in tensors:
        if tensor is not None and not (
            keeps(tensor) and type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        ):
            return False
    return True


def _place(tensor: Tensor | None) -> Any:
    """What differs where a tensor has other storage, is another view of it, or comes from elsewhere in a graph."""
    if tensor is None:
        return None
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad, tensor.grad_fn


def _are_same(some: Sources, others: Sources) -> bool:
    for a, b in zip(some, others, strict=True):  # noqa: SIM110 - all() of a generator takes four times as long
        if a is not b:
            return False
    return True
