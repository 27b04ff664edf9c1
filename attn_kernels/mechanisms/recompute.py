"""Gradient checkpointing: intermediate results are recomputed in the backward, not saved for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..derivatives import transforms_are_active


def recompute(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``function(*tensors)``, without saving intermediate results for the backward.

    function must be deterministic, and gradients flow to its arguments only. Under the transforms of ``torch.func``,
    which cannot recompute, the results are saved; ``torch.compile`` decides itself what to save.
    """
    if is_compiling() or not torch.is_grad_enabled() or transforms_are_active() or torch._C._is_tracing():
        return function(*tensors)
    result: Tensor = _Recomputed.apply(function, *tensors)  # type: ignore[no-untyped-call]  # torch has no types for it
    return result


class _Recomputed(torch.autograd.Function):
    """As ``torch.utils.checkpoint``, whose first use imports PyTorch's compiler, which costs seconds and memory."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.function = function
        ctx.autocast = {
            "device_type": tensors[0].device.type,
            "enabled": torch.is_autocast_enabled(tensors[0].device.type),
            "dtype": torch.get_autocast_dtype(tensors[0].device.type),
        }
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()  # create_graph=True: the gradient must be differentiable, too
        needed = ctx.needs_input_grad[1:]
        tensors = ctx.saved_tensors
        if not again:
            tensors = [x.detach().requires_grad_(need) for x, need in zip(tensors, needed, strict=True)]
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            result = ctx.function(*tensors)
        with torch.enable_grad():
            # The gradient of this product is grad. (Passed as grad_outputs, it would import the compiler.)
            product = (result * grad).sum()
        wanted = [x for x, need in zip(tensors, needed, strict=True) if need]
        grads = iter(torch.autograd.grad(product, wanted, create_graph=again, allow_unused=True))
        return None, *(next(grads) if need else None for need in needed)
