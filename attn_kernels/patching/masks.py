"""Differences to the results of the originals: rows that may attend nothing, and the dtype of alignments.

A row (of a sentence or a query) that may attend nothing gives NaN in most libraries, also in the gradients of all
parameters. The ops of this package give zeros. The policy of all adapters: if the mask can be read, a call with such a
row runs the original. A mask on a GPU is not read, to avoid waiting for the device, and a mask within torch.compile has
no values. Then the results of the row are set to NaN, and the gradients have no NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checksums import is_cacheable
from ..memory import Memory
from ..types import Attention, alignments_of
from .adapter import NotSupported
from .cache import cached

EMPTY_ROW = NotSupported("a row with nothing to attend")


def mask_without_empty_rows(
    module: Any, mask: Tensor, make: Callable[[Tensor], Tensor], *, wait: bool = False
) -> Tensor | NotSupported | None:
    """Which steps may be attended: bool, (..., Tk), True = attend; None if all may.

    Args:
        module: the module whose cache holds the result.
        mask: the library's mask.
        make: computes the result from the mask.
        wait: also read a mask on a GPU, for an original whose result for an empty row is not simply NaN.
    """
    if not (wait or is_cacheable(mask)):
        return make(mask)
    return cached(module, "allowed steps", lambda: _without_empty_rows(mask, make(mask)), read=(mask,))


def _without_empty_rows(mask: Tensor, allowed: Tensor) -> Tensor | NotSupported | None:
    if not bool(allowed.any(-1).all()):
        return EMPTY_ROW
    if bool(allowed.all()):
        return None
    return allowed.clone() if allowed is mask else allowed  # the cached result must not change with the mask


def memory_without_empty_rows(
    module: Any,
    mask: Tensor | None,
    make: Callable[[Tensor], Tensor],
    build: Callable[[Tensor | None], Memory],
    held: tuple[Tensor, ...],
) -> Memory | NotSupported:
    """``build(allowed)``, where allowed is the result of :func:`mask_without_empty_rows`; cached as one entry.

    held: the tensors of the memory; the next step compares them to find the entry.
    """
    if mask is not None and not is_cacheable(mask):
        return build(make(mask))

    def memory() -> Memory | NotSupported:
        allowed = None if mask is None else _without_empty_rows(mask, make(mask))
        return allowed if isinstance(allowed, NotSupported) else build(allowed)

    return cached(module, "memory", memory, read=(mask,), held=held)


def lengths_without_empty_rows(module: Any, lengths: Tensor) -> Tensor | NotSupported:
    """lengths, (B,), unless one of them is 0."""
    if is_cacheable(lengths) and cached(module, "has a length 0", lambda: bool((lengths <= 0).any()), read=(lengths,)):
        return EMPTY_ROW
    return lengths


def as_original(result: Attention, steps: Tensor | None) -> Attention:
    """Alignments in the dtype of a softmax. If ``steps`` was not read, rows that may attend nothing get NaN.

    steps: what :func:`mask_without_empty_rows` or :func:`lengths_without_empty_rows` returned, or None.
    """
    context, alignments = result.context, to_softmax_dtype(alignments_of(result))
    if steps is None or is_cacheable(steps):
        return Attention(context, alignments)
    rows = steps.any(-1) if steps.dtype == torch.bool else steps > 0
    return Attention(context if context is None else _nan_unless(rows, context), _nan_unless(rows, alignments))


def _nan_unless(rows: Tensor, x: Tensor) -> Tensor:
    return x.where(rows.view(*rows.shape, *(1,) * (x.dim() - rows.dim())), torch.nan)


def to_softmax_dtype(alignments: Tensor) -> Tensor:
    """Alignments in the dtype that a softmax has under autocast: on a GPU float32, whatever its argument."""
    if alignments.is_cuda and torch.is_autocast_enabled("cuda") and alignments.dtype != torch.float64:
        return alignments.float()
    return alignments
