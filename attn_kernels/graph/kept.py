"""Values that a captured graph computes only from the memory and from weights, reused by later steps of a decoder.

A decoder projects the same memory in every step, because its module has no place to store the result. A value is reused
if the tensors that it was computed from are those of the last call: the same objects, or equal views of one object.
They must also be unchanged. Autograd's version counter detects some writes; to detect the others (``.data``, ``set_``,
``swap_tensors``), the elements are compared; see :class:`Sources`.

A cached value has its own node in autograd's graph. The node keeps the tensors that its backward needs and never
releases them, so that steps can be differentiated together or one by one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checksums import are_readable, current_modes, value_of
from ..functional import prepare_keys
from ..memory import Memory, PreparedMemory


class Sources:
    """The tensors that a value was computed from, and their state then."""

    def __init__(self, tensors: tuple[Tensor, ...], elements: bool = True) -> None:
        """elements: whether to compare them; not necessary for views of a tensor, which always show its elements."""
        self.tensors = tensors
        self._versions = tuple(_version(x) for x in tensors)
        self._values = tuple(map(_value, tensors)) if elements else None

    def match(self, tensors: tuple[Tensor, ...]) -> bool:
        """Whether these are the same tensors with the same elements."""
        for old, new, counted in zip(self.tensors, tensors, self._versions, strict=True):
            if (old is not new and not _is_same_view(old, new)) or _version(new) != counted:
                return False
        return self._values is None or tuple(map(_value, tensors)) == self._values


def _fingerprint(tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Identifies tensors without holding references; rarely equal for other tensors that reuse the memory."""
    return tuple((x.data_ptr(), x.shape, x.stride(), x.requires_grad) for x in tensors)


def _version(x: Tensor) -> tuple[Any, ...]:
    return (None if x.is_inference() else x._version, x.data_ptr(), x.requires_grad)


def _is_same_view(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal views of the same tensor."""
    if a.shape != b.shape or a.stride() != b.stride() or a.dtype != b.dtype or a.data_ptr() != b.data_ptr():
        return False
    if a.requires_grad or b.requires_grad:
        return a.requires_grad and b.requires_grad and a._base is not None and a._base is b._base
    is_same: bool = a.untyped_storage()._cdata == b.untyped_storage()._cdata
    return is_same


def _value(x: Tensor) -> Any:
    """A key that differs if an element differs. A dense tensor is not copied, even if its axes are permuted."""
    dense = None if x.is_contiguous() else _dense(x.detach())
    return value_of(x if dense is None else dense)


def _dense(x: Tensor) -> Tensor | None:
    """The elements in memory order, if they are dense; otherwise None."""
    order = sorted(range(x.dim()), key=lambda d: (x.stride(d), x.shape[d]), reverse=True)
    moved = x.permute(order)
    return moved.flatten() if moved.is_contiguous() else None


# Slots ----------------------------------------------------------------------------------------------------------------


class Held:
    """A cached value, and values that are derived from it."""

    def __init__(self, sources: Sources, state: tuple[Any, ...], value: Tensor) -> None:
        self.sources = sources
        self.state = state
        self.value = value
        self.hits = 0
        self.memory: Memory | None = None
        self.prepared: Tensor | None = None
        self.masks: Any = None  # the masks of the last step, and the Allowed computed from them: runtime.py


class Slot:
    """The cached value of one module for one place in one graph.

    A value is cached from the second call with the same tensors on, or from the first if the previous value was reused.
    After a value that was cached and never reused, twice as many calls with the same tensors are needed.
    """

    def __init__(self) -> None:
        self._held: Held | None = None
        self._is_reused = False
        self._last: tuple[Any, ...] = ()
        self._repeats, self._needed_repeats = 0, 1

    def get(
        self, function: Callable[..., Tensor], tensors: tuple[Tensor, ...], numbers: tuple[Any, ...], is_view: bool
    ) -> Tensor:
        if not are_readable(*tensors):
            return function(*tensors, *numbers)
        state = (numbers, *current_modes())
        held = self._held
        if held is not None:
            if held.state == state and held.sources.match(tensors):
                held.hits += 1
                return held.value
            self._is_reused = held.hits > 0
            self._needed_repeats = 1 if self._is_reused else min(2 * self._needed_repeats, 64)
            self._held = held = None
        if not self._is_reused:
            last, self._last = self._last, _fingerprint(tensors)
            self._repeats = self._repeats + 1 if last == self._last else 0
            if self._repeats < self._needed_repeats:
                return function(*tensors, *numbers)
        self._last, self._repeats = (), 0
        sources = Sources(tensors, elements=not is_view)
        value = function(*tensors, *numbers) if is_view else _make(function, tensors, numbers)
        if not any(value is x for x in tensors):
            self._held = value.__dict__[_HELD] = Held(sources, state, value)
        return value


_HELD = "_attn_kernels_held"


def held_of(tensor: Tensor) -> Held | None:
    """The cache entry of a tensor, if it is a cached value."""
    held: Held | None = tensor.__dict__.get(_HELD)
    return held


class Keeper:
    """All cached values of a module."""

    def __init__(self) -> None:
        self._slots: dict[Any, Slot] = {}

    def slot(self, key: Any) -> Slot:
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = Slot()
        return slot


class Current(threading.local):
    keeper: Keeper | None = None


current: Current = Current()  # the keeper of the module whose graph runs in this thread; None if nothing is cached


def keep(function: Callable[..., Tensor], tensors: int, is_view: bool, name: str) -> Callable[..., Tensor]:
    """``function`` with a cached result. Its first arguments are tensors, the others numbers."""

    def kept(*args: Any) -> Tensor:
        keeper = current.keeper
        if keeper is None:
            return function(*args)
        return keeper.slot(kept).get(function, args[:tensors], args[tensors:], is_view)

    kept.__name__ = kept.__qualname__ = name
    return kept


def prepared_of(held: Held) -> Tensor | None:
    """The result of prepare_keys for keys that were reused."""
    if held.prepared is None and held.hits > 0:
        held.prepared = prepare_keys(held.value)
    return held.prepared


def memory_of(held: Held, values: Tensor | None, mask: Tensor | None, prepared: Tensor | None = None) -> Memory:
    """Keys and values as one Memory for all steps, which accumulates their gradients."""
    memory = held.memory
    if memory is not None and memory.mask is mask and memory.prepared is prepared:
        if memory.values is values or (values is None and memory.values.shape[2] == 0):
            return memory
    if values is None:
        values = held.value.new_empty((*held.value.shape[:2], 0))
    memory = held.memory = PreparedMemory.of(Memory(held.value, values, None, mask), prepared)
    return memory


def _make(function: Callable[..., Tensor], tensors: tuple[Tensor, ...], numbers: tuple[Any, ...]) -> Tensor:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        result: Tensor = _Kept.apply(function, numbers, *tensors)  # type: ignore[no-untyped-call]  # torch has no types for it
        return result
    return function(*tensors, *numbers)


class _Kept(torch.autograd.Function):
    """``function(*tensors, *numbers)``; its backward may run any number of times."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], numbers: tuple[Any, ...], *tensors: Tensor) -> Tensor:
        leaves = tuple(x.detach().requires_grad_(x.requires_grad) for x in tensors)
        with torch.enable_grad():
            inner = function(*leaves, *numbers)
        ctx.function, ctx.numbers, ctx.tensors = function, numbers, tensors
        ctx.leaves, ctx.inner = leaves, inner
        return inner.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # the gradient will be differentiated again
            tensors, inner = ctx.tensors, ctx.function(*ctx.tensors, *ctx.numbers)
        else:
            tensors, inner = ctx.leaves, ctx.inner
        wanted = [x for x in tensors if x.requires_grad]
        options = {"retain_graph": True, "allow_unused": True, "create_graph": torch.is_grad_enabled()}
        gradients = iter(torch.autograd.grad(inner, wanted, gradient, **options))
        return (None, None, *(next(gradients) if x.requires_grad else None for x in tensors))
