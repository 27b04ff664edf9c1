"""Running a case of the zoo fused and as it was."""

from __future__ import annotations

import copy
from itertools import starmap
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from attn_kernels.fusing import FuseReport, fuse
from fuse_zoo import Case, Draw, Sizes

SIZES = (Sizes(2, 3, 4), Sizes(4, 2, 6), Sizes(3, 5, 3))
# One row, one step, and sizes at which the kernels take other paths.
MORE_SIZES = SIZES + tuple(starmap(Sizes, ((2, 4, 12), (4, 3, 7), (1, 2, 5), (3, 2, 1), (70, 2, 40), (64, 3, 50))))
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def tensors(result: Any) -> list[Tensor]:
    return [x for x in _pytree.tree_leaves(result) if isinstance(x, Tensor)]


def results(module: nn.Module, args: tuple[Any, ...], seed: int = 0) -> list[Tensor | None]:
    """Results, and gradients of arguments and parameters for a loss over all results that are finite."""
    torch.manual_seed(seed)
    made = tensors(module(*args))
    wanted = [x for x in made if x.requires_grad and bool(torch.isfinite(x).all())]
    if not wanted or not torch.is_grad_enabled():
        return [x.detach() for x in made]
    generator = torch.Generator().manual_seed(1)
    losses = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in wanted]
    inputs = [x for x in args if isinstance(x, Tensor) and x.requires_grad] + list(module.parameters())
    return [x.detach() for x in made] + list(torch.autograd.grad(wanted, inputs, losses, allow_unused=True))


def assert_same(ours: list[Tensor | None], theirs: list[Tensor | None], tolerance: float) -> None:
    assert len(ours) == len(theirs)
    for got, expected in zip(ours, theirs, strict=True):
        assert (got is None) == (expected is None), "a gradient is None in one of the two"
        if got is not None:
            torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance, equal_nan=True)


def check(
    case: Case,
    dtype: torch.dtype = torch.float64,
    modes: tuple[bool, ...] = (True, False),
    sizes_of: tuple[Sizes, ...] = SIZES,
    calls: int = 1,
) -> FuseReport:
    """Fused and original give the same for several sizes; the report says what was expected.

    calls: how often with the same arguments, as steps on one memory have them; where it is more than one, without
    gradients, too.
    """
    torch.manual_seed(0)
    original = case.build().to(dtype)
    module = copy.deepcopy(original)
    report = fuse(module, always=True)
    for training in modes:
        module.train(training)
        original.train(training)
        for seed, sizes in enumerate(sizes_of):
            args = [case.arguments(sizes, Draw(seed, dtype)) for _ in range(2)]
            for gradients in (True,) * calls + (False,) * (calls > 1):
                with torch.set_grad_enabled(gradients):
                    ours, theirs = results(module, args[0], seed), results(original, args[1], seed)
                assert_same(ours, theirs, TOLERANCE[dtype])
    found = ", ".join(fused.what for fused in report.fused)
    if case.expected is None:
        assert not report.fused, found
        reasons = "; ".join(skipped.reason for skipped in report.skipped)
        assert report.skipped and case.why in reasons, reasons
    else:
        assert case.expected in found, str(report)
        if case.train_expected is None:
            assert report.fallbacks
    return report
