"""The base of stateful mechanisms, whose step depends on the steps before.

The state is explicit: ``initial_state`` makes the first one, and each step takes a state and returns the next one.
Nothing is stored in the module, so that a batch may be re-ordered, a search may branch, and a step may be repeated::

    attention = LocationSensitiveAttention(query_size, memory_size, units)
    memory = attention.memory(encoder_outputs, memory_lengths)
    state = attention.initial_state(memory)
    for ...:
        context, alignments, state = attention(decoder_state, memory, state)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..attention_module import AttentionModule
from ..errors import ArgumentTypeError, ArgumentValueError
from ..memory import Memory


class StatefulResult(NamedTuple):
    """The result of a step of a stateful mechanism.

    context: (B, K, D), or (B, D) for a 2-D query: alignments @ values.
    alignments: (B, K, Tk), or (B, Tk).
    state: the input of the next step: a NamedTuple of tensors, each (B, K, *).
    """

    context: Tensor
    alignments: Tensor
    state: Any


def select_state(state: Any, indices: Tensor) -> Any:
    """The sentences at ``indices``, (n,), in that order, as ``Memory.select``."""
    return with_tensors(state, [x.index_select(0, indices) for x in state])


def reorder_state(state: Any, hypotheses: Tensor) -> Any:
    """For each sentence its hypotheses at ``hypotheses``, (B, n), each in 0..K-1; repeats are allowed."""
    indices = [hypotheses.view(*hypotheses.shape, *[1] * (x.dim() - 2)) for x in state]
    return with_tensors(state, [torch.take_along_dim(x, index, dim=1) for x, index in zip(state, indices, strict=True)])


def with_tensors(state: Any, tensors: list[Tensor]) -> Any:
    """A state of the same type with other tensors."""
    return type(state)._make(tensors) if hasattr(state, "_make") else tuple(tensors)


class StatefulAttention(AttentionModule):
    """The base of mechanisms with a state.

    A subclass defines the state before the first step (``initial_state``) and the step (``_step``). The axis K holds
    the hypotheses of one sentence: they share one memory, and each has its own state. It is not a time axis: a step
    needs the state that the step before returned (see ``sequence``).

    A class may declare that its steps are ``self_contained``: see ``AttentionModule``.
    """

    def initial_state(self, memory: Memory, hypotheses: int = 1) -> Any:
        """The state before the first step: a NamedTuple of tensors, each (B, hypotheses, *)."""
        raise NotImplementedError

    def forward(  # type: ignore[override]
        self, query: Tensor, memory: Memory, state: Any
    ) -> StatefulResult:
        """A decoding step. query: (B, K, query_size) or (B, query_size), decoder states; state: of the step before.

        Raises ValueError or TypeError if query, memory or state do not fit the module or each other.
        """
        self._check(query, memory)
        self._check_state(query, state)
        if query.dim() == 3:
            return self._step(query, memory, state)
        context, alignments, state = self._step(query.unsqueeze(1), memory, state)
        return StatefulResult(context.squeeze(1), alignments.squeeze(1), state)

    if TYPE_CHECKING:

        def __call__(  # type: ignore[override]
            self, query: Tensor, memory: Memory, state: Any
        ) -> StatefulResult: ...

    def sequence(self, queries: Tensor, memory: Memory, state: Any = None) -> StatefulResult:
        """Runs the steps of a whole sequence one after the other.

        queries: (B, T, query_size). state: the state before the first step; None for ``initial_state``. Returns context
        (B, T, D), alignments (B, T, Tk) and the state after the last step.
        """
        state = self.initial_state(memory) if state is None else state
        steps = []
        for query in queries.unbind(1):
            context, alignments, state = self(query, memory, state)
            steps.append((context, alignments))
        contexts, alignments = (torch.stack(parts, dim=1) for parts in zip(*steps, strict=True))
        return StatefulResult(contexts, alignments, state)

    def _step(self, query: Tensor, memory: Memory, state: Any) -> StatefulResult:
        """A step, whose arguments have been checked. query: (B, K, query_size)."""
        raise NotImplementedError

    def _check_state(self, query: Tensor, state: Any) -> None:
        if not isinstance(state, tuple) or not all(isinstance(x, Tensor) for x in state):
            expected = f"made by {self._name}.initial_state(...) or returned by the step before"
            raise ArgumentTypeError(f"{self._name}: state must be a tuple of tensors, {expected}, got {type(state)}")
        axes = (query.shape[0], query.shape[1] if query.dim() == 3 else 1)
        for x in state:
            if tuple(x.shape[:2]) != axes:
                expected = f"(B, K, *) = ({axes[0]}, {axes[1]}, *)"
                raise ArgumentValueError(f"{self._name}: state must have tensors {expected}, got {tuple(x.shape)}")
