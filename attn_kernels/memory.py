"""Memory: what the attention modules make of a sentence once, and every decoding step then reads."""

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
    """Projected memory of a batch: an explicit value that each decoding step is given, not state of a module.

    It is a pytree of its tensors: ``torch.compile`` and ``torch.export`` take it as an argument and as a result. It
    holds nothing derived from them, such as what :func:`attn_kernels.prepare_keys` makes of keys: so steps are right
    after any write to its tensors, and with a copy that has others in their place. But the largest length is read once,
    until offsets are written to; on a GPU nobody sees what writes to those that are inference tensors.

    keys: (B, Tk, A), projected memory, in the form that the module which made it compares with its query.
    values: (B, Tk, D), what is averaged; on the device of ``keys``. Under autocast its dtype may be another.
    memory_lengths: (B,) int32 or int64, valid steps of each row, 0..Tk.
    mask: (B, Tk) or (B, Tq, Tk) bool, True where a step may be attended. With ``memory_lengths``, both must allow it.
    memory_offsets: (B + 1,) int32 or int64. With them the memory is packed: keys (N, A) and values (N, D) hold the
        steps of all sentences one after the other, without padding, and neither lengths nor a mask belong to it.
        Sentence b has steps ``memory_offsets[b]`` to ``memory_offsets[b + 1] - 1``.
    max_length: of a packed memory, the number of columns of its alignments, at least the largest length; None: that.

    Raises:
        ValueError: a shape or device does not fit. TypeError: a dtype or type does not. Whether lengths are
        within 0..Tk, and offsets rise from 0 to N, is for each step to check, and what holds no tensor at all, as trees
        may.
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
            return  # a tree of something else, made by tree_map, as torch.utils.checkpoint of torch 2.10 does
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
        """What the functions take of a packed memory."""
        assert self.memory_offsets is not None
        return PackedMemory(self.keys, self.values, self.memory_offsets, self.max_length)

    def padded(self) -> Memory:
        """This memory; of a packed one, a padded copy with ``memory_lengths``, for what takes no packed memory.

        On a GPU it waits for the largest length, unless there is a ``max_length``.

        Raises ValueError where offsets do not rise from 0 to N.
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
        """The largest length of a packed memory, read once: on a GPU it is waited for."""
        offsets = self.memory_offsets
        assert offsets is not None
        if not packing.is_readable(offsets) or (offsets.is_cpu and offsets.is_inference()):
            return packing.longest(offsets)
        version = None if offsets.is_inference() else offsets._version
        known: tuple[int | None, int] | None = self.__dict__.get("_known_longest")
        if known is None or known[0] != version:
            known = version, packing.longest(offsets)
            object.__setattr__(self, "_known_longest", known)  # no field: copies read their own
        return known[1]

    def gradient(self) -> MemoryGradient:
        """Accumulates the gradients of all steps on this memory; created on first use."""
        whole: Memory | None = self.__dict__.get("_whole")
        if whole is not None:
            return whole.gradient()
        gradient: MemoryGradient | None = self.__dict__.get("_gradient")
        if gradient is None or not gradient.is_current_for(self.keys, self.values):
            gradient = MemoryGradient(self.keys, self.values)
            object.__setattr__(self, "_gradient", gradient)  # no field: copies make their own
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
        """The earlier name of ``gradient``; it goes with the next version."""
        warn("Memory.meeting", "Memory.gradient")
        return self.gradient()

    def with_zero_padding(self) -> Memory:
        """This memory, of which the caller knows that values are 0 where no query may attend them, and keys finite."""
        if not is_compiling() and not self.keys.is_inference() and not self.values.is_inference():
            object.__setattr__(self, "_zero_padding", self._versions())  # no field: copies do not know it
        return self

    def has_zero_padding(self) -> bool:
        """Whether that is known, and no tensor was written to since: products need not leave out padding then.

        Leaving it out is a copy of keys and values in each step. In graphs, which may be run with other tensors, it is
        never known, nor of inference tensors, whose writes nobody counts.
        """
        if is_compiling() or torch._C._is_tracing():  # a compiled program would count the writes in each call
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
        """The rows (sentences) at ``indices``, in that order: to leave out finished ones, or to re-order the batch.

        indices: (n,) int32 or int64, each in 0..B-1, a row as often as wanted; or (B,) bool, True for the rows to keep.
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
        """A copy on another device or with another floating-point dtype; arguments as of ``Tensor.to``."""
        keys = self.keys.to(*args, **kwargs)
        move = {"device": keys.device, "non_blocking": kwargs.get("non_blocking", False)}
        others = (self.memory_lengths, self.mask, self.memory_offsets)
        lengths, mask, offsets = (None if x is None else x.to(**move) for x in others)
        return Memory(keys, self.values.to(*args, **kwargs), lengths, mask, offsets, self.max_length)


def padded(memory: Any) -> Any:
    """``Memory.padded``; what is no Memory, as decoders with attentions of their own have it, stays as it is."""
    return memory.padded() if isinstance(memory, Memory) else memory


torch.export.register_dataclass(Memory, serialized_type_name=f"{__package__}.Memory")


class PreparedMemory(Memory):
    """A memory with ``prepared``, which :func:`attn_kernels.prepare_keys` made of its keys, for additive attention.

    It is for many steps within one call of this package, such as a search: no code of others has it, which could write
    to the keys. Whatever is made of it but by ``select`` is without ``prepared``.
    """

    @classmethod
    def of(cls, memory: Memory, prepared: Tensor | None) -> PreparedMemory:
        made = cls(memory.keys, memory.values, memory.memory_lengths, memory.mask)
        object.__setattr__(made, "prepared", prepared)
        return made

    def select(self, indices: Tensor) -> Memory:
        selected = super().select(indices)
        return selected if self.prepared is None else self.of(selected, self.prepared[indices])
