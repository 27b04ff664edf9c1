"""A decoder over a whole target as one node of autograd: cells, attention, attentional vector and input feeding.

The forward saves only what the backward reads. In the loop over steps, the backward computes only what the previous
step needs. Sums over steps are computed once, after the loop: each weight gradient is one product over all steps, and
one pass with all steps as queries computes the gradients of keys, values and score vector.

B sentences, T steps, S source steps, H hidden_size.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ...attention_module import AttentionModule
from ...backends import choose
from ...mechanisms.additive import StatefulAdditiveAttention
from ...mechanisms.location_features import AlignmentFilters
from ...memory import Memory
from ..state import DecoderModules, DecoderState
from .called import SavedSteps
from .cuda_graph import find_graph
from .eligibility import is_called
from .formula import differentiable_gradients, is_batch
from .inputs import CalledAttention, CellWeights, Inputs, Query, flatten, unflatten
from .sequence import backward, forward


def decode_sequence(
    decoder: DecoderModules, embedded: Tensor, state: DecoderState, memory: Memory, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Teacher forcing with input feeding: ``Decoder._step`` for all steps. See ``can_fuse_sequence``.

    embedded: (B, T, E), the inputs of the steps; or (U, E), their distinct rows, with an index (B, T) of these rows.
    state: the first one, of one hypothesis per sentence.
    Returns the attentional vectors, (B, T, H), and alignments, (B, T, S).
    """
    attention, feed = decoder.attention, state.feed
    assert feed is not None  # checked by can_fuse_sequence
    inputs = Inputs(
        embedded=embedded,
        token_rows=index,
        dropout=_dropout_factors(decoder, embedded, (embedded if index is None else index).shape[:2]),
        feed=feed[:, 0],
        hidden=tuple(layer[:, 0] for layer in state.hidden),
        cell=tuple(layer[:, 0] for layer in state.cell),
        weights=tuple(CellWeights(*of_layer) for of_layer in decoder.rnn.all_weights),
        attentional_weight=decoder.attentional.weight,
        **(_called if is_called(attention) else _read)(attention, state.attention, memory, embedded),
    )
    tensors, structure = flatten(inputs)
    given = inputs, structure, decoder.cuda_graph, *tensors
    result: tuple[Tensor, Tensor] = _Sequence.apply(*given)  # type: ignore[no-untyped-call]  # torch has no types for it
    return result


def _read(attention: AttentionModule, state: Any, memory: Memory, embedded: Tensor) -> dict[str, Any]:
    """The inputs of an attention whose parameters the loop reads."""
    projection, factor = attention.query_projection, attention.query_factor()
    if factor is not None and not isinstance(factor, Tensor):
        factor = embedded.new_full((), factor)
    if memory.mask is not None and memory.mask.dim() == 3:  # (B, 1, S), the same for all queries
        memory = Memory(memory.keys, memory.values, memory.memory_lengths, memory.mask.squeeze(1))
    return {
        "memory": memory,
        "score": attention.make_score(memory),
        "query": Query(None if projection is None else projection.weight, factor, attention.query_eps()),
        "called": None,
        "filters": _filters(attention, state),
        "backend": choose(attention.backend, embedded.device.type),
    }


def _called(attention: Any, state: Any, memory: Memory, embedded: Tensor) -> dict[str, Any]:
    """The inputs of an attention that the steps call. state: the first one; None for an attention without a state."""
    parameters = tuple(x for x in attention.parameters() if x.requires_grad)
    return {
        "memory": memory,
        "score": None,
        "query": Query(None, None, None),
        "called": CalledAttention(attention, torch.is_grad_enabled(), parameters, state),
        "filters": None,
        "backend": "",
    }


def _filters(attention: AttentionModule, state: Any) -> AlignmentFilters | None:
    return attention._alignment_filters(state) if isinstance(attention, StatefulAdditiveAttention) else None


def _dropout_factors(decoder: DecoderModules, like: Tensor, shape: torch.Size) -> tuple[Tensor | None, ...]:
    """Dropout factors of the outputs of all layers but the top one, and of the attentional vectors: (T, B, H) each.

    None without dropout. shape: (B, T).
    """
    layers = decoder.rnn.num_layers
    if not decoder.dropout.training or decoder.dropout.p == 0:
        return (None,) * layers
    ones = like.new_ones(shape[1], shape[0], decoder.hidden_size)
    return tuple(decoder.dropout(ones) for _ in range(layers))


def _is_compiled_autograd() -> bool:
    """Whether the backward is compiled (``torch._dynamo.config.compiled_autograd``): saved tensors lose their graph."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return module is not None and (module.compiled_autograd_enabled or module.in_compiled_autograd_region)


class _Sequence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Inputs, structure: Any, cuda_graph: bool, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """structure, tensors: the flattened inputs, because autograd does not find tensors inside tuples."""
        ctx.set_materialize_grads(False)
        ctx.structure, ctx.called = structure, inputs.called is not None
        ctx.graph = find_graph(inputs) if cuda_graph and inputs.called is None else None
        if ctx.graph is None:
            *results, saved = forward(inputs)
            saved_tensors, ctx.saved_structure = flatten(saved)
            steps = saved.attention
            if isinstance(steps, SavedSteps) and not steps.has_alignment_gradients():
                ctx.mark_non_differentiable(results[1])
        else:
            results, saved_tensors = ctx.graph.forward(inputs)
        ctx.save_for_backward(*tensors, *saved_tensors)
        attentional, alignments = results
        return attentional, alignments

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.called and _is_compiled_autograd():
            raise RuntimeError(
                "Seq2Seq: compiled autograd cannot differentiate the graphs of steps that decoder='loop' has saved for "
                "this attention: use decoder='steps'"
            )
        all_saved = ctx.saved_tensors  # raises an error if an input has been changed in place since
        needed = ctx.needs_input_grad[3:]
        if gradients == (None, None):
            return (None,) * len(ctx.needs_input_grad)
        tensors, saved = all_saved[: len(needed)], all_saved[len(needed) :]
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active() or any(map(is_batch, gradients)):
            # Gradients that are differentiated again, and batched gradients, cannot be computed in place.
            attention = None if ctx.graph is not None else unflatten(ctx.saved_structure, iter(saved)).attention
            steps = attention if isinstance(attention, SavedSteps) else None
            found = differentiable_gradients(ctx.structure, tensors, gradients, needed, steps)
        else:
            inputs = unflatten(ctx.structure, iter(tensors))
            if ctx.graph is None:
                found, _ = flatten(backward(inputs, unflatten(ctx.saved_structure, iter(saved)), *gradients))
            else:
                found = ctx.graph.backward(inputs, saved, gradients)
        return None, None, None, *found
