"""The decoder's loop over a whole target as one op: cell, attention, attentional vector and input feeding of all steps.

One node of autograd for the sequence. The forward keeps what the backward reads and nothing else; the backward makes of
each step only what the step before waits for. What sums over steps is left till the end: each weight gradient is one
product over all steps, and keys, values and score vector get theirs from one pass with all steps as queries.

B sentences, T steps, S source steps, E embedding_size, H hidden_size, M memory_size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import choose
from ...memory import Memory
from ...modules import BahdanauAttention, CosineAttention, LuongAttention
from ...stock import is_plain
from ..state import DecoderState
from .cuda_graph import find_graph
from .eligibility import has_stock_steps
from .formula import differentiable_gradients, is_batch
from .sequence import Inputs, Settings, differentiate, evaluate


def can_loop(decoder: Any, embedded: Tensor, state: DecoderState, memory: Memory) -> bool:
    """Whether the op may stand for the steps: stock modules, and no dot attention with a learned scale."""
    attention = decoder.attention
    if isinstance(attention, LuongAttention) and attention.v is None and attention.g is not None:
        return False
    if not has_stock_steps(decoder, state, memory) or not is_plain(embedded):
        return False
    size = decoder.rnn.input_size - decoder.hidden_size
    first = (*state.hidden, *state.cell, state.feed)
    return (
        embedded.shape[::2] == (memory.batch_size, size)
        and (embedded.dtype, embedded.device) == (memory.keys.dtype, memory.keys.device)
        and all(x.shape[1] == 1 for x in first)
    )


def decode_sequence(decoder: Any, embedded: Tensor, state: DecoderState, memory: Memory) -> tuple[Tensor, Tensor]:
    """Teacher forcing with input feeding: what ``Decoder._step`` does, of all steps.

    embedded: (B, T, E), read by the steps. state: the first one, of one hypothesis per sentence.
    Returns the attentional vectors, (B, T, H), and alignments, (B, T, S).
    """
    attention = decoder.attention
    projection = attention.query_projection
    v, bias, scale = _score_parameters(attention, memory.keys)
    inputs = Inputs(
        embedded,
        state.feed[:, 0],
        memory.keys,
        memory.values,
        memory.memory_lengths,
        memory.mask,
        None if projection is None else projection.weight,
        v,
        bias,
        scale,
        decoder.attentional.weight,
    )
    first = [layer[:, 0] for layer in (*state.hidden, *state.cell)]
    weights = [weight for layer in decoder.rnn.all_weights for weight in layer]
    settings = Settings(
        decoder.rnn.num_layers,
        bool(state.cell),
        choose(attention.backend, embedded.device.type),
        attention.eps if isinstance(attention, CosineAttention) else None,
        decoder.cuda_graph,
    )
    return _Loop.apply(settings, *inputs, *_dropout_factors(decoder, embedded), *first, *weights)


def _score_parameters(attention: Any, like: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """v, bias, scale."""
    if isinstance(attention, CosineAttention):
        sharpness = attention.sharpness
        return None, None, sharpness if isinstance(sharpness, Tensor) else like.new_full((), sharpness)
    if attention.v is None:
        return None, None, None
    return attention.score_vector(), attention.bias if isinstance(attention, BahdanauAttention) else None, None


def _dropout_factors(decoder: Any, embedded: Tensor) -> list[Tensor | None]:
    """What is multiplied with the outputs of the layers below the top one and with the attentional vectors.

    (T, B, H) each; None without dropout.
    """
    layers = decoder.rnn.num_layers
    if not decoder.dropout.training or decoder.dropout.p == 0:
        return [None] * layers
    ones = embedded.new_ones(embedded.shape[1], embedded.shape[0], decoder.hidden_size)
    return [decoder.dropout(ones) for _ in range(layers)]


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: Settings, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.settings = settings
        ctx.graph = find_graph(settings, tensors)
        if ctx.graph is None:
            ctx.parts, attentional, alignments, kept = evaluate(settings, tensors)
        else:
            attentional, alignments, *kept = ctx.graph.forward(tensors)
        ctx.save_for_backward(*tensors, *kept)
        return attentional, alignments

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # raises an error if an input has been changed in place since
        inputs = len(ctx.needs_input_grad) - 1
        if gradients == (None, None):
            return (None,) * (1 + inputs)
        tensors, kept = saved[:inputs], saved[inputs:]
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active() or any(map(is_batch, gradients)):
            # Gradients that are to be differentiated again, and batches of them, are not made in place.
            return (None, *differentiable_gradients(ctx.settings, tensors, gradients, ctx.needs_input_grad[1:]))
        if ctx.graph is None:
            return (None, *differentiate(ctx.parts, tensors, kept, gradients))
        return (None, *ctx.graph.backward(tensors, kept, gradients))
