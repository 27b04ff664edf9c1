"""Decoding steps for a search on the CPU: the results of ``Decoder.step`` with less overhead.

For one hypothesis, half the time of a step is spent between the operators: in modules, in checks that already passed in
the first step, and in autograd. Here a step calls only the operators, and values that depend only on weights and memory
are computed once. This requires a separate implementation of the step: with autograd, or with saved results for a
backward, it would be as slow as the modules.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import ops
from ...attention_module import AttentionModule
from ...backends import choose
from ...gemm import Budget, PackedLinear, linear
from ...memory import Memory, PreparedMemory
from ...scores import Score
from ...stock import has_global_hooks, is_stock
from ...types import alignments_of
from ..decoder import Decoder
from ..state import DecoderModules, DecoderState
from .attention import op_arguments, prepare, with_prepared
from .eligibility import READ, can_fuse_steps
from .formula import scale_query
from .inputs import CellWeights
from .one_call import projects_values

MAX_BYTES = 1 << 26  # of all values that a search derives from weights, without the memory
_SURE_STEPS = 4  # the table is made before the first step if it is worth it within this many steps


def fast_decoder(
    decoder: Decoder, state: DecoderState, memory: Memory, hypotheses: int, steps: int
) -> tuple[Any, Memory]:
    """The fastest object whose ``step`` returns the results of ``decoder.step``, and the memory for its calls.

    state: the first one. hypotheses: their number per sentence. steps: the maximum number of steps of the search. The
    returned memory has the same sentences as the given one.

    It is a ``FastDecoder`` on the CPU, in float32 or float64, if all modules are stock and in evaluation mode. The
    parameters must not change while it is in use. Otherwise it is the decoder, or an object that calls the decoder.
    """
    if not isinstance(decoder, Decoder):
        return decoder, memory
    if can_fuse_steps(decoder, state, memory):
        memory = _prepare(decoder, memory)
        made = FastDecoder(decoder, memory, hypotheses, steps)
        return made, made.memory
    if not decoder._is_original("forward"):
        if all(map(decoder._is_original, ("step", "_step", "_attend"))):
            message = "the decoder has a forward of its own, which a search does not call: give it a step of its own"
            warnings.warn(f"Seq2Seq.generate: {message}", stacklevel=5)
    elif has_global_hooks() or decoder._forward_hooks or decoder._forward_pre_hooks:
        return _CalledSteps(decoder), memory
    return decoder, memory if state.attention is not None else _prepare(decoder, memory)


def _prepare(decoder: Decoder, memory: Memory) -> Memory:
    """The memory with prepared keys, if only code of this package will read it."""
    attention = decoder.attention
    if type(attention) not in READ or type(memory) is not Memory or torch.compiler.is_compiling():
        return memory
    if not (is_stock(decoder) and is_stock(attention)):
        return memory
    prepared = prepare(attention.make_score(memory), memory.keys, attention.backend)
    return memory if prepared is None else PreparedMemory.of(memory, prepared)


class _CalledSteps:
    """Steps that call the decoder as a module, so that its hooks run."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def step(self, tokens: Tensor, state: DecoderState, memory: Memory) -> tuple[Tensor, Tensor, DecoderState]:
        """As ``Decoder.step``."""
        after: list[DecoderState] = []
        logits, alignments = self.decoder(tokens, state, memory, after)
        return logits, alignments, after[0]


class Packing(NamedTuple):
    """The sizes for which the weights of a search are packed: rows of a product, and the maximum number of steps."""

    rows: int
    steps: int
    budget: Budget


class FastDecoder:
    """``Decoder.step`` by operators. B sentences, K hypotheses of each, R = B K rows, H hidden_size, S source steps."""

    def __init__(self, decoder: DecoderModules, memory: Memory, hypotheses: int, steps: int) -> None:
        self.input_feeding: bool = decoder.input_feeding
        rows = memory.batch_size * hypotheses
        packing = Packing(rows, steps, Budget(MAX_BYTES))
        self.packing: Packing = packing
        self.embedding: Tensor = decoder.embedding.weight
        self.make_layer: type[_LSTMLayer] | type[_GRULayer] = (
            _LSTMLayer if isinstance(decoder.rnn, nn.LSTM) else _GRULayer
        )
        self.first_weights: CellWeights
        self.first_weights, *weights = (CellWeights(*of_layer) for of_layer in decoder.rnn.all_weights)
        # The products of the first layer's weight with all embeddings of the vocabulary. The table is made once the
        # steps have computed as many rows as it has. A step counts as at least four rows: a product of one row takes as
        # long as one of four, because both read the whole weight.
        self.table: Tensor | None = None
        self.rows_left: int = max(rows, 4) * steps
        self.rows_read: int = max(rows, 4) * min(steps, _SURE_STEPS)
        self.layers: list[_LSTMLayer | _GRULayer] = []
        if not self._make_table():
            self.layers.append(self.make_layer(self.first_weights, packing))
        self.layers += [self.make_layer(of_layer, packing) for of_layer in weights]
        self.module: AttentionModule = decoder.attention
        self.attention: _Attention | None = _make_attention(decoder.attention, memory, packing)
        # W context is linear in the values: projecting the values once saves that product in every step.
        weight, source, values = decoder.attentional.weight, memory.keys.shape[1], memory.values.shape[2]
        self.of_context: _Affine | None = None
        self.memory: Memory = memory
        if self.attention is None or not projects_values(memory, decoder.hidden_size, hypotheses * steps):
            self.of_context = _Affine(weight[:, :values], *packing)
        else:
            projected = linear(memory.values.flatten(0, 1), weight[:, :values]).unflatten(0, (-1, source))
            self.memory = PreparedMemory.of(replace(memory, values=projected), memory.prepared)
        self.of_state: _Affine = _Affine(weight[:, values:], *packing)
        self.output: _Affine = _Affine(decoder.output.weight, *packing)
        bias = decoder.output.bias
        self.output_bias: Tensor = weight.new_zeros(self.output.size) if bias is None else bias

    def _make_table(self) -> bool:
        """Makes the table if it is worth it by now, and a first layer without its product. Returns whether it did."""
        vocabulary, read = self.embedding.shape
        if vocabulary > min(self.rows_read, self.rows_left):
            return False
        weights = self.first_weights
        self.rows_left = 0  # do not try again, whether the table fits or not
        if not self.packing.budget.take(vocabulary * weights.x.shape[0] * weights.x.element_size()):
            return False
        self.table = linear(self.embedding, weights.x[:, :read], self.make_layer.known_bias(weights))
        self.layers[:1] = [self.make_layer(weights._replace(x=weights.x[:, read:]), self.packing)]
        return True

    def step(self, tokens: Tensor, state: DecoderState, memory: Memory) -> tuple[Tensor, Tensor, DecoderState]:
        """As ``Decoder.step``."""
        batch, count = tokens.shape
        rows = batch * count
        feed = None if state.feed is None else state.feed.reshape(rows, -1)
        chosen = tokens.reshape(rows)
        base = inputs = None
        if self.rows_left > 0:
            self.rows_read += max(rows, 4)
            self.rows_left -= max(rows, 4)
            self._make_table()
        if self.table is not None:
            base, inputs = self.table.index_select(0, chosen), feed
        else:
            embedded = self.embedding.index_select(0, chosen)
            inputs = embedded if feed is None else torch.cat([embedded, feed], dim=1)
        hidden, cell = [], []
        for n, layer in enumerate(self.layers):
            before = state.hidden[n].reshape(rows, -1)
            inputs, *new_cell = layer(base, inputs, before, *(x.reshape(rows, -1) for x in state.cell[n : n + 1]))
            hidden.append(inputs.view(batch, count, -1))
            cell += [x.view(batch, count, -1) for x in new_cell]
            base = None
        assert inputs is not None  # the output of the last layer
        if self.attention is None:
            result = self.module(hidden[-1], memory)
            context, alignments = result.context, alignments_of(result)
        else:
            context, alignments = self.attention(inputs, count, memory)
        context = context.reshape(rows, -1)
        if self.of_context is not None:
            context = self.of_context(context, None)
        attentional = self.of_state(inputs, context).tanh_()
        logits = self.output(attentional, self.output_bias)
        fed = attentional.view(batch, count, -1) if self.input_feeding else None
        return logits.view(batch, count, -1), alignments, DecoderState(tuple(hidden), tuple(cell), fed)


class _Affine:
    """x @ weight.t() + added. x: (R, k). weight: (n, k). added: (R, n), (n,) or None."""

    def __init__(self, weight: Tensor, rows: int, steps: int, budget: Budget) -> None:
        self.size: int = weight.shape[0]
        self.transposed: Tensor = weight.t()
        self.product: PackedLinear = PackedLinear(weight, rows, steps, budget)

    def __call__(self, x: Tensor, added: Tensor | None) -> Tensor:
        if added is None:
            return self.product(x)
        if x.shape[0] == 1:  # a single operator, and packed products are not faster
            return torch.addmm(added, x, self.transposed)
        return self.product(x).add_(added)


class _Layer:
    """A layer of cells. weights.x: (G, n), for the inputs that are not in the table; n may be 0."""

    def __init__(self, weights: CellWeights, packing: Packing) -> None:
        self.bias: Tensor = self.known_bias(weights)
        self.bias_h: Tensor = weights.bias_h
        self.of_inputs: _Affine | None = _Affine(weights.x, *packing) if weights.x.shape[1] > 0 else None
        self.of_state: _Affine = _Affine(weights.h, *packing)

    @staticmethod
    def known_bias(weights: CellWeights) -> Tensor:
        """(G,), the bias of the gates besides the products with inputs and state; the rows of a table include it."""
        raise NotImplementedError


class _LSTMLayer(_Layer):
    def __init__(self, weights: CellWeights, packing: Packing) -> None:
        super().__init__(weights, packing)
        self.cell_step: Callable[..., Any] = ops.kernel("lstm_step", "cpu")

    @staticmethod
    def known_bias(weights: CellWeights) -> Tensor:
        return weights.bias_x + weights.bias_h

    def __call__(self, base: Tensor | None, inputs: Tensor | None, before: Tensor, cell: Tensor) -> tuple[Tensor, ...]:
        """base: (R, 4 H), rows of a table, or None. inputs: (R, n) or None. before, cell: (R, H). Returns both new."""
        gates = self.of_state(before, self.bias if base is None else base)
        if self.of_inputs is not None:
            assert inputs is not None
            gates = self.of_inputs(inputs, gates)
        new_cell, tanh, hidden = gates.new_empty(3, *before.shape).unbind(0)
        self.cell_step(gates, cell, new_cell, tanh, hidden, None)
        return hidden, new_cell


class _GRULayer(_Layer):
    """A GRU layer. ``known_bias`` does not include the bias of the product with the state, because r multiplies it."""

    @staticmethod
    def known_bias(weights: CellWeights) -> Tensor:
        return weights.bias_x

    def __call__(self, base: Tensor | None, inputs: Tensor | None, before: Tensor) -> tuple[Tensor, ...]:
        """base: (R, 3 H), rows of a table, or None. inputs: (R, n) or None. before: (R, H). Returns the new state."""
        gates = self.bias if base is None else base
        if self.of_inputs is not None:
            assert inputs is not None
            gates = self.of_inputs(inputs, gates)
        size = before.shape[1]
        known, n = gates.split([2 * size, size], dim=1)
        from_state, recurrent = self.of_state(before, self.bias_h).split([2 * size, size], dim=1)
        r, z = from_state.add_(known).sigmoid_().chunk(2, dim=1)
        return (torch.lerp(torch.addcmul(n, r, recurrent).tanh_(), before, z),)


class _Attention(NamedTuple):
    """A step of an attention module that calls only its op."""

    backend: str
    projection: _Affine | None  # of the state to the query
    factor: Tensor | float | None  # of the query
    eps: float | None
    score: Score  # without prepared keys

    def __call__(self, states: Tensor, count: int, memory: Memory) -> tuple[Tensor, Tensor]:
        """states: (R, H), ``count`` per sentence. Returns contexts (B, K, D) and alignments (B, K, S)."""
        query = states if self.projection is None else self.projection(states, None)
        query = scale_query(query, self.factor, self.eps).view(-1, count, query.shape[1])
        score = with_prepared(self.score, memory.prepared)
        result: tuple[Tensor, Tensor] = ops.call(score.op, self.backend, query, *op_arguments(score, memory), True)
        return result


def _make_attention(module: AttentionModule, memory: Memory, packing: Packing) -> _Attention | None:
    """The fast step of an attention; None with the backend "reference", which has no op: then the module is called."""
    backend, projection = choose(module.backend, "cpu"), module.query_projection
    if backend == "reference":
        return None
    product = None if projection is None else _Affine(projection.weight, *packing)
    return _Attention(backend, product, module.query_factor(), module.query_eps(), module.make_score(memory))
