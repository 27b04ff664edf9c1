"""NVIDIA's Tacotron 2: location-sensitive attention. PyPI's ``tacotron2`` has the same source as NVIDIA's own
repository, where the file is a top-level module ``model`` (see model.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ...deprecation import renamed
from ...functional import additive_attention
from ...stock import is_stock_linear
from ..adapter import MIN_PRODUCTS, Fused, NotSupported
from ..masks import mask_without_empty_rows
from ..registry import adapts

_LIBRARY = "Tacotron 2 (NVIDIA)"
_SOURCES = ("456ef21d5bcf",)


@adapts("model:Attention", library=_LIBRARY, versions="its repository", sources=_SOURCES)
@adapts("tacotron2.model:Attention", library=_LIBRARY, versions="22.12.28", sources=_SOURCES)
class FusedAttention(Fused):
    r"""scores_j = v . tanh(W_q query + W_k memory_j + W_f f_j).

    f: a convolution of the alignments of the step before and of the sum of all so far; gradients flow through both.

    Source: Shen et al., "Natural TTS synthesis by conditioning WaveNet on mel spectrogram predictions", 2018, section
    2.2, after Chorowski et al., "Attention-based models for speech recognition", 2015, section 2.1.

    Supported: everything except a sentence with only padding (masks.py), and masks within torch.compile. Padding that
    holds NaN is ignored.
    """

    min_products = MIN_PRODUCTS
    query_layer: Any
    location_layer: Any
    v: Any
    score_mask_value: float

    def attend(
        self,
        attention_hidden_state: Tensor,
        memory: Tensor,
        processed_memory: Tensor,
        attention_weights_cat: Tensor,
        mask: Tensor | None,
    ) -> Any:
        """(B, Q), (B, T, M), (B, T, A), (B, 2, T), and (B, T) True = padding. Returns (B, M) and (B, T)."""
        score = linear_within(self.v)
        if score is None:
            return NotSupported("a score layer that is no plain linear layer")
        allowed: Any = None
        if mask is not None:
            if is_compiling():
                return NotSupported("torch.compile")
            if mask.dtype != torch.bool or self.score_mask_value != -float("inf"):
                return NotSupported("a mask of another kind")
            allowed = mask_without_empty_rows(self, mask, torch.logical_not, wait=True)
            if isinstance(allowed, NotSupported):
                return allowed
        query = self.query_layer(attention_hidden_state)
        extra = self.location_layer(attention_weights_cat)
        v = score.weight.view(-1)
        return tuple(additive_attention(query, processed_memory, memory, v, extra=extra, mask=allowed))


def linear_within(layer: Any) -> nn.Linear | None:
    """The linear layer of a LinearNorm (NVIDIA) or Linear (coqui-tts), if its call does nothing else."""
    inner = getattr(layer, "linear_layer", None)
    if type(layer).__name__ not in ("LinearNorm", "Linear") or inner is None:
        return None
    hooks = layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks
    linear: nn.Linear | None = inner if is_stock_linear(inner) and not hooks else None
    return linear


__getattr__: Callable[[str], Any] = renamed(__name__, {"wrapped": linear_within})
