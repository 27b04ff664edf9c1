"""Helpers of stateful mechanisms: initial alignments, the context of alignments, and checks of a state."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from ..errors import ArgumentValueError
from ..memory import Memory
from ..packed_memory import padding_needed
from ..types import attention_mask, wide_dtype
from .reading import Source, gathers, weighted_sum

State = TypeVar("State", bound=tuple[Tensor, ...])


def allowed_steps(memory: Memory) -> Tensor | None:
    """(B, 1, Tk) or (B, K, Tk) bool, True where a step may be attended; None where every step may."""
    return attention_mask(memory.keys, memory.memory_lengths, memory.mask)


def no_alignments(memory: Memory, hypotheses: int, dtype: torch.dtype) -> Tensor:
    """(B, hypotheses, Tk): all zeros."""
    batch, steps = _axes(memory)
    return memory.keys.new_zeros(batch, hypotheses, steps, dtype=dtype)


def uniform_alignments(memory: Memory, hypotheses: int, dtype: torch.dtype) -> Tensor:
    """(B, hypotheses, Tk): uniform over the steps that may be attended; zeros where there is none."""
    may = _ever_allowed(memory).to(wide_dtype(dtype))
    each = may / may.sum(-1, keepdim=True).clamp(min=1)
    return each.to(dtype).unsqueeze(1).expand(-1, hypotheses, -1)


def first_step_alignments(memory: Memory, hypotheses: int, dtype: torch.dtype) -> Tensor:
    """(B, hypotheses, Tk): 1 at the first step that may be attended."""
    may = _ever_allowed(memory)
    return (may & (may.cumsum(-1) == 1)).to(dtype).unsqueeze(1).expand(-1, hypotheses, -1)


INITIAL = {"zeros": no_alignments, "uniform": uniform_alignments}


def check_initial(name: str, initial: str) -> None:
    if initial not in INITIAL:
        raise ArgumentValueError(f"{name}: initial must be 'zeros' or 'uniform', got {initial!r}")


def _ever_allowed(memory: Memory) -> Tensor:
    """(B, Tk) bool: True where at least one hypothesis may attend."""
    axes, allowed = _axes(memory), allowed_steps(memory)
    return memory.keys.new_ones(axes, dtype=torch.bool) if allowed is None else allowed.any(1)


def _axes(memory: Memory) -> tuple[int, int]:
    """B and Tk."""
    if memory.memory_offsets is not None:
        raise padding_needed("initial_state")
    return memory.keys.shape[0], memory.keys.shape[1]


def average(alignments: Tensor, memory: Memory, backend: str | None) -> Tensor:
    """(B, K, D), the context: alignments @ values. alignments: (B, K, Tk), 0 in padding. Padded values may be NaN."""
    values, allowed = memory.values, allowed_steps(memory)
    if gathers(memory, allowed, alignments, backend):
        return weighted_sum(alignments, Source(memory.keys, values, allowed, backend, memory.gradient()))
    if allowed is None or (allowed.shape[1] == 1 and memory.has_zero_padding()):
        return alignments @ values
    if allowed.shape[1] == 1:
        return alignments @ values.masked_fill(~allowed.mT, 0.0)
    # A step that is padding for one hypothesis only may hold NaN: mask per pair of hypothesis and step.
    return (alignments.unsqueeze(2) @ torch.where(allowed.unsqueeze(3), values.unsqueeze(1), 0.0)).squeeze(2)


def as_state(name: str, kind: type[State], state: tuple[Tensor, ...], sizes: tuple[int, ...]) -> State:
    """Checks a state, which may be a plain tuple, and returns it as ``kind``. sizes: the last axis of each tensor."""
    fields = kind._fields  # type: ignore[attr-defined]
    if len(state) != len(fields):
        expected = f"{kind.__name__}({', '.join(fields)})"
        raise ArgumentValueError(f"{name}: state must be {expected}, got {len(state)} tensors")
    for field, x, size in zip(fields, state, sizes, strict=True):
        if x.dim() != 3 or x.shape[2] != size:
            got = tuple(x.shape)
            raise ArgumentValueError(f"{name}: state.{field} must have shape (B, K, {size}), got {got}")
    return kind(*state)
