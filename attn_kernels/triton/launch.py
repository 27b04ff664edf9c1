"""Helpers of the launchers: launching on the right device, dtypes, and sums over the partial results of programs."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def launch(
    kernel: Any,
    programs: int,
    arguments: tuple[Any, ...],
    strides: tuple[Any, ...],
    constants: dict[str, Any],
    warps: int,
) -> None:
    """Launches a kernel with the given number of programs on the device of its first tensor."""
    if programs > 0:
        with _device_of(next(argument for argument in arguments if argument is not None)):
            kernel[(programs,)](*arguments, *strides, **constants, num_warps=warps, enable_fp_fusion=True)


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    if tensor.is_cuda:
        return torch.cuda.device_of(tensor)
    if tensor.device.type == "xpu":
        return torch.xpu.device_of(tensor)
    return contextlib.nullcontext()


def has_approximate_reciprocal(tensor: Tensor) -> bool:
    """Whether a kernel on the device of tensor may use the PTX instructions rcp.approx and ex2.approx.

    They are for NVIDIA GPUs, and not for float64.
    """
    return tensor.is_cuda and torch.version.hip is None and tensor.dtype != torch.float64


def sum_splits(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """(splits, *) -> (*): the sum, always in the same order, in the given dtype."""
    return (parts[0] if parts.shape[0] == 1 else parts.sum(0)).to(dtype)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def alignments_shape(B: int, Tq: int, Tk: int, columns: int | None) -> tuple[int, ...]:
    """The shape of the returned alignments. For packed ones, N = Tk: see ops.py."""
    if columns is None:
        return B, Tq, Tk
    return (B, Tq, columns) if columns else (Tq * Tk,)
