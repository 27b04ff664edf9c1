"""Which decoders the fused implementations may replace: those with the unmodified steps of ``Decoder`` and its modules.

The node of a whole target and the steps of a search read the parameters of the modules, and do not call the modules.
There is one exception: the node calls attentions whose parameters it cannot read (``is_called``). Both check here
first. If a check fails, each step calls the modules, in training and in a search.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ...backends import choose
from ...mechanisms import (
    CoverageAttention,
    DynamicConvolutionAttention,
    ForwardAttention,
    GMMAttention,
    HeadsMemory,
    LayerNormBahdanauAttention,
    LocalAttention,
    LocationSensitiveAttention,
    MonotonicAttention,
    MonotonicChunkwiseAttention,
    MultiHeadAttention,
    NormalizedAttention,
    StatefulAttention,
    StepwiseMonotonicAttention,
    WindowedAttention,
)
from ...mechanisms.coverage import CoverageState
from ...mechanisms.location import CumulativeLocationState, LocationState
from ...memory import Memory
from ...modules import BahdanauAttention, CosineAttention, LuongAttention
from ...stock import has_global_hooks, is_plain, is_stock, is_watched, register, runs_eagerly
from ...types import wide_dtype
from ..state import DecoderModules, DecoderState
from .inputs import keys_and_values, memories

_FUNCTIONS = FunctionType, BuiltinFunctionType

# The attentions whose parameters the node and the search read.
READ = BahdanauAttention, CosineAttention, LuongAttention, LocationSensitiveAttention, CoverageAttention
for _attention in READ[:3]:
    register(_attention, ["v", "g", "bias", "sharpness"], ["query_projection", "memory_projection"])
_of_locations = ["location_convolution", "location_projection"]
register(LocationSensitiveAttention, ["v", "bias"], ["query_projection", "memory_projection", *_of_locations])
register(CoverageAttention, ["v", "bias", "coverage_weight"], ["query_projection", "memory_projection"])

# Attentions that the loop calls.
_projections = ["query_projection", "memory_projection"]
register(ForwardAttention, ["v", "bias"], [*_projections, *_of_locations, "transition"])
for _energies in (MonotonicAttention, MonotonicChunkwiseAttention, StepwiseMonotonicAttention):
    _of_energies = ["v", "g", "bias", "score_bias", "chunk_v", "chunk_g", "chunk_bias"]
    register(_energies, _of_energies, _projections)
register(LocalAttention, ["v", "g", "bias", "position_v"], [*_projections, "position_projection"])
register(GMMAttention, (), [*_projections, "hidden", "mixture"])
_of_filters = ["static_filters", "static_projection", "dynamic_projection", "bias", "v"]
register(DynamicConvolutionAttention, _of_filters, [*_projections, "filter_hidden", "filter_output"], ["prior"])
for _wrapper in (WindowedAttention, NormalizedAttention):
    register(_wrapper, (), ["attention"])
register(MultiHeadAttention, ["v"], [*_projections, "value_projection", "output_projection"])
register(LayerNormBahdanauAttention, ["v", "gain", "shift"], _projections)


def can_fuse_sequence(
    decoder: DecoderModules, embedded: Tensor, state: DecoderState, memory: Memory, index: Tensor | None = None
) -> bool:
    """Whether ``decode_sequence`` with these arguments may replace the steps of a target."""
    if not has_stock_steps(decoder, state, memory, True) or not is_plain(embedded):
        return False
    if is_called(decoder.attention):
        steps = (embedded if index is None else index).shape[1]
        if steps == 0 or not _can_call(decoder.attention, state.attention, embedded.device):
            return False
    elif state.attention is not None and not _has_stock_state(decoder.attention, state.attention, memory):
        return False
    size = decoder.rnn.input_size - decoder.hidden_size
    first = (*state.hidden, *state.cell)
    return (
        embedded.dim() == (3 if index is None else 2)
        and (embedded if index is None else index).shape[0] == memory.batch_size
        and embedded.shape[-1] == size
        and (embedded.dtype, embedded.device) == (memory.keys.dtype, memory.keys.device)
        and state.feed is not None
        and all(x.shape[1] == 1 for x in (*first, state.feed))
    )


def can_fuse_steps(decoder: Any, state: DecoderState, memory: Memory) -> bool:
    """Whether ``FastDecoder`` may replace the steps of a search."""
    return (
        not torch.is_grad_enabled()
        and state.attention is None  # FastDecoder does not pass the state of an attention on
        and has_stock_steps(decoder, state, memory)
        and not any(module.training for module in decoder.modules())
        and memory.keys.is_cpu
        and memory.keys.dtype in (torch.float32, torch.float64)
        and all(x.dtype == memory.keys.dtype and x.is_cpu for x in decoder.parameters())
        and _has_stock_ends(decoder)
        and choose(None, "cpu") == "cpu"
    )


def is_called(attention: Any) -> bool:
    """Whether the node of a target calls the attention in each step, rather than read its parameters."""
    if type(attention) in READ:
        return attention.clip is not None
    return isinstance(attention, nn.Module)


def has_stock_steps(decoder: Any, state: DecoderState, memory: Memory, may_call: bool = False) -> bool:
    """Whether a step from ``state`` on ``memory`` may be computed from the parameters of the modules.

    It checks all modules that a step calls except embedding and output, which the caller checks. may_call: accept an
    attention that ``is_called``, without checking it.
    """
    calls = is_called(decoder.attention)
    if type(memory) not in ((Memory, HeadsMemory) if calls else (Memory,)) or (calls and not may_call):
        return False
    if isinstance(decoder.attention, StatefulAttention) != (state.attention is not None):
        return False
    if not runs_eagerly(memory.keys.device.type) or not is_stock(decoder):  # in this order: Dynamo can trace the first
        return False
    modules = [decoder.rnn, decoder.attentional, decoder.dropout]
    if not calls:
        within = (getattr(decoder.attention, name, None) for name in ("query_projection", *_of_locations))
        modules += [decoder.attention, *(module for module in within if module is not None)]
    if not all(map(is_stock, modules)):
        return False
    tensors = [*state.hidden, *state.cell, *keys_and_values(memory)]
    prepared = [x.prepared for x in memories(memory) if x.prepared is not None]
    tensors += [x for x in (state.feed, memory.memory_lengths, memory.mask, *prepared) if x is not None]
    if not all(map(is_plain, tensors)) or not _has_stock_sizes(decoder, state, memory):
        return False
    if not calls and not _has_stock_projection(decoder, memory):
        return False
    like = memory.keys
    parameters = [x for module in modules for x in module._parameters.values()]
    floating = [x for x in (*parameters, *tensors) if x is not None and x.is_floating_point()]
    return all(x.device == like.device for x in (*floating, *tensors)) and all(
        x.dtype == like.dtype for x in floating if all(x is not y for y in prepared)
    )


def _can_call(attention: nn.Module, state: Any, device: torch.device) -> bool:
    """Whether the steps of the attention may be separate graphs of autograd, with this first state, if it has one.

    So no hook may see the tensors of a step: it might use them in a loss, whose gradient would end in that graph. A
    parameter of a functional call may be computed from others, which only one graph may differentiate.
    """
    if state is not None and type(state) is not tuple and not hasattr(state, "_make"):
        return False
    tensors, modules = [*(state or ()), *attention.parameters(), *attention.buffers()], list(attention.modules())
    return (
        (all(map(_is_known, modules)) or _is_declared(attention, modules))
        and not has_global_hooks()
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None  # each pass would call them again
        and all(is_plain(x) and x.device == device for x in tensors)
        and all(x.is_leaf and not _has_hooks(x) for x in attention.parameters())
        and not any(x.requires_grad for x in attention.buffers())
    )


def _is_known(module: nn.Module) -> bool:
    """Whether the module is stock, with a normalizer, if any, that computes with its argument alone.

    A function of the user may read a tensor that requires a gradient.
    """
    normalizer = getattr(module, "normalizer", "softmax")
    library = str(getattr(normalizer, "__module__", "")).partition(".")[0]
    is_known = isinstance(normalizer, str) or (isinstance(normalizer, _FUNCTIONS) and library in ("torch", "entmax"))
    return is_known and is_stock(module)


def _has_hooks(parameter: Any) -> bool:
    """Whether a hook sees the gradient. Of a parameter that a step does not use, the node would show it None."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def _is_hooked(module: nn.Module) -> bool:
    return is_watched(module) or module._compiled_call_impl is not None


def _is_declared(attention: nn.Module, modules: Iterable[nn.Module]) -> bool:
    """Whether the class itself, not a base class, has ``self_contained``, and neither hooks nor the instance change it.

    modules: the attention and those within.
    """
    kind = type(attention)
    if not vars(kind).get("self_contained", False) or any(map(_is_hooked, modules)):
        return False
    return not vars(attention).keys() & {name for name in dir(kind) if callable(getattr(kind, name))}


def _has_stock_state(attention: nn.Module, state: Any, memory: Memory) -> bool:
    """Whether this is a stock stateful attention whose extra term is a linear filter of alignments.

    The state must have the shapes and dtypes of ``initial_state``.
    """
    if isinstance(attention, CoverageAttention):
        kind: type[Any] = CoverageState
        if attention.coverage_weight.shape != (attention.key_size,):
            return False
    elif isinstance(attention, LocationSensitiveAttention):
        kind = CumulativeLocationState if attention.cumulative else LocationState
        if not _has_stock_filters(attention):
            return False
    else:
        return False
    batch, steps, _ = memory.keys.shape
    dtype = memory.keys.dtype
    return (
        type(state) is kind
        and steps > 0
        and all(is_plain(x) and x.shape == (batch, 1, steps) and x.device == memory.keys.device for x in state)
        and all(
            x.dtype == (dtype if name == "alignments" else wide_dtype(dtype))
            for name, x in zip(kind._fields, state, strict=True)
        )
    )


def _has_stock_filters(attention: LocationSensitiveAttention) -> bool:
    convolution, projection = attention.location_convolution.weight, attention.location_projection.weight
    return (
        convolution.dim() == 3
        and convolution.shape[1] == 1 + attention.cumulative
        and convolution.shape[2] % 2 == 1
        and projection.shape == (attention.key_size, convolution.shape[0])
    )


def has_stock_cells(rnn: nn.Module) -> bool:
    """Whether a step equals ``torch.lstm_cell`` or ``torch.gru_cell`` with its weights, apart from dropout."""
    if torch.compiler.is_compiling():  # only the checks that can be traced
        return type(rnn) in (nn.LSTM, nn.GRU) and not is_watched(rnn) and _has_stock_settings(rnn)
    return is_stock(rnn) and _has_stock_settings(rnn)


def _has_stock_settings(rnn: object) -> bool:
    """Whether the settings are those of a ``Decoder``: biases, batch first, one direction, no projection."""
    return (
        isinstance(rnn, nn.LSTM | nn.GRU)
        and bool(rnn.bias)
        and bool(rnn.batch_first)
        and not rnn.bidirectional
        and rnn.proj_size == 0
    )


def _has_stock_sizes(decoder: DecoderModules, state: DecoderState, memory: Memory) -> bool:
    """Whether all shapes are those of a ``Decoder``, and layers that have no bias there have none here.

    The size of the context is not checked.
    """
    rnn, attentional, size, batch = decoder.rnn, decoder.attentional, decoder.hidden_size, memory.batch_size
    fed = size if decoder.input_feeding else 0
    layers = rnn.num_layers
    states = (*state.hidden, *state.cell, *([] if state.feed is None else [state.feed]))
    return (
        _has_stock_settings(rnn)
        and rnn.hidden_size == size
        and rnn.all_weights[0][0].shape[1] == rnn.input_size > fed
        and len(rnn.all_weights) == layers == len(state.hidden)
        and len(state.cell) == (layers if isinstance(rnn, nn.LSTM) else 0)
        and (state.feed is not None) == decoder.input_feeding
        and all(x.dim() == 3 and x.shape[0] == batch and x.shape[2] == size for x in states)
        and attentional.bias is None
        and attentional.weight.shape[0] == size < attentional.weight.shape[1]
        and (memory.mask is None or memory.mask.dim() == 2 or memory.mask.shape[1] == 1)
    )


def _has_stock_projection(decoder: DecoderModules, memory: Memory) -> bool:
    """Whether the memory has the sizes of attention and context, and the projection of the query, if any, no bias."""
    attention, size, key_size = decoder.attention, decoder.hidden_size, memory.keys.shape[2]
    projection = attention.query_projection
    return (
        key_size == attention.key_size
        and memory.values.shape[2] == attention.memory_size == decoder.attentional.weight.shape[1] - size
        and (projection is None or (projection.bias is None and projection.weight.shape == (key_size, size)))
        and (projection is not None or key_size == size)
    )


def _has_stock_ends(decoder: DecoderModules) -> bool:
    """Whether embeddings are rows of a weight, and logits a linear layer, with the sizes of a ``Decoder``."""
    embedding, output = decoder.embedding, decoder.output
    embedded = decoder.rnn.input_size - (decoder.hidden_size if decoder.input_feeding else 0)
    return (
        is_stock(embedding)
        and isinstance(embedding, nn.Embedding)
        and embedding.max_norm is None
        and is_stock(output)
        and isinstance(output, nn.Linear)
        and output.weight.shape[1] == decoder.hidden_size
        and embedding.weight.shape[1] == embedded
    )
