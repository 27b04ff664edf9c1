"""Decoding steps for a search on the CPU: what ``Decoder.step`` computes, with less around it.

Of a step of one hypothesis half the time is spent between operators: modules, checks that the first step has passed
already, autograd. Here a step calls the operators, and what weights and memory allow to be made once is made once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..backends import choose
from ..functional import prepare_keys
from ..memory import Memory, PreparedMemory
from ..modules import BahdanauAttention, CosineAttention, LuongAttention
from .decoder import AttentionModule, Decoder, DecoderState
from .products import Product, linear


def make_steps(decoder: Decoder, memory: Memory, hypotheses: int, steps: int) -> tuple[Any, Memory]:
    """An object with the ``step`` of ``decoder``, and the memory to give it: for a search of about so many steps.

    hypotheses: of each sentence. The memory has the sentences of the one given, and is selected from as that one is.

    The object is the decoder itself where the steps are not to be replaced: with gradients, under torch.compile and
    autocast, with hooks, with modules or methods of the caller's own, off the CPU or in 16 bits. Parameters are not
    to change while the object is used.
    """
    if not _can_replace(decoder):
        return decoder, _prepare(decoder, memory)
    memory = _prepare(decoder, memory)
    made = GenerationSteps(decoder, memory, hypotheses, steps)
    return made, made.memory


def _prepare(decoder: Decoder, memory: Memory) -> Memory:
    """The memory with what additive attention makes of its keys, where only modules of this package will see it."""
    attention = decoder.attention
    if type(decoder) is not Decoder or type(attention) not in (BahdanauAttention, LuongAttention):
        return memory
    watched = attention._forward_hooks or attention._forward_pre_hooks or "forward" in vars(attention)
    if attention.v is None or watched or torch.compiler.is_compiling():
        return memory
    return PreparedMemory.of(memory, prepare_keys(memory.keys, backend=attention.backend))


def _can_replace(decoder: Decoder) -> bool:
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if type(decoder) is not Decoder or {"step", "_step", "_attend"} & vars(decoder).keys():
        return False
    if not _is_as_made(decoder):
        return False
    if any(x.training or x._forward_hooks or x._forward_pre_hooks for x in decoder.modules()):
        return False
    parameters = list(decoder.parameters())
    if not all(type(p) is nn.Parameter and p.is_cpu and p.dtype == parameters[0].dtype for p in parameters):
        return False  # a parameter of another class may be a quantized one
    return parameters[0].dtype in (torch.float32, torch.float64) and choose(None, "cpu") == "cpu"


def _is_as_made(decoder: Decoder) -> bool:
    """Whether the modules that a step calls are those of ``Decoder``: others would compute something else."""
    attention, embedding, rnn = decoder.attention, decoder.embedding, decoder.rnn
    if type(attention) not in (BahdanauAttention, CosineAttention, LuongAttention):
        return False
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None or type(decoder.dropout) is not nn.Dropout:
        return False
    if type(rnn) not in (nn.LSTM, nn.GRU) or not rnn.bias or rnn.proj_size > 0:
        return False
    linears = (decoder.attentional, decoder.output, attention.query_projection)
    if not all(x is None or type(x) is nn.Linear for x in linears):
        return False
    called = (decoder, attention, embedding, decoder.dropout, rnn, *linears)
    return not any("forward" in vars(module) for module in called if module is not None)


class GenerationSteps:
    """B sentences, K hypotheses of each, R = B K rows, E embedding_size, H hidden_size, S source steps."""

    def __init__(self, decoder: Decoder, memory: Memory, hypotheses: int, steps: int) -> None:
        self.size = decoder.hidden_size
        self.input_feeding = decoder.input_feeding
        rows = memory.batch_size * hypotheses
        self.embedding: Tensor = decoder.embedding.weight
        read = self.embedding.shape[1]
        make_layer = _LSTMLayer if isinstance(decoder.rnn, nn.LSTM) else _GRULayer
        self.layers: list[_LSTMLayer | _GRULayer] = []
        # What a token adds to the gates of the first layer, for all of the vocabulary where the steps would read more.
        self.table: Tensor | None = None
        weight_x: Tensor
        for n, (weight_x, weight_h, bias_x, bias_h) in enumerate(decoder.rnn.all_weights):
            # A product of one row takes as long as one of four: both read the weight.
            if n == 0 and self.embedding.shape[0] <= max(rows, 4) * steps:
                self.table = linear(self.embedding, weight_x[:, :read], make_layer.known_bias(bias_x, bias_h))
                weight_x = weight_x[:, read:]
            self.layers.append(make_layer(weight_x, weight_h, bias_x, bias_h, rows, steps))
        self.attention = _make_attention(decoder.attention, rows, steps)
        # The attentional vector reads sums of values: of values multiplied with its weight, they are its products.
        weight, source, values = decoder.attentional.weight, memory.keys.shape[1], memory.values.shape[2]
        self.of_context: _Affine | None = None
        self.memory = memory
        if self.attention is None or 2 * source > hypotheses * steps or source == 0 or values < self.size:
            self.of_context = _Affine(weight[:, :values], rows, steps)
        else:
            projected = linear(memory.values.flatten(0, 1), weight[:, :values]).unflatten(0, (-1, source))
            self.memory = PreparedMemory.of(replace(memory, values=projected), memory.prepared)
        self.module = decoder.attention
        self.of_state = _Affine(weight[:, values:], rows, steps)
        self.output = _Affine(decoder.output.weight, rows, steps)
        bias = decoder.output.bias
        self.output_bias = weight.new_zeros(self.output.size) if bias is None else bias

    def step(self, tokens: Tensor, state: DecoderState, memory: Memory) -> tuple[Tensor, Tensor, DecoderState]:
        """As ``Decoder.step``."""
        batch, count = tokens.shape
        rows = batch * count
        feed = None if state.feed is None else state.feed.reshape(rows, -1)
        chosen = tokens.reshape(rows)
        base = inputs = None
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

    def __init__(self, weight: Tensor, rows: int, steps: int) -> None:
        self.size = weight.shape[0]
        self.transposed = weight.t()
        self.product = Product(weight, rows, steps)

    def __call__(self, x: Tensor, added: Tensor | None) -> Tensor:
        if added is None:
            return self.product(x)
        if x.shape[0] == 1:  # one operator, and no library is faster
            return torch.addmm(added, x, self.transposed)
        return self.product(x).add_(added)


class _LSTMLayer:
    """Without ``base``, (R, 4 H), the gates have the biases only, besides the products with the two inputs."""

    def __init__(
        self, weight_x: Tensor, weight_h: Tensor, bias_x: Tensor, bias_h: Tensor, rows: int, steps: int
    ) -> None:
        self.bias = self.known_bias(bias_x, bias_h)
        self.of_inputs = _Affine(weight_x, rows, steps) if weight_x.shape[1] > 0 else None
        self.of_state = _Affine(weight_h, rows, steps)
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
        self, weight_x: Tensor, weight_h: Tensor, bias_x: Tensor, bias_h: Tensor, rows: int, steps: int
    ) -> None:
        self.bias_x, self.bias_h = bias_x, bias_h
        self.size = weight_h.shape[1]
        self.of_inputs = _Affine(weight_x, rows, steps) if weight_x.shape[1] > 0 else None
        self.of_state = _Affine(weight_h, rows, steps)

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

    module: AttentionModule
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
                query = self.module.sharpness * self.module._unit_length(query)
            elif self.module.g is not None:
                query = self.module.g * query
        op = "dot_attention" if self.v is None else "additive_attention"
        query = query.view(-1, count, query.shape[1])
        return ops.call(op, self.backend, query, memory.keys, memory.values, *settings)


def _make_attention(module: AttentionModule, rows: int, steps: int) -> _Attention | None:
    """None where no op computes it, but plain PyTorch."""
    backend = choose(module.backend, "cpu")
    if backend == "reference":
        return None
    projection = None
    if module.query_projection is not None:
        projection = _Affine(module.query_projection.weight, rows, steps)
    v = None
    if not isinstance(module, CosineAttention) and module.v is not None:
        v = module.score_vector()
    bias = module.bias if isinstance(module, BahdanauAttention) else None
    return _Attention(module, backend, projection, v, bias)
