"""Parts of a computation that are made again in the backward rather than kept for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..derivatives import transforms_are_active


def recompute(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``function(*tensors)``, of whose intermediate results autograd keeps none.

    function must not be random, and gradients flow to its arguments only. The transforms of ``torch.func``, for which
    nothing can be made again, keep what they need; ``torch.compile`` decides itself what to keep.
    """
    if is_compiling() or not torch.is_grad_enabled() or transforms_are_active() or torch._C._is_tracing():
        return function(*tensors)
    result: Tensor = _Recomputed.apply(function, *tensors)  # type: ignore[no-untyped-call]  # torch has no types for it
    return result


class _Recomputed(torch.autograd.Function):
    """As ``torch.utils.checkpoint``, of which the first use imports the compiler of PyTorch: seconds, and memory."""

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
        again = torch.is_grad_enabled()  # with create_graph: the gradient is to have a gradient, too
        needed = ctx.needs_input_grad[1:]
        tensors = ctx.saved_tensors
        if not again:
            tensors = [x.detach().requires_grad_(need) for x, need in zip(tensors, needed, strict=True)]
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            result = ctx.function(*tensors)
        with torch.enable_grad():
            # The gradient of this product is grad. Given as grad_outputs, it would be what imports the compiler.
            product = (result * grad).sum()
        wanted = [x for x, need in zip(tensors, needed, strict=True) if need]
        grads = iter(torch.autograd.grad(product, wanted, create_graph=again, allow_unused=True))
        return None, *(next(grads) if need else None for need in needed)
