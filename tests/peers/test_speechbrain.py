"""SpeechBrain 1.1.2: the attention of its recurrent decoder, original against patched."""

from __future__ import annotations

import copy
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

FOUND = importlib.util.find_spec("speechbrain")
if FOUND is None:
    pytest.skip("SpeechBrain is not installed: see tests/peers/requirements.txt", allow_module_level=True)
for name in ("speechbrain", "speechbrain.nnet", "speechbrain.dataio", "speechbrain.utils"):  # which import all of it
    package = types.ModuleType(name)
    package.__path__ = [str(Path(FOUND.origin).parent.joinpath(*name.split(".")[1:]))]
    sys.modules.setdefault(name, package)
for name in ("torchaudio", "soundfile"):  # asked for by its data functions, which are not used here
    if importlib.util.find_spec(name) is None:
        sys.modules.setdefault(name, types.ModuleType(name))

attention = pytest.importorskip(
    "speechbrain.nnet.attention", reason="SpeechBrain: something that it imports is missing"
)

from attn_kernels import patch
from steps import check_copies_are_patched, compare

pytestmark = pytest.mark.usefixtures("at_any_size")

CLASSES = {
    "ContentBasedAttention": {"scaling": 1.5},
    "LocationAwareAttention": {"conv_channels": 3, "kernel_size": 4, "scaling": 0.7},
    "KeyValueAttention": {},
}
classes = pytest.mark.parametrize("name", CLASSES)


def make(name):
    return getattr(attention, name)(enc_dim=7, dec_dim=6, attn_dim=5, output_dim=4, **CLASSES[name])


def decode(module, memory, states, lengths):
    results = []
    for _ in range(2):  # batches one after the other
        module.reset()
        for state in states:
            results += module(memory, lengths.to(memory.dtype), state)
        if isinstance(module, attention.LocationAwareAttention):
            module.prev_attn = module.prev_attn.flip(0)  # as a searcher re-orders it
            results += module(memory, lengths.to(memory.dtype), states[0])
    return results


def inputs(seed, batch=3):
    torch.manual_seed(seed)
    steps = int(torch.randint(1, 40, ()))
    lengths = torch.tensor([steps, *torch.randint(1, steps + 1, (batch - 1,)).tolist()])
    given = {"memory": torch.randn(batch, steps, 7).double(), "states": torch.randn(4, batch, 6).double()}
    return {**given, "lengths": lengths}


@classes
@pytest.mark.parametrize("seed", range(4))
def test_decoding(name, seed):
    if name == "LocationAwareAttention":
        torch.set_default_dtype(torch.float64)  # the first alignments are made in the default dtype's float
    try:
        given = inputs(seed)
        if name == "LocationAwareAttention":
            given["lengths"] = torch.full_like(given["lengths"], given["memory"].shape[1])
        assert compare(make(name), decode, given) == []
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ["ContentBasedAttention", "KeyValueAttention"])
def test_a_sentence_of_length_0(name):
    """LocationAwareAttention divides by the length."""
    given = inputs(2)
    given["lengths"][1] = 0
    assert compare(make(name), decode, given) == ["a row with nothing to attend"]


@classes
def test_float32_as_users_call_it(name):
    module = make(name)
    patched = copy.deepcopy(module)
    patch(patched)
    given = inputs(3)
    arguments = (given["memory"].float(), given["states"].float(), given["lengths"])
    for expected, got in zip(decode(module, *arguments), decode(patched, *arguments), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@classes
def test_copies_and_back(name):
    check_copies_are_patched(make(name))
