"""coqui-tts: the original attention of its Tacotron models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ...functional import additive_attention
from ...types import alignments_of
from ..adapter import MIN_PRODUCTS, Fused, NotSupported
from ..masks import mask_without_empty_rows
from ..registry import adapts
from .tacotron2 import linear_within


@adapts(
    "TTS.tts.layers.tacotron.attentions:OriginalAttention",
    library="coqui-tts",
    versions="0.28.0",
    sources=("fc398948621a",),
)
class FusedOriginalAttention(Fused):
    r"""scores_j = v . tanh(W_q query + W_k memory_j + W_f f_j), the last with ``location_attention`` only.

    Then forward attention, if ``forward_attn``, by the original's own methods.

    Source: as for Tacotron 2; Zhang et al., "Forward attention in sequence-to-sequence acoustic modelling for speech
    synthesis", 2018.

    Not supported, so that the original runs: the sigmoid norm, windows (in evaluation), a sentence with only padding,
    torch.compile. The bias of ``v`` adds the same number to all scores of a softmax: its gradient is 0. Padding that
    holds NaN is ignored.
    """

    min_products = MIN_PRODUCTS
    training: bool
    norm: str
    windowing: bool
    location_attention: bool
    forward_attn: bool
    trans_agent: bool
    attention_weights: Tensor
    attention_weights_cum: Tensor
    alpha: Tensor
    u: Tensor
    query_layer: Any
    location_layer: Any
    v: Any
    ta: Any
    update_location_attention: Any
    apply_forward_attention: Any
    _mask_value: float

    def attend(self, query: Tensor, inputs: Tensor, processed_inputs: Tensor, mask: Tensor | None) -> Any:
        """(B, Q), (B, T, M), (B, T, A), and (B, T) True = keep. Returns the context, (B, M)."""
        score = linear_within(self.v)
        if score is None:
            return NotSupported("a score layer that is no plain linear layer")
        if self.norm != "softmax":
            return NotSupported("a norm other than softmax")
        if self.windowing and not self.training:
            return NotSupported("a window")
        if is_compiling():
            return NotSupported("torch.compile")
        allowed: Any = None
        if mask is not None:
            if mask.dtype != torch.bool or self._mask_value != -float("inf"):
                return NotSupported("a mask of another kind")
            allowed = mask_without_empty_rows(self, mask, lambda x: x, wait=True)
            if isinstance(allowed, NotSupported):
                return allowed
        extra = None
        if self.location_attention:
            both = (self.attention_weights.unsqueeze(1), self.attention_weights_cum.unsqueeze(1))
            extra = self.location_layer(torch.cat(both, dim=1))
        projected = self.query_layer(query)
        if torch.is_grad_enabled() and score.bias is not None and score.bias.requires_grad:
            projected = projected + 0.0 * score.bias
        values = None if self.forward_attn else inputs
        v = score.weight.view(-1)
        result = additive_attention(projected, processed_inputs, values, v, extra=extra, mask=allowed)
        context, alignments = result.context, alignments_of(result)
        if self.location_attention:
            self.update_location_attention(alignments)
        if self.forward_attn:
            alignments = self.apply_forward_attention(alignments)
            self.alpha = alignments
            context = torch.bmm(alignments.unsqueeze(1), inputs).squeeze(1)
        self.attention_weights = alignments
        if self.forward_attn and self.trans_agent:
            self.u = torch.sigmoid(self.ta(torch.cat([context, query], dim=-1)))
        return context
