"""JoeyNMT: the attention of its recurrent decoder.

The decoder calls ``compute_proj_keys`` once in a training step, but anew in every step of a greedy or beam search,
although the sentences are the same: under ``torch.no_grad()`` their projection is used again. A greedy search hands
over the same tensor. A beam search hands over another each time, with the rows of a sentence's hypotheses, which are
all equal, re-ordered, and without those of sentences that are done: see ``cached_projection``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...checksums import is_cacheable
from ...functional import attend
from ...memory import Memory
from ...scores import AdditiveScore, DotScore
from ...stock import is_stock_linear
from ...types import Attention
from ..adapter import Fused, NotSupported, to_softmax_dtype
from ..cache import cached, cached_projection
from ..registry import adapts


class _FusedMechanism(Fused):
    """What the two mechanisms share."""

    key_layer: Any
    proj_keys: Tensor | None
    _check_input_shapes_forward: Any

    def compute_proj_keys(self, keys: Tensor) -> None:
        """keys: (B, Tk, M), the encoder's output. Leaves its projection, (B, Tk, A), in ``proj_keys``."""
        self.proj_keys = cached_projection(self, self.key_layer, keys, is_shared=True)

    def attend(self, query: Tensor, mask: Tensor, values: Tensor) -> Any:
        """query: (B, 1, H), mask: (B, 1, Tk), > 0 where a step may be attended, values: (B, Tk, M)."""
        self._check_input_shapes_forward(query=query, mask=mask, values=values)
        keys = self.proj_keys
        if keys is None:
            return NotSupported("no projected keys")
        if not is_cacheable(keys):  # and so no value is read to see whether a row is empty
            allowed = _allowed(mask)
            context, alignments = self._step(query, Memory(keys, values, mask=allowed))
            some = allowed.any(2, keepdim=True)
            context, alignments = context.where(some, torch.nan), alignments.where(some, torch.nan)
        else:
            memory = cached(
                self, "memory", lambda: _memory(keys, values, mask), read=(mask,), held=(keys, values, mask)
            )
            if memory is None:
                return NotSupported("a row with nothing to attend")  # NaN there, and in all gradients
            context, alignments = self._step(query, memory)
        return context, to_softmax_dtype(alignments)

    def _step(self, query: Tensor, memory: Memory) -> Attention:
        raise NotImplementedError


@adapts("joeynmt.attention:BahdanauAttention", library="JoeyNMT", versions="2.3.0", sources=("1691e38654ae",))
class FusedBahdanauAttention(_FusedMechanism):
    r"""scores_j = v . tanh(W_q query + W_k memory_j), with the projected memory in ``proj_keys``.

    Source: Bahdanau, Cho, Bengio, "Neural machine translation by jointly learning to align and translate", 2015,
    appendix A.1.2.

    Covered: everything but a row that may attend nothing: that is left to the original, which gives NaN (on a GPU and
    in ``torch.compile`` that NaN comes from here, without the NaN of the gradients). Keys and values where the mask is
    0 are ignored, even if they are NaN or infinite; the original returns NaN then.
    """

    energy_layer: Any
    proj_query: Tensor
    compute_proj_query: Any

    def attend(self, query: Tensor, mask: Tensor, values: Tensor) -> Any:
        if not is_stock_linear(self.energy_layer):
            return NotSupported("an energy layer that is no plain nn.Linear")
        return super().attend(query, mask, values)

    def _step(self, query: Tensor, memory: Memory) -> Attention:
        self.compute_proj_query(query)
        score = AdditiveScore(self.energy_layer.weight.view(-1))
        return attend(score, self.proj_query, memory, True, None)


@adapts("joeynmt.attention:LuongAttention", library="JoeyNMT", versions="2.3.0", sources=("b326c557d00a",))
class FusedLuongAttention(_FusedMechanism):
    r"""scores_j = query . W memory_j, with the projected memory in ``proj_keys``.

    Source: Luong, Pham, Manning, "Effective approaches to attention-based neural machine translation", 2015, section
    3.1, "general".

    Covered: as of :class:`FusedBahdanauAttention`.
    """

    def _step(self, query: Tensor, memory: Memory) -> Attention:
        return attend(DotScore(), query, memory, True, None)


def _memory(keys: Tensor, values: Tensor, mask: Tensor) -> Memory | None:
    allowed = _allowed(mask)
    return Memory(keys, values, mask=allowed) if allowed.any(2).all() else None


def _allowed(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > 0
