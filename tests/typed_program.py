"""A program that uses the package under ``mypy --strict``; ``make lint`` reads it, nothing runs it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import attn_kernels
from attn_kernels import Attention, BahdanauAttention, LuongAttention, Memory
from attn_kernels.distributed import joint_mean, sharded_additive_attention
from attn_kernels.fusing import FuseReport
from attn_kernels.mechanisms import (
    AlignmentsState,
    AttentionPooling,
    LocationSensitiveAttention,
    MonotonicAttention,
    coverage_loss,
    reorder_state,
)
from attn_kernels.patching import Fused, NotSupported, Report, adapts
from attn_kernels.seq2seq import Hypothesis, Seq2Seq


def functions(query: Tensor, keys: Tensor, values: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    result = attn_kernels.additive_attention(query, keys, values, v, memory_lengths=lengths, scale=2)
    assert_type(result, Attention)
    context, alignments = result
    assert context is not None and alignments is not None  # without values, or with need_weights=False
    assert_type(attn_kernels.additive_scores(query, keys, v), Tensor)
    assert_type(attn_kernels.dot_attention(query, keys, None).alignments, Tensor | None)
    assert_type(attn_kernels.prepare_keys(keys), Tensor | None)
    assert_type(attn_kernels.backends()["cpu"].available, bool)
    assert_type(joint_mean(context.sum(), 3), Tensor)
    assert_type(sharded_additive_attention(query, keys, values, v), Attention)
    return context, alignments


def modules(outputs: Tensor, states: Tensor) -> Tensor:
    attention = BahdanauAttention(4, 8, 16, normalize=True, dtype=torch.float64)
    memory = attention.memory(outputs)
    assert_type(memory, Memory)
    assert_type(memory.keys, Tensor)
    assert_type(attention.forward(states, memory), Attention)
    assert_type(attention(states, memory, need_weights=False), Attention)  # nn.Module alone says Any
    LuongAttention(4, 8, score="general", device="cpu").reset_parameters()
    MonotonicAttention(4, 8, 16).extra_repr()
    assert_type(AttentionPooling(8, 16)(outputs).context, Tensor)
    location = LocationSensitiveAttention(4, 8, 16)
    state = location.initial_state(memory)
    context, alignments, state = location(states, memory, state)
    assert_type(context, Tensor)
    reorder_state(AlignmentsState(alignments), torch.zeros(1, 1, dtype=torch.int64))
    assert_type(coverage_loss(alignments), Tensor)
    return context


def models(model: nn.Module, tokens: Tensor, lengths: Tensor) -> list[int]:
    assert_type(attn_kernels.patch(model), Report)
    assert_type(attn_kernels.fuse(model, always=True), FuseReport)
    attn_kernels.unfuse(model)
    with attn_kernels.patched(model), attn_kernels.fused(model):
        pass
    translator = Seq2Seq(10, 10, attention="luong-dot", input_feeding=False)
    logits, _ = translator(tokens, lengths, tokens)
    assert_type(logits, Tensor)
    hypotheses = translator.generate(tokens, lengths, beam_size=2)
    assert_type(hypotheses, list[list[Hypothesis]])
    return hypotheses[0][0].tokens


class Mine(nn.Module):
    v: Tensor


@adapts(Mine)
class FusedMine(Fused):
    v: Tensor

    def attend(self, query: Tensor, keys: Tensor) -> Attention | NotSupported:
        if query.dim() != 2:
            return NotSupported("several queries")
        return attn_kernels.additive_attention(query, keys, keys, self.v)
