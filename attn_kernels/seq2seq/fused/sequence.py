"""The loop of a decoder over a whole target, without autograd: what ``loop.py`` makes an op of.

B sentences, T steps, S source steps, E embedding_size, H hidden_size, M memory_size.
"""

from __future__ import annotations

from collections.abc import Sequence as Tensors
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...memory import Memory
from .attention import AdditiveSequenceAttention, CosineSequenceAttention, SequenceAttention
from .cells import GRULayer, LSTMLayer
from .gemm import PackedLinear, linear, weight_gradient


class Settings(NamedTuple):
    layers: int
    is_lstm: bool
    backend: str  # of the attention
    eps: float | None  # of cosine attention, None for the others
    replays: bool  # on a GPU as a CUDA graph


class Inputs(NamedTuple):
    """The tensors that a sequence is computed from, but for dropout, the first states and the weights of the cells."""

    embedded: Tensor  # (B, T, E)
    feed: Tensor  # (B, H)
    keys: Tensor  # (B, S, A)
    values: Tensor  # (B, S, M)
    memory_lengths: Tensor | None  # (B,)
    mask: Tensor | None  # (B, S) or (B, 1, S)
    query_weight: Tensor | None  # (A, H); None where the state is the query
    v: Tensor | None  # (A,), of additive scores
    bias: Tensor | None  # (A,)
    scale: Tensor | None  # (), of cosine attention
    attentional_weight: Tensor  # (H, M + H)


class Sequence:
    """The forward of all steps, and what it keeps for the backward."""

    def __init__(self, settings: Settings, tensors: Tensors[Any]) -> None:
        self.settings = settings
        first, weights = self.give(tensors)
        inputs, layers = self.inputs, settings.layers
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

    def give(self, tensors: Tensors[Any]) -> tuple[Tensors[Tensor], Tensors[Tensor]]:
        """Sets the inputs and the factors of dropout. Returns the first states and the weights of the cells."""
        inputs, rest = tensors[: len(Inputs._fields)], tensors[len(Inputs._fields) :]
        self.inputs = Inputs(*inputs)
        layers = self.settings.layers
        states = layers * (2 if self.settings.is_lstm else 1)
        self.factors = rest[:layers]
        return rest[layers : layers + states], rest[layers + states :]

    def _memory(self) -> Memory:
        return Memory(self.inputs.keys, self.inputs.values, self.inputs.memory_lengths, self.inputs.mask)

    def _attention(self) -> SequenceAttention:
        settings, inputs = self.settings, self.inputs
        common = (settings.backend, self._memory(), self.steps, inputs.query_weight)
        if inputs.v is not None:
            return AdditiveSequenceAttention(*common, inputs.v, inputs.bias)
        if settings.eps is not None:
            return CosineSequenceAttention(*common, inputs.scale, settings.eps)
        return SequenceAttention(*common)

    def run(self) -> None:
        *below, top = self.factors
        attentional_product = PackedLinear(self.inputs.attentional_weight, self.joined.shape[1], self.steps)
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
        """Lets go of all tensors. Returns those that are not inputs, by owner and name: autograd keeps them."""
        parts: tuple[object, ...] = (self, *self.layers, self.attention)
        for part in parts:  # the backward has products of its own
            for name in [name for name, x in vars(part).items() if isinstance(x, PackedLinear)]:
                delattr(part, name)
        tensors = {(part, name): x for part in parts for name, x in vars(part).items() if isinstance(x, Tensor)}
        for part, name in tensors:
            delattr(part, name)
        del self.inputs, self.factors, self.attention.memory
        return tensors

    def put_back(self, tensors: Tensors[Any], kept: dict[tuple[object, str], Tensor]) -> None:
        """Undoes ``take_out``. tensors: those that this object was made of."""
        self.give(tensors)
        for (part, name), tensor in kept.items():
            setattr(part, name, tensor)
        self.attention.memory = self._memory()

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
        attentional_product = PackedLinear(inputs.attentional_weight.t(), inputs.feed.shape[0], self.steps)
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
        dkeys, dvalues, *rest = self.attention.gradients(self.joined[:, :, -self.size :], grad_alignments)
        dattentional_weight = weight_gradient(dattentional.flatten(0, 1), joined)
        dgates = self.layers[0].dgates.flatten(0, 1)
        weights = [gradient for layer in self.layers for gradient in layer.weight_gradients()]
        weights[0] = torch.cat([weight_gradient(dgates, self.embedded.flatten(0, 1)), weights[0]], dim=1)
        dembedded = linear(dgates, self.embedded_weight.t()).unflatten(0, (self.steps, batch)).transpose(0, 1)
        dcells = [gradient for layer in self.layers for gradient in layer.first_gradients()]
        dinputs = [dembedded, dfeed, dkeys, dvalues, None, None, *rest, dattentional_weight]
        return [*dinputs, *(None for _ in self.factors), *dstates, *dcells, *weights]


def _drop(x: Tensor, factor: Tensor | None, t: int, out: Tensor) -> None:
    out.copy_(x) if factor is None else torch.mul(x, factor[t], out=out)


Parts = tuple[Sequence, list[tuple[object, str]]]  # without their tensors, and where those belong


def evaluate(settings: Settings, tensors: Tensors[Tensor | None]) -> tuple[Parts, Tensor, Tensor, list[Tensor]]:
    """Returns what the backward needs, but for its tensors; attentional vectors (B, T, H); alignments (B, T, S); and
    those tensors.
    """
    sequence = Sequence(settings, tensors)
    sequence.run()
    # Copies: what is kept is not to change where a caller changes results in place.
    attentional = sequence.fed().transpose(0, 1).clone(memory_format=torch.contiguous_format)
    alignments = sequence.attention.alignments.clone()
    kept = sequence.take_out()
    return (sequence, list(kept)), attentional, alignments, list(kept.values())


def differentiate(
    parts: Parts, tensors: Tensors[Tensor | None], kept: Tensors[Tensor], gradients: Tensors[Tensor | None]
) -> list[Tensor | None]:
    """From the gradients of ``evaluate``'s results, or None, those of its tensors."""
    sequence, places = parts
    sequence.put_back(tensors, dict(zip(places, kept, strict=True)))
    try:
        return sequence.run_back(*gradients)
    finally:
        sequence.take_out()
