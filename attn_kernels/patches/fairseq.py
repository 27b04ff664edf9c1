"""fairseq: the attention of its LSTM decoder and of the recurrent speech translation model. Both are time-major."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..functional import additive_attention, additive_step, dot_step, prepare_keys
from ..memory import Memory
from ..patching import Fused, Uncovered, adapts
from ..reference import Attention
from ..sentence import as_of_softmax, is_plain, once, project


class _FusedTimeMajor(Fused):
    """What the two share: the form of memory, mask and alignments."""

    def _attend(self, query: Tensor, source_hids: Tensor, padding: Tensor | None) -> Attention | Uncovered:
        """query: (B, H), source_hids: (Tk, B, C), padding: (Tk, B) bool, True for padding, or None.

        Returns context (B, C) and alignments (Tk, B).
        """
        if padding is not None:
            if padding.dtype != torch.bool or padding.shape != source_hids.shape[:2]:
                return Uncovered("a padding mask that is not (Tk, B) bool")
            if not is_compiling() and not once(self, "no empty row", (padding,), lambda: not padding.all(0).any()):
                return Uncovered("a row with nothing to attend")
        context, alignments = self._attention(query, source_hids, padding)
        if padding is not None and is_compiling():
            some = ~padding.all(0)[:, None]
            context, alignments = context.where(some, torch.nan), alignments.where(some, torch.nan)
        return Attention(context, as_of_softmax(alignments).t().contiguous())

    def _attention(self, query: Tensor, source_hids: Tensor, padding: Tensor | None) -> Attention:
        """Context (B, C) and alignments (B, Tk)."""
        raise NotImplementedError


@adapts("fairseq.models.lstm:AttentionLayer", library="fairseq", versions="0.12.2", sources=("",))
class FusedAttentionLayer(_FusedTimeMajor):
    r"""tanh(W_out [context; query] + b_out) with scores_j = (W_in query + b_in) . memory_j.

    Source: Luong, Pham, Manning, "Effective approaches to attention-based neural machine translation", 2015, section
    3.1, "general", and equation 5.

    Covered: everything but a row that is all padding: that is left to the original, which gives NaN (in a graph of
    ``torch.compile``, the NaN comes from here). Padding is ignored, even if it is NaN or infinite; the original returns
    NaN then. ``torch.jit.script`` compiles the original.
    """

    input_proj: Any
    output_proj: Any

    def attend(self, input: Tensor, source_hids: Tensor, encoder_padding_mask: Tensor | None) -> Any:
        result = self._attend(self.input_proj(input), source_hids, encoder_padding_mask)
        if isinstance(result, Uncovered):
            return result
        context, alignments = result
        return torch.tanh(self.output_proj(torch.cat((context, input), dim=1))), alignments

    def _attention(self, query: Tensor, source_hids: Tensor, padding: Tensor | None) -> Attention:
        memory = once(self, "memory", (source_hids, padding), lambda: _memory(source_hids, source_hids, padding))
        return dot_step(query, memory, True, None)


@adapts("fairseq.models.speech_to_text.berard:MLPAttention", library="fairseq", versions="0.12.2", sources=("",))
class FusedMLPAttention(_FusedTimeMajor):
    r"""scores_j = v . tanh(W_d query + W_e memory_j + b_e).

    Source: Bahdanau, Cho, Bengio, "Neural machine translation by jointly learning to align and translate", 2015,
    appendix A.1.2; the model: Berard, Besacier, Kocabiyikoglu, Pietquin, "End-to-end automatic speech translation of
    audiobooks", 2018.

    Covered: as of :class:`FusedAttentionLayer`. Without gradients, a memory is projected once and not in each step.
    """

    encoder_proj: Any
    decoder_proj: Any
    to_scores: Any

    def attend(self, decoder_state: Tensor, source_hids: Tensor, encoder_padding_mask: Tensor | None) -> Any:
        if not is_plain(self.to_scores):
            return Uncovered("a score vector that is no plain nn.Linear")
        result = self._attend(self.decoder_proj(decoder_state), source_hids, encoder_padding_mask)
        return result if isinstance(result, Uncovered) else tuple(result)

    def _attention(self, query: Tensor, source_hids: Tensor, padding: Tensor | None) -> Attention:
        keys, v = project(self, self.encoder_proj, source_hids), self.to_scores.weight.view(-1)
        if torch.is_grad_enabled():  # the keys are new ones in each step, as the original's are
            mask = None if padding is None else ~padding.t()
            return additive_attention(query, keys.transpose(0, 1), source_hids.transpose(0, 1), v, mask=mask)
        sources = (keys, source_hids, padding)
        memory = once(self, "memory", sources, lambda: _memory(*sources, prepare=True))
        return additive_step(query, v, None, memory, True, None)


def _memory(keys: Tensor, values: Tensor, padding: Tensor | None, prepare: bool = False) -> Memory:
    """Of keys (Tk, B, A), values (Tk, B, C) and padding (Tk, B)."""
    keys, values = keys.transpose(0, 1), values.transpose(0, 1)
    mask = None if padding is None else ~padding.t()
    return Memory(keys, values, mask=mask, prepared=prepare_keys(keys) if prepare else None)
