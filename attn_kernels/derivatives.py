"""The derivatives that no kernel computes: of gradients, in forward mode, and under the transforms of ``torch.func``.

The kernels compute an op and its gradients. All other derivatives use the formulas of the reference on every backend:

- The derivative of a gradient (``create_graph=True``, ``torch.func.hessian``) is that of the reference's gradient. It
  materialises the (B, Tq, Tk, A) tensor of additive attention, as the reference does.
- A tangent (``torch.func.jvp``, ``torch.autograd.forward_ad``) is computed by the reference, the result by the backend.
- ``torch.func.grad``, ``vjp`` and ``jacrev`` use the backend's kernels, forward and backward.
- ``torch.vmap`` also uses the kernels: the mapped axis is folded into B. The kernels run once for each element of the
  mapped axis in three cases: an argument without a batch axis is mapped (``v``, ``bias``), there is dropout, or
  gradients are summed over the rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from .formulas import FORMULAS, apply_formula, pull_back, push_forward


def rules(
    op: str, compute: Callable[..., Any], gradients: Callable[..., Any] | None
) -> tuple[type[Function], type[Function]]:
    """Two autograd functions for an op on a backend.

    The first one supports forward mode and ``torch.func``. A call of it costs several times as much as a call of the
    second one, which supports reverse mode only. The second one of an attention returns only the context if alignments
    are not needed: each output costs some microseconds.

    Args:
        op: a key of ``FORMULAS``.
        compute: the kernel, for tensors without derivatives.
        gradients: computes the gradients of the differentiable arguments from the gradients of the results, the
            arguments and flags for the gradients that are needed (see ``_backward``). For an attention, the alignments
            replace the last argument. None: the formula is differentiated.
    """
    formula = FORMULAS[op]
    results_count, attends = formula.results, formula.results > 1

    save, saved = formula.save, formula.saved
    count, groups, addend = len(formula.differentiable), formula.groups, formula.addend

    @functools.cache  # computing it in every backward would take microseconds
    def plan(needs: tuple[bool, ...]) -> tuple[tuple[bool, ...], tuple[int, ...], tuple[None, ...]]:
        """The groups that need a gradient, the gradients that are not needed, and the Nones for the other inputs."""
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
        if len(grads) < results_count:  # only the context was returned
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
            # jvp reads these as ctx.saved_tensors: the same tensors, without the alignments, which it does not need.
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
            # If the mapped axis were folded into B, dropout would differ from a separate call for each element.
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

    # The name in autograd's graph comes from the op: AdditiveAttentionBackward.
    name = op.title().replace("_", "")
    members = {"forward": staticmethod(forward), "backward": staticmethod(reverse)}
    reverse_rule: type[Function] = type(Function)(name, (Function,), members)  # type: ignore[misc]
    return Rule, reverse_rule


def transforms_are_active() -> bool:
    """Whether a transform of ``torch.func`` is active; a constant for ``torch.compile``, which enters some to trace."""
    return torch._C._are_functorch_transforms_active()


transforms_are_active._dynamo_marked_constant = True  # type: ignore[attr-defined]
