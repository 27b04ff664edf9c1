"""The functions that rewritten graphs call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..attending import attend
from ..functional import additive_attention, additive_scores, dot_attention
from ..scores import AdditiveScore, DotScore
from .kept import Held, held_of, memory_of, prepared_of


class Mask(NamedTuple):
    """(B, Tk) or (B, Tq, Tk). Scores are set to ``fill`` where it is True; with ``keep``, where it is False.

    is_hidden: autograd does not see this write. is_added: ``tensor`` has numbers, and ``fill * tensor`` is added to the
    scores.
    """

    tensor: Tensor
    keep: bool
    fill: float
    is_hidden: bool
    is_added: bool


class Allowed(NamedTuple):
    """Several masks combined. mask: True where all masks allow it; None if an added one is not a pure mask.

    is_full: whether every row may attend something. highest: the maximum of all added numbers that are not 0.
    """

    mask: Tensor | None
    is_full: bool
    highest: float


Masks = tuple[Mask, ...]

_UNDERFLOW = -750.0  # the exponential is 0 in float64, too
_FAR_BELOW = -1e9  # for scores without a bound


def score_vector(v: Tensor, scale: float, shifts: tuple[Tensor, ...]) -> Tensor:
    """``scale * v``; v may also be a query. shifts: constants added to all scores. They cancel in a softmax, and get a
    gradient of 0 here.
    """
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
    query: Tensor, keys: Tensor, values: Tensor | None, score: AdditiveScore, masks: Masks
) -> tuple[Tensor | None, Tensor | None]:
    """Context and alignments. A row with nothing to attend has the result of the original formula.

    score: without prepared keys.
    """
    held = held_of(keys)
    v, bias, prepared = score
    allowed = None
    if masks:
        # A score is at most the sum of the elements of v.
        allowed = _mask(masks, keys, held, lambda: _UNDERFLOW - 2.0 * v.detach().abs().sum().item())
        if allowed is None:
            return _by_formula(additive_scores(query, keys, v, bias), values, masks)
    if held is not None and (values is None or values.dtype == keys.dtype):
        prepared = prepared_of(held)
        if torch.is_grad_enabled():
            memory = memory_of(held, values, allowed, prepared)
            return attend(AdditiveScore(v, bias, prepared), query, memory, True, None)
    return additive_attention(query, keys, values, v, bias, mask=allowed, prepared=prepared)


def dot(
    query: Tensor, keys: Tensor, values: Tensor | None, scale: float, shifts: tuple[Tensor, ...], masks: Masks
) -> tuple[Tensor | None, Tensor | None]:
    """Context and alignments, like :func:`attention`."""
    held = held_of(keys)
    allowed = None
    if shifts:
        query = score_vector(query, 1.0, shifts)
    if masks:
        allowed = _mask(masks, keys, held, lambda: _FAR_BELOW)
        if allowed is None:
            e = torch.matmul(query if query.dim() == 3 else query[:, None], keys.mT)
            return _by_formula((e if query.dim() == 3 else e[:, 0]) * scale, values, masks)
    if held is None or not torch.is_grad_enabled() or (values is not None and values.dtype != keys.dtype):
        return dot_attention(query, keys, values, scale=scale, mask=allowed)
    return attend(DotScore(), score_vector(query, scale, ()), memory_of(held, values, allowed), True, None)


def _mask(masks: Masks, keys: Tensor, held: Held | None, lowest: Callable[[], float]) -> Tensor | None:
    """Where steps may be attended; None if the original formula has to be computed instead.

    lowest: an added number masks a step if it is below this bound.
    """
    if not keys.is_cpu:  # checking for rows that may attend nothing would wait for the device
        return None
    if any(mask.is_added and mask.tensor.requires_grad for mask in masks) and torch.is_grad_enabled():
        return None
    given = tuple(mask.tensor for mask in masks)
    known: tuple[tuple[Tensor, ...], Allowed] | None = None if held is None else held.masks
    if known and all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(known[0], given, strict=True)):
        allowed = known[1]
    else:
        allowed = _allowed(masks)
        if held is not None:
            if allowed.mask is not None and any(allowed.mask is mask for mask in given):
                allowed = allowed._replace(mask=allowed.mask.clone())
            held.masks = tuple(mask.clone() for mask in given), allowed
    if not allowed.is_full or (allowed.highest > -math.inf and not allowed.highest <= lowest()):
        return None
    return allowed.mask


def _allowed(masks: Masks) -> Allowed:
    allowed, highest = None, -math.inf
    for mask in masks:
        if mask.is_added:
            added = mask.tensor.detach() * mask.fill
            kept = added == 0
            masked = added.masked_fill(kept, -math.inf)
            highest = max(masked.amax().item() if added.numel() else -math.inf, highest)  # a NaN is kept
            if not highest < 0:  # also true for NaN
                return Allowed(None, False, highest)
        else:
            kept = mask.tensor if mask.keep else ~mask.tensor
        allowed = kept if allowed is None else allowed & kept
    assert allowed is not None  # there is a mask
    return Allowed(allowed, bool(allowed.any(-1).all()), highest)


def _by_formula(e: Tensor, values: Tensor | None, masks: Masks) -> tuple[Tensor | None, Tensor]:
    """The original formula. e: (B, Tq, Tk) or (B, Tk), the scores without masks."""
    for tensor, keep, fill, is_hidden, is_added in masks:
        tensor = tensor if tensor.dim() == e.dim() else tensor[:, None]
        if is_added:
            e = e + tensor * fill
            continue
        mask = ~tensor if keep else tensor
        if is_hidden:
            e = e.clone()
            e.data.masked_fill_(mask, fill)
        else:
            e = e.masked_fill(mask, fill)
    alignments = torch.softmax(e, -1)
    if values is None:
        return None, alignments
    if e.dim() == 2:
        return torch.bmm(alignments[:, None], values.to(alignments.dtype))[:, 0], alignments
    return torch.bmm(alignments, values.to(alignments.dtype)), alignments
