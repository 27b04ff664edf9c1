"""Reads of a memory by mechanisms that compute their own alignments: scores of its keys, and sums of its values.

In the backward of every step, autograd would compute a gradient as large as keys or values, and accumulate it. If a
memory is large, a step records the factors of that gradient instead, and it is computed once for all steps: see
memory_gradient.py.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from .. import ops
from ..backends import choose
from ..memory import Memory
from ..memory_gradient import MemoryGradient, should_defer, untraced
from ..scores import ActivatedScore, AdditiveScore
from ..types import device_type, wide_dtype
from .normalizers import pair_scores


class Source(NamedTuple):
    """The part of a memory that a step reads.

    keys: (B, Tk, A), values: (B, Tk, D), finite in padding. allowed: bool, (B, 1, Tk) or (B, K, Tk); None if every step
    may be attended. gradient: accumulates the gradients of keys and values; None: each step computes its own. first:
    the index of the first of these units among the units of the memory's keys.
    """

    keys: Tensor
    values: Tensor
    allowed: Tensor | None
    backend: str | None
    gradient: MemoryGradient | None = None
    first: int = 0

    def split_keys(self, units: int) -> list[Source]:
        """One Source for each block of ``units`` columns of the keys."""
        parts = enumerate(self.keys.split(units, -1))
        return [self._replace(keys=part, first=self.first + i * units) for i, part in parts]


def read(memory: Memory, allowed: Tensor | None, query: Tensor, backend: str | None, reads_keys: bool = True) -> Source:
    """The keys and values of a memory as a Source. query: (B, K, *), as autograd sees it."""
    keys, values = memory.keys, memory.values
    if gathers(memory, allowed, query, backend):
        return Source(keys, values, allowed, backend, memory.gradient())
    if allowed is not None and not memory.has_zero_padding():
        padding = ~allowed.any(1)[..., None]
        values = values.masked_fill(padding, 0.0)
        keys = keys.masked_fill(padding, 0.0) if reads_keys else keys
    return Source(keys, values, allowed, backend)


def gathers(memory: Memory, allowed: Tensor | None, query: Tensor, backend: str | None) -> bool:
    """Whether a step on this memory defers the gradients of keys and values. query: (B, K, *)."""
    keys, values = memory.keys, memory.values
    return (
        (allowed is None or (allowed.shape[1] == 1 and memory.has_zero_padding()))
        and keys.dtype == values.dtype == query.dtype
        and keys.device == query.device
        and not torch._C._is_any_autocast_enabled()
        and should_defer(choose(backend, device_type(keys)), (query, keys, values), None)
    )


def additive_energies(query: Tensor, source: Source, score: AdditiveScore | ActivatedScore) -> Tensor:
    """(B, K, Tk), additive scores in float32 or wider. query: (B, K, A)."""
    keys, allowed, backend = source.keys, source.allowed, source.backend
    if per_hypothesis(allowed):
        pairs = torch.where(allowed[..., None], keys[:, None], 0.0).flatten(0, 1)
        scores = pair_scores(score, query.flatten(0, 1), pairs, backend).view(allowed.shape)
    elif source.gradient is None or score.v.dtype != query.dtype:
        scores = pair_scores(score, query, keys, backend)
    else:
        gradient, units = source.gradient, (source.first, keys.shape[2])
        given = gradient, gradient.anchor, choose(backend, device_type(query)), units, type(score)
        scores = _ScoresFunction.apply(*given, query, score.v, score.bias, *numbers_of(score))  # type: ignore[no-untyped-call]  # torch has no types for it
    return scores.to(wide_dtype(scores.dtype))


def op_of(kind: type[AdditiveScore] | type[ActivatedScore]) -> str:
    """The name of the op that computes only scores."""
    return "activated_scores" if kind is ActivatedScore else "additive_scores"


def numbers_of(score: AdditiveScore | ActivatedScore) -> tuple[float, ...]:
    """The arguments of the op after the tensors."""
    return score[2:] if isinstance(score, ActivatedScore) else ()


def dot_energies(query: Tensor, source: Source) -> Tensor:
    """(B, K, Tk), dot products in float32 or wider. query: (B, K, A)."""
    keys, allowed = source.keys, source.allowed
    if per_hypothesis(allowed):
        scores = (query[:, :, None] * torch.where(allowed[..., None], keys[:, None], 0.0)).sum(-1)
    elif source.gradient is None:
        scores = torch.bmm(query, keys.mT)
    else:
        gradient, units = source.gradient, (source.first, keys.shape[2])
        scores = _ProductsFunction.apply(gradient, gradient.anchor, units, query)  # type: ignore[no-untyped-call]
    return scores.to(wide_dtype(scores.dtype))


def weighted_sum(alignments: Tensor, source: Source) -> Tensor:
    """(B, K, D), alignments @ values. alignments: (B, K, Tk), 0 in padding."""
    values, allowed = source.values, source.allowed
    if per_hypothesis(allowed):
        values = values.to(alignments.dtype)
        return (alignments[..., None] * torch.where(allowed[..., None], values[:, None], 0.0)).sum(2)
    if source.gradient is None:
        return torch.bmm(alignments, values.to(alignments.dtype))
    gradient = source.gradient
    context: Tensor = _SumFunction.apply(gradient, gradient.anchor, alignments)  # type: ignore[no-untyped-call]
    return context


def per_hypothesis(allowed: Tensor | None) -> TypeGuard[Tensor]:
    """Whether the mask differs between hypotheses, so that pairs have to be masked, not steps."""
    return allowed is not None and allowed.shape[1] != 1


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast, for products that must stay in float32."""
    device = device_type(tensor)
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


class _Product(NamedTuple):
    """The record of a step whose gradient of keys or values is rows^T @ columns.

    rows: (B, K, Tk). columns: (B, K, n). size: the units of the memory's keys; the gradient is that of units
    first..first + n. None: the gradient is that of values.
    """

    rows: Tensor
    columns: Tensor
    first: int = 0
    size: int | None = None

    def is_like(self, other: _Product) -> bool:
        return self[2:] == other[2:]

    def joined_gradients(self, others: list[_Product]) -> tuple[Tensor | None, Tensor | None]:
        steps = [self, *others]
        rows, columns = torch.cat([step.rows for step in steps], 1), torch.cat([step.columns for step in steps], 1)
        found = torch.bmm(rows.mT, columns)
        return (None, found) if self.size is None else (_within(found, self.first, self.size), None)


class _Scores(NamedTuple):
    """The record of additive scores. grad: (B, K, Tk). query: (B, K, A). keys: (B, Tk, size), with ``units``."""

    score: AdditiveScore | ActivatedScore
    backend: str
    units: tuple[int, int]
    grad: Tensor
    query: Tensor
    keys: Tensor

    def backward(self, of_step: bool, of_keys: bool) -> tuple[Tensor, ...]:
        """The gradients of query, keys, v and bias."""
        score, keys = self.score, self.keys.narrow(2, *self.units)
        given = self.grad, self.query, keys, score.v, score.bias, *numbers_of(score), of_step, of_keys
        gradients: tuple[Tensor, ...] = ops.call(f"{op_of(type(score))}_backward", self.backend, *given)
        return gradients

    def is_like(self, other: _Scores) -> bool:
        if (self.backend, self.units) != (other.backend, other.units):
            return False
        # v may be recomputed in every step (weight normalisation): equal values in different tensors.
        if type(self.score) is not type(other.score) or numbers_of(self.score) != numbers_of(other.score):
            return False
        pairs = zip(self.score[:2], other.score[:2], strict=True)
        return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)

    def joined_gradients(self, others: list[_Scores]) -> tuple[Tensor | None, Tensor | None]:
        steps = [self, *others]
        grad, query = torch.cat([step.grad for step in steps], 1), torch.cat([step.query for step in steps], 1)
        dkeys = self._replace(grad=grad, query=query).backward(False, True)[1]
        return _within(dkeys, self.units[0], self.keys.shape[2]), None


def _within(gradient: Tensor, first: int, size: int) -> Tensor:
    """The gradient of units from ``first`` on, padded with zeros to all units: (B, Tk, size)."""
    behind = size - first - gradient.shape[2]
    return gradient if first == behind == 0 else F.pad(gradient, (first, behind))


class _SumFunction(Function):
    @staticmethod
    def forward(ctx: Any, gradient: MemoryGradient, anchor: Tensor, alignments: Tensor) -> Tensor:
        ctx.memory_gradient = gradient
        ctx.save_for_backward(alignments, gradient.values)
        return torch.bmm(alignments, gradient.values.to(alignments.dtype))

    @staticmethod
    @untraced
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        gradient, (alignments, values) = ctx.memory_gradient, ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: values that are not detached
            values = gradient.memory[1]
        if gradient.is_needed():
            gradient.record(_Product(alignments, grad))
        return None, gradient.empty_grad, torch.bmm(grad, values.to(grad.dtype).mT)


class _ProductsFunction(Function):
    @staticmethod
    def forward(ctx: Any, gradient: MemoryGradient, anchor: Tensor, units: tuple[int, int], query: Tensor) -> Tensor:
        ctx.memory_gradient, ctx.units = gradient, units
        ctx.save_for_backward(query, gradient.keys)
        return torch.bmm(query, gradient.keys.narrow(2, *units).mT)

    @staticmethod
    @untraced
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        gradient, (query, keys) = ctx.memory_gradient, ctx.saved_tensors
        if torch.is_grad_enabled():
            keys = gradient.memory[0]
        if gradient.is_needed():
            gradient.record(_Product(grad, query, ctx.units[0], keys.shape[2]))
        return None, gradient.empty_grad, None, torch.bmm(grad, keys.narrow(2, *ctx.units))


class _ScoresFunction(Function):
    @staticmethod
    def forward(
        ctx: Any,
        gradient: MemoryGradient,
        anchor: Tensor,
        backend: str,
        units: tuple[int, int],
        kind: Any,
        query: Tensor,
        v: Tensor,
        bias: Tensor | None,
        *numbers: float,
    ) -> Any:
        ctx.memory_gradient, ctx.backend, ctx.units = gradient, backend, units
        ctx.kind, ctx.numbers = kind, numbers
        ctx.save_for_backward(query, gradient.keys, v, bias)
        given = query, gradient.keys.narrow(2, *units), v, bias, *numbers
        return ops.below_autograd(op_of(kind), backend, given)

    @staticmethod
    @untraced
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        gradient, (query, keys, v, bias) = ctx.memory_gradient, ctx.saved_tensors
        if torch.is_grad_enabled():
            keys = gradient.memory[0]
        step = _Scores(ctx.kind(v, bias, *ctx.numbers), ctx.backend, ctx.units, grad, query, keys)
        if gradient.is_needed():
            gradient.record(step)
        dquery, _, dv, dbias = step.backward(True, False)
        of_score = dv, None if bias is None else dbias, *[None] * len(ctx.numbers)
        return None, gradient.empty_grad, None, None, None, dquery, *of_score
