"""SpeechBrain: the attention of its recurrent decoder. ``reset()`` is called for each batch, the module for each step.

The first step stores its projection in the module's attributes, as the original does. The original runs for a sentence
of length 0 (masks.py), and within torch.compile. Padding that holds NaN is ignored.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from ...attending import attend
from ...functional import additive_attention
from ...memory import Memory
from ...scores import AdditiveScore, DotScore
from ...stock import is_stock_linear
from ...types import Attention, alignments_of
from ..adapter import MIN_PRODUCTS, Fused, NotSupported
from ..cache import cached
from ..masks import mask_without_empty_rows
from ..registry import adapts

_MODULE = "speechbrain.nnet.attention"
_LIBRARY = {"library": "SpeechBrain", "versions": "1.1.2"}


class _Fused(Fused):
    min_products = MIN_PRODUCTS
    mask: Tensor

    def _mask_of(self, enc_states: Tensor, enc_len: Tensor) -> Tensor:
        """The library's own mask: (B, T), nonzero within each length, in the dtype of the lengths."""
        library: Any = importlib.import_module(self._original.__module__)
        mask: Tensor = library.length_to_mask(enc_len, max_len=enc_states.size(1), device=enc_states.device)
        return mask

    def _allowed(self) -> Tensor | NotSupported | None:
        """(B, T), True = attend."""
        return mask_without_empty_rows(self, self.mask, lambda x: (x != 0).view(x.shape[:2]), wait=True)

    def _memory(self, keys: Tensor, values: Tensor, allowed: Tensor | None) -> Memory:
        return cached(self, "memory", lambda: Memory(keys, values, mask=allowed), held=(keys, values, allowed))


class _FusedAdditive(_Fused):
    precomputed_enc_h: Tensor | None
    scaling: float
    mlp_enc: Any
    mlp_dec: Any
    mlp_attn: Any
    mlp_out: Any

    def _begin(self, enc_states: Tensor, enc_len: Tensor) -> None:
        self.precomputed_enc_h = self.mlp_enc(enc_states)
        self.mask: Tensor = self._mask_of(enc_states, enc_len)

    def _keys(self) -> Tensor:
        assert self.precomputed_enc_h is not None  # made by _begin
        return self.precomputed_enc_h

    def attend(self, enc_states: Tensor, enc_len: Tensor, dec_states: Tensor) -> Any:
        """(B, T, E), (B,), (B, D). Returns (B, output_dim) and the alignments, (B, T)."""
        if is_compiling():
            return NotSupported("torch.compile")
        if not is_stock_linear(self.mlp_attn):
            return NotSupported("a score layer that is no plain nn.Linear")
        if self.precomputed_enc_h is None:
            self._begin(enc_states, enc_len)
        allowed = self._allowed()
        if isinstance(allowed, NotSupported):
            return allowed
        context, alignments = self._step(self.mlp_dec(dec_states), enc_states, allowed)
        return self.mlp_out(context), alignments

    def _step(self, query: Tensor, values: Tensor, allowed: Tensor | None) -> Attention:
        raise NotImplementedError


@adapts(f"{_MODULE}:ContentBasedAttention", **_LIBRARY, sources=("1ee734df0c97",))
class FusedContentBasedAttention(_FusedAdditive):
    """scores_j = scaling * v . tanh(W h_j + V s): Bahdanau et al. 2015, appendix A.1.2."""

    def _step(self, query: Tensor, values: Tensor, allowed: Tensor | None) -> Attention:
        memory = self._memory(self._keys(), values, allowed)
        v = self.mlp_attn.weight.view(-1)
        score = AdditiveScore(v if self.scaling == 1 else self.scaling * v)
        return attend(score, query, memory, True, None)


@adapts(f"{_MODULE}:LocationAwareAttention", **_LIBRARY, sources=("321bdd3c9ff3",))
class FusedLocationAwareAttention(_FusedAdditive):
    """With location features of the previous alignments: Chorowski et al., "Attention-based models for speech
    recognition", 2015, section 2.1. The alignments are constants for autograd, as in the original.
    """

    prev_attn: Tensor
    conv_loc: Any
    mlp_loc: Any

    def _begin(self, enc_states: Tensor, enc_len: Tensor) -> None:
        super()._begin(enc_states, enc_len)
        self.prev_attn = self.mask * (1 / enc_len.float()).unsqueeze(1)

    def _step(self, query: Tensor, values: Tensor, allowed: Tensor | None) -> Attention:
        extra = self.mlp_loc(self.conv_loc(self.prev_attn.unsqueeze(1)).transpose(1, 2))
        keys, v = self._keys(), self.mlp_attn.weight.view(-1)
        attention = additive_attention(query, keys, values, v, extra=extra, scale=self.scaling, mask=allowed)
        self.prev_attn = alignments_of(attention).detach()
        return attention


@adapts(f"{_MODULE}:KeyValueAttention", **_LIBRARY, sources=("6e39d80b7090",))
class FusedKeyValueAttention(_Fused):
    """scores_j = query . key_j / sqrt(attn_dim): Vaswani et al., "Attention is all you need", 2017, section 3.2.1."""

    keys: Tensor | None
    values: Tensor
    scaling: Tensor
    key_linear: Any
    query_linear: Any
    value_linear: Any

    def attend(self, enc_states: Tensor, enc_len: Tensor, dec_states: Tensor) -> Any:
        """(B, T, E), (B,), (B, D). Returns (B, output_dim) and the alignments, (B, 1, T)."""
        if is_compiling():
            return NotSupported("torch.compile")
        if self.keys is None:
            self.keys, self.values = self.key_linear(enc_states), self.value_linear(enc_states)
            self.mask: Tensor = self._mask_of(enc_states, enc_len).unsqueeze(2)
        allowed = self._allowed()
        if isinstance(allowed, NotSupported):
            return allowed
        query = (self.query_linear(dec_states) / self.scaling).unsqueeze(1)
        memory = self._memory(self.keys, self.values, allowed)
        context, alignments = attend(DotScore(), query, memory, True, None)
        return context.squeeze(1), alignments
