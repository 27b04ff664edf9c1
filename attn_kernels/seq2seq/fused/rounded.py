"""Weights rounded to bfloat16 for searches on the CPU, cached between searches.

They are stored in blocks (csrc/decode.h), which products of few rows read faster than plain rows. Measured on Sapphire
Rapids, one thread, L2 of 2 MB, for weights of 1, 2, 4 and 10 MB in float32. Times are relative to a plain read of the
numbers:

| | products of one row | of five rows |
|---|---|---|
| rounded, in blocks | 1.7, 1.7, 1.1, 1.05 | 4.5, 4.5, 1.8, 1.1 |
| rounded, row by row | 2.3, 2.1, 1.25, 1.0 | 6.5, 5.6, 2.3, 1.4 |
| float32, in place | 1.6, 1.15, 1.0, 1.0 | 3.5, 1.65, 1.1, 1.05 |

Float32 blocks would save half of the part above 1 if the weight fits into L2, and little if it does not. That is less
than the cost of reading the weights once more to check that the blocks are up to date. So float32 weights are read in
place.

The blocks of a weight are cached as long as the weight exists, and reused while its values are the same, according to
checksums: see checksums.py. The cache is outside the model: copies, pickles and state dicts do not contain it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ... import ops
from ...checksums import are_readable, value_of


class Part(NamedTuple):
    """Columns begin..end of a weight: in blocks, for the op decoder_search, or in float32 in the original layout."""

    begin: int
    end: int
    in_blocks: bool = True


class _Kept(NamedTuple):
    value: Any  # of the weight from which the parts were computed
    parts: dict[Part, Tensor]


# Entries are replaced as a whole and dictionaries are thread-safe, so no lock is needed: at worst, two threads compute
# the same entry.
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
        if value_of(weight) == value:  # no other thread has written to the weight meanwhile
            _kept[weight] = _Kept(value, known)
    return [known[part] for part in parts]


def _make(weight: Tensor, part: Part) -> Tensor:
    columns = weight.detach()[:, part.begin : part.end]
    if not part.in_blocks:
        return columns.to(torch.bfloat16).to(weight.dtype)
    blocks: Tensor = ops.kernel("rounded_blocks", "cpu")(columns)
    return blocks
