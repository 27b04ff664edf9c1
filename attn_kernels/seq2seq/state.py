"""The state of a decoder between two steps, and the modules that a step uses."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..attention_module import AttentionModule
from ..mechanisms.stateful import reorder_state, select_state


class DecoderState(NamedTuple):
    """The state between two decoding steps, for K hypotheses of each of B sentences.

    hidden: (B, K, hidden_size) of each layer. cell: the same; empty for a GRU.
    feed: (B, K, hidden_size), the attentional vector of the step before; None without input feeding.
    attention: the state of a stateful attention, a NamedTuple of tensors, each (B, K, *); None for other attentions.
    """

    hidden: tuple[Tensor, ...]
    cell: tuple[Tensor, ...]
    feed: Tensor | None
    attention: Any = None

    def select(self, indices: Tensor) -> DecoderState:
        """The sentences at ``indices``, (n,)."""
        return DecoderState(
            tuple(state.index_select(0, indices) for state in self.hidden),
            tuple(state.index_select(0, indices) for state in self.cell),
            None if self.feed is None else self.feed.index_select(0, indices),
            None if self.attention is None else select_state(self.attention, indices),
        )

    def reorder(self, hypotheses: Tensor) -> DecoderState:
        """For each sentence its hypotheses at ``hypotheses``, (B, n), each in 0..K-1; repeats are allowed."""
        index = hypotheses[..., None]
        return DecoderState(
            tuple(torch.take_along_dim(state, index, dim=1) for state in self.hidden),
            tuple(torch.take_along_dim(state, index, dim=1) for state in self.cell),
            None if self.feed is None else torch.take_along_dim(self.feed, index, dim=1),
            None if self.attention is None else reorder_state(self.attention, hypotheses),
        )


class DecoderModules(Protocol):
    """The part of ``Decoder`` that the fused decoder uses."""

    hidden_size: int
    input_feeding: bool
    cuda_graph: bool
    embedding: nn.Embedding
    dropout: nn.Dropout
    rnn: nn.LSTM | nn.GRU
    attention: AttentionModule
    attentional: nn.Linear
    output: nn.Linear
