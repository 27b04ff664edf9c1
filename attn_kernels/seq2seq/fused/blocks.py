"""Weights in the order in which searches and encoders of few sentences read them on the CPU, kept between calls.

A product of one row with a weight, or of few, takes as long as reading the weight. As it lies, each output is a sum
across vectors of its own; in blocks of outputs (csrc/decode.h has the layout) the weight is one stream without such
sums. Large weights come from memory, and there the order matters little: those in float32 are read as they lie.

What is made of a weight is kept as long as the weight, and used again while that has the same values, by checksums: see
checksums.py. It is kept beside the model: copies, pickles and state dicts know nothing of it.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ... import ops
from ...checksums import are_readable, value_of

# Of a part in float32 in blocks. A product of one row takes, against a plain read of the weight (Sapphire Rapids, one
# thread), with (1024, 256) 2.1 times as long as it lies and 1.1 in blocks, with (2048, 256), which is beyond L2, 1.4
# and 1.05, with (2048, 512) 1.05 and 1.02; of five rows 3.9 and 1.8, 1.8 and 1.1, 1.2 and 1.05.
MAX_COPIED_BYTES = 1 << 22


class Part(NamedTuple):
    """Columns begin..end of a weight, and what is made of them: nothing, or one of these.

    Rounded: to bfloat16. In blocks that halves what is read; "rounded" is of float32, in the order of the weight.
    """

    begin: int
    end: int
    form: Literal["blocks", "rounded blocks", "rounded"] | None


class _Kept(NamedTuple):
    value: Any  # of the weight that the forms were made of
    forms: dict[Part, Tensor]


# Entries are replaced as a whole, and dictionaries are safe without a lock: at worst two threads make the same.
_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def forms_of(weight: Tensor, *parts: Part) -> list[Tensor]:
    """Of a weight (n, k) on the CPU with contiguous rows, without gradients, each part in its form.

    Without elements where nothing is made: in another dtype than float32, and of blocks in float32 where the part is
    read as fast as it lies. Else blocks are a flat tensor, and "rounded" is (n, end - begin).
    """
    made = [part for part in parts if _is_made(weight, part)]
    forms = _forms(weight, made) if made else {}
    return [forms[part] if part in made else weight.new_empty(0) for part in parts]


def _is_made(weight: Tensor, part: Part) -> bool:
    size = weight.shape[0] * (part.end - part.begin) * weight.element_size()
    if part.form is None or weight.dtype != torch.float32 or size == 0:
        return False
    return part.form != "blocks" or size <= MAX_COPIED_BYTES


def _forms(weight: Tensor, parts: list[Part]) -> dict[Part, Tensor]:
    if not are_readable(weight):
        return {part: _make(weight, part) for part in parts}
    value, kept = value_of(weight), _kept.get(weight)
    forms: dict[Part, Tensor] = kept.forms if kept is not None and kept.value == value else {}
    missing = [part for part in parts if part not in forms]
    if missing:
        forms = {**forms, **{part: _make(weight, part) for part in missing}}
        if value_of(weight) == value:  # no other thread has written to it meanwhile
            _kept[weight] = _Kept(value, forms)
    return forms


def _make(weight: Tensor, part: Part) -> Tensor:
    columns = weight.detach()[:, part.begin : part.end]
    if part.form == "rounded":
        return columns.to(torch.bfloat16).to(weight.dtype)
    blocks: Tensor = ops.kernel("lay_out_weight", "cpu")(columns, part.form == "rounded blocks")
    return blocks
