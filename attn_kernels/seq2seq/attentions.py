"""The attentions of ``Seq2Seq`` by name: how each is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..attention_module import AttentionModule
from ..mechanisms import (
    CoverageAttention,
    DynamicConvolutionAttention,
    ForwardAttention,
    GMMAttention,
    LocalAttention,
    LocationSensitiveAttention,
    MonotonicAttention,
    MonotonicChunkwiseAttention,
    StepwiseMonotonicAttention,
)
from ..modules import BahdanauAttention, CosineAttention, LuongAttention

# Called with query_size, memory_size, units, and backend, device and dtype by name.
Make = Callable[..., AttentionModule]


def _luong(score: str) -> Make:
    def make(query_size: int, memory_size: int, units: int, **options: Any) -> LuongAttention:
        return LuongAttention(query_size, memory_size, units if score == "concat" else None, score=score, **options)

    return make


def _with(made: Make, **settings: Any) -> Make:
    return lambda *sizes, **options: made(*sizes, **settings, **options)


def _without_backend(made: Make) -> Make:
    """Of a mechanism that calls no op."""
    return lambda *sizes, backend=None, **options: made(*sizes, **options)


STATELESS: dict[str, Make] = {
    "bahdanau": BahdanauAttention,
    "bahdanau-normalized": _with(BahdanauAttention, normalize=True),
    "luong-dot": _luong("dot"),
    "luong-general": _luong("general"),
    "luong-concat": _luong("concat"),
    "cosine": CosineAttention,
}
STATEFUL: dict[str, Make] = {
    "location": LocationSensitiveAttention,
    "location-cumulative": _with(LocationSensitiveAttention, cumulative=True),
    "coverage": CoverageAttention,
    "forward": ForwardAttention,
    "forward-agent": _with(ForwardAttention, transition_agent=True),
    "monotonic": MonotonicAttention,
    "mocha": MonotonicChunkwiseAttention,
    "stepwise-monotonic": StepwiseMonotonicAttention,
    "local-m": _with(LocalAttention, mode="local-m"),
    "local-p": _with(LocalAttention, mode="local-p"),
    "gmm": _without_backend(GMMAttention),
    "dynamic-convolution": DynamicConvolutionAttention,
}
ATTENTIONS = STATELESS | STATEFUL
