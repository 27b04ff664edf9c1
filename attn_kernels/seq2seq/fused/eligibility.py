"""Which decoders the fast paths may compute: those whose steps are what ``Decoder`` and its modules say.

The loop over a whole target and the steps of a search read the parameters of the modules that a step calls. Both ask
here; where the answer is no, steps call the modules, in training as in a search.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...memory import Memory
from ...modules import BahdanauAttention, CosineAttention, LuongAttention
from ...stock import is_plain, is_stock, register, runs_eagerly
from ..state import DecoderState

for _attention in (BahdanauAttention, CosineAttention, LuongAttention):
    register(_attention, ["v", "g", "bias", "sharpness"], ["query_projection", "memory_projection"])


def has_stock_steps(decoder: Any, state: DecoderState, memory: Memory) -> bool:
    """Whether a step from ``state`` on ``memory`` is what the parameters say, and may be computed from them.

    Of the modules that a step calls, embedding and output are for the caller to ask about.
    """
    if not runs_eagerly(memory.keys.device.type):
        return False
    attention, projection = decoder.attention, getattr(decoder.attention, "query_projection", None)
    called = (decoder, attention, decoder.rnn, decoder.attentional, decoder.dropout)
    if not all(map(is_stock, called)) or not (projection is None or is_stock(projection)):
        return False
    tensors = [*state.hidden, *state.cell, memory.keys, memory.values]
    tensors += [x for x in (state.feed, memory.memory_lengths, memory.mask, memory.prepared) if x is not None]
    if type(memory) is not Memory or not all(map(is_plain, tensors)) or not _has_sizes_as_made(decoder, state, memory):
        return False
    like = memory.keys
    parameters = [x for module in (*called, projection) if module is not None for x in module._parameters.values()]
    floating = [x for x in (*parameters, *tensors) if x is not None and x.is_floating_point()]
    return all(x.device == like.device for x in (*floating, *tensors)) and all(
        x.dtype == like.dtype for x in floating if x is not memory.prepared
    )


def has_stock_cells(rnn: nn.Module) -> bool:
    """Whether ``torch.lstm_cell`` or ``torch.gru_cell`` with its weights are a step of it, but for dropout."""
    if torch.compiler.is_compiling():  # as far as it can be traced
        watched = rnn._forward_hooks or rnn._forward_pre_hooks or rnn._backward_hooks or rnn._backward_pre_hooks
        return type(rnn) in (nn.LSTM, nn.GRU) and not watched and "forward" not in rnn.__dict__ and _is_as_made(rnn)
    return is_stock(rnn) and _is_as_made(rnn)


def _is_as_made(rnn: object) -> bool:
    return (
        isinstance(rnn, nn.LSTM | nn.GRU)
        and bool(rnn.bias)
        and bool(rnn.batch_first)
        and not rnn.bidirectional
        and rnn.proj_size == 0
    )


def _has_sizes_as_made(decoder: Any, state: DecoderState, memory: Memory) -> bool:
    """Whether all shapes are those that ``Decoder`` makes, without the biases that it leaves out."""
    attention, rnn, size = decoder.attention, decoder.rnn, decoder.hidden_size
    projection, attentional = attention.query_projection, decoder.attentional
    batch, _, key_size = memory.keys.shape
    memory_size = memory.values.shape[2]
    fed = size if decoder.input_feeding else 0
    layers = rnn.num_layers
    states = (*state.hidden, *state.cell, *([] if state.feed is None else [state.feed]))
    return (
        _is_as_made(rnn)
        and rnn.hidden_size == size
        and rnn.all_weights[0][0].shape[1] == rnn.input_size > fed
        and len(rnn.all_weights) == layers == len(state.hidden)
        and len(state.cell) == (layers if isinstance(rnn, nn.LSTM) else 0)
        and (state.feed is not None) == decoder.input_feeding
        and all(x.dim() == 3 and x.shape[0] == batch and x.shape[2] == size for x in states)
        and key_size == attention.key_size
        and memory_size == attention.memory_size
        and (projection is None or (projection.bias is None and projection.weight.shape == (key_size, size)))
        and (projection is not None or key_size == size)
        and attentional.bias is None
        and attentional.weight.shape == (size, memory_size + size)
        and (memory.mask is None or memory.mask.dim() == 2 or memory.mask.shape[1] == 1)
    )


def takes_rows(embedding: object) -> bool:
    """Whether the embeddings of tokens are rows of its weight."""
    return is_stock(embedding) and isinstance(embedding, nn.Embedding) and embedding.max_norm is None
