"""The attention decoder: recurrent cells, attention, attentional vector, input feeding, output layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..attention_module import AttentionModule
from ..mechanisms import NormalizedAttention
from ..memory import Memory, padded
from ..packed_memory import is_packed
from ..stock import register
from .attentions import attend_step
from .encoder import CELLS
from .fused.autograd import decode_sequence
from .fused.distinct import embed_distinct
from .fused.eligibility import can_fuse_sequence, has_stock_cells
from .fused.formula import step_cells
from .sharded import as_forward
from .state import DecoderState

__all__ = ["AttentionModule", "Decoder", "DecoderState"]


class Decoder(nn.Module):
    """Luong et al. 2015, section 3.

    The output layer reads the attentional vector ``tanh(W [context; state])`` (equation 5). With input feeding (section
    3.3) the next step reads it, too, besides its token.

    Customising: submodules may be replaced by others with the same call signature, and may have hooks and
    parametrizations. A subclass or an instance may have its own ``start``, ``step``, ``_step`` or ``_attend``. Training
    and search respect all of this: fast paths bypass a module only if it is stock (see stock.py). A search does not
    call ``forward``; put what is to affect both into ``step``. Between layers a step applies ``dropout``; an ``rnn``
    that is not stock applies its own.
    """

    def __init__(
        self,
        vocab: int,
        embedding_size: int,
        hidden_size: int,
        attention: AttentionModule | NormalizedAttention,
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
        self.embedding: nn.Embedding = nn.Embedding(vocab, embedding_size, padding_idx=padding_idx, **factory)
        self.dropout: nn.Dropout = nn.Dropout(dropout)
        states = num_layers * (2 if cell == "lstm" else 1)
        self.bridges: nn.ModuleList = nn.ModuleList(
            nn.Linear(2 * hidden_size, hidden_size, **factory) for _ in range(states)
        )
        self.rnn: nn.GRU | nn.LSTM = CELLS[cell](
            embedding_size + (hidden_size if input_feeding else 0),
            hidden_size,
            num_layers,
            batch_first=True,
            dropout=dropout if num_layers > 1 else 0.0,
            **factory,
        )
        self.attention: Any = attention  # Any: users may replace it
        self.loop = loop
        self.cuda_graph = cuda_graph
        self.attentional: nn.Linear = nn.Linear(memory_size + hidden_size, hidden_size, bias=False, **factory)
        self.output: nn.Linear = nn.Linear(hidden_size, vocab, **factory)

    def begin(
        self, outputs: Tensor | PackedSequence, encoder_states: tuple[Tensor, ...], source_lengths: Tensor
    ) -> tuple[Memory, DecoderState]:
        """The memory and the first decoder state. source_lengths: (B,), on the device of the outputs.

        outputs, encoder_states: of the encoder. Outputs may be a jagged tensor or a ``PackedSequence``. Searches and
        the loop, which read the memory in many steps, then pad it once. Training without input feeding does not pad: it
        attends with all queries in one call.
        """
        lengths = () if is_packed(outputs) else (source_lengths,)
        memory = as_forward(self.attention, "memory")(outputs, *lengths)
        state = self.start(encoder_states)
        initial_state = getattr(self.attention, "initial_state", None)  # only stateful attentions have it
        if initial_state is not None and state.attention is None:
            state = state._replace(attention=initial_state(memory))
        return memory, state

    def start(self, encoder_states: tuple[Tensor, ...]) -> DecoderState:
        """The first state, for one hypothesis per sentence, from the final states of the encoder.

        ``begin`` adds the state of a stateful attention, which depends on the memory.
        """
        layers = [layer for state in encoder_states for layer in state.unbind(0)]  # hidden of all layers, then cell
        states = [torch.tanh(bridge(layer)).unsqueeze(1) for bridge, layer in zip(self.bridges, layers, strict=True)]
        count = len(states) // len(encoder_states)
        hidden, cell = states[:count], states[count:]
        return DecoderState(tuple(hidden), tuple(cell), torch.zeros_like(hidden[0]) if self.input_feeding else None)

    def forward(
        self, tokens: Tensor, state: DecoderState, memory: Memory, next_state: list[DecoderState] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Teacher forcing. tokens: (B, T), inputs of the steps. Returns logits (B, T, vocab), alignments (B, T, S).

        With a list as ``next_state`` it runs one ``step`` and appends the next state: so a search calls a decoder that
        has hooks, which only a call of the module runs.
        """
        if next_state is not None:
            logits, alignments, after = self.step(tokens, state, memory)
            next_state.append(after)
            return logits, alignments
        if self.input_feeding or not (self._is_original("step") and self._is_original("_step")):
            memory = padded(memory)
        if not self._is_original("step"):
            return self._join(self.step, tokens, state, memory)
        if self.input_feeding and self.loop and self._is_original("_step"):
            distinct = embed_distinct(self.embedding, self.dropout, tokens)
            if distinct is not None and can_fuse_sequence(self, distinct.rows, state, memory, distinct.token_rows):
                attentional, alignments = decode_sequence(self, distinct.rows, state, memory, distinct.token_rows)
                return self.output(attentional), alignments
        embedded = self.dropout(self.embedding(tokens))
        if not self._is_original("_step"):
            attentional, alignments = self._join(self._step, embedded, state, memory)
        elif not self.input_feeding:  # steps do not depend on each other's attention: attend with all of them at once
            states, _ = self._call_rnn(embedded, state)
            attentional, alignments = self._attend_all(states, memory, state.attention)
        elif self.loop and can_fuse_sequence(self, embedded, state, memory):
            attentional, alignments = decode_sequence(self, embedded, state, memory)
        else:
            advance = self._step_of_cells if has_stock_cells(self.rnn) else self._step_of_rnn
            attentional, alignments = self._join(advance, embedded, state, memory)
        return self.output(attentional), alignments

    if TYPE_CHECKING:
        __call__ = forward

    def step(self, tokens: Tensor, state: DecoderState, memory: Memory) -> tuple[Tensor, Tensor, DecoderState]:
        """One step of K hypotheses per sentence.

        tokens: (B, K), inputs of the step. Returns logits (B, K, vocab), alignments (B, K, S) and the next state.
        """
        attentional, alignments, state = self._step(self.dropout(self.embedding(tokens)), state, memory)
        return self.output(attentional), alignments, state

    def _step(self, embedded: Tensor, state: DecoderState, memory: Memory) -> tuple[Tensor, Tensor, DecoderState]:
        """embedded: (B, K, embedding_size). Returns attentional (B, K, hidden_size), alignments, the next state."""
        advance = self._step_of_cells if has_stock_cells(self.rnn) else self._step_of_rnn
        return advance(embedded, state, memory)

    def _step_of_cells(
        self, embedded: Tensor, state: DecoderState, memory: Memory
    ) -> tuple[Tensor, Tensor, DecoderState]:
        """``_step`` with the weights of ``rnn``, which is faster than calling the module."""
        batch, hypotheses = embedded.shape[:2]
        inputs = self._inputs(embedded, state).flatten(0, 1)
        before = [x.flatten(0, 1) for x in state.hidden], [x.flatten(0, 1) for x in state.cell]
        hidden, cell = step_cells(inputs, *before, self.rnn.all_weights, lambda x, _: self.dropout(x))
        hidden = [x.view(batch, hypotheses, -1) for x in hidden]
        cell = [x.view(batch, hypotheses, -1) for x in cell]
        return self._finish(hidden[-1], tuple(hidden), tuple(cell), state, memory)

    def _step_of_rnn(
        self, embedded: Tensor, state: DecoderState, memory: Memory
    ) -> tuple[Tensor, Tensor, DecoderState]:
        """``_step`` that calls ``rnn``."""
        batch, hypotheses = embedded.shape[:2]
        inputs = self._inputs(embedded, state).flatten(0, 1).unsqueeze(1)
        first, second = (tuple(x.flatten(0, 1).unsqueeze(1) for x in of) for of in (state.hidden, state.cell))
        rows = DecoderState(first, second, None)
        outputs, after = self._call_rnn(inputs, rows)
        hidden, cell = (
            tuple(x.unflatten(0, (batch, hypotheses)) for layers in of for x in layers.unbind(0))
            for of in ((after[:1], after[1:]) if isinstance(after, tuple) else ((after,), ()))
        )
        return self._finish(outputs.squeeze(1).unflatten(0, (batch, hypotheses)), hidden, cell, state, memory)

    def _inputs(self, embedded: Tensor, state: DecoderState) -> Tensor:
        return embedded if state.feed is None else torch.cat([embedded, state.feed], dim=-1)

    def _call_rnn(self, inputs: Tensor, state: DecoderState) -> tuple[Tensor, Any]:
        """Calls ``rnn``. inputs: (R, T, *). state: (R, 1, *) for each layer. Returns outputs (R, T, *) and states."""
        first = tuple(torch.cat(layers, dim=1).transpose(0, 1) for layers in (state.hidden, state.cell) if layers)
        given = first if len(first) > 1 else first[0]
        if getattr(self.rnn, "batch_first", True):
            result: tuple[Tensor, Any] = self.rnn(inputs, given)
            return result
        outputs, after = self.rnn(inputs.transpose(0, 1), given)
        return outputs.transpose(0, 1), after

    def _finish(
        self,
        states: Tensor,
        hidden: tuple[Tensor, ...],
        cell: tuple[Tensor, ...],
        state: DecoderState,
        memory: Memory,
    ) -> tuple[Tensor, Tensor, DecoderState]:
        """Attention and the next state. states: (B, K, hidden_size), outputs of the cells. state: the previous one."""
        before = () if state.attention is None else (state.attention,)
        attentional, alignments, *after = self._attend(states, memory, *before)
        return attentional, alignments, DecoderState(hidden, cell, attentional if self.input_feeding else None, *after)

    def _attend(self, states: Tensor, memory: Memory, *before: Any) -> tuple[Any, ...]:
        """states: (B, K or T, hidden_size), the queries. Returns attentional, of that shape, and alignments.

        A stateful attention also takes its state, with one query per hypothesis, and returns the next one.
        """
        context, alignments, after = attend_step(self.attention, states, memory, *before)
        attentional = torch.tanh(self.attentional(torch.cat([context, states], dim=-1)))
        return self.dropout(attentional), alignments, *(() if after is None else (after,))

    def _attend_all(self, states: Tensor, memory: Memory, attention: Any) -> tuple[Tensor, Tensor]:
        """states: (B, T, hidden_size), of all steps. attention: the first state of a stateful attention, or None."""
        if attention is None:
            attentional, alignments = self._attend(states, memory)
            return attentional, alignments
        steps = []
        for query in states.split(1, dim=1):
            *results, attention = self._attend(query, memory, attention)
            steps.append(results)
        attentional, alignments = (torch.cat(parts, dim=1) for parts in zip(*steps, strict=True))
        return attentional, alignments

    def _is_original(self, method: str) -> bool:
        """Whether a method is that of this class: neither a subclass nor the instance overrides it."""
        return getattr(type(self), method) is _METHODS[method] and method not in vars(self)

    @staticmethod
    def _join(
        step: Callable[[Tensor, DecoderState, Memory], tuple[Tensor, Tensor, DecoderState]],
        inputs: Tensor,
        state: DecoderState,
        memory: Memory,
    ) -> tuple[Tensor, Tensor]:
        """The first two results of all steps, joined. inputs: (B, T) or (B, T, *)."""
        steps = []
        for given in inputs.split(1, dim=1):
            result, alignments, state = step(given, state, memory)
            steps.append((result, alignments))
        results, alignments = (torch.cat(parts, dim=1) for parts in zip(*steps, strict=True))
        return results, alignments


_METHODS = {name: getattr(Decoder, name) for name in ("forward", "step", "_step", "_attend")}
register(Decoder, (), ["embedding", "dropout", "bridges", "rnn", "attention", "attentional", "output"])
