"""The encoder: embedding and a bidirectional LSTM or GRU over sentences of different lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

CELLS: dict[str, type[nn.LSTM] | type[nn.GRU]] = {"lstm": nn.LSTM, "gru": nn.GRU}


class Encoder(nn.Module):
    """Bidirectional, ``hidden_size`` units per direction.

    With ``sum_directions`` the outputs of both directions are added, not concatenated: memory_size is then hidden_size,
    which attention without a projection of the memory needs, and not 2 * hidden_size.
    """

    def __init__(
        self,
        vocab: int,
        embedding_size: int,
        hidden_size: int,
        *,
        cell: str,
        num_layers: int,
        dropout: float,
        padding_idx: int,
        sum_directions: bool,
        factory: dict[str, Any],
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.padding_idx = padding_idx
        self.sum_directions = sum_directions
        self.embedding = nn.Embedding(vocab, embedding_size, padding_idx=padding_idx, **factory)
        self.dropout = nn.Dropout(dropout)
        self.rnn = CELLS[cell](
            embedding_size,
            hidden_size,
            num_layers,
            batch_first=True,
            dropout=dropout if num_layers > 1 else 0.0,
            bidirectional=True,
            **factory,
        )

    @property
    def memory_size(self) -> int:
        return self.hidden_size if self.sum_directions else 2 * self.hidden_size

    def forward(self, source: Tensor, source_lengths: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """source: (B, S) tokens. source_lengths: (B,), 0..S.

        Returns the memory, (B, S, memory_size), with zeros in its padding, and the final states: one tensor
        (num_layers, B, 2 * hidden_size) for a GRU, two (hidden, cell) for an LSTM; zeros for a sentence of length 0.
        """
        batch, steps = source.shape
        lengths = source_lengths.cpu()
        if steps == 0:  # RNNs refuse a sequence of length 0: compute on one step, and drop it below
            source = source.new_full((batch, 1), self.padding_idx)
        embedded = self.dropout(self.embedding(source))
        if bool((lengths == source.shape[1]).all()):  # nothing to pack, and PyTorch is faster without
            outputs, final = self.rnn(embedded)
        else:
            packed = pack_padded_sequence(embedded, lengths.clamp(min=1), batch_first=True, enforce_sorted=False)
            outputs, final = self.rnn(packed)
            outputs, _ = pad_packed_sequence(outputs, batch_first=True, total_length=source.shape[1])
        if self.sum_directions:
            outputs = outputs[..., : self.hidden_size] + outputs[..., self.hidden_size :]
        states = tuple(self._join_directions(state) for state in (final if isinstance(final, tuple) else (final,)))
        empty = lengths == 0
        if bool(empty.any()):
            empty = empty.to(source.device)
            outputs = outputs.masked_fill(empty[:, None, None], 0.0)
            states = tuple(state.masked_fill(empty[:, None], 0.0) for state in states)
        return outputs[:, :steps], states

    def _join_directions(self, state: Tensor) -> Tensor:
        """(num_layers * 2, B, hidden_size) -> (num_layers, B, 2 * hidden_size)"""
        forward, backward = state.unflatten(0, (self.num_layers, 2)).unbind(1)
        return torch.cat([forward, backward], dim=-1)
