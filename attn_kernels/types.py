"""Types and helpers that all parts of the package share: results of attention, masks, options and dtypes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

if TYPE_CHECKING:
    from typing_extensions import TypeVarTuple, Unpack  # of typing from Python 3.11 on

    _Tensors = TypeVarTuple("_Tensors")  # each a Tensor, or Tensor | None


class Attention(NamedTuple):
    """The result of attention.

    context: (B, Tq, D), or (B, D) for a 2-D query: alignments @ values; None with ``values=None``.
    alignments: (B, Tq, Tk), or (B, Tk): softmax of the scores; None with ``need_weights=False``.
    """

    context: Tensor
    alignments: Tensor | None


class Masks(NamedTuple):
    """Which steps may be attended: memory_lengths (B,), mask (B, Tk) or (B, Tq, Tk). Both must allow a step."""

    memory_lengths: Tensor | None = None
    mask: Tensor | None = None


class AttentionWithLogTotal(NamedTuple):
    """The result of attention with ``need_log_total=True``.

    context, alignments: as in :class:`Attention`. log_total: (B, Tq), or (B,): the logarithm of the normaliser, which
    is the sum of e^scores (log-sum-exp), or with ``normalizer="sigmoid"`` the sum of sigmoid(scores); -inf if nothing
    may be attended. In float32, or float64 for float64.
    """

    context: Tensor
    alignments: Tensor | None
    log_total: Tensor


class Options(NamedTuple):
    """Rarely used options of an attention.

    score_bias: (B, Tq, Tk), added to the scores.
    dropout_p: probability with which dropout zeroes a weight.
    normalizer: its index in NORMALIZERS.
    clip: C, which replaces the score by C tanh(score) before score_bias is added; 0 for no clipping.
    seed: of dropout, () int64 on the device of the query; None without dropout. It is a tensor, so that a graph draws a
        new one in each call without waiting for the GPU.
    """

    score_bias: Tensor | None = None
    dropout_p: float = 0.0
    normalizer: int = 0
    clip: float = 0.0
    seed: Tensor | None = None


NORMALIZERS = ("softmax", "sigmoid")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of all arguments but lengths and masks

_pytree._register_namedtuple(AttentionWithLogTotal, serialized_type_name=f"{__package__}.AttentionWithLogTotal")
_pytree._register_namedtuple(Attention, serialized_type_name=f"{__package__}.Attention")  # for torch.export.save


def attention_mask(keys: Tensor, memory_lengths: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Which steps may be attended: bool, (B, 1, Tk) or (B, Tq, Tk); None if all may."""
    allowed = None
    if memory_lengths is not None:
        steps = torch.arange(keys.shape[1], device=keys.device)
        allowed = (steps < memory_lengths[:, None])[:, None]
    if mask is not None:
        mask = mask if mask.dim() == 3 else mask[:, None]
        allowed = mask if allowed is None else allowed & mask
    return allowed


def alignments_of(attention: Attention) -> Tensor:
    """The alignments of a result with ``need_weights=True``."""
    assert attention.alignments is not None
    return attention.alignments


def device_type(tensor: Tensor) -> str:
    return "cpu" if tensor.is_cpu else tensor.device.type  # the latter creates two objects


def autocast(*tensors: Unpack[_Tensors]) -> tuple[Unpack[_Tensors]]:
    """The tensors in autocast's dtype, if it is enabled for the device of the first; float64 is left as it is."""
    given: tuple[Any, ...] = tensors
    device = device_type(given[0])
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    found: tuple[Any, ...] = tuple(t if t is None or t.dtype not in DTYPES[:3] else t.to(dtype) for t in given)
    return found


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The accumulation dtype: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def upcast(*tensors: Unpack[_Tensors]) -> tuple[Unpack[_Tensors]]:
    """The tensors in float32; float64 is left as it is."""
    given: tuple[Any, ...] = tensors
    found: tuple[Any, ...] = tuple(t if t is None or t.dtype == torch.float64 else t.float() for t in given)
    return found


def on_one_device(query: Tensor, *others: Any) -> bool:
    """Whether all are on the device of query, a GPU. With a query on the CPU the ops check it: see ops.py."""
    device = query.device
    return all(other is None or other.device == device for other in others)
