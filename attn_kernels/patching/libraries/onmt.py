"""OpenNMT-py: the attention of its recurrent decoders, and of copy attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...attending import attend
from ...functional import additive_attention
from ...memory import Memory
from ...scores import DotScore
from ...stock import is_stock_linear
from ...types import Attention
from ..adapter import Fused, NotSupported
from ..cache import cached, cached_projection
from ..masks import as_original, lengths_without_empty_rows
from ..registry import adapts


@adapts(
    "onmt.modules.global_attention:GlobalAttention", library="OpenNMT-py", versions="3.5.1", sources=("3aec054c5640",)
)
class FusedGlobalAttention(Fused):
    r"""tanh(W_out [context; query]), or for "mlp" W_out [context; query] + b_out, with the scores

    dot: query . memory_j; general: W_in query . memory_j; mlp: v . tanh(W_q query + b + W_c memory_j).

    Source: Luong, Pham, Manning, "Effective approaches to attention-based neural machine translation", 2015, section
    3.1 and equation 5; "mlp": Bahdanau, Cho, Bengio, "Neural machine translation by jointly learning to align and
    translate", 2015, appendix A.1.2.

    Supported: the softmax, one query or many. The original runs for sparsemax, for coverage, which writes to the
    memory, and for a sentence of length 0 (masks.py). Memory beyond ``src_len`` is ignored, even if it is NaN or
    infinite; the original returns NaN then.
    """

    attn_type: str
    linear_in: Any
    linear_query: Any
    linear_context: Any
    linear_out: Any
    v: Any

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        return None if module.attn_func == "softmax" else f"attn_func={module.attn_func!r}"

    def attend(
        self, src: Tensor, enc_out: Tensor, src_len: Tensor | None = None, coverage: Tensor | None = None
    ) -> Any:
        """src: (B, Tq, dim) or (B, dim), enc_out: (B, Tk, dim), src_len: (B,)."""
        if coverage is not None:
            return NotSupported("coverage")
        if self.attn_type == "mlp" and not is_stock_linear(self.v):
            return NotSupported("a score vector that is no plain nn.Linear")
        if src_len is not None and isinstance(empty := lengths_without_empty_rows(self, src_len), NotSupported):
            return empty
        context, alignments = as_original(self._attention(src, enc_out, src_len), src_len)
        output = self.linear_out(torch.cat([context, src], -1))
        return output if self.attn_type == "mlp" else torch.tanh(output), alignments

    def _attention(self, query: Tensor, enc_out: Tensor, src_len: Tensor | None) -> Attention:
        if self.attn_type != "mlp":
            if self.attn_type == "general":
                query = self.linear_in(query)
            memory = cached(self, "memory", lambda: Memory(enc_out, enc_out, src_len), held=(enc_out, src_len))
            return attend(DotScore(), query, memory, True, None)
        query, v = self.linear_query(query), self.v.weight.view(-1)
        keys = cached_projection(self, self.linear_context, enc_out)
        return additive_attention(query, keys, enc_out, v, memory_lengths=src_len)
