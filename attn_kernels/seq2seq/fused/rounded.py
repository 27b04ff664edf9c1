"""Weights rounded to bfloat16 for searches on the CPU, kept between searches.

They are in blocks (csrc/decode.h), which products of few rows read faster than rows. Measured on Sapphire Rapids, one
thread, as times of a plain read of the numbers, of weights of 1, 2, 4 and 10 MB in float32, of which L2 holds 2 MB:

| | products of one row | of five rows |
|---|---|---|
| rounded, in blocks | 1.7, 1.7, 1.1, 1.05 | 4.5, 4.5, 1.8, 1.1 |
| rounded, row by row | 2.3, 2.1, 1.25, 1.0 | 6.5, 5.6, 2.3, 1.4 |
| float32, as they lie | 1.6, 1.15, 1.0, 1.0 | 3.5, 1.65, 1.1, 1.05 |

In float32 blocks gain half of what is above 1 in L2, little beyond, and less than a search loses by reading its weights
once more, to see whether the blocks are up to date. So float32 is read as it lies.

What is made of a weight is kept as long as the weight, and used again while that has the same values, by checksums: see
checksums.py. It is kept beside the model: copies, pickles and state dicts know nothing of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ... import ops
from ...checksums import are_readable, value_of


class Part(NamedTuple):
    """Columns begin..end of a weight: in blocks, for the op decoder_search, or in float32, in their own order."""

    begin: int
    end: int
    in_blocks: bool = True


class _Kept(NamedTuple):
    value: Any  # of the weight that the parts were made of
    parts: dict[Part, Tensor]


# Entries are replaced as a whole, and dictionaries are safe without a lock: at worst two threads make the same.
_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def rounded(weight: Tensor, *parts: Part) -> list[Tensor]:
    """Each part of a weight (n, k) in float32, on the CPU, with contiguous rows, without gradients."""
    if not are_readable(weight):
        return [_make(weight, part) for part in parts]
    value, kept = value_of(weight), _kept.get(weight)
    known: dict[Part, Tensor] = kept.parts if kept is not None and kept.value == value else {}
    missing = [part for part in parts if part not in known]
    if missing:
        known = {**known, **{part: _make(weight, part) for part in missing}}
        if value_of(weight) == value:  # no other thread has written to it meanwhile
            _kept[weight] = _Kept(value, known)
    return [known[part] for part in parts]


def _make(weight: Tensor, part: Part) -> Tensor:
    columns = weight.detach()[:, part.begin : part.end]
    if not part.in_blocks:
        return columns.to(torch.bfloat16).to(weight.dtype)
    blocks: Tensor = ops.kernel("rounded_blocks", "cpu")(columns)
    return blocks
