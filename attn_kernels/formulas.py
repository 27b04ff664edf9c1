"""Every op as a formula in plain PyTorch, with the arguments and results of its schema, and its derivatives.

The formulas call the reference. ``FORMULAS``, at the end, has a row for each op and one for its backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers

from . import gated_formulas, packing, reference
from .activations import ACTIVATIONS
from .types import NORMALIZERS


class Formula(NamedTuple):
    """An op in plain PyTorch, with the arguments and results of its schema.

    differentiable: positions of the arguments that have a derivative.
    shared: positions of the arguments without a batch axis; None if results are sums over the batch.
    numbers: start and end of the arguments that are not tensors.
    flags: how many of the last arguments are not tensors.
    memory: how many differentiable arguments are keys and values; they start at position 1.
    results: number of results: 1, or 2 or 3 for an attention, whose last argument is need_alignments. The backward
        needs all but the first.
    addend: position of the tensor that is added to the keys, the last differentiable one. Both get the gradient of
        their sum.
    joint: whether the gradients of keys and values share a flag.
    seed: position of the seed of dropout.
    """

    function: Callable[..., tuple[Tensor, ...]]
    differentiable: tuple[int, ...]
    shared: tuple[int, ...] | None
    numbers: tuple[int, int] = (0, 0)
    flags: int = 0
    memory: int = 0
    results: int = 1
    addend: int | None = None
    joint: bool = True
    seed: int | None = None

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Positions of the arguments whose gradients share a ``need_...`` flag of the backward; see ops.py."""
        others = tuple(i for i in self.differentiable if not 1 <= i <= self.memory and i != self.addend)
        keys = (1,) if self.addend is None else (1, self.addend)
        values = tuple(range(2, 1 + self.memory))
        return (others, keys + values) if self.joint else (others, keys, values)

    def tensors(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        start, stop = self.numbers
        return (*arguments[:start], *arguments[stop : len(arguments) - self.flags]) if stop else arguments

    def save(self, ctx: Any, arguments: tuple[Any, ...]) -> None:
        """Saves the arguments for the derivatives in a node of autograd's graph."""
        start, stop = self.numbers
        if stop:
            ctx.numbers, ctx.flags = arguments[start:stop], arguments[len(arguments) - self.flags :]
        ctx.save_for_backward(*self.tensors(arguments))

    def saved(self, ctx: Any) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors  # read once: with checkpointing, each read recomputes them
        start, stop = self.numbers
        return (*tensors[:start], *ctx.numbers, *tensors[start:], *ctx.flags) if stop else tensors


def pull_back(
    formula: Formula, arguments: Sequence[Any], grads: Sequence[Tensor | None], wanted: Sequence[int]
) -> list[Tensor | None]:
    """VJP: gradients of the arguments at ``wanted`` from those of the results (None: 0); None where absent."""
    function, positions, primals = _of_tensors(formula, arguments, wanted)
    results, pull = torch.func.vjp(function, *primals)[:2]
    pairs = zip(results, grads, strict=True)
    gradients = pull(tuple(torch.zeros_like(result) if grad is None else grad for result, grad in pairs))
    by_position = dict(zip(positions, gradients, strict=True))
    return [by_position.get(i) for i in wanted]


def push_forward(formula: Formula, arguments: Sequence[Any], tangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """JVP: tangents of the results from those of the arguments (None: 0).

    It is the transpose of ``pull``, which is linear: ``torch.func.jvp`` cannot run inside the caller's ``dual_level``.
    """
    given = [i for i in formula.differentiable if tangents[i] is not None]
    function, positions, primals = _of_tensors(formula, arguments, given)
    results, pull = torch.func.vjp(function, *primals)[:2]
    push = torch.func.vjp(pull, tuple(map(torch.zeros_like, results)))[1]
    # Contiguous, as kernels write their results: autograd requires that layout if a result is a view.
    return tuple(tangent.contiguous() for tangent in push(tuple(tangents[i] for i in positions))[0])


def _of_tensors(
    formula: Formula, arguments: Sequence[Any], wanted: Sequence[int]
) -> tuple[Callable[..., tuple[Tensor, ...]], list[int], list[Tensor]]:
    """The formula as a function of the arguments at ``wanted`` that are not None, their positions and their values."""
    positions = [i for i in wanted if arguments[i] is not None]
    # Tensors saved under a transform that has ended are dead wrappers. Dispatched ops unwrap them, torch.func.vjp not.
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
    """The backward of a formula: gradients of its differentiable arguments, in order; (0,) if not needed.

    Arguments: the gradients of the results; the arguments of the formula (for an attention, its results except the
    context replace the last one); a flag for each group of gradients. An addend of the keys has no gradient here.
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


def _with_options(
    function: Callable[..., Any], tensors: int, *numbers: Callable[[Any], dict[str, Any]], adds: bool = True
) -> Formula:
    """The formula of an attention with options.

    function: of the reference. tensors: number of the score's tensors, after query, keys and values. numbers: for each
    number of the score, a function that turns it into keyword arguments. adds: whether an argument is added to the
    keys, ``extra`` after score_bias.
    """

    def formula(query: Tensor, keys: Tensor, values: Tensor, *others: Any) -> Any:
        own, score_bias, others = others[:tensors], others[tensors], others[tensors + 1 :]
        added = dict(extra=others[0]) if adds else {}
        others = others[1:] if adds else others
        keywords = {name: x for number, make in zip(others, numbers, strict=False) for name, x in make(number).items()}
        dropout_p, normalizer, clip, seed, memory_lengths, mask = others[len(numbers) : len(numbers) + 6]
        options = dict(score_bias=score_bias, dropout_p=dropout_p, seed=seed, normalizer=NORMALIZERS[normalizer])
        rest = dict(clip=clip or None, memory_lengths=memory_lengths, mask=mask)
        return function(query, keys, values, *own, **added, **keywords, **options, **rest, need_log_total=True)

    first = 4 + tensors + adds
    return Formula(
        formula,
        differentiable=tuple(range(first)),
        shared=tuple(range(3, 3 + tensors)),
        numbers=(first, first + len(numbers) + 3),
        memory=2,
        results=3,
        addend=first - 1 if adds else None,
        seed=first + len(numbers) + 3,
    )


def _packed(function: Callable[..., Any], tensors: int, *numbers: Callable[[float], dict[str, Any]]) -> Formula:
    """The formula of an attention over packed keys and values. Arguments as for ``_with_options``."""

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
        shared=None,  # offsets may differ between the elements of a mapped axis
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
_GATED_SCORES = Formula(gated_formulas.scores, tuple(range(6)), shared=(2, 3), numbers=(6, 8), memory=1, addend=5)
_GATED = _with_options(gated_formulas.attention, 3, *gated_formulas.NUMBERS)._replace(shared=(3, 4))  # not the gate
_DOT_WITH_OPTIONS = _with_options(reference.dot_attention, 0, lambda scale: dict(scale=scale), adds=False)
_ADDITIVE_WITH_EXTRA = Formula(
    _attention_with_extra, tuple(range(6)), shared=(3, 4), memory=2, results=2, addend=5, joint=False
)
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


def apply_formula(op: str, arguments: Sequence[Any]) -> Any:
    """Runs the formula of an op."""
    results = FORMULAS[op].function(*arguments)
    return results if len(results) > 1 else results[0]
