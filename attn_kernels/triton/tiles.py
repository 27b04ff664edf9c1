"""Sizes of tiles that several launchers use, and which products have a small M (SMALL_M: see device.py)."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

NUM_SMS = 128  # about what a large GPU has; asking for the number would make results depend on the device
MAX_SMALL_M = 4  # rows of a product, up to which reading the other factor takes longer than computing with it


def power_of_two(size: int, least: int, most: int) -> int:
    """The smallest power of two that holds size, within [least, most]."""
    power: int = triton.next_power_of_2(size)
    return min(most, max(least, power))


def is_small_m(query: Tensor) -> bool:
    """Whether query (B, Tq, *) takes the kernels that multiply element by element."""
    return query.shape[1] <= MAX_SMALL_M or query.dtype == torch.float64


def small_m_block(queries: int) -> int:
    """The queries of a tile with few queries: 1, 2 or 4."""
    return power_of_two(queries, 1, MAX_SMALL_M)


def small_m_tile(query: Tensor) -> tuple[int, int, int]:
    """BLOCK_Q, BLOCK_K, BLOCK_A of scores of few queries (B, Tq, A): 32 elements a thread, 16 in float64."""
    block_q, block_a = small_m_block(query.shape[1]), power_of_two(query.shape[2], 32, 256)
    elements = 2048 if query.dtype == torch.float64 else 4096
    return block_q, max(2, elements // (block_q * block_a)), block_a
