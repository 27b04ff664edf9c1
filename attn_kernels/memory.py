"""Memory: the projected encoder outputs, made once per batch of sentences and read by every decoding step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import packing
from .checks import check_device, check_lengths, check_mask, check_size, check_tensor
from .deprecation import warn
from .errors import ArgumentTypeError, ArgumentValueError
from .memory_gradient import MemoryGradient
from .packed_memory import PackedMemory, check_memory, check_offsets, refuse


@dataclass(frozen=True, eq=False)
class Memory:
    """Projected memory of a batch. It is passed to each decoding step explicitly; modules do not store it.

    It is a pytree of its tensors: ``torch.compile`` and ``torch.export`` take it as an argument and as a result. It
    caches nothing derived from its tensors, such as the result of :func:`attn_kernels.prepare_keys`, so that steps stay
    correct if a tensor is modified in place or replaced in a copy. There is one exception: the largest length of a
    packed memory is read once, until its offsets are modified. On a GPU, writes to inference tensors are not noticed.

    keys: (B, Tk, A), projected memory, as the module that made it compares it with its query.
    values: (B, Tk, D), averaged to the context; on the device of ``keys``. Under autocast the dtypes may differ.
    memory_lengths: (B,) int32 or int64, valid steps of each row, 0..Tk.
    mask: (B, Tk) or (B, Tq, Tk) bool, True where a step may be attended. With ``memory_lengths``, both must allow it.
    memory_offsets: (B + 1,) int32 or int64. With them the memory is packed: keys (N, A) and values (N, D) hold the
        steps of all sentences one after the other, without padding, and neither lengths nor a mask belong to it.
        Sentence b has steps ``memory_offsets[b]`` to ``memory_offsets[b + 1] - 1``.
    max_length: of a packed memory, the number of columns of its alignments, at least the largest length; None for the
        largest length.

    Raises:
        ValueError: a shape or device does not fit. TypeError: a dtype or type does not. Each step checks that lengths
        are within 0..Tk and that offsets rise from 0 to N. A memory without any tensor, which pytree functions may
        make, is not checked.
    """

    keys: Tensor
    values: Tensor
    memory_lengths: Tensor | None = None
    mask: Tensor | None = None
    memory_offsets: Tensor | None = None
    max_length: int | None = None

    prepared: ClassVar[Tensor | None] = None  # of a PreparedMemory only

    def __post_init__(self) -> None:
        if not any(isinstance(field, Tensor) for field in self._tensors()):
            return  # a pytree of other objects, as torch.utils.checkpoint of torch 2.10 makes with tree_map
        for argument, expected, tensor in (("keys", "(B, Tk, A)", self.keys), ("values", "(B, Tk, D)", self.values)):
            check_tensor("Memory", argument, tensor)
            check_device("Memory", argument, tensor, keys=self.keys)
            if not tensor.is_floating_point():
                raise ArgumentTypeError(f"Memory: {argument} must be floating point, got {tensor.dtype}")
            if tensor.dim() != 3 and self.memory_offsets is None:
                raise ArgumentValueError(f"Memory: {argument} must have shape {expected}, got {tuple(tensor.shape)}")
        if self.memory_offsets is not None:
            refuse("Memory", "keys", "keys and values", dict(memory_lengths=self.memory_lengths, mask=self.mask))
            if self.max_length is not None:
                check_size("Memory", "max_length", self.max_length, least=0)
            check_memory("Memory", self._packed())
            return
        if self.max_length is not None:
            raise ArgumentValueError("Memory: max_length must be None without memory_offsets")
        batch, steps = self.keys.shape[0], self.keys.shape[1]
        if self.values.shape[0] != batch or self.values.shape[1] != steps:
            expected = f"(B, Tk, D) = ({batch}, {steps}, *)"
            raise ArgumentValueError(f"Memory: values must have shape {expected}, got {tuple(self.values.shape)}")
        if self.memory_lengths is not None:
            check_lengths("Memory", batch, self.memory_lengths, keys=self.keys)
        if self.mask is not None:
            check_mask("Memory", batch, None, steps, self.mask, keys=self.keys)

    @property
    def batch_size(self) -> int:
        return (self.keys if self.memory_offsets is None else self.memory_offsets[1:]).shape[0]

    def _packed(self) -> PackedMemory:
        """The fields of a packed memory, as the functions take them."""
        assert self.memory_offsets is not None
        return PackedMemory(self.keys, self.values, self.memory_offsets, self.max_length)

    def padded(self) -> Memory:
        """This memory; if it is packed, a padded copy with ``memory_lengths``.

        On a GPU this waits for the largest length, unless there is a ``max_length``.

        Raises ValueError if offsets do not rise from 0 to N.
        """
        if self.memory_offsets is None:
            return self
        offsets, columns = self.memory_offsets, self.max_length
        check_offsets("Memory.padded", self._packed())
        columns = self._longest() if columns is None else columns
        keys = packing.pad(self.keys, offsets, columns)
        values = keys if self.values is self.keys else packing.pad(self.values, offsets, columns)
        return Memory(keys, values, packing.lengths(offsets)).with_zero_padding()

    def _longest(self) -> int:
        """The largest length of a packed memory. It is cached, because reading it from a GPU waits for the device."""
        offsets = self.memory_offsets
        assert offsets is not None
        if not packing.is_readable(offsets) or (offsets.is_cpu and offsets.is_inference()):
            return packing.longest(offsets)
        version = None if offsets.is_inference() else offsets._version
        known: tuple[int | None, int] | None = self.__dict__.get("_known_longest")
        if known is None or known[0] != version:
            known = version, packing.longest(offsets)
            object.__setattr__(self, "_known_longest", known)  # not a field, so that copies do not inherit it
        return known[1]

    def gradient(self) -> MemoryGradient:
        """Accumulates the gradients of all steps on this memory; created on first use."""
        whole: Memory | None = self.__dict__.get("_whole")
        if whole is not None:
            return whole.gradient()
        gradient: MemoryGradient | None = self.__dict__.get("_gradient")
        if gradient is None or not gradient.is_current_for(self.keys, self.values):
            gradient = MemoryGradient(self.keys, self.values)
            object.__setattr__(self, "_gradient", gradient)  # not a field, so that copies do not inherit it
        return gradient

    def keys_alone(self) -> Memory:
        """Keys, and values of size 0, for steps that make alignments only, by masks of their own; made on first use."""
        whole: Memory | None = self.__dict__.get("_whole")
        if whole is not None:  # whose lengths and mask are not read of it
            return whole.keys_alone()
        made: Memory | None = self.__dict__.get("_keys_alone")
        if made is None:
            made = Memory(self.keys, self.keys.new_empty(*self.keys.shape[:2], 0))
            if not is_compiling():
                object.__setattr__(self, "_keys_alone", made)  # no field: copies make their own
        return made

    def with_mask(self, mask: Tensor) -> Memory:
        """This memory with another mask, of one step, that allows no more than its own.

        The gradients of steps on it are gathered with those of this memory.
        """
        made = Memory(self.keys, self.values, self.memory_lengths, mask)
        if is_compiling():
            return made
        object.__setattr__(made, "_whole", self)  # no field: copies are memories of their own
        # What the mask leaves out besides is values that some steps attend: alignments of 0 times finite numbers.
        return made.with_zero_padding() if self.has_zero_padding() else made

    def meeting(self) -> MemoryGradient:
        """The earlier name of ``gradient``; the next version removes it."""
        warn("Memory.meeting", "Memory.gradient")
        return self.gradient()

    def with_zero_padding(self) -> Memory:
        """Marks padding as clean and returns this memory: the caller guarantees zero values and finite keys there."""
        if not is_compiling() and not self.keys.is_inference() and not self.values.is_inference():
            object.__setattr__(self, "_zero_padding", self._versions())  # not a field, so that copies do not inherit it
        return self

    def has_zero_padding(self) -> bool:
        """Whether ``with_zero_padding`` was called and no tensor was modified since.

        Products can then skip masking, which copies keys and values in each step. Always False in traced graphs, which
        may run with other tensors, and for inference tensors, which have no version counter.
        """
        if is_compiling() or torch._C._is_tracing():  # a compiled program would compare the versions in each call
            return False
        known = self.__dict__.get("_zero_padding")
        return known is not None and known == self._versions()

    def _versions(self) -> tuple[int | None, ...]:
        return tuple(None if x is None or x.is_inference() else x._version for x in self._tensors())

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.keys, self.values, self.memory_lengths, self.mask, self.memory_offsets

    def __getstate__(self) -> dict[str, Any]:
        derived = ("_gradient", "_keys_alone", "_whole", "_zero_padding", "_known_longest")
        return {name: x for name, x in self.__dict__.items() if name not in derived}

    def select(self, indices: Tensor) -> Memory:
        """The rows (sentences) at ``indices``, in that order, to drop finished sentences or to re-order the batch.

        indices: (n,) int32 or int64, each in 0..B-1, repeats allowed; or (B,) bool, True for the rows to keep.
        """
        if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64, torch.bool):
            got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
            raise ArgumentTypeError(f"Memory.select: indices must be an int32, int64 or bool tensor, got {got}")
        is_mask = indices.dtype == torch.bool
        if indices.dim() != 1 or (is_mask and indices.shape[0] != self.batch_size):
            expected = f"(B,) = ({self.batch_size},)" if is_mask else "(n,)"
            raise ArgumentValueError(f"Memory.select: indices must have shape {expected}, got {tuple(indices.shape)}")
        if is_mask:
            indices = indices.nonzero().squeeze(1)
        lengths, mask, offsets = self.memory_lengths, self.mask, self.memory_offsets
        rows = indices
        if offsets is not None:
            check_offsets("Memory.select", self._packed())
            rows, offsets = packing.select(offsets, indices)
        selected = Memory(
            self.keys.index_select(0, rows),
            self.values.index_select(0, rows),
            None if lengths is None else lengths.index_select(0, indices),
            None if mask is None else mask.index_select(0, indices),
            offsets,
            self.max_length,
        )
        return selected.with_zero_padding() if self.has_zero_padding() else selected

    def to(self, *args: Any, **kwargs: Any) -> Memory:
        """A copy on another device or with another floating-point dtype; arguments as for ``Tensor.to``."""
        keys = self.keys.to(*args, **kwargs)
        move = {"device": keys.device, "non_blocking": kwargs.get("non_blocking", False)}
        others = (self.memory_lengths, self.mask, self.memory_offsets)
        lengths, mask, offsets = (None if x is None else x.to(**move) for x in others)
        return Memory(keys, self.values.to(*args, **kwargs), lengths, mask, offsets, self.max_length)


def padded(memory: Any) -> Any:
    """``Memory.padded``; an object of another type, from a custom attention, is returned unchanged."""
    return memory.padded() if isinstance(memory, Memory) else memory


torch.export.register_dataclass(Memory, serialized_type_name=f"{__package__}.Memory")


class PreparedMemory(Memory):
    """A memory with ``prepared``, the result of :func:`attn_kernels.prepare_keys` for its keys, for additive attention.

    It is used only inside one call of this package, such as a search, where no other code can modify the keys. Copies
    lose ``prepared``, except those made by ``select``.
    """

    @classmethod
    def of(cls, memory: Memory, prepared: Tensor | None) -> PreparedMemory:
        made = cls(memory.keys, memory.values, memory.memory_lengths, memory.mask)
        object.__setattr__(made, "prepared", prepared)
        return made

    def select(self, indices: Tensor) -> Memory:
        selected = super().select(indices)
        return selected if self.prepared is None else self.of(selected, self.prepared[indices])
