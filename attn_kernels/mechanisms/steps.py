"""The base of mechanisms whose alignments are not a softmax of scores: it handles masks, dtypes and the context.

Monotonic attention, mixtures of Gaussians and filters of previous alignments are such mechanisms. No op computes their
alignments and context in one pass. The ops compute the scores; the rest runs in PyTorch, in float32 or wider.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_masks
from ..errors import ArgumentTypeError, ArgumentValueError
from ..memory import Memory
from ..packed_memory import padding_needed
from ..types import DTYPES, attention_mask, device_type, wide_dtype
from .reading import Source, read, weighted_sum, without_autocast
from .stateful import StatefulAttention, StatefulResult


class AlignmentsState(NamedTuple):
    """alignments: (B, K, Tk), of the step before, in float32 or wider."""

    alignments: Tensor


class AlignmentsAttention(StatefulAttention):
    """The base of stateful mechanisms that compute alignments; this class computes the context from them.

    A subclass defines ``initial_state`` and ``_alignments``. The latter gets finite padding, and zeros for a query that
    may attend no step, so that no gradient becomes NaN times 0.
    """

    reads_keys: ClassVar[bool] = True

    def reset_parameters(self) -> None:
        for layer in self.children():  # in the order in which the constructor made them
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        self._reset_scores()

    def _step(self, query: Tensor, memory: Memory, state: Any) -> StatefulResult:
        check_masks(self._name, query, memory.keys, memory.memory_lengths, memory.mask)
        allowed = attention_mask(memory.keys, memory.memory_lengths, memory.mask)
        if allowed is not None:  # 0 * NaN is NaN
            query = query.masked_fill(~allowed.any(2)[..., None], 0.0)
        source = read(memory, allowed, query, self.backend, self.reads_keys)
        alignments, state = self._alignments(query, source, state)
        dtype = result_dtype(query)
        with without_autocast(query):
            context = weighted_sum(alignments, source)
        return StatefulResult(context.to(dtype), alignments.to(dtype), state)

    def _alignments(self, query: Tensor, source: Source, state: Any) -> tuple[Tensor, Any]:
        """Alignments (B, K, Tk) in float32 or wider, zero where not allowed, and the next state.

        query: (B, K, query_size).
        """
        raise NotImplementedError

    def _check_axes(self, memory: Memory, hypotheses: int) -> tuple[int, int]:
        """Checks the arguments of ``initial_state`` and returns B and K."""
        name = f"{self._name}.initial_state"
        if not isinstance(memory, Memory):
            made = f"made by {self._name}.memory(...)"
            raise ArgumentTypeError(f"{name}: memory must be a Memory, {made}, got {type(memory).__name__}")
        if not isinstance(hypotheses, Integral) or hypotheses < 0:
            raise ArgumentValueError(f"{name}: hypotheses must be an integer >= 0, got {hypotheses!r}")
        if memory.memory_offsets is not None:
            raise padding_needed(name)
        return memory.batch_size, int(hypotheses)

    def _first_step(self, memory: Memory, hypotheses: int, attended: bool = False) -> AlignmentsState:
        """The state with all weight on the first step; attended: on the first step that may be attended."""
        batch, hypotheses = self._check_axes(memory, hypotheses)
        steps = memory.keys.shape[1]
        alignments = memory.keys.new_zeros(batch, hypotheses, steps, dtype=wide_dtype(memory.keys.dtype))
        with_mask = attended and memory.mask is not None
        allowed = attention_mask(memory.keys, memory.memory_lengths, memory.mask) if with_mask else None
        if allowed is None:
            alignments[..., :1] = 1.0
        elif allowed.shape[1] not in (1, hypotheses):
            expected = f"(B, Tk) or (B, K, Tk) = ({batch}, {steps}) or ({batch}, {hypotheses}, {steps})"
            got = tuple(allowed.shape)
            raise ArgumentValueError(f"{self._name}.initial_state: mask must have shape {expected}, got {got}")
        else:
            alignments += allowed & (allowed.cumsum(-1) == 1)
        return AlignmentsState(alignments)

    def _previous(self, state: AlignmentsState, keys: Tensor) -> Tensor:
        """The alignments of the step before, in float32 or wider."""
        previous = state[0]
        if previous.dim() != 3 or previous.shape[2] != keys.shape[1]:
            expected = f"(B, K, Tk) = ({keys.shape[0]}, *, {keys.shape[1]})"
            raise ArgumentValueError(
                f"{self._name}: state must have alignments {expected}, got {tuple(previous.shape)}"
            )
        return previous.to(wide_dtype(keys.dtype))


class PositionalAttention(AlignmentsAttention):
    """The base of mechanisms that read the query and the previous alignments, but not the content of the memory."""

    reads_keys = False

    def __init__(self, query_size: int, memory_size: int, *, backend: str | None, factory: dict[str, Any]) -> None:
        super().__init__(
            query_size,
            memory_size,
            memory_size,
            project_query=False,
            project_memory=False,
            backend=backend,
            factory=factory,
        )


def result_dtype(query: Tensor) -> torch.dtype:
    """The dtype of results: that of the query, or that of autocast if it is enabled."""
    device = device_type(query)
    if device == "meta" or query.dtype not in DTYPES[:3] or not torch.is_autocast_enabled(device):
        return query.dtype
    return torch.get_autocast_dtype(device)


def masked_softmax(scores: Tensor, allowed: Tensor | None) -> Tensor:
    """Softmax over the allowed elements of the last axis; zeros elsewhere, and in a row without any."""
    if allowed is None:
        return torch.softmax(scores, -1)
    scores = scores.masked_fill(~allowed, float("-inf"))
    scores = scores.masked_fill(~allowed.any(-1, keepdim=True), 0.0)  # softmax of a row of -inf would be NaN
    return torch.softmax(scores, -1).masked_fill(~allowed, 0.0)


def recurrence(factors: Tensor, x: Tensor) -> Tensor:
    """y with y[0] = x[0], y[j] = x[j] + factors[j] y[j-1] along the last axis. factors, x: (..., Tk); factors in 0..1.

    A parallel prefix scan (Hillis-Steele) in log2 Tk passes. It does not divide, so that factors may be 0, and no term
    underflows.
    """
    if torch.compiler.is_exporting():  # the number of passes would be fixed to that of the example input
        return _recurrence_by_steps(factors, x)
    factors = torch.cat([torch.zeros_like(factors[..., :1]), factors[..., 1:]], -1)
    shift, steps = 1, x.shape[-1]
    while shift < steps:
        x = x + factors * nn.functional.pad(x[..., :-shift], (shift, 0))
        factors = factors * nn.functional.pad(factors[..., :-shift], (shift, 0))
        shift *= 2
    return x


def _recurrence_by_steps(factors: Tensor, x: Tensor) -> Tensor:
    from torch._higher_order_ops.scan import scan  # here: it imports half of torch.compile

    if x.dim() != 3:
        rows = (x.unsqueeze(0).flatten(1, -2) if x.dim() > 1 else x[None, None] for x in (factors, x))
        return _recurrence_by_steps(*rows).view_as(x)
    batch, hypotheses = x.shape[:-1]

    def step(before: Tensor, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        factor, added = given
        # Inductor needs the sizes of the results among the variables that a step refers to.
        after = (added + factor * before).view(batch, hypotheses)
        return after, after.clone()

    inputs = (factors.movedim(-1, 0), x.movedim(-1, 0))
    found: Tensor = scan(step, torch.zeros_like(x[..., 0]), inputs, dim=0)[1]
    return found.movedim(0, -1)


def shifted(x: Tensor, fill: float = 0.0) -> Tensor:
    """x shifted by one along the last axis: fill, x[0], x[1], ..."""
    return nn.functional.pad(x, (1, 0), value=fill)[..., :-1]
