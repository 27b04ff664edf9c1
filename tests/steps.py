"""Helpers to compare an original module with the patched one over several calls; stand-ins for library classes."""

from __future__ import annotations

import copy
import itertools
import pickle
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attn_kernels import patch, patching, unpatch
from attn_kernels.patching import registry

Inputs = dict[str, Any]
Steps = Callable[..., Sequence[Tensor]]  # (module, inputs) -> the tensors of all steps that must agree


def compare(original: nn.Module, steps: Steps, inputs: Inputs, tolerance: float = 1e-10) -> list[str]:
    """Compares in float64 and float32; float64 inputs are cast. Returns the reasons why calls ran the original.

    tolerance: for float64, relative to 1 or to the largest number of a tensor.
    """
    patched = copy.deepcopy(original)
    report = patch(patched)
    assert len(report.replaced) == 1, report
    exact = results(original.double(), steps, inputs)
    ours = results(patched.double(), steps, inputs)
    assert ours.keys() == exact.keys()
    for name, expected in exact.items():
        assert (ours[name] is None) == (expected is None), name
        if expected is not None:
            assert (ours[name].shape, ours[name].dtype) == (expected.shape, expected.dtype), name
            allowed = tolerance * _size(expected)
            torch.testing.assert_close(ours[name], expected, rtol=tolerance, atol=allowed, equal_nan=True, msg=name)
    rough = results(original.float(), steps, inputs)
    ours = results(patched.float(), steps, inputs)
    for name, expected in exact.items():
        if expected is not None and not expected.isnan().any():
            error, allowed = _error(ours[name], expected), 2 * _error(rough[name], expected) + 1e-6 * _size(expected)
            assert error <= allowed, f"{name}: {error} > {allowed}"
    return [fallback.reason for fallback in report.fallbacks]


def check_two_backward_passes(original: nn.Module, steps: Steps, inputs: Inputs) -> None:
    """Runs the backward of steps on one memory twice; the memory is retained between the passes."""
    patched = copy.deepcopy(original)
    patch(patched)
    memory = inputs["memory"].requires_grad_()
    for _ in range(2):
        ours, expected = (
            torch.autograd.grad(sum(x.square().sum() for x in steps(m, **inputs)), [memory, *m.parameters()])
            for m in (patched, original)
        )
        torch.testing.assert_close(ours, expected)


def check_nothing_is_stale(
    original: nn.Module, steps: Steps, inputs: Inputs, *writes: Callable[[Inputs], None]
) -> None:
    """Checks that caches are invalidated by writes to the memory, to its mask (``writes``) and to parameters.

    Results are compared without gradients, with gradients, and without them again; gradients of the memory at the end.
    """
    patched = copy.deepcopy(original)
    report = patch(patched)

    def scale_parameters(_: Inputs) -> None:
        for module in (original, patched):
            for parameter in module.parameters():
                parameter.mul_(2)

    changes: list[Callable[[Inputs], None]] = [
        lambda _: None,
        lambda given: given["memory"][0].fill_(2),
        *writes,
        scale_parameters,
        lambda given: given.update(memory=given["memory"] + 1),
        lambda given: given["memory"].requires_grad_(),
    ]
    for change in changes:
        with torch.no_grad():
            change(inputs)
        for gradients in (False, False, True, False):
            with torch.set_grad_enabled(gradients):
                ours, expected = (steps(module, **inputs) for module in (patched, original))
            torch.testing.assert_close(ours, expected)
            assert [x.requires_grad for x in ours] == [x.requires_grad for x in expected]
    ours, expected = (
        torch.autograd.grad(sum(x.square().sum() for x in steps(module, **inputs)), inputs["memory"])
        for module in (patched, original)
    )
    torch.testing.assert_close(ours, expected)
    assert report.fallbacks == []


def check_copies(original: nn.Module, steps: Steps, *inputs: Tensor) -> None:
    """Copies and pickles of a patched module must compute the same; after unpatch the module is unchanged."""
    module = copy.deepcopy(original)
    patch(module)
    with torch.no_grad():
        expected = steps(original, *inputs)
        steps(module, *inputs)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert other.state_dict().keys() == original.state_dict().keys()
            assert other.__dict__.keys() == original.__dict__.keys()
            torch.testing.assert_close(steps(other, *inputs), expected)
        original.load_state_dict(module.state_dict())
        unpatch(module)
        assert type(module) is type(original)
        torch.testing.assert_close(steps(module, *inputs), expected, rtol=0, atol=0)


def check_copies_are_patched(module: nn.Module) -> None:
    """Patching keeps the state_dict; copies and pickles are patched; unpatch restores the original class."""
    names, cls = list(module.state_dict()), type(module)
    patch(module)
    assert list(module.state_dict()) == names and isinstance(module, cls)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert [replaced.cls for replaced in patch(other).replaced] == [cls]
        other.load_state_dict(module.state_dict())
    unpatch(module)
    assert type(module) is cls


def decoding(seed: int, least_steps: int = 2) -> tuple[Inputs, Tensor]:
    """A memory (B, Tk, 7) and states (T, B, 6) in float64, and the padding of the memory as a bool mask (B, Tk)."""
    torch.manual_seed(seed)
    batch, steps = 3, int(torch.randint(least_steps, 40, ()))
    given = {"memory": torch.randn(batch, steps, 7).double(), "states": torch.randn(4, batch, 6).double()}
    lengths = torch.tensor([steps, *torch.randint(1, steps + 1, (batch - 1,)).tolist()])
    return given, torch.arange(steps) >= lengths[:, None]


def stand_in(monkeypatch: pytest.MonkeyPatch, original: str, cls: type[nn.Module]) -> None:
    """Makes ``cls`` stand for "module:Class" of a library that is not installed, until monkeypatch is undone."""
    name, _, attribute = original.partition(":")
    for parent in itertools.accumulate(name.split("."), "{}.{}".format):
        if parent not in sys.modules:
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setattr(sys.modules[name], attribute, cls, raising=False)
    cls.__module__, cls.__qualname__ = name, attribute
    adapter = next(adapter for adapter in patching.adapters() if adapter.original == original)
    monkeypatch.setitem(registry._adapters, original, adapter._replace(sources=()))  # it has other source


def _error(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item() if a.numel() else 0.0


def _size(x: Tensor) -> float:
    return max(1.0, x.nan_to_num().abs().max().item()) if x.numel() else 1.0


def results(module: nn.Module, steps: Steps, inputs: Inputs) -> dict[str, Tensor | None]:
    """Outputs, and gradients of a random sum of outputs, by name, in the dtype of the parameters."""
    dtype = next(module.parameters()).dtype
    inputs = {name: x.to(dtype) if _floats(x) else x for name, x in inputs.items()}
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items() if _floats(x)}
    outputs = steps(module, **{**inputs, **leaves})
    generator = torch.Generator().manual_seed(0)
    wanted = {**leaves, **dict(module.named_parameters())}
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum() for x in outputs)
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    named = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return {**named, **{f"d {name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}}


def _floats(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


class CountLinear(TorchFunctionMode):
    """Counts calls of the function ``linear`` without changing the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += function is nn.functional.linear
        return function(*args, **(kwargs or {}))
