"""The attentions of ``Seq2Seq``: constructors by name, and the check of modules that users pass instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..attention_module import AttentionModule
from ..errors import ArgumentTypeError, ArgumentValueError
from ..mechanisms import (
    CoverageAttention,
    DynamicConvolutionAttention,
    ForwardAttention,
    GMMAttention,
    HeadsMemory,
    LayerNormBahdanauAttention,
    LocalAttention,
    LocationSensitiveAttention,
    MonotonicAttention,
    MonotonicChunkwiseAttention,
    MultiHeadAttention,
    NormalizedAttention,
    PointerAttention,
    StepwiseMonotonicAttention,
)
from ..modules import BahdanauAttention, CosineAttention, LuongAttention

# A constructor: (query_size, memory_size, units, *, backend, device, dtype).
Make = Callable[..., AttentionModule]


def _luong(score: str) -> Make:
    def make(query_size: int, memory_size: int, units: int, **options: Any) -> LuongAttention:
        return LuongAttention(query_size, memory_size, units if score == "concat" else None, score=score, **options)

    return make


def _with(made: Make, **settings: Any) -> Make:
    return lambda *sizes, **options: made(*sizes, **settings, **options)


def _without_ops(name: str, made: Make) -> Make:
    """The constructor of a mechanism in plain PyTorch, which has no backends other than the reference."""

    def make(*sizes: int, backend: str | None = None, **options: Any) -> AttentionModule:
        if backend not in (None, "reference"):
            expected = f"None or 'reference' with attention={name!r}, which is plain PyTorch"
            raise ArgumentValueError(f"Seq2Seq: backend must be {expected}, got {backend!r}")
        return made(*sizes, **options)

    return make


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
    "gmm": _without_ops("gmm", GMMAttention),
    "dynamic-convolution": DynamicConvolutionAttention,
}
CALLED: dict[str, Make] = {  # there is no fused form of their steps
    "multi-head": MultiHeadAttention,
    "layer-norm": _without_ops("layer-norm", LayerNormBahdanauAttention),
    "milk": _with(MonotonicChunkwiseAttention, chunk_size=None),
}
ATTENTIONS = STATELESS | STATEFUL | CALLED


def attend_step(attention: Any, states: Tensor, memory: Any, before: Any = None) -> tuple[Tensor, Tensor, Any]:
    """Calls an attention with the states of a decoder as queries, (B, K or T, hidden_size).

    before: the state of a stateful attention, whose queries belong to one step of the hypotheses; None for others.
    Returns context, alignments, averaged over heads, and the next state of the attention, or None.
    """
    averaged: dict[str, bool] = {"average": True} if isinstance(memory, HeadsMemory) else {}
    given = () if before is None else (before,)
    context, alignments, *after = attention(states, memory, *given, **averaged)
    return context, alignments, after[0] if after else None


def check_attention(attention: object, hidden_size: int, backend: str | None) -> int:
    """Checks that a decoder can call an attention module, and returns its memory_size, for the encoder."""
    module = attention.attention if isinstance(attention, NormalizedAttention) else attention
    if not isinstance(module, AttentionModule) or isinstance(module, PointerAttention):
        expected = "a name, a mechanism that returns context and alignments, or NormalizedAttention"
        raise ArgumentTypeError(f"Seq2Seq: attention must be {expected}, got {type(attention).__name__}")
    name, size = type(module).__name__, module.memory_size
    if backend is not None:
        raise ArgumentValueError(f"Seq2Seq: backend must be None with a module, which has its own, got {backend!r}")
    if module.query_size != hidden_size:
        expected = f"query_size = hidden_size = {hidden_size}"
        raise ArgumentValueError(f"Seq2Seq: attention must have {expected}, got {name} with {module.query_size}")
    if size not in (2 * hidden_size, hidden_size):
        expected = f"memory_size = 2 hidden_size = {2 * hidden_size}, or {hidden_size} for the sum of both directions"
        raise ArgumentValueError(f"Seq2Seq: attention must have {expected}, got {name} with {size}")
    if getattr(module, "output_size", size) != size:
        expected = f"output_size = memory_size = {size}"
        raise ArgumentValueError(f"Seq2Seq: attention must have {expected}, got {name} with {module.output_size}")
    return size
