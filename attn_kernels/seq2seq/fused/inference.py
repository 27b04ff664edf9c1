"""Decoding steps for a search on the CPU: what ``Decoder.step`` computes, with less around it.

Of a step of one hypothesis half the time is spent between operators: modules, checks that the first step has passed
already, autograd. Here a step calls the operators, and what weights and memory allow to be made once is made once.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import ops
from ...backends import choose
from ...functional import prepare_keys
from ...memory import Memory, PreparedMemory
from ...modules import BahdanauAttention, CosineAttention, LuongAttention, unit_length
from ...stock import has_global_hooks, is_stock
from ..decoder import Decoder
from ..state import DecoderState
from .eligibility import has_stock_steps, takes_rows
from .gemm import Budget, PackedLinear, linear

MOST_BYTES = 1 << 26  # of all that a search makes of weights, besides the memory
_SURE_STEPS = 4  # what is made for the steps of a search before the first pays within so many


def fast_decoder(
    decoder: Decoder, state: DecoderState, memory: Memory, hypotheses: int, steps: int
) -> tuple[Any, Memory]:
    """An object with the ``step`` of ``decoder``, and the memory to give it: for a search of at most so many steps.

    state: the first. hypotheses: of each sentence. The memory has the sentences of the one given, and is selected from
    as that one is.

    The object steps past the modules where all of them are stock and in evaluation mode, on the CPU in float32 or
    float64; parameters are not to change while it is used. Otherwise it calls what the decoder has.
    """
    if can_step(decoder, state, memory):
        memory = _prepare(decoder, memory)
        made = FastDecoder(decoder, memory, hypotheses, steps)
        return made, made.memory
    if not isinstance(decoder, Decoder):
        return decoder, memory
    if not decoder._is_original("forward"):
        if all(map(decoder._is_original, ("step", "_step", "_attend"))):
            message = "the decoder has a forward of its own, which a search does not call: give it a step of its own"
            warnings.warn(f"Seq2Seq.generate: {message}", stacklevel=4)
    elif has_global_hooks() or decoder._forward_hooks or decoder._forward_pre_hooks:
        return _CalledSteps(decoder), memory
    return decoder, _prepare(decoder, memory)


def _prepare(decoder: Decoder, memory: Memory) -> Memory:
    """The memory with what additive attention makes of its keys, where only modules of this package will see it."""
    attention = decoder.attention
    if not (is_stock(decoder) and is_stock(attention)) or type(memory) is not Memory or torch.compiler.is_compiling():
        return memory
    if not isinstance(attention, BahdanauAttention | LuongAttention) or attention.v is None:
        return memory
    return PreparedMemory.of(memory, prepare_keys(memory.keys, backend=attention.backend))


def can_step(decoder: Decoder, state: DecoderState, memory: Memory) -> bool:
    """Whether ``FastDecoder`` may stand for the steps of the decoder."""
    return (
        isinstance(decoder, Decoder)
        and not torch.is_grad_enabled()
        and not any(module.training for module in decoder.modules())
        and not (decoder._forward_hooks or decoder._forward_pre_hooks)
        and has_stock_steps(decoder, state, memory)
        and takes_rows(decoder.embedding)
        and _is_as_made(decoder.output, decoder)
        and memory.keys.is_cpu
        and memory.keys.dtype in (torch.float32, torch.float64)
        and all(x.dtype == memory.keys.dtype and x.is_cpu for x in decoder.parameters())
        and choose(None, "cpu") == "cpu"
    )


def _is_as_made(output: object, decoder: Decoder) -> bool:
    if not is_stock(output) or not isinstance(output, nn.Linear):
        return False
    embedded = decoder.rnn.input_size - (decoder.hidden_size if decoder.input_feeding else 0)
    return output.weight.shape[1] == decoder.hidden_size and decoder.embedding.weight.shape[1] == embedded


class _CalledSteps:
    """Steps of a decoder by calls of it, which run its hooks."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def step(self, tokens: Tensor, state: DecoderState, memory: Memory) -> tuple[Tensor, Tensor, DecoderState]:
        """As ``Decoder.step``."""
        after: list[DecoderState] = []
        logits, alignments = self.decoder(tokens, state, memory, after)
        return logits, alignments, after[0]


class FastDecoder:
    """B sentences, K hypotheses of each, R = B K rows, E embedding_size, H hidden_size, S source steps."""

    def __init__(self, decoder: Decoder, memory: Memory, hypotheses: int, steps: int) -> None:
        self.size = decoder.hidden_size
        self.input_feeding = decoder.input_feeding
        rows = memory.batch_size * hypotheses
        budget = self.budget = Budget(MOST_BYTES)
        self.embedding: Tensor = decoder.embedding.weight
        make_layer: Any = _LSTMLayer if isinstance(decoder.rnn, nn.LSTM) else _GRULayer
        weights: Any = decoder.rnn.all_weights
        self.make_first = functools.partial(make_layer, *weights[0], rows, steps, budget)
        # What a token adds to the gates of the first layer, for all of the vocabulary: as soon as the steps have
        # computed as many rows as it has (a product of one row takes as long as one of four: both read the weight).
        self.table: Tensor | None = None
        self.rows_left = max(rows, 4) * steps
        self.rows_read = max(rows, 4) * min(steps, _SURE_STEPS)
        self.layers: list[_LSTMLayer | _GRULayer] = []
        if not self._make_table():
            self.layers.append(self.make_first())
        self.layers += [make_layer(*of_layer, rows, steps, budget) for of_layer in weights[1:]]
        self.attention = _make_attention(decoder.attention, rows, steps, budget)
        # The attentional vector reads sums of values: of values multiplied with its weight, they are its products.
        weight, source, values = decoder.attentional.weight, memory.keys.shape[1], memory.values.shape[2]
        self.of_context: _Affine | None = None
        self.memory = memory
        if self.attention is None or 2 * source > hypotheses * steps or source == 0 or values < self.size:
            self.of_context = _Affine(weight[:, :values], rows, steps, budget)
        else:
            projected = linear(memory.values.flatten(0, 1), weight[:, :values]).unflatten(0, (-1, source))
            self.memory = PreparedMemory.of(replace(memory, values=projected), memory.prepared)
        self.module = decoder.attention
        self.of_state = _Affine(weight[:, values:], rows, steps, budget)
        self.output = _Affine(decoder.output.weight, rows, steps, budget)
        bias = decoder.output.bias
        self.output_bias = weight.new_zeros(self.output.size) if bias is None else bias

    def _make_table(self) -> bool:
        """Whether the table pays and was made; the first layer then has the rest of its inputs."""
        vocabulary, read = self.embedding.shape
        if vocabulary > min(self.rows_read, self.rows_left):
            return False
        first: Any = self.make_first.func
        weight_x, weight_h, bias_x, bias_h, *rest = self.make_first.args
        self.rows_left = 0  # it is not made twice, nor tried again where it does not fit
        if not self.budget.take(vocabulary * weight_x.shape[0] * weight_x.element_size()):
            return False
        self.table = linear(self.embedding, weight_x[:, :read], first.known_bias(bias_x, bias_h))
        self.layers[:1] = [first(weight_x[:, read:], weight_h, bias_x, bias_h, *rest)]
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
        if self.attention is None:
            context, alignments = self.module(hidden[-1], memory)
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
        self.size = weight.shape[0]
        self.transposed = weight.t()
        self.product = PackedLinear(weight, rows, steps, budget)

    def __call__(self, x: Tensor, added: Tensor | None) -> Tensor:
        if added is None:
            return self.product(x)
        if x.shape[0] == 1:  # one operator, and no library is faster
            return torch.addmm(added, x, self.transposed)
        return self.product(x).add_(added)


class _LSTMLayer:
    """Without ``base``, (R, 4 H), the gates have the biases only, besides the products with the two inputs."""

    def __init__(
        self,
        weight_x: Tensor,
        weight_h: Tensor,
        bias_x: Tensor,
        bias_h: Tensor,
        rows: int,
        steps: int,
        budget: Budget,
    ) -> None:
        self.bias = self.known_bias(bias_x, bias_h)
        self.of_inputs = _Affine(weight_x, rows, steps, budget) if weight_x.shape[1] > 0 else None
        self.of_state = _Affine(weight_h, rows, steps, budget)
        self.cell_step = ops.kernel("lstm_step", "cpu")

    @staticmethod
    def known_bias(bias_x: Tensor, bias_h: Tensor) -> Tensor:
        return bias_x + bias_h

    def __call__(self, base: Tensor | None, inputs: Tensor | None, before: Tensor, cell: Tensor) -> tuple[Tensor, ...]:
        """inputs: (R, n) or None. before, cell: (R, H), the state. Returns the next one."""
        gates = self.of_state(before, self.bias if base is None else base)
        if self.of_inputs is not None:
            gates = self.of_inputs(inputs, gates)
        new_cell, tanh, hidden = gates.new_empty(3, *before.shape).unbind(0)
        self.cell_step(gates, cell, new_cell, tanh, hidden, None)
        return hidden, new_cell


class _GRULayer:
    """As ``_LSTMLayer``; r multiplies the bias of the state's product, which ``base``, (R, 3 H), leaves out."""

    def __init__(
        self,
        weight_x: Tensor,
        weight_h: Tensor,
        bias_x: Tensor,
        bias_h: Tensor,
        rows: int,
        steps: int,
        budget: Budget,
    ) -> None:
        self.bias_x, self.bias_h = bias_x, bias_h
        self.size = weight_h.shape[1]
        self.of_inputs = _Affine(weight_x, rows, steps, budget) if weight_x.shape[1] > 0 else None
        self.of_state = _Affine(weight_h, rows, steps, budget)

    @staticmethod
    def known_bias(bias_x: Tensor, bias_h: Tensor) -> Tensor:
        return bias_x

    def __call__(self, base: Tensor | None, inputs: Tensor | None, before: Tensor) -> tuple[Tensor, ...]:
        """inputs: (R, n) or None. before: (R, H), the state. Returns the next one."""
        gates = self.bias_x if base is None else base
        if self.of_inputs is not None:
            gates = self.of_inputs(inputs, gates)
        known, n = gates.split([2 * self.size, self.size], dim=1)
        from_state, recurrent = self.of_state(before, self.bias_h).split([2 * self.size, self.size], dim=1)
        r, z = from_state.add_(known).sigmoid_().chunk(2, dim=1)
        return (torch.lerp(torch.addcmul(n, r, recurrent).tanh_(), before, z),)


class _Attention(NamedTuple):
    """A call of an attention module, at the cost of its op. A units."""

    module: Any
    backend: str
    projection: _Affine | None  # of the state to the query
    v: Tensor | None  # (A,), of additive attention
    bias: Tensor | None  # (A,)

    def __call__(self, states: Tensor, count: int, memory: Memory) -> tuple[Tensor, Tensor]:
        """states: (R, H), ``count`` of each sentence. Returns contexts (B, K, D) and alignments (B, K, S)."""
        query = states if self.projection is None else self.projection(states, None)
        masks = (memory.memory_lengths, memory.mask, True)
        if self.v is not None:
            settings: tuple[Any, ...] = (self.v, self.bias, memory.prepared, *masks)
        else:
            settings = (1.0, *masks)
            if isinstance(self.module, CosineAttention):
                query = self.module.sharpness * unit_length(query, self.module.eps)
            elif self.module.g is not None:
                query = self.module.g * query
        op = "dot_attention" if self.v is None else "additive_attention"
        query = query.view(-1, count, query.shape[1])
        return ops.call(op, self.backend, query, memory.keys, memory.values, *settings)


def _make_attention(module: Any, rows: int, steps: int, budget: Budget) -> _Attention | None:
    """None where no op computes it, but plain PyTorch."""
    backend = choose(module.backend, "cpu")
    if backend == "reference":
        return None
    projection = None
    if module.query_projection is not None:
        projection = _Affine(module.query_projection.weight, rows, steps, budget)
    v = None
    if not isinstance(module, CosineAttention) and module.v is not None:
        v = module.score_vector()
    bias = module.bias if isinstance(module, BahdanauAttention) else None
    return _Attention(module, backend, projection, v, bias)
