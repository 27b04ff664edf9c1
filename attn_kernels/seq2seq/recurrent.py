"""Runs an LSTM or GRU over sentences of different lengths, by our fused layers or PyTorch's packed ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ..backends import choose
from ..errors import ArgumentTypeError, ArgumentValueError
from ..stock import is_plain, is_stock, runs_eagerly
from .fused.distinct import embed_distinct
from .fused.few_sentences import MAX_SENTENCES, MAX_WITHOUT_PADDING, run_few
from .fused.ragged import Rows, find_rows, run_layer, sorted_rows
from .scanned import can_scan, run_scanned

States = Tensor | tuple[Tensor, Tensor]


def checked_lengths(name: str, argument: str, lengths: object, batch: int, steps: int) -> Tensor:
    """(B,) int64 on the CPU: packing needs them there; a caller who has them there saves a wait. Under torch.export
    they stay where they are, and their values are not known.

    Raises ValueError or TypeError where they are not (B,) int32 or int64 numbers in 0..S.
    """
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise ArgumentTypeError(f"{name}: {argument} must be an int32 or int64 tensor, got {got}")
    if lengths.shape != (batch,):
        expected = f"(B,) = ({batch},)"
        raise ArgumentValueError(f"{name}: {argument} must have shape {expected}, got {tuple(lengths.shape)}")
    if torch.compiler.is_exporting():  # of what a program is called with, its caller checks the lengths
        return lengths.to(torch.int64)
    on_host = lengths.to("cpu", torch.int64)
    if batch > 0:
        shortest, longest = (int(limit) for limit in on_host.aminmax())
        if shortest < 0 or longest > steps:
            raise ArgumentValueError(f"{name}: {argument} must be in 0..S = 0..{steps}, got {shortest}..{longest}")
    return on_host


def run_recurrent(rnn: nn.Module, x: Tensor, lengths: Tensor, states: States | None = None) -> tuple[Tensor, States]:
    r"""The results of ``rnn`` on packed sentences, padded with zeros; an empty sentence keeps its initial states.

    rnn: an ``nn.LSTM``, ``nn.GRU``, or what is called alike. x: (B, S, n), or (S, B, n) with batch_first=False.
    lengths: (B,) int64 on the CPU, 0..S. states: the first ones, as ``rnn`` takes them; None: zeros.

    Returns outputs, (B, S, \*) or (S, B, \*), and the last states.
    """
    if torch.compiler.is_exporting() and can_scan(rnn):
        outputs, found = run_scanned(rnn, x, lengths, (states,) if isinstance(states, Tensor) else (states or ()))
        return outputs, found[0] if isinstance(rnn, nn.GRU) else (found[0], found[1])
    axis = 1 if getattr(rnn, "batch_first", True) else 0
    if x.shape[axis] == 0:  # RNNs refuse a sequence of length 0: compute on one step, and drop it
        padded = functional.pad(x, (0, 0, 0, 1) if axis == 1 else (0, 0, 0, 0, 0, 1))
        outputs, last = run_recurrent(rnn, padded, lengths, states)
        return outputs.narrow(axis, 0, 0), last
    if isinstance(rnn, nn.LSTM | nn.GRU) and _is_stock_call(rnn, x, lengths, states):
        if _are_few(rnn, x.shape[axis], lengths):
            return _run_few(rnn, x, lengths, states)
        if _gains(rnn, x.shape[axis], lengths):
            return _run_fused(rnn, x, lengths, states)
    return _run_packed(rnn, x, lengths, states)


def run_tokens(
    rnn: nn.Module, embedding: nn.Module, dropout: nn.Module, tokens: Tensor, lengths: Tensor
) -> tuple[Tensor, States]:
    """``run_recurrent`` on ``dropout(embedding(tokens))``. tokens: (B, S), with batch_first=True."""
    if tokens.shape[1] > 0 and isinstance(rnn, nn.LSTM | nn.GRU) and not torch.compiler.is_exporting():
        distinct = embed_distinct(embedding, dropout, tokens)
        if (
            distinct is not None
            and _is_stock_call(rnn, distinct.rows, lengths, None)
            and not _are_few(rnn, tokens.shape[1], lengths)
            and bool((lengths > 0).any())
        ):
            return _run_fused(rnn, distinct.rows, lengths, None, distinct.token_rows)
    return run_recurrent(rnn, dropout(embedding(tokens)), lengths)


def run_sequence(
    rnn: nn.Module, sequence: PackedSequence, states: States | None = None
) -> tuple[PackedSequence, States]:
    """The results of ``rnn`` for a ``PackedSequence``: another one and the states. states: see ``run_recurrent``."""
    data, sizes, order, place = sequence
    batch = int(sizes[0])
    lengths = (sizes[:, None] > torch.arange(batch)).sum(0)  # the largest first
    stock = rnn if isinstance(rnn, nn.LSTM | nn.GRU) and _is_stock_call(rnn, data, lengths, states) else None
    if stock is None or not _gains(stock, len(sizes), lengths):
        found: tuple[PackedSequence, States] = rnn(sequence, states)
        return found
    rows = sorted_rows(lengths, torch.arange(batch) if order is None else order, (len(sizes), 1))
    of_rows, last = _run_layers(stock, rows, data, batch, states)
    return PackedSequence(of_rows, sizes, order, place), last


def _gains(rnn: nn.LSTM | nn.GRU, longest: int, lengths: Tensor) -> bool:
    """Whether our fused layers are faster than PyTorch's own."""
    if not bool((lengths > 0).any()):  # nothing but padding
        return False
    # Without padding PyTorch's LSTM is faster.
    return not isinstance(rnn, nn.LSTM) or not bool((lengths == longest).all())


def _are_few(rnn: nn.LSTM | nn.GRU, longest: int, lengths: Tensor) -> bool:
    """Whether ``run_few`` supports this call and is the fastest."""
    count = lengths.shape[0]
    return (
        0 < count <= MAX_SENTENCES
        and (count <= MAX_WITHOUT_PADDING or _gains(rnn, longest, lengths))
        and not torch.is_grad_enabled()
        and not (rnn.training and rnn.dropout > 0 and rnn.num_layers > 1)
        and choose(None, "cpu") == "cpu"
    )


def _is_stock_call(rnn: nn.LSTM | nn.GRU, x: Tensor, lengths: Tensor, states: States | None) -> bool:
    """Whether ``rnn`` is a stock layer on the CPU, in eager mode, and all arguments fit it. x: (*, n)."""
    if not runs_eagerly(x.device.type) or not is_stock(rnn):  # in this order: dynamo traces the first
        return False
    is_lstm = isinstance(rnn, nn.LSTM)
    of_states = (states,) if isinstance(states, Tensor) else (states or ())
    directions = 2 if rnn.bidirectional else 1
    gates = (4 if is_lstm else 3) * rnn.hidden_size
    shapes = [(gates, rnn.input_size), (gates, rnn.hidden_size), *([(gates,), (gates,)] if rnn.bias else [])]
    upper = [(gates, directions * rnn.hidden_size), *shapes[1:]]
    weights = rnn.all_weights
    first = (rnn.num_layers * directions, lengths.shape[0], rnn.hidden_size)
    return (
        rnn.proj_size == 0
        and (states is None or (isinstance(states, Tensor) != is_lstm and len(of_states) == 1 + is_lstm))
        and all(is_plain(state) and tuple(state.shape) == first for state in of_states)
        and is_plain(x)
        and x.is_cpu
        and x.dtype in (torch.float32, torch.float64)
        and x.shape[-1] == rnn.input_size
        and len(weights) == rnn.num_layers * directions
        and all(
            [tuple(weight.shape) for weight in of_one] == (shapes if n < directions else upper)
            for n, of_one in enumerate(weights)
        )
        and all(
            (y.dtype, y.device) == (x.dtype, x.device)
            for y in (*of_states, *(weight for of_one in weights for weight in of_one))
        )
    )


def _run_few(rnn: nn.LSTM | nn.GRU, x: Tensor, lengths: Tensor, states: States | None) -> tuple[Tensor, States]:
    first = (states,) if isinstance(states, Tensor) else (states or ())
    outputs, *last = run_few(rnn, x if rnn.batch_first else x.transpose(0, 1), lengths, first)
    outputs = outputs if rnn.batch_first else outputs.transpose(0, 1)
    return outputs, last[0] if isinstance(rnn, nn.GRU) else (last[0], last[1])


def _run_fused(
    rnn: nn.LSTM | nn.GRU, x: Tensor, lengths: Tensor, states: States | None, index: Tensor | None = None
) -> tuple[Tensor, States]:
    """x: (B, S, n), or (U, n) with an index (B, S) of rows; the first two axes in the order of ``rnn``."""
    batch, shape = lengths.shape[0], (x if index is None else index).shape[:2]
    rows = find_rows(lengths, (shape[1], 1) if rnn.batch_first else (1, batch))
    if index is None:
        x = x.flatten(0, 1).index_select(0, rows.source)
    else:
        index = index.flatten().index_select(0, rows.source)
    of_rows, last = _run_layers(rnn, rows, x, batch, states, index)
    outputs = x.new_zeros(shape.numel(), of_rows.shape[1]).index_copy(0, rows.source, of_rows)
    return outputs.unflatten(0, shape), last


def _run_layers(
    rnn: nn.LSTM | nn.GRU,
    rows: Rows,
    of_rows: Tensor,
    batch: int,
    states: States | None,
    index: Tensor | None = None,
) -> tuple[Tensor, States]:
    """of_rows: (N, n), or (U, n) with an index (N,) of rows.

    Returns the outputs of all rows, and the last states in the order of the batch.
    """
    directions = 2 if rnn.bidirectional else 1
    first = (states,) if isinstance(states, Tensor) else states
    last: list[tuple[Tensor, ...]] = []
    for layer in range(rnn.num_layers):
        if layer > 0 and rnn.dropout > 0:
            of_rows = functional.dropout(of_rows, rnn.dropout, rnn.training)
        own = slice(layer * directions, (layer + 1) * directions)
        of_layer = [state[own].index_select(1, rows.order) for state in first or ()]
        hidden, cell = (*of_layer, None, None)[:2]
        of_rows, *after = run_layer(rows, of_rows, hidden, cell, rnn.all_weights[own], index if layer == 0 else None)
        last.append(tuple(state for state in after if state is not None))
    zeros = of_rows.new_zeros(rnn.num_layers * directions, batch, rnn.hidden_size)
    kinds = [torch.cat(of_kind) for of_kind in zip(*last, strict=True)]
    found = [(zeros if first is None else first[n]).index_copy(1, rows.order, state) for n, state in enumerate(kinds)]
    return of_rows, found[0] if isinstance(rnn, nn.GRU) else (found[0], found[1])


def _run_packed(rnn: nn.Module, x: Tensor, lengths: Tensor, states: States | None) -> tuple[Tensor, States]:
    batch_first = bool(getattr(rnn, "batch_first", True))
    steps = x.shape[1 if batch_first else 0]
    is_empty: Tensor = lengths == 0
    empty = None
    if bool(is_empty.any()):
        # Packed sentences need at least one step: an empty one gets a step of zeros, which is dropped below.
        empty = is_empty.to(x.device)
        padding = empty[:, None, None] if batch_first else empty[:, None]
        x = x.masked_fill(padding, 0.0)
    first = () if states is None else (states,)
    if empty is None and bool((lengths == steps).all()):  # nothing to pack, and PyTorch is faster without
        outputs, last = rnn(x, *first)
    else:
        options = {"batch_first": batch_first}
        packed = pack_padded_sequence(x, lengths.clamp(min=1), enforce_sorted=False, **options)
        outputs, last = rnn(packed, *first)
        outputs, _ = pad_packed_sequence(outputs, total_length=steps, **options)
    if empty is not None:
        outputs = outputs.masked_fill(padding, 0.0)
        kinds = (last,) if isinstance(last, Tensor) else last
        before = (states,) if isinstance(states, Tensor) else (states or [kind.new_zeros(()) for kind in kinds])
        kept = tuple(torch.where(empty[:, None], old, new) for old, new in zip(before, kinds, strict=True))
        last = kept[0] if isinstance(last, Tensor) else kept
    return outputs, last
