"""Location features: convolutions of alignments, which location-sensitive mechanisms add to the keys in each step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling

from .. import gemm
from ..checks import check_size

_MANY_ROWS = 1024  # rows, B K Tk; with fewer, the overhead of calls outweighs the arithmetic


class AlignmentFilters(NamedTuple):
    """The term a step adds to the keys, as a linear filter of earlier alignments. The fused decoder reads it.

    weight: (A, inputs, taps). The inputs are ``previous`` and ``total``, in this order, without one that is None.
    previous: (B, Tk), the alignments before the first step. total: (B, Tk), the sum of all before it.
    """

    weight: Tensor
    previous: Tensor | None
    total: Tensor | None


def make_location_layers(
    name: str, inputs: int, channels: int, kernel_size: int, units: int, factory: dict[str, Any]
) -> tuple[nn.Conv1d, nn.Linear]:
    """The convolution F, with ``inputs`` input channels, and the projection U of its output."""
    channels = check_size(name, "channels", channels)
    kernel_size = check_size(name, "kernel_size", kernel_size, odd=True)  # centred on the step
    convolution = nn.Conv1d(inputs, channels, kernel_size, padding=kernel_size // 2, bias=False, **factory)
    return convolution, nn.Linear(channels, units, bias=False, **factory)


def project_locations(convolution: nn.Conv1d, projection: nn.Linear, *alignments: Tensor) -> Tensor:
    """(B, K, Tk, A): U f, with f = F * alignments. alignments: (B, K, Tk) for each input channel of the convolution.

    With many steps the convolution is a matrix product with the unfolded input: its gradients take half the time of
    those of ``conv1d``. If oneDNN computes the products, U F, (A, inputs taps), is multiplied out first, so that one
    product replaces two. That costs a third more multiplications, but no tensor of features is written and read.
    """
    taps, weight = convolution.weight.shape[2], projection.weight
    inputs = torch.stack(alignments, dim=2) if len(alignments) > 1 else alignments[0].unsqueeze(2)
    batch, hypotheses, _, steps = inputs.shape
    if steps == 0:  # unfold refuses an empty axis
        return weight.new_zeros(batch, hypotheses, 0, weight.shape[0])
    inputs, rows = inputs.to(weight.dtype), batch * hypotheses * steps
    if rows < _MANY_ROWS and inputs.is_cpu and weight.dtype == torch.float32:
        features = F.conv1d(inputs.flatten(0, 1), convolution.weight, padding=taps // 2)
        projected: Tensor = F.linear(features.mT, weight).unflatten(0, (batch, hypotheses))
        return projected
    padded, filters = F.pad(inputs, (taps // 2, taps // 2)), convolution.weight.flatten(1)
    if (
        not is_compiling()
        and not torch._C._is_tracing()
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and gemm.prefers_onednn(rows, padded, filters)
    ):
        weights = weight @ filters
        product: Tensor = _ProductFunction.apply(padded, weights, taps)  # type: ignore[no-untyped-call]  # torch has no types for it
        return product
    return F.linear(F.linear(neighbourhoods(padded, taps), filters), weight)


def neighbourhoods(padded: Tensor, taps: int) -> Tensor:
    """The unfolded input (im2col), (*, Tk, inputs taps). padded: (*, inputs, Tk + taps - 1)."""
    return padded.unfold(-1, taps, 1).transpose(-3, -2).flatten(-2)


def filter_alignments(padded: Tensor, weight: Tensor, taps: int) -> Tensor:
    """(*, Tk, A): the unfolded input times ``weight``, (A, inputs taps), by gemm.py, without autograd."""
    x = neighbourhoods(padded, taps)
    return gemm.linear(x.flatten(0, -2), weight).view(*x.shape[:-1], weight.shape[0])


def filter_gradients(
    grad: Tensor, padded: Tensor, weight: Tensor, taps: int, need_padded: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of ``padded`` and ``weight``; None for one that is not needed. grad: (*, Tk, A)."""
    dpadded = dweight = None
    rows = grad.reshape(-1, grad.shape[-1])
    if need_padded:
        dneighbourhoods = gemm.linear(rows, weight.t()).view(*grad.shape[:-1], padded.shape[-2], taps)
        dpadded = torch.ops.aten.unfold_backward(
            dneighbourhoods.transpose(-3, -2), padded.shape, padded.dim() - 1, taps, 1
        )
    if need_weight:
        # Unfolded with the steps as the last axis: the product is twice as fast in this layout.
        columns = padded.unfold(-1, grad.shape[-2], 1).movedim((-3, -2), (0, 1)).reshape(-1, rows.shape[0])
        dweight = gemm.linear(columns, rows.t()).t()
    return dpadded, dweight


class _ProductFunction(Function):
    """``filter_alignments`` with gradients. It saves ``padded``, not the unfolded input, which is larger."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor, taps: int) -> Tensor:
        ctx.save_for_backward(padded, weight)
        ctx.taps = taps
        return filter_alignments(padded, weight, taps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        padded, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True
            wanted = [x for x, need in zip((padded, weight), needs, strict=False) if need]
            product = F.linear(neighbourhoods(padded, ctx.taps), weight)
            found = iter(torch.autograd.grad(product, wanted, grad, create_graph=True))
            return *(next(found) if need else None for need in needs[:2]), None
        return *filter_gradients(grad, padded, weight, ctx.taps, needs[0], needs[1]), None
