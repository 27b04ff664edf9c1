"""Packed memories: made from jagged tensors, a PackedSequence, or rows with offsets; and their checks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import packing
from .checks import check_device, check_tensor, shape_of
from .errors import ArgumentTypeError, ArgumentValueError


class PackedMemory(NamedTuple):
    """Keys (N, A), values (N, D) or None, and the offsets of the sentences, (B + 1,).

    max_length: the maximal length of a jagged tensor, at least the largest length; None if it is not known.
    """

    keys: Tensor
    values: Tensor | None
    offsets: Tensor
    max_length: int | None


def is_jagged(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_nested and tensor.layout == torch.jagged


def packed_memory(
    name: str, keys: Tensor, values: Tensor | None, memory_offsets: Tensor | None, **others: Any
) -> PackedMemory:
    """The packed memory of jagged keys and values, or of packed ones with offsets.

    others: arguments that are for padded keys only, by name; an error is raised if one is not None.
    """
    refuse(name, "keys", "keys and values", others)
    max_length = None
    if is_jagged(keys):
        if memory_offsets is not None:
            raise ArgumentValueError(
                f"{name}: memory_offsets must be None with jagged keys, which contain their offsets"
            )
        memory_offsets = _offsets(name, "keys", keys)
        max_length = getattr(keys, "_maybe_max_seqlen", None)
        if values is not None:
            if not is_jagged(values):
                raise ArgumentTypeError(f"{name}: values must be jagged, as keys are, got {_kind(values)}")
            of_values = _offsets(name, "values", values)
            check_device(name, "values", values, keys=keys)
            if not (of_values is memory_offsets or _are_equal(of_values, memory_offsets)):
                raise ArgumentValueError(f"{name}: values must have the lengths of keys")
            values = values.values()
        keys = keys.values()
    assert memory_offsets is not None  # of keys that are not jagged, given
    return PackedMemory(keys, values, memory_offsets, max_length)


def refuse(name: str, argument: str, padded: str, others: dict[str, Any]) -> None:
    """Raises an error if one of the others, which are for padded memories, was given. padded: what the user may pad."""
    for other, given in others.items():
        if given is not None:
            pad = "" if other == "memory_lengths" else f"; pad {padded}, with memory_lengths, to use it"
            raise ArgumentValueError(f"{name}: {other} is not for jagged {argument}, nor with memory_offsets{pad}")


def padding_needed(name: str) -> ArgumentValueError:
    """The error of a function that does not support packed memories."""
    return ArgumentValueError(f"{name}: memory must be padded, as memory.padded() makes it, got a packed one")


def is_packed(memory: object) -> bool:
    """Whether this is a packed form that knows where each sentence begins: a jagged tensor or a PackedSequence."""
    return type(memory) is not Tensor and (isinstance(memory, PackedSequence) or is_jagged(memory))


def packed_rows(
    name: str, memory: Any, memory_offsets: Tensor | None, size: int, **others: Any
) -> tuple[Tensor, Tensor, int | None]:
    """The encoder outputs of all sentences, (N, size), with offsets and max_length, as in ``PackedMemory``.

    memory: jagged (B, j, size), a PackedSequence, or (N, size) with offsets. others: as for ``packed_memory``.
    """
    refuse(name, "memory", "memory", others)
    max_length, kind = None, "a PackedSequence" if isinstance(memory, PackedSequence) else "jagged memory"
    if is_packed(memory):
        if memory_offsets is not None:
            raise ArgumentValueError(f"{name}: memory_offsets must be None with {kind}, which has its own")
        if isinstance(memory, PackedSequence):
            memory, memory_offsets = packing.from_sequence(memory)
        else:
            memory_offsets, max_length = _offsets(name, "memory", memory), getattr(memory, "_maybe_max_seqlen", None)
            memory = memory.values()
    assert memory_offsets is not None  # of rows, given
    check_tensor(name, "memory", memory)
    if memory.dim() != 2 or memory.shape[1] != size:
        got = shape_of(memory)
        raise ArgumentValueError(f"{name}: memory must have shape (N, memory_size) = (*, {size}), got {got}")
    if not memory.is_floating_point():
        raise ArgumentTypeError(f"{name}: memory must be floating point, got {memory.dtype}")
    packed = PackedMemory(memory, None, memory_offsets, max_length)
    check_memory(name, packed)
    check_offsets(name, packed)
    return memory, memory_offsets, max_length


def _offsets(name: str, argument: str, jagged: Any) -> Tensor:
    if jagged.dim() != 3 or jagged._ragged_idx != 1:
        axes = f"(B, j, {dict(keys='A', values='D', memory='memory_size')[argument]})"
        raise ArgumentValueError(f"{name}: {argument} must have shape {axes}, got {shape_of(jagged)}")
    if jagged.lengths() is not None:
        raise ArgumentValueError(
            f"{name}: {argument} must have no holes between sentences: call {argument}.contiguous()"
        )
    offsets: Tensor = jagged.offsets()
    return offsets


def _kind(value: object) -> str:
    return f"a tensor of shape {shape_of(value)}" if isinstance(value, Tensor) else type(value).__name__


def _are_equal(offsets: Tensor, others: Tensor) -> bool:
    """Whether offsets are equal; True if that cannot be read without waiting for a device."""
    if offsets.shape != others.shape:
        return False
    return not offsets.is_cpu or not packing.is_readable(offsets) or torch.equal(offsets, others)


def check_memory(name: str, memory: PackedMemory) -> None:
    """Checks types and shapes of a packed memory."""
    keys, values, offsets, _ = memory
    check_tensor(name, "keys", keys)
    if keys.dim() != 2:
        raise ArgumentValueError(f"{name}: keys must have shape (N, A) with memory_offsets, got {shape_of(keys)}")
    if values is not None:
        check_tensor(name, "values", values)
        if values.dim() != 2 or values.shape[0] != keys.shape[0]:
            expected = f"({keys.shape[0]}, *)"
            raise ArgumentValueError(f"{name}: values must have shape (N, D) = {expected}, got {shape_of(values)}")
        check_device(name, "values", values, keys=keys)
    check_tensor(name, "memory_offsets", offsets)
    if offsets.dtype not in (torch.int32, torch.int64):
        raise ArgumentTypeError(f"{name}: memory_offsets must be int32 or int64, got {offsets.dtype}")
    if offsets.dim() != 1 or offsets.shape[0] == 0:
        raise ArgumentValueError(f"{name}: memory_offsets must have shape (B + 1,), got {shape_of(offsets)}")
    check_device(name, "memory_offsets", offsets, keys=keys)


def check_query(name: str, query: Tensor, memory: PackedMemory) -> None:
    """Checks a packed memory, and that the query, (B, Tq, A) or (B, A), fits it."""
    check_memory(name, memory)
    check_tensor(name, "query", query)
    batch, units = memory.offsets.shape[0] - 1, memory.keys.shape[1]
    if query.dim() not in (2, 3) or query.shape[0] != batch or query.shape[-1] != units:
        expected = f"({batch}, *, {units}) or ({batch}, {units})"
        raise ArgumentValueError(
            f"{name}: query must have shape (B, Tq, A) or (B, A) = {expected}, as memory_offsets, (B + 1,), and keys, "
            f"(N, A), ask for, got {shape_of(query)}"
        )
    check_device(name, "keys", memory.keys, query=query)


def check_offsets(name: str, memory: PackedMemory) -> None:
    """Checks that offsets rise from 0 to N, if their values can be read without waiting for a device."""
    if not memory.offsets.is_cpu or not packing.is_readable(memory.offsets):
        return
    try:
        offsets = memory.offsets.tolist()
    except RuntimeError:  # tensors of a functorch transform have no readable values
        return
    steps = memory.keys.shape[0]
    if offsets[0] != 0 or offsets[-1] != steps or offsets != sorted(offsets):
        decrease = next((pair for pair in pairwise(offsets) if pair[0] > pair[1]), None)
        got = f"{decrease[0]} before {decrease[1]}" if decrease else f"{offsets[0]} to {offsets[-1]}"
        raise ArgumentValueError(
            f"{name}: memory_offsets must start with 0, not decrease and end with N = {steps}, got {got}"
        )
    if memory.max_length is not None and packing.longest(memory.offsets) > memory.max_length:
        raise ArgumentValueError(
            f"{name}: a sentence is longer than max_length (max_seqlen of jagged keys), {memory.max_length}"
        )
