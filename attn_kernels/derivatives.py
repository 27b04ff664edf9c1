"""The derivatives that no kernel computes: of gradients, in forward mode, and under the transforms of ``torch.func``.

The kernels know an op and its gradients. What lies beyond takes the formulas of the reference, whatever the backend:

- The derivative of a gradient (``create_graph=True``, ``torch.func.hessian``) is that of the reference's gradient. It
  materialises the (B, Tq, Tk, A) tensor of additive attention, as the reference does.
- A tangent (``torch.func.jvp``, ``torch.autograd.forward_ad``) is that of the reference. The result itself is the
  backend's.
- ``torch.func.grad``, ``vjp`` and ``jacrev`` take the backend's kernels, forward and backward.
- ``torch.vmap`` takes them, too: the mapped axis becomes a part of B. Where something is mapped that all rows of a
  batch share (``v``, ``bias``), with dropout, and for gradients summed over the rows, the kernels run once for each of
  its elements.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function

from . import gated_formulas, packing, reference
from .activations import ACTIVATIONS
from .types import NORMALIZERS


class Formula(NamedTuple):
    """An op in plain PyTorch, with the arguments and results of its schema.

    differentiable: the positions of the arguments that have a derivative. shared: of those without an axis B; None
    where results are sums over the rows of the batch. numbers: where those that are no tensors start and end. flags:
    how many of the last arguments are none, either. memory: how many of the differentiable arguments are keys and
    values, from position 1 on. results: 1, or of an attention, whose last argument says if alignments are returned, 2
    or 3; the backward needs all but the first. addend: the position of what is added to the keys, after all others that
    are differentiable; the gradient of the sum is that of both. seed: the position of that of dropout.
    """

    function: Callable[..., tuple[Tensor, ...]]
    differentiable: tuple[int, ...]
    shared: tuple[int, ...] | None
    numbers: tuple[int, int] = (0, 0)
    flags: int = 0
    memory: int = 0
    results: int = 1
    addend: int | None = None
    seed: int | None = None

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Which gradients the backward is asked for together, by a flag each; see ops.py."""
        others = tuple(i for i in self.differentiable if not 1 <= i <= self.memory and i != self.addend)
        if self.addend is None:
            return others, tuple(range(1, 1 + self.memory))
        return others, (1, self.addend), (2,)

    def tensors(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        start, stop = self.numbers
        return (*arguments[:start], *arguments[stop : len(arguments) - self.flags]) if stop else arguments

    def save(self, ctx: Any, arguments: tuple[Any, ...]) -> None:
        """Of an op's node in the graph: what its derivatives need."""
        start, stop = self.numbers
        if stop:
            ctx.numbers, ctx.flags = arguments[start:stop], arguments[len(arguments) - self.flags :]
        ctx.save_for_backward(*self.tensors(arguments))

    def saved(self, ctx: Any) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors  # read once: checkpointing computes what is saved anew for each read
        start, stop = self.numbers
        return (*tensors[:start], *ctx.numbers, *tensors[start:], *ctx.flags) if stop else tensors


def pull_back(
    formula: Formula, arguments: Sequence[Any], grads: Sequence[Tensor | None], wanted: Sequence[int]
) -> list[Tensor | None]:
    """Gradients of the arguments at ``wanted``, from those of the results (None: 0); None for an argument of None."""
    function, positions, primals = _of_tensors(formula, arguments, wanted)
    results, pull = torch.func.vjp(function, *primals)[:2]
    pairs = zip(results, grads, strict=True)
    gradients = pull(tuple(torch.zeros_like(result) if grad is None else grad for result, grad in pairs))
    by_position = dict(zip(positions, gradients, strict=True))
    return [by_position.get(i) for i in wanted]


def push_forward(formula: Formula, arguments: Sequence[Any], tangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Tangents of the results, from those of the arguments (None: 0).

    ``pull`` below is linear, and its transpose is the derivative in forward mode: ``torch.func.jvp`` would refuse to
    run in a ``dual_level`` of the caller.
    """
    given = [i for i in formula.differentiable if tangents[i] is not None]
    function, positions, primals = _of_tensors(formula, arguments, given)
    results, pull = torch.func.vjp(function, *primals)[:2]
    push = torch.func.vjp(pull, tuple(map(torch.zeros_like, results)))[1]
    # In the layout that kernels write: where a result is a view of a larger tensor, autograd takes no other.
    return tuple(tangent.contiguous() for tangent in push(tuple(tangents[i] for i in positions))[0])


def _of_tensors(
    formula: Formula, arguments: Sequence[Any], wanted: Sequence[int]
) -> tuple[Callable[..., tuple[Tensor, ...]], list[int], list[Tensor]]:
    """The formula as a function of the arguments at ``wanted`` that are not None; their positions; and they."""
    positions = [i for i in wanted if arguments[i] is not None]
    # What a transform saved that has ended since, dispatched ops unwrap themselves, and torch.func.vjp does not.
    arguments = unwrap_dead_wrappers(tuple(arguments))

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(positions, tensors, strict=True))
        return tuple(formula.function(*(given.get(i, argument) for i, argument in enumerate(arguments))))

    return function, positions, [arguments[i] for i in positions]


# The table ------------------------------------------------------------------------------------------------------------


def _additive_scores(query: Tensor, keys: Tensor, v: Tensor, bias: Tensor | None) -> Any:
    return (reference.additive_scores(query, keys, v, bias),)


def _activated_scores(*arguments: Any) -> Any:
    *inputs, activation, negative_slope = arguments
    return (reference.additive_scores(*inputs, **_of_activation(activation, negative_slope)),)


def _activated_attention(*arguments: Any) -> Any:
    *inputs, activation, negative_slope, memory_lengths, mask, _ = arguments
    keywords: dict[str, Any] = _of_activation(activation, negative_slope)
    return reference.additive_attention(*inputs, **keywords, memory_lengths=memory_lengths, mask=mask)


def _of_activation(activation: int, negative_slope: float) -> dict[str, Any]:
    return dict(activation=ACTIVATIONS[activation], negative_slope=negative_slope)


def _additive_attention(*arguments: Any) -> Any:
    *inputs, _, memory_lengths, mask, _ = arguments  # of query, keys, values, v, bias, prepared
    return reference.additive_attention(*inputs, memory_lengths=memory_lengths, mask=mask)


def _attention_with_extra(*arguments: Any) -> Any:
    inputs, (extra, *numbers, memory_lengths, mask, _) = arguments[:5], arguments[5:]  # of query, keys, values, v, bias
    keywords: dict[str, Any] = dict(extra=extra, memory_lengths=memory_lengths, mask=mask)
    if numbers:
        keywords |= _of_activation(*numbers)
    return reference.additive_attention(*inputs, **keywords)


def _dot_attention(*arguments: Any) -> Any:
    *inputs, scale, memory_lengths, mask, _ = arguments
    return reference.dot_attention(*inputs, scale=scale, memory_lengths=memory_lengths, mask=mask)


def _backward(formula: Formula) -> Formula:
    """The gradients of a formula's differentiable arguments, in order; (0,) for those that are not needed.

    Arguments: the gradients of the results, the arguments of the formula (of an attention with its results but the
    context in place of the last one), and which groups of gradients are needed. There is none of an addend of the keys.
    """
    results, groups = formula.results, formula.groups
    returned = [i for i in formula.differentiable if i != formula.addend]

    def function(*arguments: Any) -> tuple[Tensor, ...]:
        grads, inputs, flags = arguments[:results], arguments[results : -len(groups)], arguments[-len(groups) :]
        needed = {i for group, flag in zip(groups, flags, strict=True) if flag for i in group}
        wanted = [i for i in returned if i in needed]
        found = dict(zip(wanted, pull_back(formula, inputs, grads, wanted), strict=True))
        gradients = (found.get(i) for i in returned)
        return tuple(inputs[0].new_zeros(0) if gradient is None else gradient for gradient in gradients)

    return Formula(
        function,
        differentiable=(*range(results), *(results + i for i in formula.differentiable)),
        shared=() if formula.shared == () else None,
        numbers=(results + formula.numbers[0], results + formula.numbers[1]),
        flags=len(groups),
        seed=None if formula.seed is None else results + formula.seed,
    )


_SCORES = Formula(_additive_scores, differentiable=(0, 1, 2, 3), shared=(2, 3), memory=1)
_ADDITIVE = Formula(_additive_attention, differentiable=(0, 1, 2, 3, 4), shared=(3, 4), memory=2, results=2)
_ACTIVATED_SCORES = Formula(_activated_scores, differentiable=(0, 1, 2, 3), shared=(2, 3), numbers=(4, 6), memory=1)
_ACTIVATED = Formula(
    _activated_attention, differentiable=(0, 1, 2, 3, 4), shared=(3, 4), numbers=(5, 7), memory=2, results=2
)
_DOT = Formula(_dot_attention, differentiable=(0, 1, 2), shared=(), numbers=(3, 4), memory=2, results=2)


def _with_options(function: Callable[..., Any], tensors: int, *numbers: Callable[[Any], dict[str, Any]]) -> Formula:
    """The formula of an attention with options.

    function: of the reference. tensors: of the score, after query, keys and values. numbers: for each number of the
    score, what makes keywords of the function of it.
    """

    def formula(query: Tensor, keys: Tensor, values: Tensor, *others: Any) -> Any:
        own, score_bias, others = others[:tensors], others[tensors], others[tensors + 1 :]
        keywords = {name: x for number, make in zip(others, numbers, strict=False) for name, x in make(number).items()}
        dropout_p, normalizer, clip, seed, memory_lengths, mask = others[len(numbers) : len(numbers) + 6]
        options = dict(score_bias=score_bias, dropout_p=dropout_p, seed=seed, normalizer=NORMALIZERS[normalizer])
        rest = dict(clip=clip or None, memory_lengths=memory_lengths, mask=mask)
        return function(query, keys, values, *own, **keywords, **options, **rest, need_log_total=True)

    first = 4 + tensors
    return Formula(
        formula,
        differentiable=tuple(range(first)),
        shared=tuple(range(3, 3 + tensors)),
        numbers=(first, first + len(numbers) + 3),
        memory=2,
        results=3,
        seed=first + len(numbers) + 3,
    )


def _packed(function: Callable[..., Any], tensors: int, *numbers: Callable[[float], dict[str, Any]]) -> Formula:
    """The formula of an attention over packed keys and values. Arguments as of ``_with_options``."""

    def formula(query: Tensor, keys: Tensor, values: Tensor, *others: Any) -> Any:
        own, (*given, max_length, offsets, _) = others[:tensors], others[tensors:]
        keywords = {name: x for number, make in zip(given, numbers, strict=True) for name, x in make(number).items()}
        columns = max_length or packing.enough_columns(offsets, len(keys))
        padded = (packing.pad(x, offsets, columns) for x in (keys, values))
        lengths = packing.lengths(offsets)
        context, alignments = function(query, *padded, *own, **keywords, memory_lengths=lengths)
        return context, alignments if max_length else packing.flatten_alignments(alignments, offsets, len(keys))

    first = 3 + tensors
    return Formula(
        formula,
        differentiable=tuple(range(first)),
        shared=None,  # where sentences lie differs from one element of a mapped axis to the next
        numbers=(first, first + len(numbers) + 1),
        flags=0,
        memory=2,
        results=2,
    )


_ADDITIVE_PACKED = _packed(reference.additive_attention, 2)
_ACTIVATED_PACKED = _packed(reference.additive_attention, 2, *gated_formulas.NUMBERS)
_DOT_PACKED = _packed(reference.dot_attention, 0, lambda scale: dict(scale=scale))
_ADDITIVE_WITH_OPTIONS = _with_options(reference.additive_attention, 2)
_ACTIVATED_WITH_OPTIONS = _with_options(reference.additive_attention, 2, *gated_formulas.NUMBERS)
_GATED_SCORES = Formula(gated_formulas.scores, (0, 1, 2, 3, 4), shared=(2, 3), numbers=(5, 7), memory=1)
_GATED = _with_options(gated_formulas.attention, 3, *gated_formulas.NUMBERS)._replace(shared=(3, 4))  # not the gate
_DOT_WITH_OPTIONS = _with_options(reference.dot_attention, 0, lambda scale: dict(scale=scale))
_ADDITIVE_WITH_EXTRA = Formula(_attention_with_extra, tuple(range(6)), shared=(3, 4), memory=2, results=2, addend=5)
_ACTIVATED_WITH_EXTRA = _ADDITIVE_WITH_EXTRA._replace(numbers=(6, 8))
_WITH_BACKWARD = {
    "additive_scores": _SCORES,
    "additive_attention": _ADDITIVE,
    "activated_scores": _ACTIVATED_SCORES,
    "activated_attention": _ACTIVATED,
    "dot_attention": _DOT,
    "additive_attention_with_options": _ADDITIVE_WITH_OPTIONS,
    "activated_attention_with_options": _ACTIVATED_WITH_OPTIONS,
    "dot_attention_with_options": _DOT_WITH_OPTIONS,
    "additive_attention_with_extra": _ADDITIVE_WITH_EXTRA,
    "activated_attention_with_extra": _ACTIVATED_WITH_EXTRA,
    "additive_attention_packed": _ADDITIVE_PACKED,
    "activated_attention_packed": _ACTIVATED_PACKED,
    "dot_attention_packed": _DOT_PACKED,
    "gated_additive_scores": _GATED_SCORES,
    "gated_additive_attention": _GATED,
}
FORMULAS = {
    "additive_prepare": Formula(lambda keys: (), differentiable=(), shared=()),  # a constant that no formula reads
    **_WITH_BACKWARD,
    **{f"{name}_backward": _backward(formula) for name, formula in _WITH_BACKWARD.items()},
}


# The rule of autograd -------------------------------------------------------------------------------------------------


def rules(
    op: str, compute: Callable[..., Any], gradients: Callable[..., Any] | None
) -> tuple[type[Function], type[Function]]:
    """Two rules of autograd for an op on a backend.

    The first one has all that forward mode and ``torch.func`` ask for. It costs several times as much a call as the
    second one, which is for reverse mode alone, and of an attention returns the context alone where no alignments are
    asked for: each output costs some microseconds.

    Args:
        op: of ``FORMULAS``.
        compute: the kernel, for tensors without derivatives.
        gradients: of the differentiable arguments, called with those of the results, the arguments, and which are
            needed (see ``_backward``); of an attention it gets the alignments in place of the last argument. None: as
            the formula has it.
    """
    formula = FORMULAS[op]
    results_count, attends = formula.results, formula.results > 1

    save, saved = formula.save, formula.saved
    count, groups, addend = len(formula.differentiable), formula.groups, formula.addend

    @functools.cache  # a call of it in every backward would take microseconds
    def plan(needs: tuple[bool, ...]) -> tuple[tuple[bool, ...], tuple[int, ...], tuple[None, ...]]:
        """Of the inputs that need a gradient: which groups do, which results do not, and what follows the results."""
        unneeded = tuple(i for i in range(count) if not needs[i])
        return tuple(any(needs[i] for i in group) for group in groups), unneeded, (None,) * (len(needs) - count)

    def pulled(arguments: tuple[Any, ...], grads: Sequence[Tensor | None], needs: tuple[bool, ...]) -> Any:
        wanted = [i for i in formula.differentiable if needs[i]]
        found = dict(zip(wanted, pull_back(formula, arguments, grads, wanted), strict=True)) if wanted else {}
        return tuple(found.get(i) for i in range(len(needs)))

    def reverse(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        if grads[0] is None and all(grad is None for grad in grads):
            return (None,) * len(needs)
        if gradients is None:
            pulled_back: tuple[Tensor | None, ...] = pulled(saved(ctx), grads, needs)
            return pulled_back
        flags, unneeded, rest = plan(needs)
        if len(grads) < results_count:  # the context alone was returned
            made = gradients(grads[0], *(None,) * (results_count - 1), *saved(ctx), *flags)
        else:
            made = gradients(*grads, *saved(ctx), *flags)
        if addend is not None:
            made = (*made, made[1])
        if unneeded:
            made = list(made)
            for i in unneeded:
                made[i] = None
        return (*made, *rest)

    class Rule(Function):
        backward = staticmethod(reverse)

        @staticmethod
        def forward(*arguments: Any) -> Any:
            return compute(*arguments[:-1], True) if attends else compute(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.set_materialize_grads(False)
            ctx.single = isinstance(output, Tensor)
            save(ctx, (*inputs[:-1], *output[1:]) if attends else inputs)
            # What forward mode reads as ctx.saved_tensors: as above, but for the alignments, which it does not need.
            ctx.save_for_forward(*(x if isinstance(x, Tensor) else None for x in formula.tensors(inputs)))
            if not formula.differentiable:
                ctx.mark_non_differentiable(output)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            if not formula.differentiable:
                return None
            results = push_forward(formula, saved(ctx), tangents)
            return results[0] if ctx.single else results

        @staticmethod
        def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
            n, apply = info.batch_size, cast(Any, Rule.apply)
            if n == 0:
                return torch.vmap(lambda *arguments: apply_formula(op, arguments), in_dims)(*arguments), 0
            first = [x if axis is None else x.movedim(axis, 0) for x, axis in zip(arguments, in_dims, strict=True)]
            mapped = [axis is not None for axis in in_dims]
            # As a part of B, elements that share a seed would have other weights than with a call for each.
            drops = formula.seed is not None and arguments[formula.seed] is not None
            if drops or formula.shared is None or any(mapped[i] for i in formula.shared):
                parts = [apply(*(x[i] if m else x for x, m in zip(first, mapped, strict=True))) for i in range(n)]
                if isinstance(parts[0], Tensor):
                    return torch.stack(parts), 0
                return tuple(map(torch.stack, zip(*parts, strict=True))), 0
            folded = list(first)
            for i, x in enumerate(first):
                if isinstance(x, Tensor) and i not in formula.shared:
                    folded[i] = (x if mapped[i] else x.expand(n, *x.shape)).flatten(0, 1)
            results = apply(*folded)
            if isinstance(results, Tensor):
                return results.unflatten(0, (n, -1)), 0
            return tuple(result.unflatten(0, (n, -1)) for result in results), 0

    def forward(ctx: Any, *arguments: Any) -> Any:
        ctx.set_materialize_grads(False)
        if not attends:
            save(ctx, arguments)
            return compute(*arguments)
        inputs = arguments[:-1]
        results = compute(*inputs, True)  # the backward starts from the alignments, (B, Tq, Tk)
        save(ctx, (*inputs, *results[1:]))
        return results if arguments[-1] or results_count > 2 else results[0]

    # Named after the op, as autograd's graph shows it: AdditiveAttentionBackward.
    name = op.title().replace("_", "")
    members = {"forward": staticmethod(forward), "backward": staticmethod(reverse)}
    reverse_rule: type[Function] = type(Function)(name, (Function,), members)  # type: ignore[misc]
    return Rule, reverse_rule


def apply_formula(op: str, arguments: Sequence[Any]) -> Any:
    """The results of an op by its formula."""
    results = FORMULAS[op].function(*arguments)
    return results if len(results) > 1 else results[0]


def transforms_are_active() -> bool:
    """Whether a transform of ``torch.func`` is; ``torch.compile``, which enters them as it traces, takes a constant."""
    return torch._C._are_functorch_transforms_active()


transforms_are_active._dynamo_marked_constant = True  # type: ignore[attr-defined]
