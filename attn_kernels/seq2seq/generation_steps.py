"""Decoding steps for a search on the CPU: what ``Decoder.step`` computes, with less around it.

Of a step of one hypothesis half the time is spent between operators: modules, checks that the first step has passed
already, autograd. Here a step calls the operators, and what its weights allow to be made once is made once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..backends import choose
from ..memory import Memory
from ..modules import BahdanauAttention, CosineAttention, LuongAttention
from .decoder import Decoder, DecoderState
from .products import Product, linear


def make_steps(decoder: Decoder, hypotheses: int, steps: int) -> Any:
    """An object with the ``step`` of ``decoder``, for a search of about so many hypotheses and steps.

    It is the decoder itself where its steps are not to be replaced: with gradients, under torch.compile and autocast,
    with hooks or classes or methods of the caller's own, of a GRU, off the CPU or in 16 bits. Parameters are not to
    change while it is used.
    """
    return GenerationSteps(decoder, hypotheses, steps) if _can_replace(decoder) else decoder


def _can_replace(decoder: Decoder) -> bool:
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if type(decoder) is not Decoder or {"step", "_step"} & vars(decoder).keys():
        return False
    if type(decoder.attention) not in (BahdanauAttention, CosineAttention, LuongAttention):
        return False
    if any(module._forward_hooks or module._forward_pre_hooks for module in decoder.modules()) or decoder.training:
        return False
    parameters = list(decoder.parameters())
    if not all(p.is_cpu and p.dtype == parameters[0].dtype for p in parameters):
        return False
    is_float = parameters[0].dtype in (torch.float32, torch.float64)
    return is_float and isinstance(decoder.rnn, torch.nn.LSTM) and choose(None, "cpu") == "cpu"


class GenerationSteps:
    """B sentences, K hypotheses of each, R = B K rows, E embedding_size, H hidden_size, S source steps."""

    def __init__(self, decoder: Decoder, hypotheses: int, steps: int) -> None:
        self.decoder = decoder
        self.size = decoder.hidden_size
        read = decoder.embedding.embedding_dim
        # What a token adds to the gates of the first layer, for all of the vocabulary where the steps would read more.
        self.table: Tensor | None = None
        self.layers: list[tuple[Product | None, Product, Tensor]] = []  # of inputs and of the state; biases
        for n, (weight_x, weight_h, bias_x, bias_h) in enumerate(decoder.rnn.all_weights):
            bias = bias_x + bias_h
            # A product of one row takes as long as one of four: both read the weight.
            if n == 0 and decoder.embedding.num_embeddings <= max(hypotheses, 4) * steps:
                self.table = linear(decoder.embedding.weight, weight_x[:, :read], bias)
            rest = weight_x if n > 0 or self.table is None else weight_x[:, read:]
            of_inputs = Product(rest, hypotheses, steps) if rest.shape[1] > 0 else None
            self.layers.append((of_inputs, Product(weight_h, hypotheses, steps), bias))
        self.attentional = Product(decoder.attentional.weight, hypotheses, steps)
        self.output = Product(decoder.output.weight, hypotheses, steps)
        self.attention = _Scores(decoder.attention, hypotheses, steps)

    def step(self, tokens: Tensor, state: DecoderState, memory: Memory) -> tuple[Tensor, Tensor, DecoderState]:
        """As ``Decoder.step``."""
        batch, count = tokens.shape
        rows = batch * count
        feed = None if state.feed is None else state.feed.reshape(rows, -1)
        if self.table is None:
            embedded = self.decoder.embedding.weight.index_select(0, tokens.reshape(rows))
            inputs = embedded if feed is None else torch.cat([embedded, feed], dim=1)
            base = None
        else:
            base, inputs = self.table.index_select(0, tokens.reshape(rows)), feed
        hidden, cell = [], []
        for n, (of_inputs, of_state, bias) in enumerate(self.layers):
            before = state.hidden[n].reshape(rows, -1)
            gates = of_state(before)
            gates += bias if base is None else base
            if of_inputs is not None:
                gates += of_inputs(inputs)
            new = torch.empty(3, rows, self.size, dtype=gates.dtype)  # cell, its tanh, state
            new_cell, tanh, inputs = new.unbind(0)
            ops.kernel("lstm_step", "cpu")(gates, state.cell[n].reshape(rows, -1), new_cell, tanh, inputs, None)
            hidden.append(inputs.view(batch, count, -1))
            cell.append(new_cell.view(batch, count, -1))
            base = None
        context, alignments = self.attention(hidden[-1], memory)
        joined = torch.cat([context.reshape(rows, -1), inputs], dim=1)
        attentional = self.attentional(joined).tanh_()
        logits = self.output(attentional)
        logits += self.decoder.output.bias
        fed = attentional.view(batch, count, -1) if self.decoder.input_feeding else None
        return logits.view(batch, count, -1), alignments, DecoderState(tuple(hidden), tuple(cell), fed)


class _Scores:
    """A call of an attention module, at the cost of its op where it is one of two whose call is nothing else."""

    def __init__(self, module: Any, hypotheses: int, steps: int) -> None:
        self.module = module
        self.backend = choose(module.backend, "cpu")
        is_additive = type(module) is BahdanauAttention or (type(module) is LuongAttention and module.v is not None)
        self.calls_op = is_additive and self.backend == "cpu"
        if self.calls_op:
            projection = module.query_projection
            self.query = None if projection is None else Product(projection.weight, hypotheses, steps)
            self.v = module.score_vector()
            self.bias = module.bias if type(module) is BahdanauAttention else None

    def __call__(self, states: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """states: (B, K, H). Returns contexts (B, K, M) and alignments (B, K, S)."""
        if not self.calls_op:
            return self.module(states, memory)
        query = states if self.query is None else self.query(states.flatten(0, 1)).view(*states.shape[:2], -1)
        settings = (self.v, self.bias, memory.prepared, memory.memory_lengths, memory.mask, True)
        return ops.call("additive_attention", self.backend, query, memory.keys, memory.values, *settings)
