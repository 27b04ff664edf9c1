"""From the arguments of an op to those of a kernel: strides, masks, and numbers in two parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..types import Masks


def rows_aligned(*tensors: Tensor | None) -> bool:
    """Whether each row of tensors (B, T, N) may be read 16 bytes at a time, if the first row may. None: no tensor.

    Triton itself would specialise on the batch stride, which depends on the length T, and would recompile.
    """
    return all(stride % 16 == 0 for tensor in tensors if tensor is not None for stride in tensor.stride()[:2])


def strides_of(tensor: Tensor | None, axes: int = 3) -> tuple[int, ...]:
    """The strides of a tensor with that number of axes; zeros for an absent tensor."""
    return (0,) * axes if tensor is None else tensor.stride()


def extra_arguments(extra: Tensor | None) -> tuple[Any, ...]:
    """``extra``, ``stride_eb``, ``stride_ek``, ``stride_ea`` of a kernel: (B, Tk, A), added to the keys.

    Without it all are None, constants for Triton, so kernels of calls without extra do not change.
    """
    return (None,) * 4 if extra is None else (extra, *extra.stride())


def mask_tensors(masks: Masks) -> tuple[Tensor | None, Tensor | None]:
    """``lengths`` and ``mask`` of a kernel. A bool mask is viewed as bytes, not copied."""
    memory_lengths, mask = masks
    return memory_lengths, None if mask is None else mask.view(torch.uint8)


def mask_strides(masks: Masks) -> tuple[int, int, int, int]:
    """``stride_lengths``, ``stride_mb``, ``stride_mq``, ``stride_mk``; a 2-D mask has stride 0 along the queries."""
    memory_lengths, mask = masks
    of_lengths = 0 if memory_lengths is None else memory_lengths.stride(0)
    if mask is None:
        return of_lengths, 0, 0, 0
    return of_lengths, mask.stride(0), mask.stride(1) if mask.dim() == 3 else 0, mask.stride(-1)


def two_parts(number: float, dtype: torch.dtype) -> tuple[float, float]:
    """A number rounded to float32, as kernels get it, and its rounding error, for kernels in float64."""
    if dtype != torch.float64:
        return float(number), 0.0
    return float(number), number - torch.tensor(number, dtype=torch.float32).item()
