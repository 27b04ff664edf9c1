"""What the launchers share: launching on the right device, dtypes, strides, and which products have a small M."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

NUM_SMS = 128  # about what a large GPU has; asking for the number would make results depend on the device
MAX_SMALL_M = 4  # rows of a product, up to which reading the other factor takes longer than computing with it


def launch(
    kernel: Any,
    programs: int,
    arguments: tuple[Any, ...],
    strides: tuple[Any, ...],
    constants: dict[str, Any],
    warps: int,
) -> None:
    """Runs that many programs of a kernel on the device of its first tensor."""
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
    """Whether a kernel on the device of tensor may use the PTX instruction rcp.approx: NVIDIA GPUs, not float64."""
    return tensor.is_cuda and torch.version.hip is None and tensor.dtype != torch.float64


def sum_splits(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """(splits, *) -> (*): the sum, always in the same order, in the given dtype."""
    return (parts[0] if parts.shape[0] == 1 else parts.sum(0)).to(dtype)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_aligned(*tensors: Tensor) -> bool:
    """Whether every row of tensors (B, T, N) may be read 16 bytes at a time, if the first may.

    What Triton finds out by itself about a stride of the batch would change with the length T, and the code with it.
    """
    return all(stride % 16 == 0 for tensor in tensors for stride in tensor.stride()[:2])


def bytes_of(mask: Tensor | None) -> Tensor | None:
    """A bool mask as bytes, not copied."""
    return None if mask is None else mask.view(torch.uint8)


def mask_strides(mask: Tensor | None) -> tuple[int, int, int]:
    """Strides of a mask along batch, queries and steps; a 2-D mask does not change along the queries."""
    if mask is None:
        return 0, 0, 0
    if mask.dim() == 2:
        return mask.stride(0), 0, mask.stride(1)
    batch, query, step = mask.stride()
    return batch, query, step


def lengths_stride(memory_lengths: Tensor | None) -> int:
    return 0 if memory_lengths is None else memory_lengths.stride(0)


def steps_of_row(Tk: int, B: int, columns: int | None) -> int:
    """The steps of a row by which tiles are chosen: Tk, or of a packed memory of N = Tk, what its B have on average."""
    return Tk if columns is None else triton.cdiv(Tk, B)


def packed_split(splits: int, N: int) -> tuple[int, int]:
    """steps_per_split and splits of a packed memory, of whose sentences each is cut: see split_steps."""
    per_split = triton.cdiv(N, splits)
    return per_split, triton.cdiv(N, per_split)


def step_tiles(Tk: int, B: int, block: int, packed: bool) -> int:
    """The tiles of block steps of all sentences; of a packed memory, N = Tk: see packed_tile."""
    return Tk // block + B if packed else B * triton.cdiv(Tk, block)


def alignments_shape(B: int, Tq: int, Tk: int, columns: int | None) -> tuple[int, ...]:
    """Of alignments as they are returned: see ops.py on packed ones, of N = Tk."""
    if columns is None:
        return B, Tq, Tk
    return (B, Tq, columns) if columns else (Tq * Tk,)


def power_of_two(size: int, least: int, most: int) -> int:
    """The smallest power of two that holds size, within [least, most]."""
    power: int = triton.next_power_of_2(size)
    return min(most, max(least, power))


def is_small_m(query: Tensor) -> bool:
    """Whether query (B, Tq, *) takes the kernels that multiply element by element."""
    return query.shape[1] <= MAX_SMALL_M or query.dtype == torch.float64


def two_parts(number: float, dtype: torch.dtype) -> tuple[float, float]:
    """A number as a kernel gets it, in float32, and what float32 lost of it, for kernels of float64."""
    if dtype != torch.float64:
        return float(number), 0.0
    return float(number), number - torch.tensor(number, dtype=torch.float32).item()


def small_m_block(queries: int) -> int:
    """The queries of a tile with few queries: 1, 2 or 4."""
    return power_of_two(queries, 1, MAX_SMALL_M)


def small_m_tile(query: Tensor) -> tuple[int, int, int]:
    """BLOCK_Q, BLOCK_K, BLOCK_A of scores of few queries (B, Tq, A): 32 elements a thread, 16 in float64."""
    block_q, block_a = small_m_block(query.shape[1]), power_of_two(query.shape[2], 32, 256)
    elements = 2048 if query.dtype == torch.float64 else 4096
    return block_q, max(2, elements // (block_q * block_a)), block_a
