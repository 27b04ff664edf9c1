"""The attention of all steps of a sequence, without autograd: forward step by step, then backward.

The backward of a step makes the gradient of its query alone. Keys, values, score vector and bias get theirs from one
pass with all steps as queries, when all are done. B sentences, T steps, S source steps, A units, D value size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops, reference
from ..functional import prepare_keys
from ..memory import Memory
from .products import Product, across


class SequenceAttention:
    """Dot attention; what the other forms have in common with it.

    query_weight: (A, H), or None where the state is the query.
    """

    op = "dot_attention"
    function: Callable[..., reference.Attention] = staticmethod(reference.dot_attention)

    query_product: Product | None  # with query_weight in the forward, with its transpose in the backward
    dqueries: Tensor  # (T, B, A)  of the backward that runs
    dcontexts: Tensor  # (B, T, D)

    def __init__(self, backend: str, memory: Memory, steps: int, query_weight: Tensor | None) -> None:
        self.backend = backend
        self.memory = memory
        self.query_weight = query_weight
        batch, source, units = memory.keys.shape
        self.queries = memory.keys.new_empty(steps, batch, units)  # as they are scored
        self.alignments = memory.keys.new_empty(batch, steps, source)
        self.query_product = None if query_weight is None else Product(query_weight, batch, steps)

    def step(self, t: int, state: Tensor) -> Tensor:
        """state: (B, H). Returns the context, (B, D)."""
        query = self.queries[t]
        self._query(t, state, query)
        memory = self.memory
        if self.backend == "reference":
            context, alignments = self._reference(query.unsqueeze(1), memory.keys, memory.values, *self._score())
        else:
            context, alignments = ops.call(
                self.op, self.backend, query.unsqueeze(1), memory.keys, memory.values, *self._settings(), True
            )
        self.alignments[:, t] = alignments.squeeze(1)
        return context.squeeze(1)

    def start_backward(self) -> None:
        weight, (steps, batch, _) = self.query_weight, self.queries.shape
        self.query_product = None if weight is None else Product(weight.t(), batch, steps)
        self.dqueries = torch.empty_like(self.queries)
        self.dcontexts = self.memory.values.new_empty(*self.alignments.shape[:2], self.memory.values.shape[2])

    def step_back(self, t: int, dcontext: Tensor, dalignments: Tensor | None) -> Tensor:
        """dcontext: (B, D). dalignments: (B, T, S), those of all steps. Returns the gradient of the state, (B, H)."""
        self.dcontexts[:, t] = dcontext
        step = slice(t, t + 1)
        dalignments = None if dalignments is None else dalignments[:, step]
        query, alignments = self.queries[step].transpose(0, 1), self.alignments[:, step]
        dquery, *_ = self._backward(dcontext.unsqueeze(1), dalignments, query, alignments, need_memory=False)
        self.dqueries[t] = dquery.squeeze(1)
        return self._state_gradient(t)

    def gradients(self, states: Tensor, dalignments: Tensor | None) -> tuple[Tensor | None, ...]:
        """states: (T, B, H). dalignments: (B, T, S). Of keys, values, query_weight, v, bias, scale."""
        queries = self.queries.transpose(0, 1)
        _, dkeys, dvalues, *score = self._backward(self.dcontexts, dalignments, queries, self.alignments)
        dweight = None
        if self.query_weight is not None:
            dweight = across(self.dqueries.flatten(0, 1), states.flatten(0, 1))
        dv, dbias = score or (None, None)
        if dbias is not None and dbias.numel() == 0:
            dbias = None  # without a bias
        return dkeys, dvalues, dweight, dv, dbias, self._scale_gradient()

    def _backward(
        self,
        dcontext: Tensor,
        dalignments: Tensor | None,
        query: Tensor,
        alignments: Tensor,
        need_memory: bool = True,
    ) -> Any:
        """Of query, keys, values and what the scores have besides, as far as the op gives them."""
        memory = self.memory
        tensors = (query, memory.keys, memory.values)
        if self.backend != "reference":
            op, grads = f"{self.op}_backward", (dcontext, dalignments)
            return ops.call(op, self.backend, *grads, *tensors, *self._settings(), alignments, True, need_memory)
        inputs = [None if x is None else x.detach().requires_grad_() for x in (*tensors, *self._score())]
        with torch.enable_grad():
            outputs = self._reference(*inputs)
        wanted = [x for x in inputs if x is not None]
        gradients = (dcontext, torch.zeros_like(alignments) if dalignments is None else dalignments)
        found = iter(torch.autograd.grad(outputs, wanted, gradients))
        return tuple(None if x is None else next(found) for x in inputs)

    def _reference(self, *arguments: Tensor | None) -> reference.Attention:
        memory = self.memory
        return self.function(*arguments, memory_lengths=memory.memory_lengths, mask=memory.mask)

    def _score(self) -> tuple[Tensor | None, ...]:
        """What scores take besides queries and keys, as arguments of the public function."""
        return ()

    def _settings(self) -> tuple[Any, ...]:
        """The arguments of the op after query, keys and values."""
        return (1.0, self.memory.memory_lengths, self.memory.mask)

    # How a query is made of a state -----------------------------------------------------------------------------------

    def _query(self, t: int, state: Tensor, out: Tensor) -> None:
        out.copy_(self._projected(state))

    def _projected(self, state: Tensor) -> Tensor:
        return state if self.query_product is None else self.query_product(state)

    def _state_gradient(self, t: int) -> Tensor:
        """From dqueries[t], which becomes the gradient of the product with query_weight."""
        return self._projected(self.dqueries[t])

    def _scale_gradient(self) -> Tensor | None:
        return None


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
        x = self._projected(state).to(self.lengths.dtype)
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
        return self._projected(self.dqueries[t])

    def _scale_gradient(self) -> Tensor:
        return self.dscale.to(self.scale.dtype)


class AdditiveSequenceAttention(SequenceAttention):
    """v: (A,). bias: (A,) or None."""

    op = "additive_attention"
    function = staticmethod(reference.additive_attention)

    def __init__(
        self, backend: str, memory: Memory, steps: int, query_weight: Tensor, v: Tensor, bias: Tensor | None
    ) -> None:
        super().__init__(backend, memory, steps, query_weight)
        # In 16 bits e^{2k} would be rounded once more than in single steps, which have no prepared keys.
        is_short = memory.keys.element_size() == 2
        self.prepared = None if is_short else prepare_keys(memory.keys, backend=backend)
        self.v = v
        self.bias = bias

    def _score(self) -> tuple[Tensor | None, ...]:
        return self.v, self.bias

    def _settings(self) -> tuple[Any, ...]:
        return self.v, self.bias, self.prepared, self.memory.memory_lengths, self.memory.mask


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
