"""The attention of all steps of a sequence, if each step adds filtered earlier alignments to the keys.

That is location-sensitive attention and coverage. Each step has its own keys, so its backward computes their gradient.
The gradient of the filters is computed from it, and the sum over the steps is the gradient of the memory's keys. The
added terms are recomputed in the backward, not saved, so that a sequence stores alignments but no keys of each step.
One product computes the gradients of the values. Sizes as in ``attention.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...mechanisms.location_features import AlignmentFilters, filter_alignments, filter_gradients
from ...memory import Memory
from ...scores import ActivatedExtraScore, ActivatedScore, AdditiveExtraScore, AdditiveScore
from ...types import wide_dtype
from .attention import AttentionBackward, AttentionForward, SavedAttention, call, op_arguments
from .inputs import Inputs


def additive_score(inputs: Inputs) -> AdditiveScore | ActivatedScore:
    assert isinstance(inputs.score, AdditiveScore | ActivatedScore)  # all attentions with filters have such a score
    return inputs.score


class _Filters:
    """The terms that the filters add to the keys in each step, and the op that reads them.

    padded: (T, B, inputs, S + taps - 1), the padded inputs of the filters in each step.
    """

    def __init__(self, inputs: Inputs, filters: AlignmentFilters, padded: Tensor) -> None:
        self.score: AdditiveScore | ActivatedScore = additive_score(inputs)
        self.memory: Memory = inputs.memory
        self.padded = padded
        self.weight: Tensor = filters.weight.flatten(1)
        self.taps: int = filters.weight.shape[2]
        with_extra = ActivatedExtraScore if isinstance(self.score, ActivatedScore) else AdditiveExtraScore
        self.op: str = with_extra.op

    def arguments(self, t: int) -> tuple[Any, ...]:
        """The arguments of the op in step t, after the query and without the last one."""
        extra = filter_alignments(self.padded[t], self.weight, self.taps)
        return op_arguments(self.score.with_extra(extra), self.memory)

    def inside(self, padded: Tensor) -> Tensor:
        """(*, inputs, S): the elements without the padding on both sides. padded: with the padding of one step."""
        return padded.narrow(-1, self.taps // 2, self.memory.keys.shape[1])


class FilteredForward(AttentionForward):
    """Computes the attention step by step."""

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
    """Computes the gradients of each step, from the last to the first, and then the gradients over all steps."""

    def __init__(self, inputs: Inputs, filters: AlignmentFilters, saved: SavedAttention) -> None:
        super().__init__(inputs, saved)
        assert saved.padded is not None
        self.given = filters
        self.keys: Tensor = inputs.memory.keys
        self.filters: _Filters = _Filters(inputs, filters, saved.padded)
        self.op: str = f"{self.filters.op}_backward"
        # Gradients summed over the steps, and the gradients of the state after the current step.
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
        assert dalignments is not None  # filters read the previous alignments or their sum
        gradients = dcontext, dalignments.to(alignments.dtype)
        given = query, *self.filters.arguments(t), alignments
        dquery: Tensor
        dquery, dkeys, _, dv, dbias = call(self.op, self.backend, *gradients, *given, True, True, False)
        self.dkeys += dkeys
        self.dv += dv
        if self.dbias is not None:
            self.dbias += dbias
        read = self.filters.padded[t], self.filters.weight, self.filters.taps
        dpadded, dweight = filter_gradients(dkeys, *read, True, True)
        assert dpadded is not None and dweight is not None  # both were requested
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
            "called": None,
            "filters": AlignmentFilters(dweight, self.dprevious, self.dtotal),
        }


def _sum_of(x: Tensor) -> Tensor:
    """Zeros, to accumulate the gradients of x over all steps."""
    return x.new_zeros(x.shape, dtype=wide_dtype(x.dtype))
