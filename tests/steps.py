"""Original against patched: outputs and all gradients of a few calls in a row."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attn_kernels import patch

Inputs = dict[str, Any]
Steps = Callable[..., Sequence[Tensor]]  # of a module and the inputs: what is to be the same, of all steps


def compare(original: nn.Module, steps: Steps, inputs: Inputs) -> list[str]:
    """In float64 and float32; the inputs, in float64, are cast. Returns why calls fell through to the original."""
    patched = copy.deepcopy(original)
    report = patch(patched)
    assert len(report.replaced) == 1, report
    exact = _results(original.double(), steps, inputs)
    ours = _results(patched.double(), steps, inputs)
    assert ours.keys() == exact.keys()
    for name, expected in exact.items():
        assert (ours[name] is None) == (expected is None), name
        if expected is not None:
            assert (ours[name].shape, ours[name].dtype) == (expected.shape, expected.dtype), name
            torch.testing.assert_close(ours[name], expected, rtol=1e-10, atol=1e-10, equal_nan=True, msg=name)
    rough = _results(original.float(), steps, inputs)
    ours = _results(patched.float(), steps, inputs)
    for name, expected in exact.items():
        if expected is not None and not expected.isnan().any():
            size = expected.abs().max().item() if expected.numel() else 0.0
            error, allowed = _error(ours[name], expected), 2 * _error(rough[name], expected) + 1e-6 * max(1.0, size)
            assert error <= allowed, f"{name}: {error} > {allowed}"
    return [fallback.reason for fallback in report.fallbacks]


def _error(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item() if a.numel() else 0.0


def _results(module: nn.Module, steps: Steps, inputs: Inputs) -> dict[str, Tensor | None]:
    dtype = next(module.parameters()).dtype
    inputs = {name: x.to(dtype) if _floats(x) else x for name, x in inputs.items()}
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items() if _floats(x)}
    outputs = steps(module, **{**inputs, **leaves})
    generator = torch.Generator().manual_seed(0)
    wanted = {**leaves, **dict(module.named_parameters())}
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum() for x in outputs)
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return {**results, **{f"d {name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}}


def _floats(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
