"""A greedy or beam search on the CPU as one op: the loop over steps, and all that a step computes, in C++.

At one sentence most of a step's time is not spent on products: between them are operators, each with a result of its
own, and Python. The op has neither. It reads the parameters as they lie, or in blocks that are kept between searches
(blocks.py). Made in each search is what FastDecoder makes, too: prepared keys, and values that are projected where that
pays.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

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
from .blocks import Part, forms_of
from .eligibility import can_fuse_steps
from .inputs import CellWeights

Form = Literal["blocks", "rounded blocks"]  # of weights that are read in each step

MAX_ROWS = 64  # hypotheses of all sentences: with more, products of packed weights gain what the loop does
MAX_TABLE_BYTES = 1 << 26  # of the products with embeddings, which are kept as tokens come


class Found(NamedTuple):
    """What a search found, N hypotheses of each of B sentences, best first; T steps."""

    tokens: Tensor  # (B, N, T), of which the first of `lengths` count
    lengths: Tensor  # (B, N), without eos
    scores: Tensor  # (B, N) float64, -inf where there is none
    alignments: Tensor  # (B, N, T, S)


def search_in_one_call(
    decoder: DecoderModules, memory: Memory, state: DecoderState, options: SearchOptions
) -> Found | None:
    """The results of ``greedy_search`` and ``beam_search``; of likeliest tokens that are equal the first is taken.

    None where steps are to be called from Python: what ``FastDecoder`` may not stand for, other backends or activations
    of the attention, many rows, for which it is faster, parameters whose rows are not contiguous, weights of another
    dtype than float32 that are to be rounded, and logits that are no numbers.
    """
    rows = memory.batch_size * options.beam_size
    if not 0 < rows <= MAX_ROWS or not can_fuse_steps(decoder, state, memory):
        return None
    if options.weight_dtype is not None and memory.keys.dtype != torch.float32:
        return None
    if getattr(decoder.attention, "activation", "tanh") != "tanh":  # the loop in C++ has no other
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
    if found.scores.shape[1] == 0:  # met NaN
        return None
    return found._replace(alignments=found.alignments.unflatten(0, found.lengths.shape))


def _arguments(decoder: DecoderModules, memory: Memory, state: DecoderState, options: SearchOptions) -> tuple[Any, ...]:
    """Of the op, in the order of its schema."""
    attention = decoder.attention
    score = attention.make_score(memory)
    vectors: tuple[Any, ...] = (None, None, None, *score)
    if isinstance(score, AdditiveScore):
        vectors = (score.v, score.bias, prepare(score, memory.keys, "cpu"), 1.0)
    projection, factor, eps = attention.query_projection, attention.query_factor(), attention.query_eps()
    form: Form = "blocks" if options.weight_dtype is None else "rounded blocks"
    layers, of_token, blocks = _layers(decoder, form)
    blocks += [decoder.output.weight.new_empty(0)] if projection is None else _whole(projection.weight, form)
    weight, values = decoder.attentional.weight, memory.values
    split = values.shape[2]
    of_context: Tensor = weight[:, :split]
    # Where one sentence is searched, a product of one row takes as long as one of several: all read the weight.
    each_step = max(options.beam_size, 2 if memory.batch_size == 1 else 1)
    is_projected = projects_values(memory, decoder.hidden_size, each_step * options.max_length)
    context_form = form if not is_projected else None if options.weight_dtype is None else "rounded"
    made, of_state = forms_of(weight, Part(0, split, context_form), Part(split, weight.shape[1], form))
    if is_projected:
        projection_of_values = of_context if context_form is None else made
        values = linear(values.flatten(0, 1), projection_of_values).unflatten(0, values.shape[:2])
        made = weight.new_empty(0)
    blocks += [made, of_state, *_whole(decoder.output.weight, form)]
    return (
        layers,
        decoder.embedding.weight,
        of_token,
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
        options.weight_dtype is not None,
    )


def _layers(decoder: DecoderModules, form: Form) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """The weights and biases of all layers, four each; what the first reads of a token; the blocks of all of these."""
    read = decoder.embedding.weight.shape[1]
    layers, blocks, of_token = [], [], []
    for n, cell in enumerate(CellWeights(*of_layer) for of_layer in decoder.rnn.all_weights):
        begin = 0 if n else read  # of the columns of what is read beside a token
        bias = cell.bias_x + cell.bias_h if isinstance(decoder.rnn, nn.LSTM) else cell.bias_x
        layers += [cell.x[:, begin:], cell.h, bias, cell.bias_h]
        of_x, *token = forms_of(cell.x, Part(begin, cell.x.shape[1], form), *([] if n else [Part(0, read, form)]))
        blocks += [of_x, *_whole(cell.h, form)]
        of_token += token
    return layers, decoder.rnn.all_weights[0][0][:, :read], [*blocks, *of_token]


def _whole(weight: Tensor, form: Form) -> list[Tensor]:
    return forms_of(weight, Part(0, weight.shape[1], form))


def projects_values(memory: Memory, size: int, rows: int) -> bool:
    """Whether to project all values once rather than the context in each step. rows: contexts of a sentence."""
    source, values = memory.keys.shape[1], memory.values.shape[2]
    return 0 < 2 * source <= rows and values >= size
