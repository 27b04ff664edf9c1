"""The derivatives that no kernel computes: of gradients, in forward mode, and under the transforms of ``torch.func``.

The kernels know an op and its gradients. What lies beyond takes the formulas of the reference, whatever the backend:

- The derivative of a gradient (``create_graph=True``, ``torch.func.hessian``) is that of the reference's gradient. It
  materialises the (B, Tq, Tk, A) tensor of additive attention, as the reference does.
- A tangent (``torch.func.jvp``, ``torch.autograd.forward_ad``) is that of the reference. The result itself is the
  backend's.
- ``torch.func.grad``, ``vjp`` and ``jacrev`` take the backend's kernels, forward and backward.
- ``torch.vmap`` takes them, too: the mapped axis becomes a part of B. Where something is mapped that all rows of a
  batch share (``v``, ``bias``), and for gradients summed over the rows, the kernels run once for each of its elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function

from . import reference


class Formula(NamedTuple):
    """An op in plain PyTorch, with the arguments and results of its schema.

    differentiable: the positions of the arguments that have a derivative. shared: of those without an axis B; None
    where results are sums over the rows of the batch.
    """

    function: Callable[..., tuple[Tensor, ...]]
    differentiable: tuple[int, ...]
    shared: tuple[int, ...] | None


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


def _additive_scores(query, keys, v, bias):
    return (reference.additive_scores(query, keys, v, bias),)


def _additive_attention(query, keys, values, v, bias, prepared, memory_lengths, mask, _):
    return reference.additive_attention(query, keys, values, v, bias, memory_lengths=memory_lengths, mask=mask)


def _dot_attention(query, keys, values, scale, memory_lengths, mask, _):
    return reference.dot_attention(query, keys, values, scale=scale, memory_lengths=memory_lengths, mask=mask)


def _backward(formula: Formula, results: int, wanted: Sequence[int]) -> Formula:
    """The gradients of the arguments at ``wanted`` of a formula with so many results; (0,) for an argument of None."""

    def function(*arguments: Any) -> tuple[Tensor, ...]:
        grads, inputs = arguments[:results], arguments[results:]
        gradients = pull_back(formula, inputs, grads, wanted)
        return tuple(inputs[0].new_zeros(0) if gradient is None else gradient for gradient in gradients)

    differentiable = (*range(results), *(results + i for i in formula.differentiable))
    return Formula(function, differentiable, None if formula.shared else ())


_SCORES = Formula(_additive_scores, differentiable=(0, 1, 2, 3), shared=(2, 3))
_ADDITIVE = Formula(_additive_attention, differentiable=(0, 1, 2, 3, 4), shared=(3, 4))
_DOT = Formula(_dot_attention, differentiable=(0, 1, 2), shared=())
FORMULAS = {
    "additive_prepare": Formula(None, differentiable=(), shared=()),  # a constant
    "additive_scores": _SCORES,
    "additive_scores_backward": _backward(_SCORES, 1, (0, 1, 2, 3)),
    "additive_attention": _ADDITIVE,
    "additive_attention_backward": _backward(_ADDITIVE, 2, (0, 1, 2, 3, 4)),
    "additive_attention_query_backward": _backward(_ADDITIVE, 2, (0, 3, 4)),
    "dot_attention": _DOT,
    "dot_attention_backward": _backward(_DOT, 2, (0, 1, 2)),
    "dot_attention_query_backward": _backward(_DOT, 2, (0,)),
}


# The rule of autograd -------------------------------------------------------------------------------------------------


def rule(op: str, compute: Callable[..., Any], gradients: Callable[..., Any] | None) -> type[Function]:
    """The rule of autograd for an op on a backend, with all that forward mode and ``torch.func`` ask for.

    It costs several times as much a call as one without ``setup_context``, which ops.py has for each op besides.

    Args:
        op: of ``FORMULAS``.
        compute: the kernel, for tensors without derivatives.
        gradients: of the differentiable arguments, called with those of the results and the arguments; of an attention
            it gets the alignments in place of the last argument. None: as the formula has it.
    """
    formula = FORMULAS[op]
    attends = op.endswith("_attention")

    class Rule(Function):
        @staticmethod
        def forward(*arguments):
            return compute(*arguments)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.set_materialize_grads(False)
            ctx.single = isinstance(output, Tensor)
            arguments = (*inputs[:-1], output[1]) if attends else inputs
            ctx.constants = [None if isinstance(argument, Tensor) else argument for argument in arguments]
            tensors = [argument if isinstance(argument, Tensor) else None for argument in arguments]
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*((*tensors[:-1], None) if attends else tensors))
            if formula.function is None:
                ctx.mark_non_differentiable(output)

        @staticmethod
        def backward(ctx, *grads):
            arguments = _merge(ctx.saved_tensors, ctx.constants)
            results: list[Tensor | None] = [None] * len(arguments)
            wanted = [i for i in formula.differentiable if ctx.needs_input_grad[i]]
            if wanted and any(grad is not None for grad in grads):
                if gradients is None:
                    of_wanted = pull_back(formula, arguments, grads, wanted)
                else:
                    by_position = dict(zip(formula.differentiable, gradients(*grads, *arguments), strict=True))
                    of_wanted = [by_position[i] for i in wanted]
                for i, gradient in zip(wanted, of_wanted, strict=True):
                    results[i] = gradient
            return tuple(results)

        @staticmethod
        def jvp(ctx, *tangents):
            if formula.function is None:
                return None
            arguments = _merge(ctx.saved_tensors, ctx.constants)
            results = push_forward(formula, arguments, tangents)
            return results[0] if ctx.single else results

        @staticmethod
        def vmap(info, in_dims, *arguments):
            n = info.batch_size
            if n == 0:
                return torch.vmap(lambda *arguments: apply_formula(op, arguments), in_dims)(*arguments), 0
            first = [x if axis is None else x.movedim(axis, 0) for x, axis in zip(arguments, in_dims, strict=True)]
            mapped = [axis is not None for axis in in_dims]
            if formula.shared is None or any(mapped[i] for i in formula.shared):
                parts = [Rule.apply(*(x[i] if m else x for x, m in zip(first, mapped, strict=True))) for i in range(n)]
                if isinstance(parts[0], Tensor):
                    return torch.stack(parts), 0
                return tuple(map(torch.stack, zip(*parts, strict=True))), 0
            folded = list(first)
            for i, x in enumerate(first):
                if isinstance(x, Tensor) and i not in formula.shared:
                    folded[i] = (x if mapped[i] else x.expand(n, *x.shape)).flatten(0, 1)
            results = Rule.apply(*folded)
            if isinstance(results, Tensor):
                return results.unflatten(0, (n, -1)), 0
            return tuple(result.unflatten(0, (n, -1)) for result in results), 0

    return Rule


def apply_formula(op: str, arguments: Sequence[Any]) -> Any:
    """The results of an op by its formula."""
    results = FORMULAS[op].function(*arguments)
    return results if len(results) > 1 else results[0]


def _merge(tensors: Sequence[Tensor | None], constants: Sequence[Any]) -> list[Any]:
    return [constant if tensor is None else tensor for tensor, constant in zip(tensors, constants, strict=True)]


def transforms_are_active() -> bool:
    """Whether a transform of ``torch.func`` is; ``torch.compile``, which enters them as it traces, takes a constant."""
    return torch._C._are_functorch_transforms_active()


transforms_are_active._dynamo_marked_constant = True  # type: ignore[attr-defined]
