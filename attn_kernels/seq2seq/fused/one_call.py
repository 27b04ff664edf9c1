"""A greedy or beam search on the CPU as one op: the loop over steps, and all arithmetic of a step, in C++.

For one sentence, most of a step's time is not spent on products, but on small operators with a result tensor each, and
on Python. The op has neither. It reads the parameters in place, row by row, and needs only those derived values that
FastDecoder also computes: prepared keys, and projected values if projecting them is worth it. Rounded weights are those
in the cache of rounded.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import ops
from ...backends import choose
from ...gemm import linear
from ...memory import Memory
from ...scores import AdditiveScore
from ..options import SearchOptions
from ..state import DecoderModules, DecoderState
from .attention import prepare
from .eligibility import can_fuse_steps
from .inputs import CellWeights
from .rounded import Part, rounded

MAX_ROWS = 64  # hypotheses of all sentences: with more, products of packed weights save as much as the loop does
MAX_TABLE_BYTES = 1 << 26  # of the products with embeddings, which are cached as tokens occur


class Found(NamedTuple):
    """The results of a search: N hypotheses of each of B sentences, best first; T steps."""

    tokens: Tensor  # (B, N, T); the first `lengths` tokens are valid
    lengths: Tensor  # (B, N), without eos
    scores: Tensor  # (B, N) float64, -inf if there is no such hypothesis
    alignments: Tensor  # (B, N, T, S)


def search_in_one_call(
    decoder: DecoderModules, memory: Memory, state: DecoderState, options: SearchOptions
) -> Found | None:
    """The results of ``greedy_search`` and ``beam_search``. Of equally likely tokens the first one is taken.

    None if the steps have to be called from Python: decoders that ``FastDecoder`` may not replace, other backends or
    activations of the attention, many rows (``FastDecoder`` is faster), parameters without contiguous rows, rounded
    weights of a dtype other than float32, and NaN logits.
    """
    rows = memory.batch_size * options.beam_size
    if not 0 < rows <= MAX_ROWS or not can_fuse_steps(decoder, state, memory):
        return None
    if options.weight_dtype is not None and memory.keys.dtype != torch.float32:
        return None
    if getattr(decoder.attention, "activation", "tanh") != "tanh":  # the C++ loop supports no other activation
        return None
    if choose(decoder.attention.backend, "cpu") != "cpu" or (memory.mask is not None and memory.mask.dim() != 2):
        return None
    states = (*state.hidden, *state.cell, *(() if state.feed is None else (state.feed,)))
    if any(x.shape[1] != 1 for x in states) or decoder.embedding.weight.shape[0] != decoder.output.weight.shape[0]:
        return None
    modules = (decoder.embedding, decoder.rnn, decoder.attention, decoder.attentional, decoder.output)
    read = (*states, *(parameter for module in modules for parameter in module.parameters()))
    if any(x.dim() > 0 and x.shape[-1] > 1 and x.stride(-1) != 1 for x in read):
        return None
    found = Found(*ops.kernel("decoder_search", "cpu")(*_arguments(decoder, memory, state, options)))
    if found.scores.shape[1] == 0:  # a logit was NaN
        return None
    return found._replace(alignments=found.alignments.unflatten(0, found.lengths.shape))


def _arguments(decoder: DecoderModules, memory: Memory, state: DecoderState, options: SearchOptions) -> tuple[Any, ...]:
    """The arguments of the op, in the order of its schema."""
    attention = decoder.attention
    score = attention.make_score(memory)
    vectors: tuple[Any, ...] = (None, None, None, *score)
    if isinstance(score, AdditiveScore):
        vectors = (score.v, score.bias, prepare(score, memory.keys, "cpu"), 1.0)
    projection, factor, eps = attention.query_projection, attention.query_factor(), attention.query_eps()
    weight, values = decoder.attentional.weight, memory.values
    split = values.shape[2]
    of_context: Tensor = weight[:, :split]
    # For one sentence, a product of one row takes as long as one of several: both read the whole weight.
    each_step = max(options.beam_size, 2 if memory.batch_size == 1 else 1)
    is_projected = projects_values(memory, decoder.hidden_size, each_step * options.max_length)
    blocks: list[Tensor] = []
    if options.weight_dtype is not None:
        parts = rounded(weight, Part(0, split, in_blocks=not is_projected), Part(split, weight.shape[1]))
        if is_projected:
            of_context, parts[0] = parts[0], weight.new_empty(0)
        blocks = _blocks(decoder, *parts)
    if is_projected:
        values = linear(values.flatten(0, 1), of_context).unflatten(0, values.shape[:2])
    cells, read = [CellWeights(*of_layer) for of_layer in decoder.rnn.all_weights], decoder.embedding.weight.shape[1]
    layers = []
    for n, cell in enumerate(cells):
        bias = cell.bias_x + cell.bias_h if isinstance(decoder.rnn, nn.LSTM) else cell.bias_x
        layers += [cell.x[:, read:] if n == 0 else cell.x, cell.h, bias, cell.bias_h]
    return (
        layers,
        decoder.embedding.weight,
        cells[0].x[:, :read],
        None if projection is None else projection.weight,
        1.0 if factor is None else float(factor),
        -1.0 if eps is None else eps,
        None if is_projected else of_context,
        weight[:, split:],
        decoder.output.weight,
        decoder.output.bias,
        memory.keys,
        values,
        *vectors,
        memory.memory_lengths,
        memory.mask,
        *([x.squeeze(1) for x in of] for of in (state.hidden, state.cell)),
        None if state.feed is None else state.feed.squeeze(1),
        options.bos,
        options.eos,
        options.max_length,
        options.beam_size,
        options.num_hypotheses,
        options.length_penalty,
        options.coverage_penalty,
        bool(options.early_stopping),
        MAX_TABLE_BYTES,
        blocks,
    )


def _blocks(decoder: DecoderModules, of_context: Tensor, of_state: Tensor) -> list[Tensor]:
    """The blocks of all weights that are read in each step, in the order of the op.

    of_context, of_state: the blocks of the attentional layer.
    """

    def whole(weight: Tensor) -> Tensor:
        return rounded(weight, Part(0, weight.shape[1]))[0]

    first, *cells = (CellWeights(*of_layer) for of_layer in decoder.rnn.all_weights)
    read, projection = decoder.embedding.weight.shape[1], decoder.attention.query_projection
    of_token, of_feed = rounded(first.x, Part(0, read), Part(read, first.x.shape[1]))
    layers = [of_feed, whole(first.h)]
    for cell in cells:
        layers += [whole(cell.x), whole(cell.h)]
    query = of_token.new_empty(0) if projection is None else whole(projection.weight)
    return [*layers, of_token, query, of_context, of_state, whole(decoder.output.weight)]


def projects_values(memory: Memory, size: int, rows: int) -> bool:
    """Whether to project all values once, not the context in each step. rows: the number of contexts of a sentence."""
    source, values = memory.keys.shape[1], memory.values.shape[2]
    return 0 < 2 * source <= rows and values >= size
