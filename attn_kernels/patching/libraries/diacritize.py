"""arabic-diacritizer: the attention of its BiLSTM, from every step to all steps of a sentence."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...functional import additive_attention
from ...stock import is_stock_linear
from ..adapter import Fused, NotSupported
from ..registry import adapts


@adapts(
    "diacritize.baseline.model:BahdanauAttention",
    library="arabic-diacritizer",
    versions="1.0.0",
    sources=("d33ad0e25da1",),
)
class FusedBahdanauAttention(Fused):
    r"""scores_ij = v . tanh(W h_i + U h_j). Returns the contexts, without the alignments.

    Source: Bahdanau, Cho, Bengio, "Neural machine translation by jointly learning to align and translate", 2015,
    appendix A.1.2, with the states as queries and as memory.

    Supported: everything. There is no mask: padding is attended. The op saves the (B, T, T, 512) tensor of the tanh.
    """

    W: Any
    U: Any
    v: Any

    def attend(self, hidden_states: Tensor) -> Any:
        """hidden_states: (B, T, H). Returns the contexts, (B, T, H)."""
        if not is_stock_linear(self.v):
            return NotSupported("a score layer that is no plain nn.Linear")
        query, keys = self.W(hidden_states), self.U(hidden_states)
        return additive_attention(query, keys, hidden_states, self.v.weight.view(-1), need_weights=False).context
