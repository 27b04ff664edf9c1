"""All steps of a decoder over a target, without autograd: the forward, and the backward from the saved tensors.

The forward writes the steps into arrays of the whole sequence. So this is a third implementation of a decoder step,
besides ``formula.py``, which uses differentiable operators, and ``inference.py``, which saves nothing.

B sentences, T steps, E embedding_size, H hidden_size, M memory_size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...gemm import PackedLinear, linear, weight_gradient
from ...memory import Memory
from .attention import AttentionBackward, AttentionForward, SavedAttention
from .called import CalledBackward, CalledForward, SavedSteps
from .cells import GRUBackward, GRUForward, LSTMBackward, LSTMForward, SavedGRU, SavedLSTM
from .distinct import gather, sum_by_row
from .filtered import FilteredBackward, FilteredForward
from .inputs import CellWeights, Inputs
from .projected import find_projection, gains, with_values


class Saved(NamedTuple):
    """The tensors that the backward reads besides the inputs."""

    embedded: Tensor  # (T * B, E), or (U, E) with token_rows
    token_rows: Tensor | None  # (T * B,)
    context_and_state: Tensor  # (T, B, M + H); without the context if the values are projected: (T, B, H)
    projected: Tensor | None  # (B, S, H), the values of the attention: see projected.py
    attentional: Tensor  # (T, B, H), before dropout
    layers: tuple[SavedLSTM | SavedGRU, ...]
    attention: SavedAttention | SavedSteps


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Saved]:
    """Attentional vectors, (B, T, H); alignments, (B, T, S); and the saved tensors for the backward."""
    steps, batch = inputs.steps, inputs.feed.shape[0]
    embedded, index = _rows(inputs)
    layers = _make_layers(inputs, embedded, index)
    projected = find_projection(inputs).forward(inputs.memory) if gains(inputs) else None
    attention = _attention_forward(inputs if projected is None else with_values(inputs, projected))
    size, memory_size = inputs.feed.shape[1], 0 if projected is not None else inputs.context_size
    context_and_state = inputs.feed.new_empty(steps, batch, memory_size + size)
    product = PackedLinear(inputs.attentional_weight[:, -memory_size - size :], batch, steps)
    contexts = context_and_state[:, :, :memory_size].unbind(0)
    last_states = context_and_state[:, :, memory_size:].unbind(0)
    *below, top = inputs.dropout
    layers[0].x[0].copy_(inputs.feed)
    saved_layers = tuple(layer.saved for layer in layers)
    fed = saved_layers[0].inputs[1:, :, :size]  # the attentional vectors after dropout
    attentional = fed if top is None else torch.empty_like(top)
    for t, (both, out) in enumerate(zip(context_and_state.unbind(0), attentional.unbind(0), strict=True)):
        last = last_states[t]
        state = layers[0].step(t, None if below else last)
        for n, (layer, factors) in enumerate(zip(layers[1:], below, strict=True), 2):
            _drop(state, factors, t, layer.x[t])
            state = layer.step(t, last if n == len(layers) else None)
        if projected is None:
            contexts[t].copy_(attention.step(t, state))
            torch.tanh(product(both), out=out)
        else:
            torch.tanh(product.add_to(attention.step(t, state), both), out=out)
        if top is not None:
            torch.mul(out, top[t], out=layers[0].x[t + 1])
    # Copies: a caller may change the results in place, and the saved tensors must not change.
    results = fed.transpose(0, 1).clone(memory_format=torch.contiguous_format), attention.all_alignments()
    return *results, Saved(embedded, index, context_and_state, projected, attentional, saved_layers, attention.saved)


def backward(inputs: Inputs, saved: Saved, grad_attentional: Tensor | None, grad_alignments: Tensor | None) -> Inputs:
    """The gradients of the inputs, from those of the results of ``forward``; None for constants."""
    embedded, index, context_and_state, projected, attentional, *_ = saved
    steps, batch, size = attentional.shape
    memory_size = context_and_state.shape[2] - size
    make_layer: Any = LSTMBackward if inputs.cell else GRUBackward
    weights = _weights_in_loop(inputs)
    layers: list[LSTMBackward | GRUBackward] = list(map(make_layer, saved.layers, weights))
    attention = _attention_backward(inputs if projected is None else with_values(inputs, projected), saved)
    product = PackedLinear(inputs.attentional_weight[:, -context_and_state.shape[2] :].t(), batch, steps)
    dattentional = attentional.new_empty(attentional.shape)  # before the tanh
    outputs, doutputs = attentional.unbind(0), dattentional.unbind(0)
    of_results = None if grad_attentional is None else grad_attentional.unbind(1)
    dfeed = torch.zeros_like(inputs.feed)
    dstates = [torch.zeros_like(inputs.feed) for _ in layers]  # of the states after the step
    *below, top = inputs.dropout
    for t in reversed(range(steps)):
        if of_results is not None:
            dfeed = dfeed + of_results[t]
        if top is not None:
            dfeed = dfeed * top[t]
        torch.ops.aten.tanh_backward.grad_input(dfeed, outputs[t], grad_input=doutputs[t])
        if projected is None:
            dcontext, dstate = product(doutputs[t]).tensor_split([memory_size], dim=1)
            dstates[-1].add_(dstate)
        else:
            dcontext = doutputs[t]
            product.add_to(dstates[-1], dcontext)
        attention.step(t, dcontext, grad_alignments, dstates[-1])
        for n in reversed(range(len(layers))):
            dx, dstates[n] = layers[n].step(t, dstates[n])
            if n > 0:
                factors = below[n - 1]
                dstates[n - 1] = dstates[n - 1] + (dx if factors is None else dx * factors[t])
        dfeed = dx
    dgates = sum_by_row(layers[0].dgates.flatten(0, 1), index, embedded.shape[0])
    first, *others = (layer.weight_gradients() for layer in layers)
    dweight = torch.cat([weight_gradient(dgates, embedded), first.x], dim=1)
    dembedded = linear(dgates, inputs.weights[0].x[:, : embedded.shape[1]].t())
    dattentional_weight = weight_gradient(dattentional.flatten(0, 1), context_and_state.flatten(0, 1))
    of_attention = attention.gradients(context_and_state[:, :, -size:], grad_alignments)
    if projected is not None:
        memory = of_attention["memory"]
        dvalues, of_context = find_projection(inputs).gradients(memory.values, inputs.memory)
        of_attention["memory"] = Memory(memory.keys, dvalues)
        dattentional_weight = torch.cat([of_context, dattentional_weight], dim=1)
    return Inputs(
        embedded=dembedded if index is not None else dembedded.unflatten(0, (steps, batch)).transpose(0, 1),
        token_rows=None,
        dropout=(None,) * len(inputs.dropout),
        feed=dfeed,
        hidden=tuple(dstates),
        cell=tuple(layer.dcell for layer in layers if isinstance(layer, LSTMBackward)),
        weights=(first._replace(x=dweight), *others),
        attentional_weight=dattentional_weight,
        backend=inputs.backend,
        **of_attention,
    )


def _attention_forward(inputs: Inputs) -> AttentionForward | CalledForward:
    if inputs.called is not None:
        return CalledForward(inputs, inputs.called)
    return AttentionForward(inputs) if inputs.filters is None else FilteredForward(inputs, inputs.filters)


def _attention_backward(inputs: Inputs, saved: Saved) -> AttentionBackward | CalledBackward:
    if isinstance(saved.attention, SavedSteps):
        assert inputs.called is not None
        return CalledBackward(inputs, inputs.called, saved.attention)
    if inputs.filters is None:
        return AttentionBackward(inputs, saved.attention)
    return FilteredBackward(inputs, inputs.filters, saved.attention)


def _rows(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """The fields embedded and token_rows of ``Saved``."""
    if inputs.token_rows is None:
        return inputs.embedded.transpose(0, 1).flatten(0, 1), None
    return inputs.embedded, inputs.token_rows.t().flatten()


def _make_layers(inputs: Inputs, embedded: Tensor, index: Tensor | None) -> list[LSTMForward | GRUForward]:
    """embedded, index: two fields of Saved. The products of embedded tokens are computed here, all at once."""
    steps, batch = inputs.steps, inputs.feed.shape[0]
    make_layer: Any = LSTMForward if inputs.cell else GRUForward
    layers = []
    for n, weights in enumerate(_weights_in_loop(inputs)):
        if n == 0:
            base = linear(embedded, inputs.weights[0].x[:, : embedded.shape[1]], weights.bias_x)
            base = gather(base, index).unflatten(0, (steps, batch))
        else:
            base = weights.bias_x.expand(steps, batch, -1).clone()
        layers.append(make_layer(base, weights, inputs.hidden[n], *inputs.cell[n : n + 1]))
    return layers


def _weights_in_loop(inputs: Inputs) -> list[CellWeights]:
    """The weights for inputs that become known in the loop: in the first layer, only the attentional vector."""
    first, *others = inputs.weights
    return [first._replace(x=first.x[:, inputs.embedded.shape[-1] :]), *others]


def _drop(x: Tensor, factors: Tensor | None, t: int, out: Tensor) -> None:
    out.copy_(x) if factors is None else torch.mul(x, factors[t], out=out)
