"""What is kept from one step to the next is used only where it would be made the same again."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from attn_kernels.derived import forget, once
from attn_kernels.sentence import project


@pytest.fixture
def layer(monkeypatch):
    """A linear layer whose calls are in ``layer.calls``."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    layer.calls = []
    forward = nn.Linear.forward

    def counted(self, x):
        layer.calls.append(x)
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    return layer


def rows_of(layer, x):
    return x @ layer.weight.T + layer.bias


def check(layer, x, calls):
    """The keys are right, and took that many calls of the layer."""
    before = len(layer.calls)
    torch.testing.assert_close(project(layer, layer, x), rows_of(layer, x))
    assert len(layer.calls) - before == calls


def test_rows_are_projected_once(layer):
    x = torch.randn(3, 5, 6)
    with torch.no_grad():
        check(layer, x, 1)
        check(layer, x, 0)
        check(layer, x.clone(), 0)
        check(layer, torch.randn(3, 5, 6), 1)
        check(layer, x, 1)  # only the last are kept


@pytest.mark.parametrize("steps", [1, 5, 40])
def test_rows_of_a_beam_are_recognised(layer, steps):
    x = torch.randn(4, steps, 6).repeat_interleave(3, 0)
    with torch.no_grad():
        check(layer, x, 1)
        for order in ([2, 1, 0, 5, 5, 3, 6, 7, 8, 11, 9, 10], [3, 4, 5, 9, 10, 11], [0, 3], [1], [0, 0, 0]):
            x = x[order]
            check(layer, x, 0)
        other = x.clone()
        other[1, -1, 0] += 1  # not among the elements that are looked at first
        check(layer, other, 1)
        check(layer, torch.cat([other, torch.randn(1, steps, 6)]), 1)


def test_nothing_in_common(layer):
    with torch.no_grad():
        check(layer, torch.randn(3, 5, 6), 1)
        for shape in ((3, 4, 6), (0, 4, 6), (2, 4, 6), (2, 0, 6), (1, 0, 6)):
            project(layer, layer, torch.randn(shape))
        x = torch.full((2, 3, 6), torch.nan)
        check_nan = project(layer, layer, x), project(layer, layer, x.clone())
        assert all(keys.isnan().all() for keys in check_nan)
        assert project(layer.double(), layer, torch.randn(2, 3, 6).double()).dtype == torch.float64


@pytest.mark.parametrize("what", ["rows", "weight", "bias", "keys", "weight.data", "new weight", "gradients"])
def test_what_is_written_to_is_projected_again(layer, what):
    x = torch.randn(3, 5, 6)
    with torch.no_grad():
        keys = project(layer, layer, x)
        if what == "rows":
            x[0, 0, 0] += 1
        elif what == "keys":
            keys.zero_()
        elif what == "weight.data":
            layer.weight.data = layer.weight + 1
        elif what == "new weight":
            layer.weight = nn.Parameter(layer.weight + 1)
        elif what != "gradients":
            getattr(layer, what).add_(1)
    with torch.set_grad_enabled(what == "gradients"):
        check(layer, x, 1)
        check(layer, x, 1 if what == "gradients" else 0)
    with torch.no_grad():
        check(layer, x, 1 if what == "gradients" else 0)  # with gradients nothing is kept


def test_rows_written_to_are_not_taken_for_what_they_were(layer):
    x = torch.randn(3, 5, 6)
    with torch.no_grad():
        check(layer, x, 1)
        x += 1
        check(layer, x.clone(), 1)


def test_vmap(layer):
    x = torch.randn(2, 3, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(lambda rows: project(layer, layer, rows))(x), rows_of(layer, x))


def test_hooks_are_called(layer):
    x = torch.randn(3, 5, 6)
    layer.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        check(layer, x, 1)
        check(layer, x, 1)


def test_autocast_and_inference_mode(layer):
    x = torch.randn(3, 5, 6)
    with torch.no_grad():
        check(layer, x, 1)
        with torch.autocast("cpu", torch.bfloat16):
            assert project(layer, layer, x).dtype == torch.bfloat16
        check(layer, x, 1)
    with torch.inference_mode():
        y = torch.randn(3, 5, 6)
        check(layer, y, 1)
        y += 1
        check(layer, y, 1)


def test_once():
    module, made = nn.Module(), []
    a, b = torch.randn(2), torch.randn(2)

    def make():
        made.append(None)
        return len(made)

    assert once(module, "x", (a, b), make) == 1
    assert once(module, "x", (a, b), make) == 1
    assert once(module, "y", (a, b), make) == 2
    assert once(nn.Module(), "x", (a, b), make) == 3
    assert once(module, "x", (a, None), make) == 4
    assert once(module, "x", (a, b), make) == 5
    b += 1
    assert once(module, "x", (a, b), make) == 6
    assert once(module, "x", (a, b.clone()), make) == 7
    assert once(module, "x", (a, b), make) == 8
    with torch.no_grad():
        assert once(module, "x", (a, b), make) == 9
    assert once(module, "x", (a, b), make) == 10
    a.requires_grad_()
    assert once(module, "x", (a, b), make) == 11
    with torch.autocast("cpu", torch.bfloat16):
        assert once(module, "x", (a, b), make) == 12


def test_only_on_the_cpu():
    module, made = nn.Module(), []
    x = torch.empty(2, 3, 6, device="meta")
    for _ in range(2):
        once(module, "x", (x,), lambda: made.append(None))
    assert len(made) == 2
    layer = nn.Linear(6, 4, device="meta")
    with torch.no_grad():
        assert project(module, layer, x) is not project(module, layer, x)


@pytest.mark.parametrize("how", ["deleted", "forgotten"])
def test_what_is_kept_goes_with_the_module(layer, how):
    module = nn.Module()
    x = torch.randn(2, 3, 6)
    with torch.no_grad():
        keys = weakref.ref(project(module, layer, x))
        once(module, "x", (x,), lambda: x)
    assert keys() is not None
    x = weakref.ref(x)
    layer.calls.clear()
    if how == "forgotten":
        forget(module)
    else:
        del module
        gc.collect()
    assert keys() is None and x() is None
