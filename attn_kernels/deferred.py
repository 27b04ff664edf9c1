"""The gradient of a memory, deferred: made once for all steps that read it, and not by each of them.

The backward of a decoding step that makes gradients of keys and values writes, and autograd then adds up, two arrays as
large as the memory; over the steps of a sentence that takes most of the time of training. Here the backward of a step
makes the gradients of its query and of v and bias only, and leaves its query, alignments and their gradients with the
memory; after the last step, the many-query backward makes the gradients of keys and values from all of them at once.

To autograd the memory is a node, ``_Meeting``, that keys and values enter and an empty tensor, the token, leaves. Every
step takes the token, so autograd runs the node after all steps that are part of a backward pass, and only where the
pass wants a gradient beyond it. The node saves no tensors, as no identity does: what a pass needs it gets from the
steps, which save and release theirs as each would by itself. Hence retained graphs, several losses and steps that are
never differentiated behave as without it.

What the steps leave belongs to the pass (autograd's "graph task") that they ran in, by its number, and is held by the
engine only: it goes with the pass, whether that ends or is aborted, and passes that are nested or run in other threads
do not see each other.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd import Function, Variable, forward_ad
from torch.compiler import is_compiling

from . import ops
from .scores import Score

_FEW = 8  # queries; with more in one step its own backward is the many-query one
# Bytes of keys and values. How many times as fast as a gradient from each step, over the backward of 20 to 50 steps of
# one query on one thread of a CPU, additive / dot: 0.9 / 0.9 at 80 KB, 1.0 / 1.0 at 200 KB, 1.2 / 1.5 at 400 KB, 3 / 4
# at 13 MB. Four steps gain; a single one takes longer.
_LARGE = 1 << 18


class _Step(NamedTuple):
    """What a step leaves: its op, the backend, and the arguments of the backward of that.

    These are grad_context (B, Tq, D) or None, grad_alignments (B, Tq, Tk) or None, query (B, Tq, A), keys, values, what
    is particular to the op, memory_lengths, mask, and alignments (B, Tq, Tk).
    """

    op: str
    backend: str
    arguments: tuple[Any, ...]


class _Pass(list[_Step]):
    """The steps of one backward pass so far. The engine holds it as a function to call at the end of the pass."""

    def __call__(self) -> None:
        """Nothing is left to do: the engine lets go of it now, as it does where the pass is aborted."""


class Meeting:
    """Where the gradients of all steps on one memory meet.

    keys: (B, Tk, A), values: (B, Tk, D). The steps get them detached: the token is their only way back to them.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._state = *_state(keys), *_state(values)
        self._passes: WeakValueDictionary[int, _Pass] = WeakValueDictionary()
        self.keys, self.values = keys.detach(), values.detach()
        self.memory = (keys, values)  # for gradients that are differentiated themselves
        self.token = _Meeting.apply(keys, values, self._passes)
        self.nothing = self.token.detach()  # the gradient of the token: None is no number to compiled autograd

    def is_of(self, keys: Tensor, values: Tensor) -> bool:
        """Whether keys and values still have the storage and the place in autograd's graph that they had.

        What they hold may have been written to: both that and ``self.keys`` show it.
        """
        is_alias = torch._C._is_alias_of  # type: ignore[attr-defined]
        return (
            self._state == (*_state(keys), *_state(values))
            and is_alias(self.keys, keys)
            and is_alias(self.values, values)
        )

    def arguments(self, *arguments: Any) -> tuple[Any, ...]:
        """Those of a step's backward; where that is differentiated itself, with keys and values as autograd knows them.

        arguments: grad_context, grad_alignments, query, keys, values, and what follows in the op's backward.
        """
        if torch.is_grad_enabled():  # the pass has create_graph=True
            return *arguments[:3], *self.memory, *arguments[5:]
        return arguments

    def leave(self, step: _Step) -> None:
        """Called by the backward of a step."""
        if not torch._C._will_engine_execute_node(self.token.grad_fn):
            return  # this pass asks for nothing beyond the memory
        task = torch._C._current_graph_task_id()
        steps = self._passes.get(task)
        if steps is None:
            steps = self._passes[task] = _Pass()
            Variable._execution_engine.queue_callback(steps)
        steps.append(step)

    def attend(
        self,
        score: Score,
        backend: str,
        query: Tensor,
        memory_lengths: Tensor | None,
        mask: Tensor | None,
        need_alignments: bool,
    ) -> Any:
        """The op of a score on the memory, by ``ops.call``."""
        masks = (memory_lengths, mask)
        return _StepFunction.apply(self, self.token, type(score), backend, query, *masks, need_alignments, *score)


def pays(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether keys and values, which need a gradient, are large enough and the queries, (B, Tq, A), few enough."""
    return (
        (keys.requires_grad or values.requires_grad)
        and query.shape[1] < _FEW
        and (keys.numel() + values.numel()) * keys.element_size() >= _LARGE
    )


def defers(backend: str, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> bool:
    """Whether a step on a memory leaves the gradients of keys and values to be made later.

    query: (B, Tq, A), keys: (B, Tk, A), values: (B, Tk, D), mask: (B, Tk) or (B, Tq, Tk), which a step of several
    queries may not have.
    """
    return (
        backend in ops.BACKENDS  # not the reference
        and not is_compiling()
        and not torch._C._is_tracing()
        and torch.is_grad_enabled()
        and pays(query, keys, values)
        and (mask is None or mask.dim() == 2 or query.shape[1] == 1)
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
    )


def _state(x: Tensor) -> tuple[Any, ...]:
    """Differs where a tensor was written to, got other storage, or began or ceased to need a gradient."""
    return x._version, x.requires_grad, x.grad_fn, x.storage_offset(), x.shape, x.stride()


class _Meeting(Function):
    @staticmethod
    def forward(ctx, keys, values, passes):
        ctx.set_materialize_grads(False)
        ctx.passes = passes
        return keys.new_empty(0)

    @staticmethod
    def backward(ctx, _):
        steps = ctx.passes.get(torch._C._current_graph_task_id())
        if not steps:
            return None, None, None
        groups: list[list[_Step]] = []
        for step in steps:
            group = next((group for group in groups if _score_alike(group[0], step)), None)
            if group is None:
                groups.append([step])
            else:
                group.append(step)
        steps.clear()
        dkeys, dvalues = _memory_gradients(groups[0])
        for group in groups[1:]:
            more_keys, more_values = _memory_gradients(group)
            dkeys, dvalues = dkeys + more_keys, dvalues + more_values
        return dkeys, dvalues, None


def _score_alike(a: _Step, b: _Step) -> bool:
    """Whether two steps can be queries of one call. A v that is normalised in each step is equal, and not the same."""
    return (a.op, a.backend) == (b.op, b.backend) and all(
        x is y or (torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y)
        for x, y in zip(a.arguments[5:-3], b.arguments[5:-3], strict=True)
    )


def _memory_gradients(steps: list[_Step]) -> tuple[Tensor, Tensor]:
    """dkeys, dvalues of steps that score alike: those of one call with the queries of all."""
    _, _, _, keys, values, *score, memory_lengths, mask, _ = steps[0].arguments
    if mask is not None and mask.dim() == 3:
        mask = mask.squeeze(1)  # (B, 1, Tk), and the same for every step
    grad_contexts, grad_alignments, queries, *_, alignments = zip(*(step.arguments for step in steps), strict=True)
    gradients = ops.call(
        f"{steps[0].op}_backward",
        steps[0].backend,
        _join_gradients(grad_contexts, queries, values.shape[2]),
        _join_gradients(grad_alignments, queries, keys.shape[1]),
        torch.cat(queries, 1),
        keys,
        values,
        *score,
        memory_lengths,
        mask,
        torch.cat(alignments, 1),
        False,
        True,
    )
    return gradients[1], gradients[2]


def _join_gradients(gradients: tuple[Tensor | None, ...], queries: tuple[Tensor, ...], size: int) -> Tensor | None:
    """(B, all Tq, size), with zeros for the queries whose output has no gradient; None where none has one."""
    if all(gradient is None for gradient in gradients):
        return None
    pairs = zip(gradients, queries, strict=True)
    return torch.cat([query.new_zeros(*query.shape[:2], size) if g is None else g for g, query in pairs], 1)


class _StepFunction(Function):
    @staticmethod
    def forward(ctx, meeting, token, kind, backend, query, memory_lengths, mask, need_alignments, *score):
        ctx.set_materialize_grads(False)
        ctx.meeting, ctx.backend, ctx.op = meeting, backend, kind.op
        # A score is of tensors or of numbers: saved, or kept as it is.
        ctx.numbers, tensors = ((), score) if kind.holds_tensors else (score, ())
        memory, masks = (meeting.keys, meeting.values), (memory_lengths, mask)
        context, alignments = ops.below_autograd(kind.op, backend, (query, *memory, *score, *masks, True))
        ctx.save_for_backward(query, *memory, *tensors, *masks, alignments)
        return (context, alignments) if need_alignments else context

    @staticmethod
    def backward(ctx, grad_context, grad_alignments=None):
        if grad_context is None and grad_alignments is None:
            return (None,) * len(ctx.needs_input_grad)
        query, keys, values, *tensors, memory_lengths, mask, alignments = ctx.saved_tensors
        score, others = (*ctx.numbers, *tensors), (memory_lengths, mask, alignments)
        arguments = ctx.meeting.arguments(grad_context, grad_alignments, query, keys, values, *score, *others)
        ctx.meeting.leave(_Step(ctx.op, ctx.backend, arguments))
        dquery, _, _, *dscore = ops.call(f"{ctx.op}_backward", ctx.backend, *arguments, True, False)
        of_score = [d if need else None for d, need in zip_longest(dscore, ctx.needs_input_grad[8:])]
        return None, ctx.meeting.nothing, None, None, dquery, None, None, None, *of_score
