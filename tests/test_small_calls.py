"""The rule for small calls with default settings: below a number of products the original runs, above it the fused op.

The tests of each adapter disable this rule (``at_any_size``), so that small sizes run the fused op.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import test_patches_espnet as espnet
import test_patches_fairseq as fairseq
import test_patches_others as others
from attn_kernels import patch, patching
from attn_kernels.patching import registry
from attn_kernels.patching.adapter import MIN_PRODUCTS
from steps import Inputs, Steps, results, stand_in

STAND_INS = {
    "fairseq.models.lstm:AttentionLayer": fairseq.Layer,
    "fairseq.models.speech_to_text.berard:MLPAttention": fairseq.MLP,
    "tacotron2.model:Attention": others.Tacotron,
    "TTS.tts.layers.tacotron.attentions:OriginalAttention": others.Coqui,
    "speechbrain.nnet.attention:ContentBasedAttention": others.Brain,
}


class Example(NamedTuple):
    """batch and steps: the smallest sizes at which a call is fused; one fewer in the axis ``shorter`` is too small."""

    make: Callable[[], nn.Module]
    decode: Steps
    inputs: Callable[[int, int], Inputs]
    batch: int
    steps: int
    shorter: str = "steps"


def of_espnet(batch: int, steps: int) -> Inputs:
    torch.manual_seed(0)
    memory, states = torch.randn(batch, steps, 6).double(), torch.randn(3, batch, 7).double()
    return {"memory": memory, "states": states, "lengths": [steps, *torch.randint(1, steps + 1, (batch - 1,)).tolist()]}


def of_others(batch: int, steps: int) -> Inputs:
    torch.manual_seed(0)
    memory, states = torch.randn(batch, steps, others.M).double(), torch.randn(3, batch, others.Q).double()
    return {"memory": memory, "states": states, "padding": torch.arange(steps) >= torch.randint(1, steps, (batch, 1))}


# 2^16 numbers in the largest tensor: the memory, or in Tacotron 2 and coqui-tts the projected memory, (B, T, 9).
EXAMPLES = {
    "fairseq, general": Example(
        lambda: fairseq.make("lstm", 5, 64), fairseq.decode, lambda *size: fairseq.some_inputs(*size, 5, 64), 8, 128
    ),
    "fairseq, additive": Example(
        lambda: fairseq.make("berard", 5, 64), fairseq.decode, lambda *size: fairseq.some_inputs(*size, 5, 64), 8, 128
    ),
    "Tacotron 2": Example(others.Tacotron, others.tacotron_steps, of_others, 16, 456),
    "coqui-tts": Example(others.Coqui, others.coqui_steps, of_others, 16, 456),
    "SpeechBrain": Example(others.Brain, others.brain_steps, of_others, 16, 586),
    "ESPnet, additive": Example(lambda: espnet.AttAdd(6, 7, 5), espnet.decode, of_espnet, 64, 171),
    "ESPnet, location": Example(lambda: espnet.AttLoc(6, 7, 5), espnet.decode, of_espnet, 64, 171),
    "ESPnet, forward": Example(lambda: espnet.AttForward(6, 7, 5), espnet.decode, of_espnet, 547, 20, "batch"),
}


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    for original, cls in STAND_INS.items():
        stand_in(monkeypatch, original, cls)
    brain = sys.modules["speechbrain.nnet.attention"]
    monkeypatch.setattr(brain, "length_to_mask", others.length_to_mask, raising=False)
    for cls in espnet.CLASSES:
        name = f"{espnet.MODULE}:{cls.__name__}"
        monkeypatch.setitem(registry._adapters, name, registry._adapters[name]._replace(sources=()))


def count_fused(patched: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows with every call that the adapter serves."""
    attend, calls = type(patched).attend, []

    def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return attend(module, *args, **kwargs)

    monkeypatch.setattr(type(patched), "attend", counted)
    return calls


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_small_calls_are_the_originals_and_large_ones_are_fused(
    example: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large, small and large again, as batches of a training are: nothing of one is left over in the next."""
    original = example.make().double()
    patched = copy.deepcopy(original)
    report = patch(patched)
    assert len(report.replaced) == 1, report
    fused_calls = count_fused(patched, monkeypatch)
    large = {"batch": example.batch, "steps": example.steps}
    small = {**large, example.shorter: large[example.shorter] - 1}
    for size in (large, small, large):
        inputs = example.inputs(size["batch"], size["steps"])
        fused_calls.clear()
        ours, expected = results(patched, example.decode, inputs), results(original, example.decode, inputs)
        assert bool(fused_calls) == (size is large), size
        for name, tensor in expected.items():
            if size is small:
                torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0, msg=f"{name} of a small call")
            else:
                torch.testing.assert_close(ours[name], tensor, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    assert report.fallbacks == []


def test_one_rule_for_all_adapters() -> None:
    """Those that have it are in the table, by their library."""
    shipped = [one for one in patching.adapters() if one.fused.__module__.startswith("attn_kernels.")]
    assert {one.fused.min_products for one in shipped} == {0, MIN_PRODUCTS}
    sized = {one.library for one in shipped if one.fused.min_products}
    assert sized == {"fairseq", "Tacotron 2 (NVIDIA)", "coqui-tts", "SpeechBrain", "ESPnet"}


@pytest.mark.parametrize(("steps", "is_fused"), [(84, False), (88, True)])
def test_a_projection_that_is_kept_counts_without_gradients(
    steps: int, is_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of fairseq's additive class: 4 x T x 64 x (1 + 64 / 32) products, and with gradients a third of them."""
    original, inputs = fairseq.make("berard", 5, 64).double(), fairseq.some_inputs(4, steps, 5, 64)
    patched = copy.deepcopy(original)
    patch(patched)
    fused_calls = count_fused(patched, monkeypatch)
    with torch.no_grad():
        ours, expected = fairseq.decode(patched, **inputs), fairseq.decode(original, **inputs)
    assert bool(fused_calls) == is_fused
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    fused_calls.clear()
    fairseq.decode(patched, **inputs)
    assert fused_calls == []


def test_wrong_arguments_of_a_small_call() -> None:
    """The error is the original's."""
    module = fairseq.make("berard", 5, 64)
    patch(module)
    with pytest.raises(TypeError, match=r"forward\(\) missing 3 required positional arguments"):
        module()
