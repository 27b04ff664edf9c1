"""The attention decoder: recurrent cells, attention, attentional vector, input feeding, output layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..memory import Memory
from ..modules import BahdanauAttention, CosineAttention, LuongAttention
from .encoder import CELLS
from .loop import can_loop, decode_sequence

AttentionModule = BahdanauAttention | LuongAttention | CosineAttention


class DecoderState(NamedTuple):
    """What a decoding step hands to the next, for K hypotheses of each of B sentences.

    hidden: (B, K, hidden_size) of each layer. cell: the same; empty for a GRU.
    feed: (B, K, hidden_size), the attentional vector of the step before; None without input feeding.
    """

    hidden: tuple[Tensor, ...]
    cell: tuple[Tensor, ...]
    feed: Tensor | None

    def select(self, indices: Tensor) -> DecoderState:
        """The sentences at ``indices``, (n,)."""
        return DecoderState(
            tuple(state.index_select(0, indices) for state in self.hidden),
            tuple(state.index_select(0, indices) for state in self.cell),
            None if self.feed is None else self.feed.index_select(0, indices),
        )

    def reorder(self, hypotheses: Tensor) -> DecoderState:
        """For each sentence its hypotheses at ``hypotheses``, (B, n), each in 0..K-1 and as often as wanted."""
        index = hypotheses[..., None]
        return DecoderState(
            tuple(torch.take_along_dim(state, index, dim=1) for state in self.hidden),
            tuple(torch.take_along_dim(state, index, dim=1) for state in self.cell),
            None if self.feed is None else torch.take_along_dim(self.feed, index, dim=1),
        )


class Decoder(nn.Module):
    """Luong et al. 2015, section 3.

    The attentional vector ``tanh(W [context; state])`` (equation 5) is what the output layer reads, and with input
    feeding (section 3.3) also what the next step reads beside its token.
    """

    def __init__(
        self,
        vocab: int,
        embedding_size: int,
        hidden_size: int,
        attention: AttentionModule,
        memory_size: int,
        *,
        cell: str,
        num_layers: int,
        dropout: float,
        input_feeding: bool,
        loop: bool,
        cuda_graph: bool,
        padding_idx: int,
        factory: dict[str, Any],
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.input_feeding = input_feeding
        self.embedding = nn.Embedding(vocab, embedding_size, padding_idx=padding_idx, **factory)
        self.dropout = nn.Dropout(dropout)
        states = num_layers * (2 if cell == "lstm" else 1)
        self.bridges = nn.ModuleList(nn.Linear(2 * hidden_size, hidden_size, **factory) for _ in range(states))
        # A step computes with the weights of this module in a cell, a whole sequence with the module itself.
        self.rnn = CELLS[cell](
            embedding_size + (hidden_size if input_feeding else 0),
            hidden_size,
            num_layers,
            batch_first=True,
            dropout=dropout if num_layers > 1 else 0.0,
            **factory,
        )
        self.attention = attention
        self.loop = loop
        self.cuda_graph = cuda_graph
        self.attentional = nn.Linear(memory_size + hidden_size, hidden_size, bias=False, **factory)
        self.output = nn.Linear(hidden_size, vocab, **factory)

    def start(self, encoder_states: tuple[Tensor, ...]) -> DecoderState:
        """The first state, for one hypothesis per sentence, from the final states of the encoder."""
        layers = [layer for state in encoder_states for layer in state.unbind(0)]  # hidden of all layers, then cell
        states = [torch.tanh(bridge(layer)).unsqueeze(1) for bridge, layer in zip(self.bridges, layers, strict=True)]
        hidden, cell = states[: self.rnn.num_layers], states[self.rnn.num_layers :]
        return DecoderState(tuple(hidden), tuple(cell), torch.zeros_like(hidden[0]) if self.input_feeding else None)

    def forward(self, tokens: Tensor, state: DecoderState, memory: Memory) -> tuple[Tensor, Tensor]:
        """Teacher forcing. tokens: (B, T), read by the steps. Returns logits (B, T, vocab) and alignments (B, T, S)."""
        embedded = self.dropout(self.embedding(tokens))
        if self.input_feeding and self.loop and can_loop(self, embedded):
            attentional, alignments = decode_sequence(self, embedded, state, memory)
        elif self.input_feeding:
            steps = []
            for token in embedded.split(1, dim=1):
                attentional, alignments, state = self._step(token, state, memory)
                steps.append((attentional, alignments))
            attentional, alignments = (torch.cat(parts, dim=1) for parts in zip(*steps, strict=True))
        else:  # no step waits for the attention of another: all of them are queries of one call
            first = tuple(torch.cat(layers, dim=1).transpose(0, 1) for layers in (state.hidden, state.cell) if layers)
            states, _ = self.rnn(embedded, first if state.cell else first[0])
            attentional, alignments = self._attend(states, memory)
        return self.output(attentional), alignments

    def step(self, tokens: Tensor, state: DecoderState, memory: Memory) -> tuple[Tensor, Tensor, DecoderState]:
        """One step of K hypotheses per sentence.

        tokens: (B, K), read by the step. Returns logits (B, K, vocab), alignments (B, K, S) and the next state.
        """
        attentional, alignments, state = self._step(self.dropout(self.embedding(tokens)), state, memory)
        return self.output(attentional), alignments, state

    def _step(self, embedded: Tensor, state: DecoderState, memory: Memory) -> tuple[Tensor, Tensor, DecoderState]:
        """embedded: (B, K, embedding_size). Returns attentional (B, K, hidden_size), alignments, the next state."""
        batch, hypotheses = embedded.shape[:2]
        inputs = embedded if state.feed is None else torch.cat([embedded, state.feed], dim=-1)
        output = inputs.flatten(0, 1)
        hidden, cell = [], []
        for layer, weights in enumerate(self.rnn.all_weights):
            if layer > 0:
                output = self.dropout(output)
            if state.cell:
                before = (state.hidden[layer].flatten(0, 1), state.cell[layer].flatten(0, 1))
                output, memory_cell = torch.lstm_cell(output, before, *weights)
                cell.append(memory_cell.view(batch, hypotheses, -1))
            else:
                output = torch.gru_cell(output, state.hidden[layer].flatten(0, 1), *weights)
            hidden.append(output.view(batch, hypotheses, -1))
        attentional, alignments = self._attend(hidden[-1], memory)
        feed = attentional if self.input_feeding else None
        return attentional, alignments, DecoderState(tuple(hidden), tuple(cell), feed)

    def _attend(self, states: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """states: (B, K or T, hidden_size), the queries. Returns attentional, of that shape, and alignments."""
        context, alignments = self.attention(states, memory)
        attentional = torch.tanh(self.attentional(torch.cat([context, states], dim=-1)))
        return self.dropout(attentional), alignments
