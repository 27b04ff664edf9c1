"""The loop of a decoder in operators that autograd knows: the specification of loop_sequence.py, and its derivatives.

The backward of the loop writes into arrays, so that autograd cannot differentiate it. Where gradients are to be
differentiated again, they are those of this formula, computed anew: they are right, and cost what plain steps cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ... import reference
from .sequence import Inputs, Settings


def evaluate_formula(settings: Settings, tensors: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """What ``loop_sequence.evaluate`` returns of the same arguments: attentional vectors and alignments."""
    inputs, rest = Inputs(*tensors[: len(Inputs._fields)]), tensors[len(Inputs._fields) :]
    layers = settings.layers
    states = layers * (2 if settings.is_lstm else 1)
    factors, first, weights = rest[:layers], rest[layers : layers + states], rest[layers + states :]
    hidden, cell, feed = list(first[:layers]), list(first[layers:]), inputs.feed
    steps = []
    for t, embedded in enumerate(inputs.embedded.unbind(1)):
        x = torch.cat([embedded, feed], dim=1)
        for n in range(layers):
            if n > 0:
                x = _drop(x, factors[n - 1], t)
            of_layer = weights[4 * n : 4 * n + 4]
            if settings.is_lstm:
                hidden[n], cell[n] = torch.lstm_cell(x, (hidden[n], cell[n]), *of_layer)
            else:
                hidden[n] = torch.gru_cell(x, hidden[n], *of_layer)
            x = hidden[n]
        context, alignments = _attend(settings, inputs, x)
        feed = torch.tanh(linear(torch.cat([context, x], dim=1), inputs.attentional_weight))
        feed = _drop(feed, factors[-1], t)
        steps.append((feed, alignments))
    attentional, alignments = (torch.stack(parts, dim=1) for parts in zip(*steps, strict=True))
    return attentional, alignments


def differentiable_gradients(
    settings: Settings, tensors: Sequence[Any], gradients: Sequence[Tensor | None], needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of those ``tensors`` that are needed, from those of the results; as functions of both."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # Other names: some of the tensors are made of others, and each is to get its own part of the gradient.
        names = [x.view_as(x) if is_needed else x for x, is_needed in zip(tensors, needed, strict=True)]
        results = evaluate_formula(settings, names)
        pairs = [(x, gradient) for x, gradient in zip(results, gradients, strict=True) if gradient is not None]
    wanted = [x for x, is_needed in zip(names, needed, strict=True) if is_needed]
    outputs, of_outputs = zip(*pairs, strict=True)
    found = iter(
        torch.autograd.grad(outputs, wanted, of_outputs, create_graph=differentiable, allow_unused=True)
        if wanted
        else ()
    )
    return [next(found) if is_needed else None for is_needed in needed]


def is_batch(gradient: Tensor | None) -> bool:
    """Whether this stands for a batch of gradients: those of ``torch.autograd.grad(..., is_grads_batched=True)``."""
    return gradient is not None and torch._C._functorch.is_legacy_batchedtensor(gradient)


def _attend(settings: Settings, inputs: Inputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """state: (B, H). Returns context (B, M) and alignments (B, S)."""
    query = state if inputs.query_weight is None else linear(state, inputs.query_weight)
    mask = None if inputs.mask is None else inputs.mask.view(inputs.mask.shape[0], -1)
    masks: dict[str, Any] = {"memory_lengths": inputs.memory_lengths, "mask": mask}
    if inputs.v is not None:
        return reference.additive_attention(query, inputs.keys, inputs.values, inputs.v, inputs.bias, **masks)
    if settings.eps is not None:
        wide = query.to(torch.promote_types(query.dtype, torch.float32))
        is_zero = torch.linalg.vector_norm(wide.detach(), dim=-1, keepdim=True) <= settings.eps
        # The length of a zero vector has no second derivative; that of a constant is 0.
        length = torch.linalg.vector_norm(torch.where(is_zero, 1.0, wide), dim=-1, keepdim=True)
        query = inputs.scale * (wide / torch.where(is_zero, 1.0, length)).to(query.dtype)
    return reference.dot_attention(query, inputs.keys, inputs.values, **masks)


def _drop(x: Tensor, factor: Tensor | None, t: int) -> Tensor:
    return x if factor is None else x * factor[t]
