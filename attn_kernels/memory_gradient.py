"""The deferred gradient of a memory: computed once for all steps that read it, not in each of them.

If every decoding step computes gradients of keys and values, it writes two arrays as large as the memory, which
autograd then adds up. Over the steps of a sentence that dominates training time. Here the backward of a step computes
only the gradients of its query, v and bias, and records its query, alignments and their gradients. After the last step,
one many-query backward computes the gradients of keys and values from all records.

In autograd's graph the memory is a node, ``_MemoryGradientNode``. Its inputs are keys and values, its output is an
empty tensor, the anchor. Every step takes the anchor as an input. So autograd runs the node after all steps of a
backward pass, and only if the pass needs a gradient beyond it. The node saves no tensors: the steps do, and release
them as they would without it. So retained graphs, several losses and steps that are never differentiated behave as
usual.

Records are stored per backward pass, by the number of its graph task, and only the engine holds a reference: they are
freed when the pass ends or is aborted. Nested passes and passes in other threads do not see each other's records.

A step with its own addend of the keys (``extra``: location features) computes the gradient of the sum in its backward,
because it is the gradient of the extra. It is added to the accumulated gradient of the keys; only the gradient of the
values is deferred.

Mechanisms whose steps are not an attention op have records of their own: see mechanisms/reading.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from itertools import zip_longest
from typing import Any, NamedTuple, Protocol, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd import Function, Variable, forward_ad
from torch.compiler import is_compiling

from . import ops
from .scores import PackedScore, Score

_MAX_QUERIES = 8  # exclusive: from here on, the backward of a single step is the many-query one
# Bytes of keys and values. Speed-up over a gradient in each step, for the backward of 20 to 50 steps of one query on
# one CPU thread, additive / dot: 0.9 / 0.9 at 80 KB, 1.0 / 1.0 at 200 KB, 1.2 / 1.5 at 400 KB, 3 / 4 at 13 MB. Four
# steps gain; a single one takes longer.
_MIN_BYTES = 1 << 18


def untraced(backward: Callable[..., Any]) -> Callable[..., Any]:
    """backward wrapped by ``torch.compiler.disable``: the records of a pass cannot be part of a compiled graph.

    Importing Dynamo takes longer than importing torch, so it is not wrapped before someone else has imported Dynamo.
    """
    disabled: list[Callable[..., Any]] = []

    @wraps(backward)
    def left_out(*args: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return backward(*args)
        if not disabled:
            disabled.append(torch.compiler.disable(backward))
        return disabled[0](*args)

    return left_out


class Record(Protocol):
    """What a step records for the gradient of the memory."""

    def is_like(self, other: Any) -> bool:
        """Whether both can be parts of one call. other: of the same class."""

    def joined_gradients(self, others: list[Any]) -> tuple[Tensor | None, Tensor | None]:
        """dkeys and dvalues, from this record and the others, which are alike; None if 0 or computed earlier."""


class _StepRecord(NamedTuple):
    """The record of a step for the gradient of the memory: the arguments of its backward.

    grad_context: (B, Tq, D) or None. grad_alignments: (B, Tq, Tk) or None. query: (B, Tq, A). alignments: (B, Tq, Tk).
    masks: memory_lengths and mask; of a packed memory, its offsets.
    """

    score: Score | PackedScore
    backend: str
    grad_context: Tensor | None
    grad_alignments: Tensor | None
    query: Tensor
    keys: Tensor
    values: Tensor
    masks: tuple[Tensor | None, ...]
    alignments: Tensor

    def backward(self, *needed: bool) -> tuple[Tensor, ...]:
        """The gradients of query, keys, values and the score's arguments; empty if not needed.

        needed: the flags of the op: need_query and need_memory or, with an extra, need_keys and need_values.
        """
        score, backend, *inputs, masks, alignments = self
        given = *inputs, *score, *masks, alignments
        gradients: tuple[Tensor, ...] = ops.call(f"{score.op}_backward", backend, *given, *needed)
        return gradients

    def is_like(self, other: _StepRecord) -> bool:
        return _score_alike(self, other)

    def joined_gradients(self, others: list[_StepRecord]) -> tuple[Tensor | None, Tensor | None]:
        return _memory_gradients([self, *others])


class PendingSteps(list[Record]):
    """The recorded steps of one backward pass. The engine holds it as a callback for the end of the pass.

    dkeys: the sum of the gradients of keys that steps computed themselves, in float32 or wider.
    """

    dkeys: Tensor | None = None

    def add(self, dkeys: Tensor) -> None:
        if self.dkeys is None:
            # Always a copy: the step also returns dkeys to autograd.
            self.dkeys = dkeys.to(torch.promote_types(dkeys.dtype, torch.float32), copy=True)
        elif torch.is_grad_enabled():
            self.dkeys = self.dkeys + dkeys
        else:
            self.dkeys.add_(dkeys)

    def joined_gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """dkeys and dvalues of all recorded steps, whose records are removed; None if there is none."""
        groups: list[list[Record]] = []
        for step in self:
            alike = (group for group in groups if type(group[0]) is type(step) and group[0].is_like(step))
            group = next(alike, None)
            if group is None:
                groups.append([step])
            else:
                group.append(step)
        self.clear()
        dkeys = dvalues = None
        for first, *others in groups:
            more_keys, more_values = first.joined_gradients(others)
            dkeys, dvalues = plus(dkeys, more_keys), plus(dvalues, more_values)
        of_steps = self.dkeys
        if of_steps is not None and dvalues is not None:
            of_steps = of_steps.to(dvalues.dtype)
        return plus(dkeys, of_steps), dvalues

    def __call__(self) -> None:
        """No-op: it is queued only so that the engine keeps the records alive for exactly one backward pass."""


class MemoryGradient:
    """Accumulates the gradients of all steps on one memory.

    keys: (B, Tk, A), values: (B, Tk, D), or packed (N, A), (N, D). The steps read them detached: gradients flow only
    through the anchor.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._state = *_state(keys), *_state(values)
        self._passes: WeakValueDictionary[int, PendingSteps] = WeakValueDictionary()
        self.keys: Tensor = keys.detach()
        self.values: Tensor = values.detach()
        self.memory: tuple[Tensor, Tensor] = (keys, values)  # for gradients that are differentiated themselves
        self.anchor: Tensor = self._make_anchor()
        self.empty_grad: Tensor = self.anchor.detach()  # of the anchor: compiled autograd does not accept None

    def _make_anchor(self) -> Tensor:
        # torch has no types for apply.
        anchor: Tensor = _MemoryGradientNode.apply(*self.memory, self._passes)  # type: ignore[no-untyped-call]
        return anchor

    def is_current_for(self, keys: Tensor, values: Tensor) -> bool:
        """Whether keys and values are still the same tensors, unmodified and at the same place in autograd's graph."""
        is_alias = torch._C._is_alias_of  # type: ignore[attr-defined]
        return (
            self._state == (*_state(keys), *_state(values))
            and is_alias(self.keys, keys)
            and is_alias(self.values, values)
        )

    def is_needed(self) -> bool:
        """Whether this pass needs a gradient beyond the memory."""
        node = self.anchor.grad_fn
        assert node is not None  # this pass came from a step, whose memory needs a gradient
        return torch._C._will_engine_execute_node(node)

    def record(self, step: Record, dkeys: Tensor | None = None) -> None:
        """Records a step. Its backward calls this if the gradient of the memory is needed.

        dkeys: the gradient of the keys, if the step has computed it.
        """
        task = torch._C._current_graph_task_id()
        steps = self._passes.get(task)
        if steps is None:
            steps = self._passes[task] = PendingSteps()
            Variable._execution_engine.queue_callback(steps)
        steps.append(step)
        if dkeys is not None:
            steps.add(dkeys)

    def attend(
        self,
        score: Score | PackedScore,
        backend: str,
        query: Tensor,
        masks: tuple[Tensor | None, ...],
        need_alignments: bool,
    ) -> Any:
        """Runs the op of a score on the memory. masks: as in a step's record."""
        given = self, self.anchor, type(score), backend, query, need_alignments
        return _StepFunction.apply(*given, *score, *masks)  # type: ignore[no-untyped-call]  # torch has no types for it


def is_worth_deferring(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether keys or values need a gradient and are large enough, and the queries, (B, Tq, A), few enough."""
    return (
        (keys.requires_grad or values.requires_grad)
        and query.shape[1] < _MAX_QUERIES
        and (keys.numel() + values.numel()) * keys.element_size() >= _MIN_BYTES
    )


def should_defer(backend: str, inputs: tuple[Tensor, Tensor, Tensor], mask: Tensor | None) -> bool:
    """Whether a step on a memory defers the gradients of keys and values.

    inputs: query, (B, Tq, A), keys, (B, Tk, A), values, (B, Tk, D), or packed ones, (N, *). mask: (B, Tk) or
    (B, Tq, Tk), which a step of several queries may not have.
    """
    return (
        backend in ops.BACKENDS  # not the reference
        and not is_compiling()
        and not torch._C._is_tracing()
        and torch.is_grad_enabled()
        and is_worth_deferring(*inputs)
        and (mask is None or mask.dim() == 2 or inputs[0].shape[1] == 1)
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
    )


def _state(x: Tensor) -> tuple[Any, ...]:
    """Changes if a tensor is modified, gets another storage or layout, or its requires_grad or grad_fn changes."""
    return x._version, x.requires_grad, x.grad_fn, x.storage_offset(), x.shape, x.stride()


class _MemoryGradientNode(Function):
    @staticmethod
    def forward(ctx: Any, keys: Tensor, values: Tensor, passes: Any) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.passes = passes
        return keys.new_empty(0)

    @staticmethod
    @untraced
    def backward(ctx: Any, _: Any) -> Any:
        steps = ctx.passes.get(torch._C._current_graph_task_id())
        return (*steps.joined_gradients(), None) if steps else (None, None, None)


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b; None counts as 0."""
    return a if b is None else b if a is None else a + b


def _score_alike(a: _StepRecord, b: _StepRecord) -> bool:
    """Whether two steps can be combined as queries of one call.

    v may be recomputed in every step (weight normalisation): equal values in different tensors.
    """
    if type(a.score) is not type(b.score) or a.backend != b.backend:
        return False
    if _of_queries(a) and _of_queries(b):  # masks are joined like the queries
        a, b = a._replace(masks=a.masks[:1]), b._replace(masks=b.masks[:1])
    return all(
        x is y or (torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y)
        for x, y in zip((*a.score, *a.masks), (*b.score, *b.masks), strict=True)
    )


def _of_queries(step: _StepRecord) -> bool:
    """Whether the mask, (B, 1, Tk), belongs to the query of this step."""
    mask = step.masks[-1]
    return mask is not None and mask.dim() == 3


def _memory_gradients(steps: list[_StepRecord]) -> tuple[Tensor | None, Tensor | None]:
    """dkeys and dvalues of steps with equal scores: those of one call with the queries of all steps.

    dkeys is None if the steps have computed it themselves, dvalues if there are no values then.
    """
    first, queries = steps[0], [step.query for step in steps]
    masks = first.masks
    if _of_queries(first):
        mask: Any = masks[-1]
        is_same = all(step.masks[-1] is mask for step in steps)
        mask = mask.squeeze(1) if is_same else torch.cat([cast(Tensor, step.masks[-1]) for step in steps], 1)
        masks = (*masks[:-1], mask)
    joined = first._replace(
        grad_context=_join_gradients([step.grad_context for step in steps], queries, first.values.shape[-1]),
        grad_alignments=_join_gradients([step.grad_alignments for step in steps], queries, first.alignments.shape[2]),
        query=torch.cat(queries, 1),
        masks=masks,
        alignments=torch.cat([step.alignments for step in steps], 1),
    )
    if first.score.has_extra:
        if first.values.shape[-1] == 0:  # the steps computed only alignments
            return None, None
        return None, joined.backward(False, False, True)[2]
    _, dkeys, dvalues, *_ = joined.backward(False, True)
    return dkeys, dvalues


def _join_gradients(gradients: list[Tensor | None], queries: list[Tensor], size: int) -> Tensor | None:
    """(B, all Tq, size), with zeros for queries whose output has no gradient; None if none has one."""
    if all(gradient is None for gradient in gradients):
        return None
    pairs = zip(gradients, queries, strict=True)
    return torch.cat([query.new_zeros(*query.shape[:2], size) if g is None else g for g, query in pairs], 1)


class _StepFunction(Function):
    @staticmethod
    def forward(
        ctx: Any,
        gradient: MemoryGradient,
        anchor: Tensor,
        kind: Any,
        backend: str,
        query: Tensor,
        need_alignments: bool,
        *others: Any,
    ) -> Any:
        """others: the fields of the score, and the masks."""
        ctx.set_materialize_grads(False)
        ctx.memory_gradient, ctx.backend, ctx.kind = gradient, backend, kind
        fields = len(kind._fields)
        tensors, ctx.numbers, masks = others[: kind.tensors], others[kind.tensors : fields], others[fields:]
        memory = (gradient.keys, gradient.values)
        context, alignments = ops.below_autograd(kind.op, backend, (query, *memory, *others, True))
        ctx.save_for_backward(query, *memory, *tensors, *masks, alignments)
        return (context, alignments) if need_alignments else context

    @staticmethod
    @untraced
    def backward(ctx: Any, grad_context: Tensor | None, grad_alignments: Tensor | None = None) -> tuple[Any, ...]:
        if grad_context is None and grad_alignments is None:
            return (None,) * len(ctx.needs_input_grad)
        kind, gradient = ctx.kind, ctx.memory_gradient
        query, keys, values, *others, alignments = ctx.saved_tensors
        score, masks = kind(*others[: kind.tensors], *ctx.numbers), tuple(others[kind.tensors :])
        if torch.is_grad_enabled():  # create_graph=True: keys and values that are not detached
            keys, values = gradient.memory
        step = _StepRecord(score, ctx.backend, grad_context, grad_alignments, query, keys, values, masks, alignments)
        needed = gradient.is_needed()
        if kind.has_extra:
            of_keys = needed and gradient.memory[0].requires_grad
            need_sum = of_keys or ctx.needs_input_grad[6 + kind.gradients]
            dquery, dkeys, _, *dscore = step.backward(True, need_sum, False)
            dscore.append(dkeys)
            if needed:
                if not torch.is_grad_enabled():  # the extra is large, and the deferred dvalues do not depend on it
                    step = step._replace(score=score._replace(extra=keys))
                gradient.record(step, dkeys if of_keys else None)
        else:
            if needed:
                gradient.record(step)
            dquery, _, _, *dscore = step.backward(True, False)
        of_score = [d if need else None for d, need in zip_longest(dscore, ctx.needs_input_grad[6:])]
        return None, gradient.empty_grad, None, None, dquery, None, *of_score
