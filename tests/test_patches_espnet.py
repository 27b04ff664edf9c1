"""The adapters of ESPnet on classes with the same interface: additive, with location features, forward, heads."""

from __future__ import annotations

import copy
import importlib
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_kernels import checksums, patch
from attn_kernels.patching import cache, masks, registry
from steps import compare

pytestmark = pytest.mark.usefixtures("at_any_size")

MODULE = "espnet.nets.pytorch_backend.rnn.attentions"


class AttAdd(nn.Module):
    """One head; what is projected stays in the module until ``reset``."""

    __module__ = MODULE

    def __init__(self, memory_size: int, state_size: int, units: int) -> None:
        super().__init__()
        self.mlp_enc, self.mlp_dec = nn.Linear(memory_size, units), nn.Linear(state_size, units)
        self.gvec = nn.Linear(units, 1)
        self.dunits, self.han_mode = state_size, False
        self.reset()

    def reset(self) -> None:
        self.h_length = self.enc_h = self.pre_compute_enc_h = self.mask = None

    def scores(self, memory: Tensor, lengths: list[int], state: Tensor, extra: Tensor | float = 0.0) -> Tensor:
        if self.pre_compute_enc_h is None:
            self.enc_h, self.h_length = memory, memory.shape[1]
            self.pre_compute_enc_h = self.mlp_enc(memory)
        if self.mask is None:
            self.mask = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
        hidden = self.pre_compute_enc_h + self.mlp_dec(state)[:, None] + extra
        return self.gvec(hidden.tanh()).squeeze(2).masked_fill(self.mask, -torch.inf)

    def forward(self, memory: Tensor, lengths: list[int], state: Tensor, previous: Any, scaling: float = 2.0) -> Any:
        weights = (scaling * self.scores(memory, lengths, state)).softmax(1)
        return (weights[:, None] @ self.enc_h)[:, 0], weights


class AttLoc(AttAdd):
    __module__ = MODULE

    def __init__(self, memory_size: int, state_size: int, units: int) -> None:
        super().__init__(memory_size, state_size, units)
        self.loc_conv = nn.Conv2d(1, 3, (1, 5), padding=(0, 2), bias=False)
        self.mlp_att = nn.Linear(3, units, bias=False)

    def located(self, memory: Tensor, lengths: list[int], state: Tensor, previous: Tensor) -> Tensor:
        features = self.loc_conv(previous[:, None, None]).squeeze(2).transpose(1, 2)
        return self.scores(memory, lengths, state, self.mlp_att(features))

    def forward(self, memory: Tensor, lengths: list[int], state: Tensor, previous: Any, scaling: float = 2.0) -> Any:
        if previous is None:
            within = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).to(state.dtype)
            previous = within / within.sum(1, keepdim=True)
        weights = (scaling * self.located(memory, lengths, state, previous)).softmax(1)
        return (weights[:, None] @ self.enc_h)[:, 0], weights


class AttForward(AttLoc):
    __module__ = MODULE

    def forward(self, memory: Tensor, lengths: list[int], state: Tensor, previous: Any, scaling: float = 1.0) -> Any:
        if previous is None:
            previous = torch.zeros(memory.shape[:2], dtype=memory.dtype)
            previous[:, 0] = 1
        weights = (scaling * self.located(memory, lengths, state, previous)).softmax(1)
        shifted = torch.cat([torch.zeros_like(previous[:, :1]), previous[:, :-1]], dim=1)
        weights = ((previous + shifted) * weights).clamp(min=1e-6)
        weights = weights / weights.sum(1, keepdim=True)
        return (weights[:, None] @ self.enc_h)[:, 0], weights


CLASSES = (AttAdd, AttLoc, AttForward)
classes = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapters take these classes for those that they were written for."""
    importlib.import_module("attn_kernels.patching.libraries.espnet")
    for cls in CLASSES:
        name = f"{MODULE}:{cls.__name__}"
        monkeypatch.setitem(registry._adapters, name, registry._adapters[name]._replace(sources=()))


def decode(module: nn.Module, memory: Tensor, states: Tensor, lengths: list[int]) -> list[Tensor]:
    results = []
    for _ in range(2):  # batches one after the other
        module.reset()
        previous = None
        for state in states:
            context, previous = module(memory, lengths, state, previous)
            results += [context, previous]
    return [*results, module.enc_h, module.pre_compute_enc_h]


@classes
@pytest.mark.parametrize(("batch", "steps", "units"), [(1, 1, 3), (3, 9, 5), (8, 70, 160)])
def test_decoding(cls: type[nn.Module], batch: int, steps: int, units: int) -> None:
    """The last case is one where the gradients of all steps are gathered."""
    if cls is AttForward:
        steps = min(steps, 20)  # what two of many frames have of the weights is small, and is divided by its sum
    torch.manual_seed(0)
    lengths = [steps, *torch.randint(1, steps + 1, (batch - 1,)).tolist()]
    memory, states = torch.randn(batch, steps, 6).double(), torch.randn(3, batch, 7).double()
    assert compare(cls(6, 7, units), decode, {"memory": memory, "states": states, "lengths": lengths}) == []


@classes
def test_an_empty_utterance_falls_through(cls: type[nn.Module]) -> None:
    """Its NaN is the original's."""
    memory, states = torch.randn(2, 4, 6).double(), torch.randn(1, 2, 7).double()
    if cls is AttLoc:
        pytest.skip("it divides by the length")
    given = {"memory": memory, "states": states, "lengths": [4, 0]}
    assert compare(cls(6, 7, 5), decode, given) == ["a row with nothing to attend"]


@classes
def test_another_source_is_left_alone(cls: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    ((_, skipped, reason),) = patch(cls(6, 7, 5)).skipped
    assert skipped is cls and reason.startswith("its source is not that of ESPnet 202511")


@classes
def test_an_unread_mask(cls: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where reading it would wait for the device: an empty utterance is NaN, the others are not."""

    for module in (checksums, masks):
        monkeypatch.setattr(module, "is_cacheable", lambda tensor: False)
    torch.manual_seed(0)
    original = cls(6, 7, 5)
    patched = copy.deepcopy(original)
    report = patch(patched)
    memory, state = torch.randn(2, 4, 6), torch.randn(2, 7)
    previous = torch.full((2, 4), 0.25)
    for lengths in ([4, 3], [4, 0]):
        for module in (original, patched):
            module.reset()
        expected = original(memory, lengths, state, previous)
        for name, a, b in zip(
            ("context", "alignments"), patched(memory, lengths, state, previous), expected, strict=True
        ):
            torch.testing.assert_close(a, b, equal_nan=True, msg=name)
    assert report.fallbacks == [] and expected[0][1].isnan().all() and not expected[0][0].isnan().any()


@classes
def test_lengths(cls: type[nn.Module]) -> None:
    """Lengths that are floats are cut, those in a tensor serve where the library takes them."""
    torch.manual_seed(0)
    module = cls(6, 7, 5)
    patch(module)
    memory, state = torch.randn(2, 4, 6), torch.randn(2, 7)
    expected = module(memory, [4, 2], state, torch.full((2, 4), 0.25))
    module.reset()
    for a, b in zip(module(memory, [4.0, 2.9], state, torch.full((2, 4), 0.25)), expected, strict=True):
        assert torch.equal(a, b)


@classes
def test_reset_lets_go(cls: type[nn.Module]) -> None:
    """Of the utterances and all that was made of them."""
    module = cls(6, 7, 5)
    patch(module)
    memory = torch.randn(2, 4, 6)
    module(memory, [4, 2], torch.randn(2, 7), torch.full((2, 4), 0.25))
    gone = weakref.ref(memory)
    module.reset()
    del memory
    assert gone() is None and module not in cache._entries
