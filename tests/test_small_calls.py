"""Adapters with the sizes from which users meet them: below, a call is the original's; from there on it is fused.

The tests of each adapter turn these sizes off (``at_any_size``), to reach the fused form with small numbers.
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


EXAMPLES = {
    # 2^16 numbers in the memory
    "fairseq, general": Example(
        lambda: fairseq.make("lstm", 5, 64), fairseq.decode, lambda *size: fairseq.some_inputs(*size, 5, 64), 8, 128
    ),
    # 2^11 numbers in the memory
    "fairseq, additive": Example(
        lambda: fairseq.make("berard", 5, 64), fairseq.decode, lambda *size: fairseq.some_inputs(*size, 5, 64), 4, 8
    ),
    # 2^15 numbers in the projected memory
    "Tacotron 2": Example(others.Tacotron, others.tacotron_steps, of_others, 16, 228),
    "coqui-tts": Example(others.Coqui, others.coqui_steps, of_others, 16, 228),
    # 2^15 numbers in the memory
    "SpeechBrain": Example(others.Brain, others.brain_steps, of_others, 16, 293),
    # 2^13 numbers in the memory
    "ESPnet, additive": Example(lambda: espnet.AttAdd(6, 7, 5), espnet.decode, of_espnet, 8, 171),
    "ESPnet, location": Example(lambda: espnet.AttLoc(6, 7, 5), espnet.decode, of_espnet, 8, 171),
    "ESPnet, forward": Example(lambda: espnet.AttForward(6, 7, 5), espnet.decode, of_espnet, 69, 20, "batch"),
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


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_small_calls_are_the_originals_and_large_ones_are_fused(
    example: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large, small and large again, as batches of a training are: nothing of one is left over in the next."""
    original = example.make().double()
    patched = copy.deepcopy(original)
    report = patch(patched)
    assert len(report.replaced) == 1, report
    attend, fused_calls = type(patched).attend, []

    def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        fused_calls.append(None)
        return attend(module, *args, **kwargs)

    monkeypatch.setattr(type(patched), "attend", counted)
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


def test_every_adapter_with_a_size_has_an_example() -> None:
    """By its library: an adapter with another size belongs into the table."""
    sized = {adapter.library for adapter in patching.adapters() if adapter.fused.min_numel}
    assert sized == {"fairseq", "Tacotron 2 (NVIDIA)", "coqui-tts", "SpeechBrain", "ESPnet"}
