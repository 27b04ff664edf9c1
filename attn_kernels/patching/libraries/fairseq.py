"""fairseq: the attention of its LSTM decoder and of the recurrent speech translation model. Both are time-major."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...attending import attend
from ...functional import additive_attention
from ...memory import Memory
from ...scores import DotScore
from ...stock import is_stock_linear
from ...types import Attention, alignments_of
from ..adapter import MIN_PRODUCTS, Fused, NotSupported
from ..cache import cached_projection
from ..masks import as_original, mask_without_empty_rows, memory_without_empty_rows
from ..registry import adapts


@adapts("fairseq.models.lstm:AttentionLayer", library="fairseq", versions="0.12.2", sources=("95aa4911b5d2",))
class FusedAttentionLayer(Fused):
    r"""tanh(W_out [context; query] + b_out) with scores_j = (W_in query + b_in) . memory_j.

    Source: Luong, Pham, Manning, "Effective approaches to attention-based neural machine translation", 2015, section
    3.1, "general", and equation 5.

    Supported: everything except small problems, which the original computes faster, and a row with only padding
    (masks.py). Padding is ignored, even if it is NaN or infinite; the original returns NaN then. The original rounds
    float64 scores to float32 if there is a padding mask; here they are not rounded. ``torch.jit.script`` compiles the
    original.
    """

    min_products = MIN_PRODUCTS
    input_proj: Any
    output_proj: Any

    def attend(self, input: Tensor, source_hids: Tensor, encoder_padding_mask: Tensor | None) -> Any:
        if _is_of_another_kind(encoder_padding_mask, source_hids):
            return _OTHER_PADDING
        memory = memory_without_empty_rows(
            self, encoder_padding_mask, _allowed, lambda allowed: _memory(source_hids, allowed), held=(source_hids,)
        )
        if isinstance(memory, NotSupported):
            return memory
        result = attend(DotScore(), self.input_proj(input), memory, True, None)
        context, alignments = _time_major(result, memory.mask)
        return torch.tanh(self.output_proj(torch.cat((context, input), dim=1))), alignments


@adapts(
    "fairseq.models.speech_to_text.berard:MLPAttention", library="fairseq", versions="0.12.2", sources=("5fee10cf7b8a",)
)
class FusedMLPAttention(Fused):
    r"""scores_j = v . tanh(W_d query + W_e memory_j + b_e).

    Source: Bahdanau, Cho, Bengio, "Neural machine translation by jointly learning to align and translate", 2015,
    appendix A.1.2; the model: Berard, Besacier, Kocabiyikoglu, Pietquin, "End-to-end automatic speech translation of
    audiobooks", 2018.

    Supported: as for :class:`FusedAttentionLayer`. Without gradients, a memory is projected once, not in each step.
    """

    min_products = MIN_PRODUCTS
    encoder_proj: Any
    decoder_proj: Any
    to_scores: Any

    def count_products(self, elements: int) -> float:
        """Without gradients, the products of the cached projection count, too: 32 of them take as long as one product
        with a tanh.
        """
        columns = 0 if torch.is_grad_enabled() else getattr(self.encoder_proj, "in_features", 0)
        return elements * (1 + columns / 32)

    def attend(self, decoder_state: Tensor, source_hids: Tensor, encoder_padding_mask: Tensor | None) -> Any:
        if not is_stock_linear(self.to_scores):
            return NotSupported("a score vector that is no plain nn.Linear")
        allowed: Any = None
        if encoder_padding_mask is not None:
            if _is_of_another_kind(encoder_padding_mask, source_hids):
                return _OTHER_PADDING
            allowed = mask_without_empty_rows(self, encoder_padding_mask, _allowed)
            if isinstance(allowed, NotSupported):
                return allowed
        query, v = self.decoder_proj(decoder_state), self.to_scores.weight.view(-1)
        keys = cached_projection(self, self.encoder_proj, source_hids).transpose(0, 1)
        return _time_major(additive_attention(query, keys, source_hids.transpose(0, 1), v, mask=allowed), allowed)


def _memory(values: Tensor, allowed: Tensor | None) -> Memory:
    """The memory of values (Tk, B, C), which are also the keys."""
    values = values.transpose(0, 1)
    return Memory(values, values, mask=allowed)


_OTHER_PADDING = NotSupported("a padding mask that is not (Tk, B) bool")


def _is_of_another_kind(padding: Tensor | None, values: Tensor) -> bool:
    return padding is not None and (padding.dtype != torch.bool or padding.shape != values.shape[:2])


def _allowed(padding: Tensor) -> Tensor:
    """(B, Tk), True where a step may be attended."""
    return ~padding.t().contiguous()


def _time_major(result: Attention, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Context (B, C) and alignments (Tk, B), from alignments (B, Tk)."""
    result = as_original(result, allowed)
    return result.context, alignments_of(result).t().contiguous()
