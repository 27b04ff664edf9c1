"""Features of alignments along the memory: what location-sensitive mechanisms add to the keys in each step."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling

from .. import gemm
from ..errors import ArgumentValueError


def make_location_layers(
    name: str, inputs: int, channels: int, kernel_size: int, units: int, factory: dict[str, Any]
) -> tuple[nn.Conv1d, nn.Linear]:
    """The convolution F of ``inputs`` kinds of alignments and the projection U of what it finds."""
    for argument, size in (("channels", channels), ("kernel_size", kernel_size)):
        if not isinstance(size, Integral) or size < 1:
            raise ArgumentValueError(f"{name}: {argument} must be a positive integer, got {size!r}")
    if kernel_size % 2 == 0:  # the features of a step are to be around it
        raise ArgumentValueError(f"{name}: kernel_size must be odd, got {kernel_size}")
    channels, kernel_size = int(channels), int(kernel_size)  # numpy has its own
    convolution = nn.Conv1d(inputs, channels, kernel_size, padding=kernel_size // 2, bias=False, **factory)
    return convolution, nn.Linear(channels, units, bias=False, **factory)


def project_locations(convolution: nn.Conv1d, projection: nn.Linear, *alignments: Tensor) -> Tensor:
    """(B, K, Tk, A): U f, with f = F * alignments. alignments: (B, K, Tk) of each input of the convolution.

    Both maps are linear: U F is multiplied out first, (A, inputs taps), so that there is one product with the
    neighbourhoods of the steps and no tensor of features.
    """
    weight = projection.weight @ convolution.weight.flatten(1)
    taps = convolution.weight.shape[2]
    inputs = torch.stack(alignments, dim=2) if len(alignments) > 1 else alignments[0].unsqueeze(2)
    batch, hypotheses, _, steps = inputs.shape
    if steps == 0:  # which unfold refuses
        return weight.new_zeros(batch, hypotheses, 0, weight.shape[0])
    padded = F.pad(inputs.to(weight.dtype), (taps // 2, taps // 2))
    if (
        not is_compiling()
        and not torch._C._is_tracing()
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and gemm.prefers_onednn(batch * hypotheses * steps, padded, weight)
    ):
        return _ProductFunction.apply(padded, weight, taps)
    return _product(padded, weight, taps)


def _neighbourhoods(padded: Tensor, taps: int) -> Tensor:
    """(B, K, Tk, inputs taps). padded: (B, K, inputs, Tk + taps - 1)."""
    return padded.unfold(3, taps, 1).transpose(2, 3).flatten(3)


def _product(padded: Tensor, weight: Tensor, taps: int) -> Tensor:
    return F.linear(_neighbourhoods(padded, taps), weight)


class _ProductFunction(Function):
    """``_product`` by the products of gemm.py. The neighbourhoods, ``taps`` times the alignments, are not saved."""

    @staticmethod
    def forward(ctx, padded, weight, taps):
        ctx.save_for_backward(padded, weight)
        ctx.taps = taps
        x = _neighbourhoods(padded, taps)
        return gemm.linear(x.flatten(0, 2), weight).view(*x.shape[:3], -1)

    @staticmethod
    def backward(ctx, grad):
        padded, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True
            wanted = [x for x, need in zip((padded, weight), needs, strict=False) if need]
            found = iter(torch.autograd.grad(_product(padded, weight, ctx.taps), wanted, grad, create_graph=True))
            return *(next(found) if need else None for need in needs[:2]), None
        dpadded = dweight = None
        rows = grad.reshape(-1, grad.shape[3])
        if needs[0]:
            dneighbourhoods = gemm.linear(rows, weight.t()).view(*grad.shape[:3], padded.shape[2], ctx.taps)
            dpadded = torch.ops.aten.unfold_backward(dneighbourhoods.transpose(2, 3), padded.shape, 3, ctx.taps, 1)
        if needs[1]:
            # The neighbourhoods with the steps last, as the product takes them at twice the speed.
            columns = padded.unfold(3, grad.shape[2], 1).permute(2, 3, 0, 1, 4).reshape(-1, rows.shape[0])
            dweight = gemm.linear(columns, rows.t()).t()
        return dpadded, dweight, None
