"""The steps of a decoder in differentiable operators: the specification of sequence.py, and its derivatives.

The backward of a sequence writes in place, so autograd cannot differentiate it. Gradients that will be differentiated
again are therefore computed by this formula. They are exact, and cost as much as plain steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn.functional import embedding, linear, pad

from ... import formulas
from ...mechanisms.location_features import AlignmentFilters, neighbourhoods
from ...scores import ActivatedScore, AdditiveScore, unit_length
from .attention import op_arguments
from .called import Replay, SavedSteps
from .inputs import Inputs, unflatten


def step_cells(
    x: Tensor,
    hidden: Sequence[Tensor],
    cell: Sequence[Tensor],
    weights: Sequence[Sequence[Tensor]],
    dropout: Callable[[Tensor, int], Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """A step of stacked LSTM layers, or GRU layers if ``cell`` is empty. Returns the states after it.

    x: (R, n). hidden, cell: (R, H) for each layer. weights: for each layer, in the order of ``nn.LSTM.all_weights``.
    dropout: a function of the output of a layer below the top, and the number of that layer.
    """
    new_hidden: list[Tensor] = []
    new_cell: list[Tensor] = []
    for n, of_layer in enumerate(weights):
        if n > 0:
            x = dropout(x, n - 1)
        if cell:
            x, cell_after = torch.lstm_cell(x, (hidden[n], cell[n]), *of_layer)
            new_cell.append(cell_after)
        else:
            x = torch.gru_cell(x, hidden[n], *of_layer)
        new_hidden.append(x)
    return new_hidden, new_cell


def formula(inputs: Inputs, replay: Replay | None = None) -> tuple[Tensor, Tensor]:
    """The first two results of ``sequence.forward``: attentional vectors and alignments.

    replay: the steps of the attention, if the forward has called it.
    """
    hidden, cell, feed, filters = list(inputs.hidden), list(inputs.cell), inputs.feed, inputs.filters
    called = inputs.called
    state: Sequence[Tensor] = () if called is None or called.state is None else called.state
    steps = []
    of_steps = inputs.embedded if inputs.token_rows is None else embedding(inputs.token_rows, inputs.embedded)
    for t, embedded in enumerate(of_steps.unbind(1)):

        def drop(x: Tensor, layer: int, t: int = t) -> Tensor:
            factors = inputs.dropout[layer]
            return x if factors is None else x * factors[t]

        hidden, cell = step_cells(torch.cat([embedded, feed], dim=1), hidden, cell, inputs.weights, drop)
        if replay is None:
            context, alignments, filters = _attend(hidden[-1], filters, inputs)
        else:
            context, alignments, *state = replay.step(t, hidden[-1].unsqueeze(1), state, inputs)
        both = torch.cat([context.squeeze(1), hidden[-1]], dim=1)
        feed = drop(torch.tanh(linear(both, inputs.attentional_weight)), -1)
        steps.append((feed, alignments.squeeze(1)))
    attentional, alignments = (torch.stack(parts, dim=1) for parts in zip(*steps, strict=True))
    return attentional, alignments


def _attend(
    state: Tensor, filters: AlignmentFilters | None, inputs: Inputs
) -> tuple[Tensor, Tensor, AlignmentFilters | None]:
    """state: (B, H). Returns context, (B, 1, M), alignments, (B, 1, S), and the filters of the next step."""
    query = state if inputs.query.weight is None else linear(state, inputs.query.weight)
    query = scale_query(query, inputs.query.factor, inputs.query.eps).unsqueeze(1)
    score = inputs.score
    assert score is not None  # the attention is not called
    if filters is not None and isinstance(score, AdditiveScore | ActivatedScore):
        score = score.with_extra(_extra(filters))
    arguments = (query, *op_arguments(score, inputs.memory), True)
    context, alignments = formulas.apply_formula(score.op, arguments)
    return context, alignments, None if filters is None else _follow(filters, alignments.squeeze(1))


def _extra(filters: AlignmentFilters) -> Tensor:
    """(B, S, A): the term that a step adds to the keys."""
    weight, *state = filters
    taps = weight.shape[2]
    read = torch.stack([x.to(weight.dtype) for x in state if x is not None], dim=1)
    return linear(neighbourhoods(pad(read, (taps // 2, taps // 2)), taps), weight.flatten(1))


def _follow(filters: AlignmentFilters, alignments: Tensor) -> AlignmentFilters:
    """The state after a step with these alignments, (B, S)."""
    weight, previous, total = filters
    return AlignmentFilters(
        weight, None if previous is None else alignments, None if total is None else total + alignments
    )


def scale_query(query: Tensor, factor: Tensor | float | None, eps: float | None) -> Tensor:
    """The part of ``AttentionModule.make_query`` after the projection."""
    if eps is not None:
        query = unit_length(query, eps)
    return query if factor is None else factor * query


def differentiable_gradients(
    structure: Any,
    tensors: Sequence[Any],
    gradients: Sequence[Tensor | None],
    needed: Sequence[bool],
    steps: SavedSteps | None = None,
) -> list[Tensor | None]:
    """The needed gradients of ``tensors`` from the gradients of the results, as differentiable functions of both.

    structure, tensors: the flattened inputs. steps: those of the attention, if the forward has called it.
    """
    differentiable = torch.is_grad_enabled()
    replay = None if steps is None else Replay(steps, unflatten(structure, iter(tensors)).called.parameters)
    # In ``torch.func.vmap`` only the gradients are batches. A custom autograd function refuses to run inside of it.
    transforms = replay is not None and torch._C._are_functorch_transforms_active()
    with torch.enable_grad(), temporarily_clear_interpreter_stack() if transforms else nullcontext():
        # Aliases: some tensors are computed from others, and each must get only its own part of the gradient.
        names = [x.view_as(x) if is_needed else x for x, is_needed in zip(tensors, needed, strict=True)]
        results = formula(unflatten(structure, iter(names)), replay)
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
    """Whether this is a batch of gradients, as in ``torch.autograd.grad(..., is_grads_batched=True)``."""
    return gradient is not None and torch._C._functorch.is_legacy_batchedtensor(gradient)
