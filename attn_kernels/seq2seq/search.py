"""Search. The K hypotheses of a sentence are K queries on one memory, which is never copied for them.

A step costs the same however long the hypotheses are: it stores what it chose and from where, and the hypotheses are
read off backwards at the end. A sentence that is finished leaves the batch and costs nothing more.

This is the specification, and what computes where fused/one_call.py, which does the same in C++, may not.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentValueError
from ..memory import Memory, padded
from ..types import attention_mask
from .decoder import Decoder
from .fused.inference import fast_decoder
from .fused.one_call import MAX_ROWS, search_in_one_call
from .options import SearchOptions
from .state import DecoderState


class Hypothesis(NamedTuple):
    """One output for one sentence.

    tokens: T of them, without bos and eos.
    score: the sum of the log-probabilities of the tokens, and of eos where it was reached; with the penalties of beam
        search if there are any.
    alignments: (T, S), over the S steps of this sentence: where each token looked.
    """

    tokens: list[int]
    score: float
    alignments: Tensor


def search(decoder: Any, memory: Memory, state: Any, options: SearchOptions) -> list[list[Hypothesis]]:
    """The hypotheses of each sentence. memory, state: as returned by ``encode``. options: as ``checked`` returns them.

    decoder: a ``Decoder``, or what has a ``step`` as that; a state has ``select`` and ``reorder``.
    """
    memory = padded(memory)
    if options.sample:
        return draw_samples(decoder, memory, state, options)
    found = search_in_one_call(decoder, memory, state, options) if isinstance(decoder, Decoder) else None
    if found is not None:
        return _hypotheses(memory, found.tokens, found.alignments, found.scores, found.lengths)
    if options.weight_dtype is not None:
        where = f"on the CPU, in float32, of a decoder as it was made, {MAX_ROWS} hypotheses at most, without NaN"
        raise ArgumentValueError(f"Seq2Seq.generate: weight_dtype needs a search that is one op: {where}")
    if options.beam_size == 1 and options.length_penalty == 0 and options.coverage_penalty == 0:
        return greedy_search(decoder, memory, state, options)
    return beam_search(decoder, memory, state, options)


def greedy_search(
    decoder: Decoder, memory: Memory, state: DecoderState, options: SearchOptions
) -> list[list[Hypothesis]]:
    """Greedy search: the most probable token in every step, until eos. Equals a beam search with one hypothesis."""
    batch, device = memory.batch_size, memory.keys.device
    rows = torch.arange(batch, device=device)
    tokens = torch.full((batch, 1), options.bos, device=device)
    lengths = torch.full_like(tokens, options.max_length)
    log_probabilities = []
    history = []
    sentences = memory
    steps, memory = fast_decoder(decoder, state, memory, 1, options.max_length)
    eos = options.eos
    for step in range(options.max_length):
        logits, alignments, state = steps.step(tokens, state, memory)
        log_probability, tokens = _log_probabilities(logits).max(2)
        log_probabilities.append(log_probability)
        history.append(_Step(rows, tokens, None, alignments))
        if eos in tokens.flatten().tolist():
            goes_on = tokens[:, 0] != eos
            lengths[rows[~goes_on]] = step
            stay = goes_on.nonzero().squeeze(1)
            if len(stay) == 0:
                break
            rows, tokens = rows[stay], tokens[stay]
            state, memory = state.select(stay), memory.select(stay)
    scores = torch.zeros(batch, 1, dtype=torch.float64, device=device)
    scores.index_add_(0, torch.cat([step.rows for step in history]), torch.cat(log_probabilities).double())
    return _trace(sentences, history, scores, lengths, torch.zeros_like(lengths))


def beam_search(
    decoder: Decoder, memory: Memory, state: DecoderState, options: SearchOptions
) -> list[list[Hypothesis]]:
    """For each sentence up to ``num_hypotheses``, best first; ``Seq2Seq.generate`` says how, and when a search ends.

    n below is the number of sentences still searched, w that of their hypotheses: 1 in the first step, then
    ``beam_size``, or as many as the vocabulary allows. Places without a hypothesis have score -inf.
    """
    device = memory.keys.device
    rows = torch.arange(memory.batch_size, device=device)  # (n,), the sentence of each row
    tokens = torch.full((memory.batch_size, 1), options.bos, device=device)
    scores = torch.zeros(memory.batch_size, 1, dtype=torch.float64, device=device)  # (n, w), log-probabilities
    coverage = _nothing_covered(memory)  # (n, w, S)
    finished = _Finished(memory.batch_size, options.beam_size, device)
    history = []
    sentences = memory
    steps, memory = fast_decoder(decoder, state, memory, options.beam_size, options.max_length)
    for step in range(1, options.max_length + 1):
        logits, alignments, state = steps.step(tokens, state, memory)
        candidates, parents, tokens = _extend(scores, logits, 2 * options.beam_size)
        totals = candidates / _length_factor(step, options.length_penalty)
        if options.coverage_penalty > 0:
            coverage = coverage + alignments
            totals = totals + options.coverage_penalty * _log_coverage(coverage).gather(1, parents)
        is_end = tokens == options.eos
        ended = totals.masked_fill(~is_end, -torch.inf)
        finished.add(rows, ended[:, : options.beam_size], step - 1, parents[:, : options.beam_size])
        # Among twice as many candidates as places, at most half end: each hypothesis has only one eos.
        width = min(options.beam_size, candidates.shape[1])
        scores, order = candidates.masked_fill(is_end, -torch.inf).topk(width, dim=1)
        parents, tokens = parents.gather(1, order), tokens.gather(1, order)
        history.append(_Step(rows, tokens, parents, alignments))
        if step == options.max_length:
            unfinished = totals.masked_fill(is_end, -torch.inf).gather(1, order)
            finished.add(rows, unfinished, step, torch.arange(width, device=device).expand_as(order))
            break
        # No token adds to a log-probability, no length divides by more, and the coverage term is at most 0.
        within_reach = scores[:, 0] / _length_factor(options.max_length, options.length_penalty)
        done = within_reach <= finished.scores[rows, options.hypotheses - 1]
        if options.early_stopping:
            done |= finished.scores[rows, -1] > -torch.inf
        stay = (~done).nonzero().squeeze(1)
        if len(stay) == 0:
            break
        if len(stay) < len(rows):
            rows, tokens, parents, scores, coverage = (x[stay] for x in (rows, tokens, parents, scores, coverage))
            state, memory = state.select(stay), memory.select(stay)
        state = state.reorder(parents)
        if options.coverage_penalty > 0:
            coverage = torch.take_along_dim(coverage, parents[..., None], dim=1)
    best = slice(options.hypotheses)
    return _trace(sentences, history, finished.scores[:, best], finished.lengths[:, best], finished.slots[:, best])


def draw_samples(
    decoder: Decoder, memory: Memory, state: DecoderState, options: SearchOptions
) -> list[list[Hypothesis]]:
    """For each sentence ``num_hypotheses`` independent outputs, in the order drawn, with their log-probabilities.

    A sentence leaves the batch when all of its samples have reached eos.
    """
    batch, device = memory.batch_size, memory.keys.device
    rows = torch.arange(batch, device=device)
    own = torch.arange(options.hypotheses, device=device).expand(batch, -1)  # each sample goes on from itself
    state = state.reorder(torch.zeros_like(own))
    tokens = torch.full_like(own, options.bos)
    running = torch.ones_like(own, dtype=torch.bool)
    scores = torch.zeros(batch, options.hypotheses, dtype=torch.float64, device=device)
    lengths = torch.zeros_like(own)
    history = []
    sentences = memory
    steps, memory = fast_decoder(decoder, state, memory, options.hypotheses, options.max_length)
    for _ in range(options.max_length):
        logits, alignments, state = steps.step(tokens, state, memory)
        tokens = _draw(logits, options.temperature, options.top_k, options.generator)
        log_probability = _log_probabilities(logits).gather(2, tokens[..., None]).squeeze(2)
        scores[rows] += log_probability.masked_fill(~running, 0.0)
        running = running & (tokens != options.eos)
        lengths[rows] += running
        history.append(_Step(rows, tokens, None, alignments))
        stay = running.any(1).nonzero().squeeze(1)
        if len(stay) == 0:
            break
        if len(stay) < len(rows):
            rows, tokens, running = rows[stay], tokens[stay], running[stay]
            state, memory = state.select(stay), memory.select(stay)
    return _trace(sentences, history, scores, lengths, own)


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _extend(scores: Tensor, logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` most probable continuations of each sentence, or all if there are fewer, best first.

    scores: (n, w). logits: (n, w, vocab). Returns their scores, the hypotheses that they continue and their tokens, all
    (n, min(count, w * vocab)).
    """
    # The best of all are among the best of each hypothesis: only these few are added up and compared.
    log_probabilities, tokens = _log_probabilities(logits).topk(min(count, logits.shape[2]), dim=2)
    each = tokens.shape[2]
    totals = (scores[..., None] + log_probabilities).flatten(1)
    best, order = totals.topk(min(count, totals.shape[1]), dim=1)
    return best, order // each, tokens.flatten(1).gather(1, order)


def _length_factor(length: int, penalty: float) -> float:
    """The length penalty, which divides the log-probability of ``length`` tokens, with eos (Wu et al. 2016, eq. 14)."""
    penalty_of_length: float = ((5 + length) / 6) ** penalty
    return penalty_of_length


def _nothing_covered(memory: Memory) -> Tensor:
    """(B, 1, S) float64: the initial coverage, 0 for the steps of a sentence and 1 for padding, which needs none."""
    allowed = attention_mask(memory.values, memory.memory_lengths, memory.mask)
    if allowed is None:
        return torch.zeros(memory.batch_size, 1, memory.keys.shape[1], dtype=torch.float64, device=memory.keys.device)
    return (~allowed).double()


def _log_coverage(coverage: Tensor) -> Tensor:
    """sum_j log(min(coverage_j, 1)), (n, w). coverage: (n, w, S); 0 counts as 1.2e-38, to keep the sum finite."""
    return coverage.clamp(torch.finfo(torch.float32).tiny, 1.0).log().sum(-1)


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token for each of logits (n, K, vocab): (n, K)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    tokens = None
    if top_k is not None:
        logits, tokens = logits.topk(min(top_k, logits.shape[2]), dim=2)
    # The largest logit is subtracted first, so that no temperature makes it infinite.
    logits = logits - logits.amax(dim=2, keepdim=True)
    probabilities = (logits / max(temperature, torch.finfo(logits.dtype).tiny)).softmax(dim=2)
    # Inverse transform sampling: torch.multinomial would draw a random number for each token of the vocabulary.
    cumulative = probabilities.cumsum(dim=2, dtype=torch.float64)
    drawn = torch.rand(*logits.shape[:2], 1, dtype=torch.float64, device=logits.device, generator=generator)
    chosen = torch.searchsorted(cumulative, drawn * cumulative[..., -1:], right=True)
    chosen = chosen.squeeze(2).clamp(max=logits.shape[2] - 1)  # NaN is beyond the end
    return chosen if tokens is None else tokens.gather(2, chosen[..., None]).squeeze(2)


class _Finished:
    """The K best finished hypotheses of each of B sentences, best first.

    scores: (B, K) float64, penalties included; -inf where there is none. lengths: (B, K), tokens without eos.
    slots: (B, K), which of the hypotheses of that length in the history it is.
    """

    def __init__(self, batch: int, count: int, device: torch.device) -> None:
        self.scores = torch.full((batch, count), -torch.inf, dtype=torch.float64, device=device)
        self.lengths = torch.zeros(batch, count, dtype=torch.int64, device=device)
        self.slots = torch.zeros_like(self.lengths)

    def add(self, rows: Tensor, scores: Tensor, length: int, slots: Tensor) -> None:
        """scores, slots: (n, m), for the sentences at rows, (n,); those with score -inf do not exist."""
        best, order = torch.cat([self.scores[rows], scores], dim=1).topk(self.scores.shape[1], dim=1)
        self.scores[rows] = best
        self.lengths[rows] = torch.cat([self.lengths[rows], torch.full_like(slots, length)], dim=1).gather(1, order)
        self.slots[rows] = torch.cat([self.slots[rows], slots], dim=1).gather(1, order)


class _Step(NamedTuple):
    """The record of a search step of n sentences, from w hypotheses to w'.

    rows: (n,), the sentences. tokens: (n, w'), the last of each new hypothesis. parents: (n, w'), the hypothesis that
    it continues; None where each goes on from itself. alignments: (n, w, S), of those given.
    """

    rows: Tensor
    tokens: Tensor
    parents: Tensor | None
    alignments: Tensor


def _trace(
    memory: Memory, history: list[_Step], scores: Tensor, lengths: Tensor, slots: Tensor
) -> list[list[Hypothesis]]:
    """Backtracks the hypotheses through the history, from their ends to their beginnings.

    scores, lengths, slots: (B, N), as of ``_Finished``. Those with score -inf are left out.
    """
    batch, count = slots.shape
    tokens = slots.new_zeros(batch, count, len(history))
    alignments = history[0].alignments.new_zeros(batch, count, len(history), memory.keys.shape[1])
    end = 0
    for is_straight, group in itertools.groupby(history, key=lambda step: step.parents is None and id(step.rows)):
        parts = list(group)
        begin, end = end, end + len(parts)
        if is_straight:  # all steps of the same sentences at once
            rows = parts[0].rows
            tokens[rows, :, begin:end] = torch.stack([step.tokens for step in parts], dim=2)
            alignments[rows, :, begin:end] = torch.stack([step.alignments for step in parts], dim=2)
    for t in reversed(range(len(history))):
        rows, chosen, parents, looked = history[t]
        if parents is None:
            continue
        # For a hypothesis that ended earlier this copies arbitrary tokens, which are cut off below; its slot stays.
        slot = slots[rows]
        parent = parents.gather(1, slot)
        tokens[rows, :, t] = chosen.gather(1, slot)
        alignments[rows, :, t] = torch.take_along_dim(looked, parent[..., None], dim=1)
        slots = slots.index_copy(0, rows, torch.where(lengths[rows] > t, parent, slot))
    return _hypotheses(memory, tokens, alignments, scores, lengths)


def _hypotheses(
    memory: Memory, tokens: Tensor, alignments: Tensor, scores: Tensor, lengths: Tensor
) -> list[list[Hypothesis]]:
    """tokens: (B, N, T). alignments: (B, N, T, S). scores, lengths: (B, N). Those with score -inf are left out."""
    batch = memory.batch_size
    steps = [memory.keys.shape[1]] * batch if memory.memory_lengths is None else memory.memory_lengths.tolist()
    scored, ends, outputs = scores.tolist(), lengths.tolist(), tokens.tolist()
    return [
        [
            Hypothesis(outputs[i][k][:end], score, alignments[i, k, :end, : steps[i]].clone())
            for k, (score, end) in enumerate(zip(scored[i], ends[i], strict=True))
            if score != -torch.inf
        ]
        for i in range(batch)
    ]
