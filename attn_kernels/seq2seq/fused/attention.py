"""The attention of all steps of a sequence, without autograd: forward step by step, then backward.

The backward of a step computes only the gradient of its query. After the last step, one pass with all steps as queries
computes the gradients of memory and score. B sentences, T steps, S source steps, A units, M memory_size, H hidden_size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import formulas, ops
from ...functional import prepare_keys
from ...gemm import PackedLinear, weight_gradient
from ...memory import Memory
from ...scores import AdditiveScore, Score
from ...types import wide_dtype
from .inputs import Inputs, Query


class SavedAttention(NamedTuple):
    """The results of the forward that the backward reads."""

    queries: Tensor  # (T, B, A), before the factor
    alignments: Tensor  # (B, T, S)
    lengths: Tensor | None  # (T, B, 1), the divisor of a query: its length, or 1 if that is 0
    is_zero: Tensor | None  # (T, B, 1), whether the length is 0
    prepared: Tensor | None  # of the keys
    padded: Tensor | None = None  # (T, B, inputs, S + taps - 1), the padded inputs of the filters in each step


def prepare(score: Score, keys: Tensor, backend: str | None) -> Tensor | None:
    """The value that the op would compute from the keys alone in each call; None if there is none."""
    return prepare_keys(keys, backend=backend) if isinstance(score, AdditiveScore) else None


def with_prepared(score: Score, prepared: Tensor | None) -> Score:
    """The score with the result of ``prepare``."""
    return AdditiveScore(score.v, score.bias, prepared) if isinstance(score, AdditiveScore) else score


def op_arguments(score: Score, memory: Memory) -> tuple[Any, ...]:
    """The arguments of the score's op, and of its backward, after the query and without the last one."""
    return memory.keys, memory.values, *score, memory.memory_lengths, memory.mask


def call(op: str, backend: str, *arguments: Any) -> Any:
    """Runs an op on a backend, or its formula if the backend is "reference", which has no ops."""
    if backend == "reference":
        return formulas.apply_formula(op, arguments)
    return ops.call(op, backend, *arguments)


class AttentionForward:
    """Computes the attention step by step."""

    def __init__(self, inputs: Inputs) -> None:
        self.backend: str = inputs.backend
        self.query: Query = inputs.query
        assert inputs.score is not None  # the attention is not called
        keys, steps = inputs.memory.keys, inputs.steps
        batch, source, units = keys.shape
        lengths = is_zero = None
        if self.query.eps is not None:
            lengths = keys.new_empty(steps, batch, 1, dtype=wide_dtype(keys.dtype))
            is_zero = torch.empty_like(lengths, dtype=torch.bool)
        # In 16 bits, prepared keys would round e^{2k} once more than single steps, which have no prepared keys.
        rounded = keys.element_size() == 2
        prepared = None if rounded or inputs.filters is not None else prepare(inputs.score, keys, self.backend)
        score = with_prepared(inputs.score, prepared)
        self.op: str = score.op
        self.arguments: tuple[Any, ...] = op_arguments(score, inputs.memory)
        queries, alignments = keys.new_empty(steps, batch, units), keys.new_empty(batch, steps, source)
        self.saved: SavedAttention = SavedAttention(queries, alignments, lengths, is_zero, prepared)
        self.projection: PackedLinear | None = _projection(self.query.weight, batch, steps)
        self.queries: tuple[Tensor, ...] = queries.unsqueeze(2).unbind(0)  # (B, 1, A)
        self.alignments: tuple[Tensor, ...] = alignments.split(1, dim=1)  # (B, 1, S)

    def step(self, t: int, state: Tensor) -> Tensor:
        """state: (B, H). Returns the context, (B, M)."""
        context, alignments = self._attend(t, self._query(t, state))
        self.alignments[t].copy_(alignments)
        result: Tensor = context.squeeze(1)
        return result

    def all_alignments(self) -> Tensor:
        """(B, T, S), a copy."""
        return self.saved.alignments.clone()

    def _attend(self, t: int, query: Tensor) -> tuple[Tensor, Tensor]:
        """query: (B, 1, A). Returns the context, (B, 1, M), and alignments, (B, 1, S)."""
        found: tuple[Tensor, Tensor] = call(self.op, self.backend, query, *self.arguments, True)
        return found

    def _query(self, t: int, state: Tensor) -> Tensor:
        """The query of step t, (B, 1, A)."""
        saved, factor, eps = self.saved, self.query.factor, self.query.eps
        query = self.queries[t]
        x = state if self.projection is None else self.projection(state)
        if eps is not None:
            lengths, is_zero = saved.lengths, saved.is_zero
            assert lengths is not None and is_zero is not None  # with eps
            x = x.to(lengths.dtype)
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            torch.le(length, eps, out=is_zero[t])
            lengths[t] = length.masked_fill(is_zero[t], 1.0)
            x = x / lengths[t]
        query.copy_(x.unsqueeze(1))
        return query if factor is None else query * factor


class AttentionBackward:
    """Computes the gradients of each step, from the last to the first, and then the gradients over all steps."""

    def __init__(self, inputs: Inputs, saved: SavedAttention) -> None:
        assert inputs.score is not None  # the attention is not called
        self.backend: str = inputs.backend
        self.score: Score = inputs.score
        self.query: Query = inputs.query
        self.saved = saved
        self.arguments: tuple[Any, ...] = op_arguments(with_prepared(inputs.score, saved.prepared), inputs.memory)
        batch, steps, _ = saved.alignments.shape
        weight, factor = self.query.weight, self.query.factor
        self.projection: PackedLinear | None = _projection(None if weight is None else weight.t(), batch, steps)
        self.op: str = f"{self.score.op}_backward"
        as_scored = saved.queries if factor is None else saved.queries * factor
        self.queries: Tensor = as_scored.transpose(0, 1)  # (B, T, A)
        self.dqueries: Tensor = torch.empty_like(saved.queries)  # overwritten by the gradients of the projected states
        self.dcontexts: Tensor = saved.queries.new_empty(batch, steps, inputs.memory.values.shape[2])
        self.dfactor: Tensor | None = None if factor is None else factor.new_zeros((), dtype=wide_dtype(factor.dtype))
        # Views of all steps.
        self.of_steps: tuple[tuple[Tensor, ...], ...] = (
            self.dcontexts.split(1, dim=1),
            self.queries.split(1, dim=1),
            self.saved.alignments.split(1, dim=1),
            self.dqueries.unsqueeze(2).unbind(0),
        )

    def step(self, t: int, dcontext: Tensor, dalignments: Tensor | None, dstate: Tensor) -> None:
        """dcontext: (B, M). dalignments: (B, T, S), of all steps. Adds the gradient of the state to dstate, (B, H)."""
        kept, query, alignments, dquery = (x[t] for x in self.of_steps)
        kept.copy_(dcontext.unsqueeze(1))
        of_alignments = None if dalignments is None else dalignments.narrow(1, t, 1)
        dquery.copy_(self._query_gradient(t, kept, of_alignments, query, alignments))
        self._add_state_gradient(t, dstate)

    def _query_gradient(
        self, t: int, dcontext: Tensor, dalignments: Tensor | None, query: Tensor, alignments: Tensor
    ) -> Tensor:
        """The gradient of the query, (B, 1, A). The arguments are those of the op's backward, for step t only."""
        given = dcontext, dalignments, query, *self.arguments, alignments
        dquery: Tensor = call(self.op, self.backend, *given, True, False)[0]
        return dquery

    def _add_state_gradient(self, t: int, dstate: Tensor) -> None:
        """Adds the gradient of the state. Overwrites dqueries[t] by the gradient of the product with the weight."""
        factor, dfactor, saved = self.query.factor, self.dfactor, self.saved
        if factor is not None and dfactor is not None:
            unit = saved.queries[t].to(dfactor.dtype)
            dquery = self.dqueries[t].to(unit.dtype)
            along = (dquery * unit).sum(-1, keepdim=True)
            dfactor += along.sum()
            if saved.lengths is not None and saved.is_zero is not None:  # the length of a zero vector is a constant
                dquery = (dquery - unit * along.masked_fill(saved.is_zero[t], 0.0)) / saved.lengths[t]
            self.dqueries[t] = dquery * factor
        if self.projection is None:
            dstate.add_(self.dqueries[t])
        else:
            self.projection.add_to(dstate, self.dqueries[t])

    def gradients(self, states: Tensor, dalignments: Tensor | None) -> dict[str, Any]:
        """The gradients of the fields memory, score and query of ``Inputs``, by name.

        states: (T, B, H). dalignments: (B, T, S).
        """
        arguments = (self.dcontexts, dalignments, self.queries, *self.arguments, self.saved.alignments)
        # One flag covers the score and the queries. The steps have computed the gradients of the queries already.
        needed = (self.score.tensors > 0, True)
        _, dkeys, dvalues, *dscore = call(self.op, self.backend, *arguments, *needed)
        # The op returns an empty tensor if there is no bias.
        pairs = zip(self.score._fields, self.score, dscore, strict=False)
        by_name: dict[str, Any] = {name: None if x is None else gradient for name, x, gradient in pairs}
        return {
            "memory": Memory(dkeys, dvalues),
            "score": self.score._replace(**by_name),
            "query": self._of_query(states),
            "called": None,
            "filters": None,
        }

    def _of_query(self, states: Tensor) -> Query:
        dweight = None
        if self.query.weight is not None:
            dweight = weight_gradient(self.dqueries.flatten(0, 1), states.flatten(0, 1))
        factor, dfactor = self.query.factor, self.dfactor
        dfactor = None if factor is None or dfactor is None else dfactor.to(factor.dtype)
        return self.query._replace(weight=dweight, factor=dfactor)


def _projection(weight: Tensor | None, batch: int, steps: int) -> PackedLinear | None:
    return None if weight is None else PackedLinear(weight, batch, steps)
