"""Normalizers, which turn scores into alignments: softmax, smoothing, hardmax, or a function such as sparsemax."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..activations import ACTIVATIONS
from ..attending import OPTIONS, attend_once, make_options
from ..attention_module import AttentionModule
from ..backends import choose_among
from ..checks import check_dtypes, check_lengths, check_mask, check_range, check_tensor
from ..errors import ArgumentTypeError, ArgumentValueError
from ..functional import additive_scores
from ..memory import Memory
from ..packed_memory import padding_needed
from ..scores import ActivatedScore, DotScore, Score, clipped
from ..types import Attention, attention_mask, autocast, device_type, upcast
from .stateful import StatefulAttention

Normalizer = str | Callable[[Tensor], Tensor]


def _softmax(scores: Tensor) -> Tensor:
    return torch.softmax(scores, dim=-1)


def _smoothing(scores: Tensor) -> Tensor:
    # sigmoid(x) / sum sigmoid = softmax(log sigmoid(x)), which stays finite where every sigmoid is 0.
    return torch.softmax(torch.nn.functional.logsigmoid(scores), dim=-1)


def _hardmax(scores: Tensor) -> Tensor:
    best = scores.argmax(dim=-1, keepdim=True)
    return torch.zeros_like(scores).scatter(-1, best, 1.0)


NORMALIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": _softmax,
    "sigmoid": _smoothing,
    "hardmax": _hardmax,
}


def normalize(
    scores: Tensor,
    memory_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    normalizer: Normalizer = "softmax",
) -> Tensor:
    r"""Normalizes scores to alignments, over the steps that may be attended.

    .. math::
        \text{softmax:} \; \frac{e^{s_{ij}}}{\sum_k e^{s_{ik}}} \qquad
        \text{sigmoid:} \; \frac{\sigma(s_{ij})}{\sum_k \sigma(s_{ik})} \qquad
        \text{hardmax:} \; 1 \text{ for the first } j \text{ of } \max_k s_{ik}, \text{ else } 0

    Source: "sigmoid" is the smoothing of Chorowski et al., "Attention-based models for speech recognition", 2015,
    section 2.3; "hardmax" is that of TensorFlow's seq2seq, and has no gradient.

    Args:
        scores: (B, Tq, Tk) or (B, Tk), such as :func:`attn_kernels.additive_scores` returns. Padding, which may be
            NaN, has no effect, and its gradient is 0.
        memory_lengths: (B,) int32 or int64, valid steps of each row, 0..Tk.
        mask: (B, Tk) or (B, Tq, Tk) bool, True where a step may be attended. With lengths, both must allow it.
        normalizer: "softmax", "sigmoid", "hardmax", or a function that maps a tensor (..., Tk) to one of that shape,
            along its last axis. It gets float32 or float64 scores, -inf where a step may not be attended, and zeros
            for a row with nothing to attend. ``entmax.sparsemax`` and ``entmax.entmax15`` (PyPI: entmax) fit.

    Returns:
        Alignments, with the shape and dtype of ``scores``. 0 in padding; a row with nothing to attend is zeros.

    Raises:
        ArgumentValueError: a shape, device or length does not fit, or the normalizer is unknown.
        ArgumentTypeError: a dtype or type does not fit.
    """
    name = "normalize"
    check_tensor(name, "scores", scores)
    if scores.dim() not in (2, 3):
        raise ArgumentValueError(f"{name}: scores must have shape (B, Tq, Tk) or (B, Tk), got {tuple(scores.shape)}")
    if not scores.is_floating_point():
        raise ArgumentTypeError(f"{name}: scores must be floating point, got {scores.dtype}")
    function = check_normalizer(name, normalizer)
    batch, steps = scores.shape[0], scores.shape[-1]
    if memory_lengths is not None:
        check_lengths(name, batch, memory_lengths, scores=scores)
        check_range(name, memory_lengths, steps)
    if mask is not None:
        check_mask(name, batch, scores.shape[1] if scores.dim() == 3 else 1, steps, mask, scores=scores)
    allowed = allowed_pairs(scores, memory_lengths, mask)
    if scores.numel() == 0:  # a user's function may take the maximum of a row
        return scores.clone()
    (wide,) = upcast(scores)
    if allowed is not None:
        wide = mask_scores(wide, allowed)
    alignments = function(wide)
    if not isinstance(alignments, Tensor) or alignments.shape != scores.shape:
        got = tuple(alignments.shape) if isinstance(alignments, Tensor) else type(alignments).__name__
        raise ArgumentValueError(
            f"{name}: normalizer must return a tensor of the shape it was given, {tuple(scores.shape)}, got {got}"
        )
    if allowed is not None:
        alignments = alignments.masked_fill(~allowed, 0.0)
    return alignments.to(scores.dtype)


def check_normalizer(name: str, normalizer: Normalizer) -> Callable[[Tensor], Tensor]:
    """The function of a normalizer that is given as a function or by name."""
    if callable(normalizer):
        return normalizer
    if not isinstance(normalizer, str) or normalizer not in NORMALIZERS:
        names = ", ".join(map(repr, NORMALIZERS))
        raise ArgumentValueError(f"{name}: normalizer must be {names} or a function, got {normalizer!r}")
    return NORMALIZERS[normalizer]


def allowed_pairs(scores: Tensor, memory_lengths: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Bool, broadcasts to scores: True where a step may be attended. None if all may."""
    allowed = attention_mask(scores.mT if scores.dim() == 3 else scores, memory_lengths, mask)
    return allowed if allowed is None or scores.dim() == 3 else allowed[:, 0]


def mask_scores(scores: Tensor, allowed: Tensor) -> Tensor:
    """Sets padding to -inf. A row with only padding gets zeros, because its softmax would be NaN."""
    scores = scores.masked_fill(~allowed, float("-inf"))
    return scores.masked_fill(~allowed.any(-1, keepdim=True), 0.0)


def mask_queries(query: Tensor, memory: Memory) -> Tensor:
    """query, (B, Tq, *) or (B, *), with zeros where a query has nothing to attend: 0 * NaN would be NaN."""
    allowed = attention_mask(memory.keys, memory.memory_lengths, memory.mask)
    if allowed is None:
        return query
    unused = ~allowed.any(-1, keepdim=True)  # (B, 1 or Tq, 1)
    return query.masked_fill(unused if query.dim() == 3 else unused[:, 0], 0.0)


def pair_scores(score: Score, query: Tensor, keys: Tensor, backend: str | None = None) -> Tensor:
    """The scores of all pairs. query: (B, Tq, A) or (B, A); keys: (B, Tk, A). Returns (B, Tq, Tk) or (B, Tk)."""
    if not isinstance(score, DotScore):
        options: dict[str, Any] = {}
        if isinstance(score, ActivatedScore):
            options = {"activation": ACTIVATIONS[score.activation], "negative_slope": score.negative_slope}
        return additive_scores(query, keys, score.v, score.bias, backend=backend, **options)
    query, keys = autocast(query, keys)
    check_dtypes(score.name, query, keys=keys)
    scores = score.scale * ((query if query.dim() == 3 else query[:, None]) @ keys.mT)
    return scores if query.dim() == 3 else scores[:, 0]


def weighted_sum(alignments: Tensor, values: Tensor) -> Tensor:
    """alignments @ values: (B, Tq, Tk) or (B, Tk), and (B, Tk, D)."""
    alignments, values = autocast(alignments, values)
    return alignments @ values if alignments.dim() == 3 else (alignments[:, None] @ values)[:, 0]


class NormalizedAttention(nn.Module):
    r"""An attention mechanism with another normalizer in place of softmax.

    .. math:: alignments_i = normalizer_j(scores_{ij}), \quad context_i = \sum_j alignments_{ij} values_j

    It is called like the wrapped mechanism::

        attention = NormalizedAttention(BahdanauAttention(query_size, memory_size, units), entmax.entmax15)
        memory = attention.memory(encoder_outputs, memory_lengths)
        context, alignments = attention(decoder_state, memory)

    The fused op computes the scores; no tensor (B, Tq, Tk, A) is stored. A step that no query may attend is padding and
    may hold NaN; with a mask (B, Tq, Tk), a step that only some queries may attend must be finite.

    Args:
        attention: the mechanism, such as BahdanauAttention or LuongAttention, which has the parameters. A stateful
            mechanism is refused.
        normalizer: as for :func:`normalize`. "softmax" runs in one pass of the op, and so does "sigmoid" on the
            backends that have it.

    A function of your own may read a tensor that requires a gradient. With it ``Seq2Seq`` trains step by step, unless a
    subclass declares ``self_contained = True`` as :class:`AttentionModule` describes. Names and functions of torch and
    entmax need no declaration.
    """

    self_contained: ClassVar[bool] = False

    def __init__(self, attention: AttentionModule, normalizer: Normalizer) -> None:
        super().__init__()
        if not isinstance(attention, AttentionModule):
            got = type(attention).__name__
            raise ArgumentTypeError(f"NormalizedAttention: attention must be an AttentionModule, got {got}")
        if isinstance(attention, StatefulAttention):  # its scores depend on the state, which is not passed on here
            got = type(attention).__name__
            raise ArgumentTypeError(f"NormalizedAttention: attention must be one without a state, got {got}")
        if type(attention).make_score is AttentionModule.make_score:
            got = type(attention).__name__
            raise ArgumentTypeError(f"NormalizedAttention: attention must be one whose step is a score, got {got}")
        check_normalizer("NormalizedAttention", normalizer)
        self.attention = attention
        self.normalizer = normalizer

    def memory(
        self,
        memory: Tensor | PackedSequence,
        memory_lengths: Tensor | None = None,
        mask: Tensor | None = None,
        memory_offsets: Tensor | None = None,
    ) -> Memory:
        """Like ``memory`` of the mechanism, but a packed memory is padded."""
        return self.attention.memory(memory, memory_lengths, mask, memory_offsets).padded()

    def forward(self, query: Tensor, memory: Memory, need_weights: bool = True) -> Attention:
        """query: (B, Tq, query_size) or (B, query_size), decoder states. Returns (context, alignments).

        Raises ValueError or TypeError if query or memory do not fit the module or each other.
        """
        self.attention._check(query, memory)
        if memory.memory_offsets is not None:
            raise padding_needed("NormalizedAttention")
        query = mask_queries(query, memory)
        if self.normalizer == "softmax":
            result: Attention = self.attention(query, memory, need_weights)
            return result
        score, made = self.attention.make_score(memory), self.attention.make_query(query)
        backend = self.attention.backend
        if self.normalizer == "sigmoid" and choose_among(OPTIONS.backends, backend, device_type(query)) is not None:
            options = make_options(score.name, made, None, 0.0, "sigmoid", self.attention.clip)
            return attend_once(score, made, memory, options, need_weights, backend)  # in one pass
        scores = clipped(pair_scores(score, made, memory.keys, backend), self.attention.clip)
        alignments = normalize(scores, memory.memory_lengths, memory.mask, self.normalizer)
        return Attention(weighted_sum(alignments, memory.values), alignments if need_weights else None)

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        name = self.normalizer if isinstance(self.normalizer, str) else getattr(self.normalizer, "__name__", "function")
        return f"normalizer={name!r}"
