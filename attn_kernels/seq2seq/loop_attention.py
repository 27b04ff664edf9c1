"""The attention of all steps of a sequence, without autograd: forward step by step, then backward.

The backward of a step makes the gradient of its query alone. Keys, values, score vector and bias get theirs from one
pass with all steps as queries, when all are done. B sentences, T steps, S source steps, A units, D value size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops, reference
from ..memory import Memory


class SequenceAttention:
    """Dot attention; what the other forms have in common with it.

    query_weight: (A, H), or None where the state is the query.
    """

    dscores: Tensor  # (B, T, S)  of the backward that runs
    dqueries: Tensor  # (T, B, A)
    dcontexts: Tensor  # (B, T, D)

    def __init__(self, backend: str, memory: Memory, steps: int, query_weight: Tensor | None) -> None:
        self.backend = backend
        self.memory = memory
        self.query_weight = query_weight
        batch, source, units = memory.keys.shape
        self.queries = memory.keys.new_empty(steps, batch, units)  # as they are scored
        self.alignments = memory.keys.new_empty(batch, steps, source)

    def step(self, t: int, state: Tensor) -> Tensor:
        """state: (B, H). Returns the context, (B, D)."""
        query = self.queries[t]
        self._query(t, state, query)
        context, alignments = self._attend(query.unsqueeze(1))
        self.alignments[:, t] = alignments.squeeze(1)
        return context.squeeze(1)

    def start_backward(self) -> None:
        self.dscores = torch.empty_like(self.alignments)
        self.dqueries = torch.empty_like(self.queries)
        self.dcontexts = self.memory.values.new_empty(*self.alignments.shape[:2], self.memory.values.shape[2])

    def step_back(self, t: int, dcontext: Tensor, dalignments: Tensor | None) -> Tensor:
        """dcontext: (B, D). dalignments: (B, T, S), those of all steps. Returns the gradient of the state, (B, H)."""
        self.dcontexts[:, t] = dcontext
        dweights = torch.bmm(self.memory.values, dcontext.unsqueeze(2)).squeeze(2)
        if dalignments is not None:
            dweights += dalignments[:, t]
        weights = self.alignments[:, t]
        dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
        self.dscores[:, t] = dscores
        self.dqueries[t] = self._query_gradient(t, dscores.unsqueeze(1)).squeeze(1)
        return self._state_gradient(t)

    def gradients(self, states: Tensor) -> tuple[Tensor | None, ...]:
        """states: (T, B, H). Of keys, values, query_weight, v, bias, scale."""
        dvalues = torch.bmm(self.alignments.transpose(1, 2), self.dcontexts)
        dkeys, dv, dbias = self._key_gradients()
        dweight = None
        if self.query_weight is not None:
            dweight = self.dqueries.flatten(0, 1).t() @ states.flatten(0, 1)
        return dkeys, dvalues, dweight, dv, dbias, self._scale_gradient()

    # How a query is made of a state -----------------------------------------------------------------------------------

    def _query(self, t: int, state: Tensor, out: Tensor) -> None:
        out.copy_(state) if self.query_weight is None else torch.mm(state, self.query_weight.t(), out=out)

    def _state_gradient(self, t: int) -> Tensor:
        """From dqueries[t], which becomes the gradient of the product with query_weight."""
        return self.dqueries[t] if self.query_weight is None else self.dqueries[t] @ self.query_weight

    def _scale_gradient(self) -> Tensor | None:
        return None

    # How scores are made of queries and keys --------------------------------------------------------------------------

    def _attend(self, query: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.memory
        if self.backend == "reference":
            return reference.dot_attention(
                query, memory.keys, memory.values, memory_lengths=memory.memory_lengths, mask=memory.mask
            )
        arguments = (query, memory.keys, memory.values, 1.0, memory.memory_lengths, memory.mask, True)
        return ops.call("dot_attention", self.backend, *arguments)

    def _query_gradient(self, t: int, dscores: Tensor) -> Tensor:
        return torch.bmm(dscores, self.memory.keys)

    def _key_gradients(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return torch.bmm(self.dscores.transpose(1, 2), self.queries.transpose(0, 1)), None, None


class CosineSequenceAttention(SequenceAttention):
    """The query is scale u, u = x / |x|; the keys have length 1 already (modules.CosineAttention)."""

    def __init__(
        self, backend: str, memory: Memory, steps: int, query_weight: Tensor | None, scale: Tensor, eps: float
    ) -> None:
        super().__init__(backend, memory, steps, query_weight)
        self.scale = scale
        self.eps = eps
        self.lengths = self.queries.new_empty(steps, self.queries.shape[1], 1, dtype=_wide(self.queries))
        self.is_zero = torch.empty_like(self.lengths, dtype=torch.bool)

    def start_backward(self) -> None:
        super().start_backward()
        self.dscale = self.lengths.new_zeros(())

    def _query(self, t: int, state: Tensor, out: Tensor) -> None:
        x = (state if self.query_weight is None else state @ self.query_weight.t()).to(self.lengths.dtype)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        torch.le(length, self.eps, out=self.is_zero[t])
        self.lengths[t] = length.masked_fill(self.is_zero[t], 1.0)
        torch.mul((x / self.lengths[t]).to(out.dtype), self.scale, out=out)

    def _state_gradient(self, t: int) -> Tensor:
        unit = self.queries[t].to(self.lengths.dtype) / self.scale
        gradient = self.dqueries[t].to(unit.dtype)
        along = (gradient * unit).sum(-1, keepdim=True)
        self.dscale += along.sum()
        across = gradient - unit * along.masked_fill(self.is_zero[t], 0.0)  # below eps the length is a constant
        self.dqueries[t] = across * (self.scale / self.lengths[t])
        return self.dqueries[t] if self.query_weight is None else self.dqueries[t] @ self.query_weight

    def _scale_gradient(self) -> Tensor:
        return self.dscale.to(self.scale.dtype)


class AdditiveSequenceAttention(SequenceAttention):
    """v: (A,). bias: (A,) or None."""

    def __init__(
        self, backend: str, memory: Memory, steps: int, query_weight: Tensor, v: Tensor, bias: Tensor | None
    ) -> None:
        super().__init__(backend, memory, steps, query_weight)
        self.v = v
        self.bias = bias

    def _attend(self, query: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.memory
        if self.backend == "reference":
            return reference.additive_attention(
                query,
                memory.keys,
                memory.values,
                self.v,
                self.bias,
                memory_lengths=memory.memory_lengths,
                mask=memory.mask,
            )
        arguments = (query, memory.keys, memory.values, self.v, self.bias, memory.prepared)
        return ops.call("additive_attention", self.backend, *arguments, memory.memory_lengths, memory.mask, True)

    def _query_gradient(self, t: int, dscores: Tensor) -> Tensor:
        return self._scores_backward(dscores, self.queries[t].unsqueeze(1))[0]

    def _key_gradients(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        _, dkeys, dv, *dbias = self._scores_backward(self.dscores, self.queries.transpose(0, 1))
        return dkeys, dv, None if self.bias is None else dbias[0]

    def _scores_backward(self, dscores: Tensor, queries: Tensor) -> tuple[Tensor, ...]:
        """dscores: (B, Tq, S). queries: (B, Tq, A). Of queries, keys, v, bias."""
        arguments = (queries, self.memory.keys, self.v, self.bias)
        if self.backend != "reference":
            return ops.call("additive_scores_backward", self.backend, dscores, *arguments)
        with torch.enable_grad():
            inputs = [None if x is None else x.detach().requires_grad_() for x in arguments]
            scores = reference.additive_scores(*inputs)
            return torch.autograd.grad(scores, [x for x in inputs if x is not None], dscores)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
