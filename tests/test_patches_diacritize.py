"""The adapter of arabic-diacritizer, on a class with the same interface as its class."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor, nn

from attn_kernels import patch
from attn_kernels.patching import registry
from steps import compare


class BahdanauAttention(nn.Module):
    """Every step of a sequence attends to all of them, by v . tanh(W h_i + U h_j)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.W, self.U, self.v = (nn.Linear(size, n, bias=False) for n in (size, size, 1))

    def forward(self, hidden_states: Tensor) -> Tensor:
        pairs = self.W(hidden_states)[:, :, None] + self.U(hidden_states)[:, None]
        return self.v(pairs.tanh())[..., 0].softmax(2) @ hidden_states


BahdanauAttention.__module__ = "diacritize.baseline.model"


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter takes this class for the one that it was written for."""
    name = "diacritize.baseline.model:BahdanauAttention"
    importlib.import_module("attn_kernels.patching.libraries.diacritize")
    monkeypatch.setitem(registry._adapters, name, registry._adapters[name]._replace(sources=()))


def call(module: nn.Module, states: Tensor) -> list[Tensor]:
    return [module(states)]


@pytest.mark.parametrize(("batch", "steps", "size"), [(1, 1, 4), (3, 17, 8), (2, 64, 33)])
def test_same_result_and_gradients(batch: int, steps: int, size: int) -> None:
    torch.manual_seed(0)
    states = torch.randn(batch, steps, size, dtype=torch.float64)
    assert compare(BahdanauAttention(size), call, {"states": states}) == []


def test_a_changed_score_layer_is_called() -> None:
    module = BahdanauAttention(4)
    module.v = nn.Sequential(module.v, nn.Softplus())
    states = torch.randn(2, 3, 4, dtype=torch.float64)
    assert compare(module, call, {"states": states}) == ["a score layer that is no plain nn.Linear"]


def test_another_source_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    ((name, cls, reason),) = patch(BahdanauAttention(4)).skipped
    assert (name, cls) == ("", BahdanauAttention)
    assert reason.startswith("its source is not that of arabic-diacritizer 1.0.0")
