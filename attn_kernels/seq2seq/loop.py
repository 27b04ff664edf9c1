"""The decoder's loop over a whole target as one op: cell, attention, attentional vector and input feeding of all steps.

One node of autograd for the sequence. The forward keeps what the backward reads and nothing else; the backward makes of
each step only what the step before waits for. What sums over steps is left till the end: each weight gradient is one
product over all steps, and keys, values and score vector get theirs from one pass with all steps as queries.

B sentences, T steps, S source steps, E embedding_size, H hidden_size, M memory_size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import choose
from ..memory import Memory
from ..modules import BahdanauAttention, CosineAttention, LuongAttention
from .loop_attention import AdditiveSequenceAttention, CosineSequenceAttention, SequenceAttention
from .loop_cells import GRULayer, LSTMLayer
from .products import Product, linear

if TYPE_CHECKING:
    from .decoder import AttentionModule, Decoder, DecoderState


def can_loop(decoder: Decoder, embedded: Tensor) -> bool:
    """Whether the op may stand for the steps.

    Not for those who look into steps: torch.compile, autocast, hooks of the modules that a step calls, an attention of
    another class, or a dot attention with a learned scale.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(embedded.device.type):
        return False
    called = (*decoder.attention.modules(), decoder.attentional, decoder.dropout)
    if any(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks for module in called):
        return False
    attention = decoder.attention
    if type(attention) is LuongAttention:
        return attention.v is not None or attention.g is None
    return type(attention) in (BahdanauAttention, CosineAttention)


def decode_sequence(decoder: Decoder, embedded: Tensor, state: DecoderState, memory: Memory) -> tuple[Tensor, Tensor]:
    """Teacher forcing with input feeding: what ``Decoder._step`` does, of all steps.

    embedded: (B, T, E), read by the steps. state: the first one, of one hypothesis per sentence.
    Returns the attentional vectors, (B, T, H), and alignments, (B, T, S). They have no second derivative.
    """
    attention = decoder.attention
    projection = attention.query_projection
    v, bias, scale = _score_parameters(attention, memory.keys)
    inputs = _Inputs(
        embedded,
        state.feed[:, 0],
        memory.keys,
        memory.values,
        None if projection is None else projection.weight,
        v,
        bias,
        scale,
        decoder.attentional.weight,
    )
    first = [layer[:, 0] for layer in (*state.hidden, *state.cell)]
    weights = [weight for layer in decoder.rnn.all_weights for weight in layer]
    settings = _Settings(
        decoder.rnn.num_layers,
        bool(state.cell),
        choose(attention.backend, embedded.device.type),
        attention.eps if isinstance(attention, CosineAttention) else None,
        memory,
    )
    return _Loop.apply(settings, *inputs, *_dropout_factors(decoder, embedded), *first, *weights)


class _Settings(NamedTuple):
    layers: int
    is_lstm: bool
    backend: str  # of the attention
    eps: float | None  # of cosine attention, None for the others
    memory: Memory


class _Inputs(NamedTuple):
    """The inputs but for dropout, the first states and the weights of the cells."""

    embedded: Tensor  # (B, T, E)
    feed: Tensor  # (B, H)
    keys: Tensor  # (B, S, A)
    values: Tensor  # (B, S, M)
    query_weight: Tensor | None  # (A, H); None where the state is the query
    v: Tensor | None  # (A,), of additive scores
    bias: Tensor | None  # (A,)
    scale: Tensor | None  # (), of cosine attention
    attentional_weight: Tensor  # (H, M + H)


def _score_parameters(attention: AttentionModule, like: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """v, bias, scale."""
    if isinstance(attention, CosineAttention):
        sharpness = attention.sharpness
        return None, None, sharpness if isinstance(sharpness, Tensor) else like.new_tensor(sharpness)
    if attention.v is None:
        return None, None, None
    return attention.score_vector(), attention.bias if isinstance(attention, BahdanauAttention) else None, None


def _dropout_factors(decoder: Decoder, embedded: Tensor) -> list[Tensor | None]:
    """What is multiplied with the outputs of the layers below the top one and with the attentional vectors.

    (T, B, H) each; None without dropout.
    """
    layers = decoder.rnn.num_layers
    if not decoder.training or decoder.dropout.p == 0:
        return [None] * layers
    ones = embedded.new_ones(embedded.shape[1], embedded.shape[0], decoder.hidden_size)
    return [decoder.dropout(ones) for _ in range(layers)]


class _Sequence:
    """The forward of all steps, and what it keeps for the backward."""

    def __init__(self, settings: _Settings, tensors: tuple[Any, ...]) -> None:
        self.settings = settings
        self.inputs = inputs = _Inputs(*tensors[: len(_Inputs._fields)])
        rest = tensors[len(_Inputs._fields) :]
        layers = settings.layers
        states = layers * (2 if settings.is_lstm else 1)
        self.factors, first, weights = rest[:layers], rest[layers : layers + states], rest[layers + states :]
        self.embedded = inputs.embedded.transpose(0, 1).contiguous()  # (T, B, E)
        self.steps, batch, self.read = self.embedded.shape
        self.layers: list[LSTMLayer | GRULayer] = []
        for n in range(layers):
            weight_x, weight_h, bias_x, bias_h = weights[4 * n : 4 * n + 4]
            if n == 0:
                self.embedded_weight, weight_x = weight_x[:, : self.read], weight_x[:, self.read :]
                base = linear(self.embedded.flatten(0, 1), self.embedded_weight, bias_x)
                base = base.unflatten(0, (self.steps, batch))
            else:
                base = bias_x.expand(self.steps, batch, -1).clone()
            layer = LSTMLayer if settings.is_lstm else GRULayer
            self.layers.append(layer(base, weight_x, weight_h, bias_h, *first[n::layers]))
        self.layers[0].x(0).copy_(inputs.feed)
        self.attention = self._attention()
        self.size, memory_size = self.layers[-1].size, inputs.values.shape[2]
        self.joined = inputs.feed.new_empty(self.steps, batch, memory_size + self.size)  # [context | state]
        self.attentional = inputs.feed.new_empty(self.steps, batch, self.size)  # before dropout

    def _attention(self) -> SequenceAttention:
        settings, inputs = self.settings, self.inputs
        memory = settings.memory
        common = (settings.backend, memory, self.steps, inputs.query_weight)
        if inputs.v is not None:
            return AdditiveSequenceAttention(*common, inputs.v, inputs.bias)
        if settings.eps is not None:
            return CosineSequenceAttention(*common, inputs.scale, settings.eps)
        return SequenceAttention(*common)

    def run(self) -> None:
        *below, top = self.factors
        attentional_product = Product(self.inputs.attentional_weight, self.joined.shape[1], self.steps)
        for t in range(self.steps):
            joined = self.joined[t]
            context, last = joined[:, : -self.size], joined[:, -self.size :]
            state = self.layers[0].step(t, None if below else last)
            for n, (layer, factor) in enumerate(zip(self.layers[1:], below, strict=True), 2):
                _drop(state, factor, t, layer.x(t))
                state = layer.step(t, last if n == len(self.layers) else None)
            context.copy_(self.attention.step(t, state))
            attentional = torch.tanh(attentional_product(joined), out=self.attentional[t])
            _drop(attentional, top, t, self.layers[0].x(t + 1))

    def take_out(self) -> dict[tuple[object, str], Tensor]:
        """All tensors that this object and its parts hold, by owner and name: autograd keeps them till the backward."""
        parts: tuple[object, ...] = (self, *self.layers, self.attention)
        for part in parts:  # the backward has products of its own
            for name in [name for name, x in vars(part).items() if isinstance(x, Product)]:
                delattr(part, name)
        tensors = {(part, name): x for part in parts for name, x in vars(part).items() if isinstance(x, Tensor)}
        for part, name in tensors:
            delattr(part, name)
        return tensors

    def fed(self) -> Tensor:
        """(T, B, H): the attentional vectors after dropout."""
        return self.layers[0].inputs[1:, :, : self.size]

    def run_back(self, grad_attentional: Tensor | None, grad_alignments: Tensor | None) -> list[Tensor | None]:
        """The gradients of all inputs, in the order of the op's arguments."""
        inputs = self.inputs
        *below, top = self.factors
        for layer in self.layers:
            layer.start_backward()
        self.attention.start_backward()
        dattentional = torch.empty_like(self.attentional)  # before the tanh
        attentional_product = Product(inputs.attentional_weight.t(), inputs.feed.shape[0], self.steps)
        dfeed = torch.zeros_like(inputs.feed)
        dstates = [torch.zeros_like(inputs.feed) for _ in self.layers]  # of the states after the step
        for t in reversed(range(self.steps)):
            if grad_attentional is not None:
                dfeed = dfeed + grad_attentional[:, t]
            if top is not None:
                dfeed = dfeed * top[t]
            torch.ops.aten.tanh_backward.grad_input(dfeed, self.attentional[t], grad_input=dattentional[t])
            djoined = attentional_product(dattentional[t])
            dstates[-1] = dstates[-1] + djoined[:, -self.size :]
            dstates[-1] += self.attention.step_back(t, djoined[:, : -self.size], grad_alignments)
            for n in reversed(range(len(self.layers))):
                dx, dstates[n] = self.layers[n].step_back(t, dstates[n])
                if n > 0:
                    dstates[n - 1] = dstates[n - 1] + (dx if below[n - 1] is None else dx * below[n - 1][t])
            dfeed = dx
        joined, batch = self.joined.flatten(0, 1), inputs.feed.shape[0]
        dkeys, dvalues, dquery_weight, *rest = self.attention.gradients(
            self.joined[:, :, -self.size :], grad_alignments
        )
        dattentional_weight = linear(dattentional.flatten(0, 1).t(), joined.t())
        dgates = self.layers[0].dgates.flatten(0, 1)
        weights = [gradient for layer in self.layers for gradient in layer.weight_gradients()]
        weights[0] = torch.cat([linear(dgates.t(), self.embedded.flatten(0, 1).t()), weights[0]], dim=1)
        dembedded = linear(dgates, self.embedded_weight.t()).unflatten(0, (self.steps, batch)).transpose(0, 1)
        dcells = [gradient for layer in self.layers for gradient in layer.first_gradients()]
        dinputs = [dembedded, dfeed, dkeys, dvalues, dquery_weight, *rest, dattentional_weight]
        return [*dinputs, *(None for _ in self.factors), *dstates, *dcells, *weights]


def _drop(x: Tensor, factor: Tensor | None, t: int, out: Tensor) -> None:
    out.copy_(x) if factor is None else torch.mul(x, factor[t], out=out)


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: _Settings, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        sequence = _Sequence(settings, tensors)
        sequence.run()
        # Copies: what is kept is not to change where a caller changes results in place.
        attentional = sequence.fed().transpose(0, 1).clone(memory_format=torch.contiguous_format)
        alignments = sequence.attention.alignments.clone()
        kept = sequence.take_out()
        ctx.sequence, ctx.places = sequence, list(kept)
        ctx.save_for_backward(*tensors, *kept.values())
        return attentional, alignments

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # raises an error if an input has been changed in place since
        inputs = len(tensors) - len(ctx.places)
        if gradients == (None, None):
            return (None,) * (1 + inputs)
        for (part, name), tensor in zip(ctx.places, tensors[inputs:], strict=True):
            setattr(part, name, tensor)
        try:
            return (None, *ctx.sequence.run_back(*gradients))
        finally:
            ctx.sequence.take_out()
