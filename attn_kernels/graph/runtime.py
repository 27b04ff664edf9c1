"""What rewritten graphs call."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional import additive_attention, additive_scores, additive_step
from .kept import Held, held_of, memory_of, prepared_of

# mask, whether True is to keep, what the others are set to, whether autograd does not see that
Masks = tuple[tuple[Tensor, bool, float, bool], ...]


def score_vector(v: Tensor, scale: float, shifts: tuple[Tensor, ...]) -> Tensor:
    """``scale * v``. What is added to all scores alike vanishes in a softmax, but is to have a gradient of 0."""
    if scale != 1.0:
        v = v * scale
    for shift in shifts:
        if shift.requires_grad and torch.is_grad_enabled():
            v = v + 0.0 * shift.sum().to(v.dtype)
    return v


def scores(query: Tensor, keys: Tensor, v: Tensor, bias: Tensor | None, shift: Tensor | None) -> Tensor:
    """(B, Tq, Tk), or (B, Tk) for a 2-D query. shift: one element, or None."""
    result = additive_scores(query, keys, v, bias)
    return result if shift is None else result + shift


def attention(
    query: Tensor, keys: Tensor, values: Tensor | None, v: Tensor, bias: Tensor | None, masks: Masks
) -> tuple[Tensor | None, Tensor]:
    """Context and alignments. A row with nothing to attend has what the original formula has there."""
    held = held_of(keys)
    allowed = None
    if masks:
        if not keys.is_cpu:  # whether a row may attend nothing would have to be waited for
            return _with_fills(query, keys, values, v, bias, masks)
        allowed, is_full = _allowed(masks, held)
        if not is_full:
            return _with_fills(query, keys, values, v, bias, masks)
    if held is None or (values is not None and values.dtype != keys.dtype):
        return additive_attention(query, keys, values, v, bias, mask=allowed)
    if torch.is_grad_enabled():
        return additive_step(query, v, bias, memory_of(held, values, allowed), True, None)
    return additive_attention(query, keys, values, v, bias, mask=allowed, prepared=prepared_of(held))


def _allowed(masks: Masks, held: Held | None) -> tuple[Tensor, bool]:
    """Where all masks let attend, and whether every row may attend something; known for the masks of the last step."""
    given = tuple(mask for mask, _, _, _ in masks)
    if held is not None and held.masks is not None:
        known, allowed, is_full = held.masks
        if all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(known, given, strict=True)):
            return allowed, is_full
    allowed = None
    for mask, keep, _, _ in masks:
        kept = mask if keep else ~mask
        allowed = kept if allowed is None else allowed & kept
    is_full = bool(allowed.any(-1).all())
    if held is not None:
        if any(allowed is mask for mask in given):
            allowed = allowed.clone()
        held.masks = tuple(mask.clone() for mask in given), allowed, is_full
    return allowed, is_full


def _with_fills(
    query: Tensor, keys: Tensor, values: Tensor | None, v: Tensor, bias: Tensor | None, masks: Masks
) -> tuple[Tensor | None, Tensor]:
    e = additive_scores(query, keys, v, bias)
    for mask, keep, fill, is_hidden in masks:
        mask = ~mask if keep else mask
        mask = mask if mask.dim() == e.dim() else mask[:, None]
        if is_hidden:
            e = e.clone()
            e.data.masked_fill_(mask, fill)
        else:
            e = e.masked_fill(mask, fill)
    alignments = torch.softmax(e, -1)
    if values is None:
        return None, alignments
    if query.dim() == 2:
        return torch.bmm(alignments[:, None], values.to(alignments.dtype))[:, 0], alignments
    return torch.bmm(alignments, values.to(alignments.dtype)), alignments
