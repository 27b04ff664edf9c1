"""Sizes of tiles that several launchers use, and which products have a small M (SMALL_M: see device.py)."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

NUM_SMS = 128  # roughly that of a large GPU; with the device's own number, results would depend on the device
MAX_SMALL_M = 4  # up to this many rows, a product is limited by reading the other operand


def power_of_two(size: int, least: int, most: int) -> int:
    """The smallest power of two that holds size, within [least, most]."""
    power: int = triton.next_power_of_2(size)
    return min(most, max(least, power))


def is_small_m(query: Tensor) -> bool:
    """Whether query (B, Tq, *) runs on the kernels that multiply element by element."""
    return query.shape[1] <= MAX_SMALL_M or query.dtype == torch.float64


def small_m_block(queries: int) -> int:
    """The number of queries of a tile with few queries: 1, 2 or 4."""
    return power_of_two(queries, 1, MAX_SMALL_M)


def small_m_tile(query: Tensor) -> tuple[int, int, int]:
    """BLOCK_Q, BLOCK_K, BLOCK_A for scores of few queries (B, Tq, A): 32 elements per thread, 16 in float64."""
    block_q, block_a = small_m_block(query.shape[1]), power_of_two(query.shape[2], 32, 256)
    elements = 2048 if query.dtype == torch.float64 else 4096
    return block_q, max(2, elements // (block_q * block_a)), block_a


def steps_of_row(Tk: int, B: int, columns: int | None) -> int:
    """The number of steps by which tiles are chosen: Tk, or for a packed memory, N = Tk, the average length."""
    return Tk if columns is None else triton.cdiv(Tk, B)


def packed_split(splits: int, N: int) -> tuple[int, int]:
    """steps_per_split and splits of a packed memory, in which every sentence is split: see split_steps."""
    per_split = triton.cdiv(N, splits)
    return per_split, triton.cdiv(N, per_split)


def step_tiles(Tk: int, B: int, block: int, packed: bool) -> int:
    """The number of tiles of ``block`` steps of all sentences; for a packed memory, N = Tk: see packed_tile."""
    return Tk // block + B if packed else B * triton.cdiv(Tk, block)
