"""A recurrent layer over sentences of different lengths as one node of autograd: see ``ragged_cells``.

B sentences, R of them not empty, N steps in total, T steps of the longest sentence, D directions, H units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...gemm import linear_of_rows, prefers_transposed, weight_gradient
from .distinct import gather, sum_by_row
from .formula import is_batch
from .ragged_cells import (
    Direction,
    DirectionWeights,
    Part,
    SavedDirection,
    backward,
    forward,
    products_with_inputs,
)

# A cost model to choose between the node here and oneDNN's padded LSTM: oneDNN's time for a row, and the overhead of a
# step here, both in units of the time for a row here. Measured on Zen 5 with 2 to 64 sentences and 256 units, forward
# and backward: without this choice, the node here takes up to twice as long. On Sapphire Rapids, where products of few
# rows are faster (``prefers_transposed``), with 4 to 128 sentences and 256 and 512 units.
_PADDED, _STEP = 0.75, 3.5
_PADDED_INTEL, _STEP_INTEL = 0.95, 0.6
_DISTINCT = 0.65  # a row here, if the products with the inputs are those of few distinct rows
_SHUT = 1e6  # closes or opens a gate for any states
_EXTRA = 16  # added inputs, one of which marks padding: with this number oneDNN is as fast as without them


class Rows(NamedTuple):
    """The steps of sentences in the order of the data of a ``PackedSequence``: step by step, the longest first."""

    order: Tensor  # (R,), indices of sentences, longest first, as sorted by pack_padded_sequence
    source: Tensor  # (N,), the index of each row in (B * S, *) or (S * B, *)
    sizes: Tensor  # (T,), number of rows of each step
    directions: tuple[Direction, Direction]  # forward and reverse


def find_rows(lengths: Tensor, strides: tuple[int, int]) -> Rows:
    """lengths: (B,) int64 on the CPU, 0..S, at least one above 0. strides: of sentences and steps in ``source``."""
    lengths, order = lengths.sort(descending=True)
    count = int((lengths > 0).sum())
    return sorted_rows(lengths[:count], order[:count], strides)


def sorted_rows(lengths: Tensor, order: Tensor, strides: tuple[int, int]) -> Rows:
    """lengths: (R,), above 0, largest first, of the sentences at ``order``. strides: as for ``find_rows``."""
    count = lengths.shape[0]
    longest = int(lengths[0])
    step = torch.arange(longest)[:, None]
    exists = step < lengths
    sizes = exists.sum(1)
    offsets = sizes.cumsum(0) - sizes
    sentence = torch.arange(count)
    rows = offsets[:, None] + sentence  # (T, R), where they exist
    begin, total = rows[0], int(lengths.sum())
    end = offsets[lengths - 1] + sentence
    no_row = total + sentence[None]
    before = torch.cat([no_row, rows[:-1]])
    after = torch.where(step + 1 < lengths, torch.cat([rows[1:], no_row]), no_row)
    by_step = sizes.tolist()
    return Rows(
        order,
        (order * strides[0] + step * strides[1])[exists],
        sizes,
        (
            Direction(_parts(by_step), by_step, before[exists], begin, end),
            Direction(*_reverse_parts(by_step), after[exists], end, begin),
        ),
    )


def _parts(sizes: list[int]) -> list[Part]:
    """The parts of the forward direction, in which all sentences begin in the first step. sizes: rows of each step."""
    parts, begin, before = [], 0, sum(sizes)
    for t, rows in enumerate(sizes):
        parts.append(Part(t, rows, begin, before, 0, t > 0))
        begin, before = begin + rows, begin
    return parts


def _reverse_parts(sizes: list[int]) -> tuple[list[Part], list[int]]:
    """The parts of the reverse direction, and their numbers of rows.

    In a step, some sentences continue, and those whose last step it is begin.
    """
    parts: list[Part] = []
    begin, total = 0, sum(sizes)
    for rows, going_on in zip(sizes, [*sizes[1:], 0], strict=True):
        if going_on > 0:
            parts.append(Part(len(parts), going_on, begin, begin + rows, 0, True))
        if going_on < rows:
            new = rows - going_on
            parts.append(Part(len(parts), new, begin + going_on, total + going_on, going_on, False))
        begin += rows
    return parts[::-1], [part.rows for part in parts]


def run_layer(
    rows: Rows,
    x: Tensor,
    hidden: Tensor | None,
    cell: Tensor | None,
    weights: Sequence[Sequence[Tensor]],
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x: (N, n), or (U, n) with an index (N,) of its rows: see distinct.py. hidden, cell: (D, R, H), the first states;
    None: zeros. weights: in the order of ``nn.LSTM.all_weights``.

    Returns the states of all rows, (N, D * H), and the last states, hidden and cell, (D, R, H) each; a GRU has no cell.
    """
    flat = [weight for direction in weights for weight in direction]
    layer: Any = _Layer
    given = index, x
    if hidden is None and _is_for_onednn(rows, x, flat, index is not None):
        layer, given = _PaddedLSTM, (None, gather(x, index))
    result: tuple[Tensor, Tensor, Tensor | None] = layer.apply(rows, len(weights), *given, hidden, cell, *flat)
    return result


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Rows,
        count: int,
        index: Tensor | None,
        x: Tensor,
        hidden: Tensor | None,
        cell: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """count: D."""
        ctx.set_materialize_grads(False)
        ctx.rows, ctx.index = rows, index
        by_direction = _split(weights, count)
        units = by_direction[0].h.shape[1]
        outputs = x.new_empty(rows.source.shape[0], count * units)
        saved: list[SavedDirection] = []
        for d, (way, of_direction) in enumerate(zip(rows.directions, by_direction, strict=False)):
            first_hidden, first_cell = (None if states is None else states[d] for states in (hidden, cell))
            out = outputs[:, d * units : (d + 1) * units]
            gates = products_with_inputs(x, index, of_direction)
            saved.append(forward(way, gates, of_direction, first_hidden, first_cell, out))
        ctx.save_for_backward(x, hidden, cell, *weights, *(tensor for of_one in saved for tensor in of_one))
        cells = [of_one.cell for of_one in saved if of_one.cell is not None]
        return outputs, _last(rows, [of_one.hidden for of_one in saved]), _last(rows, cells) if cells else None

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        all_saved = ctx.saved_tensors  # raises an error if an input has been changed in place since
        _, _, _, *needed = ctx.needs_input_grad
        if all(gradient is None for gradient in gradients):
            return (None,) * len(ctx.needs_input_grad)
        tensors, saved = all_saved[: len(needed)], all_saved[len(needed) :]
        if _are_differentiated(gradients):
            found = _differentiable_gradients(ctx.rows, ctx.index, tensors, gradients, needed)
        else:
            found = _gradients(ctx.rows, ctx.index, tensors, saved, gradients, needed)
        return None, None, None, *found


def _are_differentiated(gradients: tuple[Tensor | None, ...]) -> bool:
    """Whether gradients are differentiated again, or are batched: these cannot be computed in place."""
    transformed = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
    return transformed or any(map(is_batch, gradients))


class _PaddedLSTM(torch.autograd.Function):
    """Like _Layer, with oneDNN's LSTM on padded sentences, which is faster if there is little padding."""

    @staticmethod
    def forward(
        ctx: Any, rows: Rows, count: int, index: None, x: Tensor, hidden: None, cell: None, *weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """count: D."""
        ctx.set_materialize_grads(False)
        ctx.rows = rows
        with torch.set_grad_enabled(any(ctx.needs_input_grad)):
            needed = [ctx.needs_input_grad[3], *ctx.needs_input_grad[6:]]
            leaves = [y.detach().requires_grad_(need) for y, need in zip((x, *weights), needed, strict=True)]
            results = _run_padded(rows, count, leaves[0], leaves[1:])
        ctx.leaves, ctx.results = leaves, results
        ctx.save_for_backward(x, *weights)
        outputs, last, last_cell = (y.detach() for y in results)
        return outputs, last, last_cell

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors  # raises an error if an input has been changed in place since
        if all(gradient is None for gradient in gradients):
            return (None,) * len(ctx.needs_input_grad)
        if _are_differentiated(gradients):
            tensors = (x, None, None, *weights)
            needed = ctx.needs_input_grad[3:]
            return None, None, None, *_differentiable_gradients(ctx.rows, None, tensors, gradients, needed)
        pairs = [pair for pair in zip(ctx.results, gradients, strict=True) if pair[1] is not None]
        wanted = [leaf for leaf in ctx.leaves if leaf.requires_grad]
        results, of_results = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(results, wanted, of_results, retain_graph=True, allow_unused=True))
        dx, *dweights = (next(found) if leaf.requires_grad else None for leaf in ctx.leaves)
        return None, None, None, dx, None, None, *dweights


def _is_for_onednn(rows: Rows, x: Tensor, weights: Sequence[Tensor], is_distinct: bool) -> bool:
    sentences, steps, total = rows.order.shape[0], rows.sizes.shape[0], rows.source.shape[0]
    padded, step = (_PADDED_INTEL, _STEP_INTEL) if prefers_transposed(x) else (_PADDED, _STEP)
    return (
        (_DISTINCT if is_distinct else 1.0) * total + step * steps >= padded * sentences * steps
        and x.dtype == torch.float32
        and len(weights) % 4 == 0  # with biases
        and weights[1].shape[0] == 4 * weights[1].shape[1]
        and bool(torch.backends.mkldnn.enabled)
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    )


def _run_padded(rows: Rows, count: int, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The results of ``run_layer`` with zero first states. In padding the gates i and o are closed and f is open.

    So cells keep their values in padding: after the end of a sentence, and in the reverse direction the initial zeros
    before it. Outputs are zero there.
    """
    sentences, steps, units = rows.order.shape[0], rows.sizes.shape[0], weights[1].shape[1]
    exists = torch.arange(sentences) < rows.sizes[:, None]  # (T, R)
    place = exists.flatten().nonzero().squeeze(1)
    is_padding = (~exists).to(x.dtype).view(-1, 1)
    padded = x.new_zeros(steps * sentences, x.shape[1]).index_copy(0, place, x)
    padded = torch.cat([padded, is_padding, x.new_zeros(steps * sentences, _EXTRA - 1)], dim=1)
    of_padding = x.new_zeros(4 * units, _EXTRA)
    of_padding[:, 0] = x.new_tensor([-_SHUT, _SHUT, 0.0, -_SHUT]).repeat_interleave(units)
    extended = [torch.cat([w, of_padding], dim=1) if n % 4 == 0 else w for n, w in enumerate(weights)]
    zeros = x.new_zeros(count, sentences, units)
    found, last, cell = torch.lstm(
        padded.view(steps, sentences, -1), (zeros, zeros), extended, True, 1, 0.0, True, count == 2, False
    )
    outputs = found.flatten(0, 1).index_select(0, place)
    first = outputs[:, :units].index_select(0, rows.directions[0].last)
    return outputs, torch.stack([first, *last[1:]]), cell


def _split(weights: tuple[Tensor, ...], count: int) -> list[DirectionWeights]:
    """The weights of each direction."""
    size = len(weights) // count
    return [DirectionWeights(*weights[d * size : (d + 1) * size]) for d in range(count)]


def _last(rows: Rows, states: list[Tensor]) -> Tensor:
    ways = zip(rows.directions, states, strict=False)
    return torch.stack([x.index_select(0, way.last) for way, x in ways])


def _gradients(
    rows: Rows, index: Tensor | None, tensors: Any, saved: Any, gradients: Any, needed: list[bool]
) -> list[Tensor | None]:
    """The gradients of the tensors, from those of the results."""
    x, _, _, *weights = tensors
    of_outputs, of_hidden, of_cell = gradients
    count = len(saved) // len(SavedDirection._fields)
    by_direction = _split(tuple(weights), count)
    total, units = rows.source.shape[0], by_direction[0].h.shape[1]
    need_x, need_hidden, need_cell, *need_weights = needed
    dx: Tensor | None = None
    dfirst: list[Tensor] = []
    dcells: list[Tensor] = []
    dweights: list[Tensor | None] = []
    for d, (way, of_direction) in enumerate(zip(rows.directions, by_direction, strict=False)):
        of_one = SavedDirection(*saved[d * 4 : d * 4 + 4])
        dhidden = torch.zeros_like(of_one.hidden)
        if of_outputs is not None:
            dhidden[:total] = of_outputs[:, d * units : (d + 1) * units]
        if of_hidden is not None:
            dhidden.index_add_(0, way.last, of_hidden[d])
        dcell = None
        if of_one.cell is not None:
            dcell = x.new_zeros(way.first.shape[0], units)
            if of_cell is not None:
                dcell += of_cell[d]
            dcells.append(dcell)
        dgates, dproducts = backward(way, of_direction, of_one, dhidden, dcell)
        dgates = sum_by_row(dgates, index, x.shape[0])
        if need_x:
            part = linear_of_rows(dgates, of_direction.x.t())
            dx = part if dx is None else dx.add_(part)
        if need_hidden:
            dfirst.append(dhidden[total:] + dproducts.index_select(0, way.first) @ of_direction.h)
        if any(need_weights):
            before = of_one.hidden.index_select(0, way.before)
            of_weights = weight_gradient(dgates, x), weight_gradient(dproducts, before)
            of_biases = dgates.sum(0), dproducts.sum(0)
            dweights += [*of_weights, *of_biases][: len(weights) // count]
    first = torch.stack(dfirst) if need_hidden else None
    dweights = dweights or [None] * len(weights)
    return [dx, first, torch.stack(dcells) if need_cell else None, *dweights]


def _formula(rows: Rows, index: Tensor | None, tensors: Any) -> tuple[Tensor, ...]:
    """The results of ``run_layer``, by PyTorch's own packed layer. tensors: x, hidden, cell and weights."""
    x, hidden, cell, *weights = tensors
    x = gather(x, index)
    has_biases = any(weight.dim() == 1 for weight in weights)
    is_lstm = weights[1].shape[0] == 4 * weights[1].shape[1]
    count = len(weights) // (4 if has_biases else 2)
    zeros = x.new_zeros(count, rows.order.shape[0], weights[1].shape[1])
    first = [zeros if states is None else states for states in ((hidden, cell) if is_lstm else (hidden,))]
    options = (weights, has_biases, 1, 0.0, False, count == 2)
    if is_lstm:
        return tuple(torch.lstm(x, rows.sizes, first, *options))
    return tuple(torch.gru(x, rows.sizes, first[0], *options))


def _differentiable_gradients(
    rows: Rows, index: Tensor | None, tensors: Any, gradients: tuple[Tensor | None, ...], needed: list[bool]
) -> list[Tensor | None]:
    """Like ``_gradients``, but as differentiable functions of tensors and gradients."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: some tensors are computed from others, and each must get only its own part of the gradient.
        names = [x.view_as(x) if is_needed else x for x, is_needed in zip(tensors, needed, strict=True)]
        pairs = [pair for pair in zip(_formula(rows, index, names), gradients, strict=False) if pair[1] is not None]
    wanted = [x for x, is_needed in zip(names, needed, strict=True) if is_needed]
    outputs, of_outputs = zip(*pairs, strict=True)
    options: dict[str, Any] = {"create_graph": differentiable, "allow_unused": True}
    found = iter(torch.autograd.grad(outputs, wanted, of_outputs, **options) if wanted else ())
    return [next(found) if is_needed else None for is_needed in needed]
