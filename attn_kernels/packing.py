"""Packed sequences: the steps of all sentences one after the other, (N, *), and the offset of each sentence.

offsets: (B + 1,) int32 or int64; sentence b has the steps offsets[b] to offsets[b + 1] - 1. All functions are plain
PyTorch, so that autograd and the transforms of ``torch.func`` can differentiate them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.utils.rnn import PackedSequence


def lengths(offsets: Tensor) -> Tensor:
    """(B,), in the dtype of offsets."""
    return offsets.diff()


def longest(offsets: Tensor) -> int:
    """The largest length, 0 if there is no sentence. Waits for the device."""
    return int(lengths(offsets).max()) if offsets.numel() > 1 else 0


def is_readable(offsets: Tensor) -> bool:
    """Whether the values of offsets can be read: not within a trace, a compilation or a dispatch mode."""
    return (
        type(offsets) is Tensor
        and not is_compiling()
        and not torch._C._is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def enough_columns(offsets: Tensor, n: int) -> int:
    """A number of columns that holds every sentence: the largest length, or N if that cannot be read."""
    return longest(offsets) if is_readable(offsets) else n


def pad(rows: Tensor, offsets: Tensor, columns: int) -> Tensor:
    """(N, *) -> (B, columns, *), with zeros after the end of each sentence.

    On a GPU offsets are not checked: indices are clamped to the rows, so that nothing out of bounds is read.
    """
    steps = torch.arange(columns, device=rows.device)
    used = steps < lengths(offsets)[:, None]
    zeros = len(rows)  # the index of a row of zeros
    at = torch.where(used, offsets[:-1, None] + steps, zeros).clamp(0, zeros)
    with_zeros = torch.cat((rows, rows.new_zeros((1, *rows.shape[1:]))))
    return with_zeros.index_select(0, at.flatten()).view(*at.shape, *rows.shape[1:])


def select(offsets: Tensor, sentences: Tensor) -> tuple[Tensor, Tensor]:
    """The row indices of the steps of the sentences at ``sentences``, (n,), in that order, and their new offsets."""
    starts, counts = offsets[:-1].index_select(0, sentences), lengths(offsets).index_select(0, sentences)
    chosen = torch.cat((offsets.new_zeros(1), counts.cumsum(0).to(offsets.dtype)))
    steps = torch.arange(int(counts.sum()), device=offsets.device)
    return steps + (starts - chosen[:-1]).repeat_interleave(counts, output_size=len(steps)), chosen


def from_sequence(sequence: PackedSequence) -> tuple[Tensor, Tensor]:
    """The rows of a PackedSequence, which is ordered by step, re-ordered by sentence; and the offsets."""
    data, sizes, _, order = sequence  # sizes: (T,), on the CPU; order: (B,), the place of each sentence in a step
    batch = int(sizes[0]) if len(sizes) else 0
    counts = (sizes[:, None] > torch.arange(batch)).sum(0)
    place = torch.arange(batch) if order is None else order.cpu()
    counts = counts.index_select(0, place)
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    of_row = torch.arange(batch).repeat_interleave(counts)
    step = torch.arange(len(of_row)) - offsets[of_row]
    rows = (sizes.cumsum(0) - sizes)[step] + place[of_row]
    return data.index_select(0, rows.to(data.device)), offsets.to(data.device)


def flatten_alignments(alignments: Tensor, offsets: Tensor, n: int) -> Tensor:
    """(B, Tq, columns) -> (Tq n,): the weights (Tq, length) of each sentence, without the columns after its end."""
    queries, columns = alignments.shape[1:]
    place = torch.arange(queries * n, device=alignments.device)
    sentence = torch.bucketize(place, queries * offsets[1:].long(), right=True)
    within, length = place - queries * offsets[sentence], lengths(offsets)[sentence]
    at = (sentence * queries + within // length) * columns + within % length
    return alignments.flatten().index_select(0, at)
