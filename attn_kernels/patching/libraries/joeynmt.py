"""JoeyNMT: the attention of its recurrent decoder.

The decoder calls ``compute_proj_keys`` once in a training step. In a greedy or beam search it calls it in every step,
although the sentences are the same. Under ``torch.no_grad()`` their projection is reused. A greedy search passes the
same tensor. A beam search passes a new tensor each time: all hypotheses of a sentence have equal rows, the rows are
re-ordered, and the rows of finished sentences are left out. See ``cached_projection``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...attending import attend
from ...memory import Memory
from ...scores import AdditiveScore, DotScore
from ...stock import is_stock_linear
from ...types import Attention
from ..adapter import Fused, NotSupported
from ..cache import cached_projection
from ..masks import as_original, memory_without_empty_rows
from ..registry import adapts


class _FusedMechanism(Fused):
    """The base of the two mechanisms."""

    key_layer: Any
    proj_keys: Tensor | None
    _check_input_shapes_forward: Any

    def compute_proj_keys(self, keys: Tensor) -> None:
        """keys: (B, Tk, M), the encoder's output. Stores its projection, (B, Tk, A), in ``proj_keys``."""
        self.proj_keys = cached_projection(self, self.key_layer, keys, is_shared=True)

    def attend(self, query: Tensor, mask: Tensor, values: Tensor) -> Any:
        """query: (B, 1, H), mask: (B, 1, Tk), > 0 where a step may be attended, values: (B, Tk, M)."""
        self._check_input_shapes_forward(query=query, mask=mask, values=values)
        keys = self.proj_keys
        if keys is None:
            return NotSupported("no projected keys")
        memory = memory_without_empty_rows(
            self, mask, _allowed, lambda allowed: Memory(keys, values, mask=allowed), held=(keys, values)
        )
        if isinstance(memory, NotSupported):
            return memory
        return tuple(as_original(self._step(query, memory), memory.mask))

    def _step(self, query: Tensor, memory: Memory) -> Attention:
        raise NotImplementedError


@adapts("joeynmt.attention:BahdanauAttention", library="JoeyNMT", versions="2.3.0", sources=("1691e38654ae",))
class FusedBahdanauAttention(_FusedMechanism):
    r"""scores_j = v . tanh(W_q query + W_k memory_j), with the projected memory in ``proj_keys``.

    Source: Bahdanau, Cho, Bengio, "Neural machine translation by jointly learning to align and translate", 2015,
    appendix A.1.2.

    Supported: everything except a row that may attend nothing (masks.py). Keys and values are ignored where the mask is
    0, even if they are NaN or infinite; the original returns NaN then.
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

    Supported: as for :class:`FusedBahdanauAttention`.
    """

    def _step(self, query: Tensor, memory: Memory) -> Attention:
        return attend(DotScore(), query, memory, True, None)


def _allowed(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > 0
