"""Search. Written for K hypotheses per sentence: they are K queries on one memory, which is never copied for them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..memory import Memory
from .decoder import Decoder, DecoderState


class Hypothesis(NamedTuple):
    """One output for one sentence.

    tokens: T of them, without bos and eos.
    score: the sum of the log-probabilities of the tokens, and of eos where it was reached.
    alignments: (T, S), over the S steps of this sentence: where each token looked.
    """

    tokens: list[int]
    score: float
    alignments: Tensor


@torch.no_grad()
def greedy_search(
    decoder: Decoder, memory: Memory, state: DecoderState, *, bos: int, eos: int, max_length: int
) -> list[list[Hypothesis]]:
    """The likeliest token at every step, until eos or ``max_length`` steps. One hypothesis per sentence.

    A sentence that is finished leaves the batch and costs nothing more.
    """
    batch, source_steps = memory.keys.shape[:2]
    lengths = [source_steps] * batch if memory.memory_lengths is None else memory.memory_lengths.tolist()
    device = memory.keys.device
    rows = torch.arange(batch, device=device)  # the sentence of each row that is still searched
    token = torch.full((batch, 1), bos, device=device)
    scores = torch.zeros(batch, dtype=torch.float64, device=device)
    all_tokens, all_alignments = [], []  # of each step, for all sentences
    for _ in range(max_length):
        logits, alignments, state = decoder.step(token, state, memory)
        wide = torch.promote_types(logits.dtype, torch.float32)
        log_probability, token = logits.log_softmax(-1, dtype=wide).max(-1)
        scores[rows] += log_probability[:, 0]
        all_tokens.append(torch.full((batch,), eos, device=device).index_copy(0, rows, token[:, 0]))
        all_alignments.append(alignments.new_zeros(batch, source_steps).index_copy(0, rows, alignments[:, 0]))
        unfinished = (token[:, 0] != eos).nonzero().squeeze(1)
        if len(unfinished) == 0:
            break
        if len(unfinished) < len(rows):
            rows, token = rows[unfinished], token[unfinished]
            state, memory = state.select(unfinished), memory.select(unfinished)
    steps = len(all_tokens)
    histories = torch.stack(all_tokens, dim=1).tolist()
    tokens = [history[: history.index(eos) if eos in history else steps] for history in histories]
    alignments = torch.stack(all_alignments, dim=1)
    return [
        [Hypothesis(tokens[i], score, alignments[i, : len(tokens[i]), : lengths[i]].clone())]
        for i, score in enumerate(scores.tolist())
    ]
