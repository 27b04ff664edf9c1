"""The attention of all steps of a sequence, if each step calls a module, with a state or without one.

The forward calls the module on detached copies of its inputs, and saves the graph that autograd records for the step.
The backward of a step differentiates that graph: from the gradients of context, alignments and next state to those of
the query, of the state, and of parameters, keys and values, which are summed over the steps. The saved tensors of the
sequence hold the graphs, so that autograd releases the graphs together with other saved tensors.

B sentences, S source steps, M size of the context, H hidden_size. Each sentence is one hypothesis.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, Variable

from ...errors import ArgumentTypeError, ArgumentValueError
from ...mechanisms import HeadsMemory
from ...mechanisms.stateful import with_tensors
from ...memory import Memory
from ...memory_gradient import plus
from ...types import wide_dtype
from ..attentions import attend_step
from .collected import Collector, Gradients, with_collected_gradients
from .inputs import CalledAttention, Inputs, Query, keys_and_values, memories, with_memories


class Step(NamedTuple):
    """The graph of a step: from its own inputs, and the inputs of all steps, to its results."""

    query: Tensor  # (B, 1, H), a leaf
    state: tuple[Tensor, ...]  # leaves, or constants; empty without a state
    results: tuple[Tensor, ...]  # context, (B, 1, M), alignments, (B, 1, S), and the next state


class SavedSteps(NamedTuple):
    """The results of the forward that the backward reads."""

    steps: tuple[Step, ...]  # empty if no gradients are needed
    memory: tuple[Tensor, ...]  # keys and values, of each head: leaves, or constants
    anchors: tuple[Tensor, ...]  # of ``gradients``: leaves
    gradients: Gradients

    def has_alignment_gradients(self) -> bool:
        """Whether the alignments depend on anything that requires a gradient; hard choices do not."""
        return any(step.results[1].requires_grad for step in self.steps)

    def inputs(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The inputs of all steps."""
        return [*parameters, *self.memory, *self.anchors]


class CalledForward:
    """Calls the attention step by step."""

    def __init__(self, inputs: Inputs, called: CalledAttention) -> None:
        self.called = called
        self.name: str = type(called.module).__name__
        self.context_size: int = inputs.context_size
        self.state: Any = called.state
        self.alignments: list[Tensor] = []
        self.steps: list[Step] = []
        self.memory: Memory | HeadsMemory = inputs.memory
        self.of_memory: tuple[tuple[Tensor, ...], Gradients] = (), ()
        if called.records:
            leaves = [_of_leaves(x) for x in memories(self.memory)]
            self.memory = with_memories(self.memory, leaves)
            self.of_memory = with_collected_gradients(leaves)

    def step(self, t: int, state: Tensor) -> Tensor:
        """state: (B, H). Returns the context, (B, M)."""
        if self.called.records:
            with torch.enable_grad():
                # ``data`` has its own version counter. Later steps write to other parts of the array of all states.
                query = state.data.unsqueeze(1).requires_grad_()
                before = None if self.state is None else with_tensors(self.state, [_leaf(x) for x in self.state])
                context, alignments, after = attend_step(self.called.module, query, self.memory, before)
            self.steps.append(Step(query, tuple(before or ()), (context, alignments, *(after or ()))))
        else:
            query = state.unsqueeze(1)
            context, alignments, after = attend_step(self.called.module, query, self.memory, self.state)
        batch = state.shape[0]
        if context.shape != (batch, 1, self.context_size):
            expected = f"(B, 1, memory_size) = ({batch}, 1, {self.context_size})"
            raise ArgumentValueError(f"{self.name}: context must have shape {expected}, got {tuple(context.shape)}")
        if context.dtype != state.dtype:
            raise ArgumentTypeError(f"{self.name}: context must have dtype {state.dtype}, got {context.dtype}")
        self.alignments.append(alignments)
        self.state = after
        result: Tensor = context.squeeze(1)
        return result

    def all_alignments(self) -> Tensor:
        """(B, T, S), a copy."""
        return torch.cat(self.alignments, dim=1)

    @property
    def saved(self) -> SavedSteps:
        return SavedSteps(tuple(self.steps), keys_and_values(self.memory), *self.of_memory)


class CalledBackward:
    """Computes the gradients of each step, from the last to the first, and sums those of the inputs of all steps."""

    def __init__(self, inputs: Inputs, called: CalledAttention, saved: SavedSteps) -> None:
        self.called = called
        self.saved = saved
        self.memory: Memory | HeadsMemory = inputs.memory
        self.inputs: list[Tensor] = saved.inputs(called.parameters)
        self.sums: list[Tensor | None] = [None] * (len(called.parameters) + len(saved.memory))  # in the order of inputs
        self.dstate: list[Tensor | None] = []  # of the state after the step that is processed next
        self.collector: Collector = Collector(saved.gradients)

    def step(self, t: int, dcontext: Tensor, dalignments: Tensor | None, dstate: Tensor) -> None:
        """dcontext: (B, M). dalignments: (B, T, S), of all steps. Adds the gradient of the state to dstate, (B, H)."""
        query, state, results = self.saved.steps[t]
        of_alignments = None if dalignments is None else dalignments.narrow(1, t, 1)
        given = [dcontext.unsqueeze(1), of_alignments, *self.dstate]
        with self.collector:
            found = _gradients(results, given, [query, *state, *self.inputs])
        first = 1 + len(state)
        dquery, self.dstate, others = found[0], found[1:first], found[first : first + len(self.sums)]
        for n, gradient in enumerate(others):
            if gradient is None:
                continue
            total = self.sums[n]
            if total is None:  # a copy, because autograd may use the same tensor elsewhere
                self.sums[n] = gradient.to(wide_dtype(gradient.dtype), copy=True)
            else:
                total += gradient
        if dquery is not None:
            dstate.add_(dquery.squeeze(1))

    def gradients(self, states: Tensor, dalignments: Tensor | None) -> dict[str, Any]:
        """The gradients of the fields of ``Inputs`` that belong to the attention, by name.

        The arguments are those of ``AttentionBackward.gradients``. The graphs of the steps have read them already.
        """
        count, sums = len(self.called.parameters), self.sums
        for n, of_steps in enumerate(self.collector.gradients(), count):
            sums[n] = plus(sums[n], of_steps)
        found: list[Any] = [None if d is None else d.to(x.dtype) for x, d in zip(self.inputs, sums, strict=False)]
        of_memory = iter(found[count:])
        parts = [_of_gradients(x, next(of_memory), next(of_memory)) for x in memories(self.memory)]
        of_state: Any = None if self.called.state is None else tuple(self.dstate)
        called = self.called._replace(parameters=tuple(found[:count]), state=of_state)
        return {
            "memory": with_memories(self.memory, parts),
            "score": None,
            "query": Query(None, None, None),
            "called": called,
            "filters": None,
        }


class Replay:
    """The steps of a forward again, as functions of other tensors with the same values, without calling the module.

    This is for gradients that are differentiated themselves. parameters: of the module, as its steps have read them.
    """

    def __init__(self, saved: SavedSteps, parameters: Sequence[Tensor]) -> None:
        self.saved = saved
        self.inputs: list[Tensor] = saved.inputs(parameters)

    def step(self, t: int, query: Tensor, state: Iterable[Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
        """query: (B, 1, H). Returns context, alignments and the tensors of the next state."""
        assert inputs.called is not None
        step = self.saved.steps[t]
        leaves = [step.query, *step.state, *self.inputs]
        unused = [None] * len(self.saved.anchors)
        names = [query, *state, *inputs.called.parameters, *keys_and_values(inputs.memory), *unused]
        return _replay(step.results, leaves, names, self.saved.gradients)


def _replay(
    results: Sequence[Tensor], leaves: Sequence[Tensor], names: Sequence[Tensor | None], gradients: Gradients
) -> tuple[Tensor, ...]:
    """The results of a graph with these leaves, as functions of ``names``, which have the same values."""
    given = tuple(results), tuple(leaves), gradients
    found: tuple[Tensor, ...] = _Replayed.apply(*given, *names)  # type: ignore[no-untyped-call]  # torch has no types
    return found


class _Replayed(Function):
    """Results of a graph, as functions of tensors with the values of its leaves, differentiable any number of times.

    The graph may itself be that of gradients. The last leaves are keys and values of each memory, and the anchors.
    """

    @staticmethod
    def forward(
        ctx: Any, results: tuple[Tensor, ...], leaves: tuple[Tensor, ...], gradients: Gradients, *names: Tensor | None
    ) -> tuple[Tensor, ...]:
        """results, leaves: in tuples, so that autograd does not record them as inputs."""
        ctx.set_materialize_grads(False)
        ctx.gradients, ctx.counts = gradients, (len(results), len(leaves))
        ctx.save_for_backward(*results, *leaves, *names)
        found = tuple(x.detach() for x in results)
        ctx.mark_non_differentiable(*(y for x, y in zip(results, found, strict=True) if not x.requires_grad))
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        tensors, (count, of_leaves) = ctx.saved_tensors, ctx.counts
        results, leaves, names = tensors[:count], tensors[count : count + of_leaves], tensors[count + of_leaves :]
        differentiable = torch.is_grad_enabled()
        given = [g.detach().requires_grad_() if g is not None and differentiable else g for g in grads]
        collector = Collector(ctx.gradients)
        with collector:
            found = _gradients(results, given, leaves, differentiable)
        of_memory, anchors = collector.gradients(), len(collector.used)
        first = of_leaves - anchors - len(of_memory)  # the index of the first keys
        for n, of_steps in enumerate(of_memory, first):
            total = plus(found[n], of_steps)
            found[n] = None if total is None else total.to(leaves[n].dtype)
        found[of_leaves - anchors :] = [None] * anchors
        if differentiable:
            at = [n for n, x in enumerate(found) if x is not None]
            new_leaves, new_names = ([x for x in of if x is not None] for of in (given, grads))
            of_found = tuple(x for x in found if x is not None)
            again = _replay(of_found, (*new_leaves, *leaves), (*new_names, *names), ctx.gradients)
            for n, x in zip(at, again, strict=True):
                found[n] = x
        return None, None, None, *found


def _leaf(x: Tensor) -> Tensor:
    """A copy that shares the values: a leaf if x requires a gradient, else a constant."""
    return x.detach().requires_grad_(x.requires_grad)


def _of_leaves(memory: Memory) -> Memory:
    """A memory of leaves that share the values."""
    made = Memory(_leaf(memory.keys), _leaf(memory.values), memory.memory_lengths, memory.mask)
    return made.with_zero_padding() if memory.has_zero_padding() else made


def _of_gradients(memory: Memory, *gradients: Tensor | None) -> Memory:
    """A memory with the gradients of keys and values, which may be None, in their place."""
    made = Memory(memory.keys, memory.values)
    for name, gradient in zip(("keys", "values"), gradients, strict=True):
        object.__setattr__(made, name, gradient)
    return made


def _gradients(
    results: Sequence[Tensor], given: Sequence[Tensor | None], leaves: Sequence[Tensor], create_graph: bool = False
) -> list[Tensor | None]:
    """The gradients of leaves from those of results, which may be fewer; None for constants, and for zeros."""
    pairs = [(x, d) for x, d in zip(results, given, strict=False) if d is not None and x.requires_grad]
    wanted = [x for x in leaves if x.requires_grad]
    if not pairs or not wanted:
        return [None] * len(leaves)
    outputs, of_outputs = zip(*pairs, strict=True)
    hooked = [x for x in wanted if x._backward_hooks]
    with _without_hooks(hooked) if hooked else nullcontext():
        found = iter(_run_backward(outputs, of_outputs, create_graph, wanted))
    return [next(found) if x.requires_grad else None for x in leaves]


def _run_backward(
    outputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...], create_graph: bool, inputs: list[Tensor]
) -> Sequence[Tensor | None]:
    """``torch.autograd.grad`` without its checks of arguments, whose first call imports half of torch.compile.

    The graphs stay for another backward: autograd releases them with the saved tensors of the sequence.
    """
    keep_graph = allow_unused = True
    found: tuple[Tensor | None, ...] = Variable._execution_engine.run_backward(
        outputs, gradients, keep_graph, create_graph, tuple(inputs), allow_unused, accumulate_grad=False
    )
    return found


@contextmanager
def _without_hooks(tensors: Sequence[Any]) -> Iterator[None]:
    """A context without the hooks of these tensors, which must see whole gradients, not those of single steps."""
    hooks: list[dict[int, Any]] = [x._backward_hooks for x in tensors]
    kept = [dict(of_tensor) for of_tensor in hooks]
    for of_tensor in hooks:
        of_tensor.clear()
    try:
        yield
    finally:
        for of_tensor, before in zip(hooks, kept, strict=True):
            of_tensor.update(before)
