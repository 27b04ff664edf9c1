"""Projected location features: the oneDNN product and its gradients equal the plain formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_kernels import gemm
from attn_kernels.mechanisms import location_features
from attn_kernels.mechanisms.location_features import make_location_layers, project_locations


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """oneDNN for all products, whatever the CPU is. Gives the sizes of those made by the rule of autograd."""
    if not gemm._has_operators():
        pytest.skip("this PyTorch has no products of oneDNN")
    made: list[int] = []
    linear = gemm.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        made.append(x.shape[0])
        return linear(x, weight, bias)

    monkeypatch.setattr(location_features, "_MANY_ROWS", 0)
    monkeypatch.setattr(gemm, "_has_wide_vectors", lambda: True)
    monkeypatch.setattr(gemm, "_MIN_WORK", 0)
    monkeypatch.setattr(gemm, "linear", counted)
    return made


def layers(inputs: int, taps: int = 5) -> tuple[nn.Conv1d, nn.Linear]:
    torch.manual_seed(0)
    return make_location_layers("test", inputs, 6, taps, 8, {})


def in_two_steps(convolution: nn.Conv1d, projection: nn.Linear, *alignments: Tensor) -> Tensor:
    """The convolution, then the projection, of each hypothesis."""
    inputs = torch.stack(alignments, 2)
    found = convolution(inputs.flatten(0, 1)).mT
    return projection(found).unflatten(0, inputs.shape[:2])


@pytest.mark.parametrize("many", [False, True], ids=["few steps", "many steps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_without_onednn(monkeypatch: pytest.MonkeyPatch, many: bool, dtype: torch.dtype) -> None:
    """As a convolution and as products, on other CPUs and in other dtypes."""
    monkeypatch.setattr(location_features, "_MANY_ROWS", 0 if many else 1 << 20)
    monkeypatch.setattr(gemm, "_has_wide_vectors", lambda: False)
    convolution, projection = (layer.to(dtype) for layer in layers(2))
    alignments = [torch.rand(2, 3, 11).to(dtype).requires_grad_() for _ in range(2)]
    every = (*alignments, convolution.weight, projection.weight)
    got = project_locations(convolution, projection, *alignments)
    wide = [x.detach().double().requires_grad_() for x in every]
    for layer, weight in ((convolution, wide[2]), (projection, wide[3])):
        layer.weight = nn.Parameter(weight)
    expected = in_two_steps(convolution, projection, *wide[:2])
    weight = torch.randn(expected.shape).to(dtype)
    of_ours = torch.autograd.grad((got * weight).sum(), every)
    of_formula = torch.autograd.grad((expected * weight).sum(), (*wide[:2], convolution.weight, projection.weight))
    for ours, exact in zip((got, *of_ours), (expected, *of_formula), strict=True):
        rounding = 4 * torch.finfo(dtype).eps * exact.abs().max().item()  # of the features and of the result
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=rounding)


@pytest.mark.parametrize("inputs", [1, 2])
@pytest.mark.parametrize("hypotheses", [1, 3])
def test_gradients(products: list[int], inputs: int, hypotheses: int) -> None:
    convolution, projection = layers(inputs)
    alignments = [torch.rand(2, hypotheses, 11).requires_grad_() for _ in range(inputs)]
    every = (*alignments, convolution.weight, projection.weight)
    got, expected = (f(convolution, projection, *alignments) for f in (project_locations, in_two_steps))
    assert len(products) == 1
    torch.testing.assert_close(got, expected)
    weight = torch.randn_like(got)
    gradients = [torch.autograd.grad((x * weight).sum(), every) for x in (got, expected)]
    assert len(products) == 3
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_what_is_not_needed_is_not_made(products: list[int]) -> None:
    convolution, projection = layers(1)
    first, alignments = torch.rand(2, 1, 11), torch.rand(2, 1, 11).requires_grad_()
    project_locations(convolution, projection, first).sum().backward()
    assert len(products) == 2  # no gradient of alignments that need none
    with torch.no_grad():
        frozen = project_locations(convolution.requires_grad_(False), projection.requires_grad_(False), first)
    assert not frozen.requires_grad
    del products[:]
    project_locations(convolution, projection, alignments).sum().backward()
    assert len(products) == 2 and alignments.grad is not None


def test_second_derivatives(products: list[int]) -> None:
    convolution, projection = layers(2)
    alignments = [torch.rand(2, 1, 7).requires_grad_() for _ in range(2)]
    results = []
    for features in (project_locations, in_two_steps):
        x = features(convolution, projection, *alignments)
        first = torch.autograd.grad(x.square().sum(), [*alignments, convolution.weight], create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        results.append(torch.autograd.grad(penalty, [*alignments, convolution.weight, projection.weight]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_other_ways_take_the_formula(products: list[int]) -> None:
    """Transforms, forward mode and graphs, which know nothing of the rule; other dtypes; no steps."""
    convolution, projection = layers(1)
    alignments = torch.rand(2, 1, 7)

    def function(x: Tensor) -> Tensor:
        return project_locations(convolution, projection, x)

    expected = in_two_steps(convolution, projection, alignments)
    torch.testing.assert_close(torch.vmap(function)(alignments[None])[0], expected)
    tangent = torch.func.jvp(function, (alignments,), (alignments,))[1]
    torch.testing.assert_close(tangent, expected)  # it is linear
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(alignments), expected)
    assert function(torch.rand(2, 1, 0)).shape == (2, 1, 0, 8)
    assert products == []
    convolution, projection = convolution.double(), projection.double()
    torch.testing.assert_close(function(alignments), in_two_steps(convolution, projection, alignments.double()))
    assert products == []


def test_neighbourhoods() -> None:
    """Of each step, the alignments from taps // 2 before it to as many after it, one input after the other."""
    alignments = torch.arange(1.0, 13.0).view(1, 1, 2, 6)
    found = location_features.neighbourhoods(F.pad(alignments, (1, 1)), 3)
    assert found.shape == (1, 1, 6, 6)
    assert found[0, 0, 0].tolist() == [0, 1, 2, 0, 7, 8]
    assert found[0, 0, 5].tolist() == [5, 6, 0, 11, 12, 0]
