"""The attention of all steps of a sequence where a step adds to the keys what filters make of the steps before.

Location-sensitive attention and coverage. A step has keys of its own, so that its backward makes their gradient, which
that of the filters is made of; the sum of all is the gradient of the memory's keys. What was added is not kept but made
again, so that a sequence takes memory for alignments and not for keys of each step. The gradients of the values are
those of one product. Sizes as in ``attention.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...attending import ADD_BEFOREHAND
from ...mechanisms.location_features import AlignmentFilters, filter_alignments, filter_gradients
from ...memory import Memory
from ...scores import ActivatedExtraScore, ActivatedScore, AdditiveExtraScore, AdditiveScore
from ...types import wide_dtype
from .attention import AttentionBackward, AttentionForward, SavedAttention, call, op_arguments
from .inputs import Inputs


def additive_score(inputs: Inputs) -> AdditiveScore | ActivatedScore:
    assert isinstance(inputs.score, AdditiveScore | ActivatedScore)  # of all that have filters
    return inputs.score


class _Filters:
    """What the filters add to the keys in each step, and the op of that.

    padded: (T, B, inputs, S + taps - 1), what they read in each step.
    """

    def __init__(self, inputs: Inputs, filters: AlignmentFilters, padded: Tensor) -> None:
        self.score: AdditiveScore | ActivatedScore = additive_score(inputs)
        self.memory: Memory = inputs.memory
        self.padded = padded
        self.weight: Tensor = filters.weight.flatten(1)
        self.taps: int = filters.weight.shape[2]
        self.adds_beforehand: bool = inputs.backend in ADD_BEFOREHAND
        with_extra = ActivatedExtraScore if isinstance(self.score, ActivatedScore) else AdditiveExtraScore
        self.op: str = self.score.op if self.adds_beforehand else with_extra.op

    def arguments(self, t: int) -> tuple[Any, ...]:
        """Of the op in step t, after the query, but for the last one."""
        extra = filter_alignments(self.padded[t], self.weight, self.taps)
        if not self.adds_beforehand:
            return op_arguments(self.score.with_extra(extra), self.memory)
        _, *others = op_arguments(self.score, self.memory)
        return self.memory.keys + extra, *others

    def inside(self, padded: Tensor) -> Tensor:
        """(*, inputs, S): without what stands before the first and behind the last step. padded: as of any step."""
        return padded.narrow(-1, self.taps // 2, self.memory.keys.shape[1])


class FilteredForward(AttentionForward):
    """The attention of each step in turn."""

    def __init__(self, inputs: Inputs, filters: AlignmentFilters) -> None:
        super().__init__(inputs)
        steps, batch, _ = self.saved.queries.shape
        source, (_, count, taps) = self.saved.alignments.shape[2], filters.weight.shape
        padded = filters.weight.new_zeros(steps, batch, count, source + taps - 1)
        self.saved: SavedAttention = self.saved._replace(padded=padded)
        self.filters: _Filters = _Filters(inputs, filters, padded)
        self.inside: Tensor = self.filters.inside(padded)
        self.total: Tensor | None = None if filters.total is None else filters.total.clone()
        for n, x in enumerate(x for x in filters[1:] if x is not None):
            self.inside[0, :, n] = x
        self.reads_previous: bool = filters.previous is not None

    def _attend(self, t: int, query: Tensor) -> tuple[Tensor, Tensor]:
        context, alignments = call(self.filters.op, self.backend, query, *self.filters.arguments(t), True)
        if t + 1 < self.inside.shape[0]:
            after = alignments.squeeze(1)
            if self.reads_previous:
                self.inside[t + 1, :, 0] = after
            if self.total is not None:
                self.total += after
                self.inside[t + 1, :, -1] = self.total
        return context, alignments


class FilteredBackward(AttentionBackward):
    """The gradients of each step, from the last to the first, and what is made of those of all steps."""

    def __init__(self, inputs: Inputs, filters: AlignmentFilters, saved: SavedAttention) -> None:
        super().__init__(inputs, saved)
        assert saved.padded is not None
        self.given = filters
        self.keys: Tensor = inputs.memory.keys
        self.filters: _Filters = _Filters(inputs, filters, saved.padded)
        self.op: str = f"{self.filters.op}_backward"
        # Query and score; keys; and where the op has a flag of their own, values.
        self.needed: tuple[bool, ...] = (True, True) if self.filters.adds_beforehand else (True, True, False)
        # Sums over the steps, and the gradients of the state after the step.
        score = self.filters.score
        self.dkeys: Tensor = _sum_of(self.keys)
        self.dweight: Tensor = _sum_of(self.filters.weight)
        self.dv: Tensor = _sum_of(score.v)
        self.dbias: Tensor | None = None if score.bias is None else _sum_of(score.bias)
        self.dprevious: Tensor | None = None if filters.previous is None else torch.zeros_like(filters.previous)
        self.dtotal: Tensor | None = None if filters.total is None else torch.zeros_like(filters.total)

    def _query_gradient(
        self, t: int, dcontext: Tensor, dalignments: Tensor | None, query: Tensor, alignments: Tensor
    ) -> Tensor:
        of_state = [x for x in (self.dprevious, self.dtotal) if x is not None]
        for x in of_state:
            dalignments = x.unsqueeze(1) if dalignments is None else dalignments + x.unsqueeze(1)
        assert dalignments is not None  # a filter reads one of the two
        gradients = dcontext, dalignments.to(alignments.dtype)
        given = query, *self.filters.arguments(t), alignments
        dquery: Tensor
        dquery, dkeys, _, dv, dbias = call(self.op, self.backend, *gradients, *given, *self.needed)
        self.dkeys += dkeys
        self.dv += dv
        if self.dbias is not None:
            self.dbias += dbias
        read = self.filters.padded[t], self.filters.weight, self.filters.taps
        dpadded, dweight = filter_gradients(dkeys, *read, True, True)
        assert dpadded is not None and dweight is not None  # both are asked for
        self.dweight += dweight
        inside = self.filters.inside(dpadded)
        if self.dprevious is not None:
            self.dprevious = inside[:, 0]
        if self.dtotal is not None:
            self.dtotal += inside[:, -1]
        return dquery

    def gradients(self, states: Tensor, dalignments: Tensor | None) -> dict[str, Any]:
        dtype = self.keys.dtype
        dvalues = self.saved.alignments.mT @ self.dcontexts
        dbias = None if self.dbias is None else self.dbias.to(dtype)
        dweight = self.dweight.to(dtype).view_as(self.given.weight)
        return {
            "memory": Memory(self.dkeys.to(dtype), dvalues),
            "score": self.filters.score._replace(v=self.dv.to(dtype), bias=dbias),
            "query": self._of_query(states),
            "filters": AlignmentFilters(dweight, self.dprevious, self.dtotal),
        }


def _sum_of(x: Tensor) -> Tensor:
    """Zeros, for the gradients of x in all steps."""
    return x.new_zeros(x.shape, dtype=wide_dtype(x.dtype))
