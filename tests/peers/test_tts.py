"""coqui-tts 0.28.0: the original attention of its Tacotron models, original against patched."""

from __future__ import annotations

import copy

import pytest
import torch
from coqui import attentions

from attn_kernels import patch
from steps import check_copies_are_patched, compare, decoding

pytestmark = pytest.mark.usefixtures("at_any_size")

OPTIONS = {
    "location_attention": True,
    "windowing": False,
    "norm": "softmax",
    "forward_attn": False,
    "trans_agent": False,
    "forward_attn_mask": False,
}


def make(**options):
    sizes = {"attention_location_n_filters": 4, "attention_location_kernel_size": 5}
    return attentions.OriginalAttention(6, 7, 9, **sizes, **{**OPTIONS, **options})


def decode(module, memory, states, mask=None):
    module.init_states(memory)
    for name in ("attention_weights", "attention_weights_cum", "alpha", "u"):  # it makes them in float32
        if hasattr(module, name):
            setattr(module, name, getattr(module, name).to(memory.dtype))
    processed = module.preprocess_inputs(memory)
    results = []
    for state in states:
        results += [module(state, memory, processed, mask), module.attention_weights]
    return results


def inputs(seed, masked=True):
    given, padding = decoding(seed, least_steps=4)
    return given | {"mask": ~padding} if masked else given


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("location", [True, False])
@pytest.mark.parametrize("forward", ["", "forward", "agent"])
def test_decoding(location, forward, masked):
    module = make(location_attention=location, forward_attn=forward != "", trans_agent=forward == "agent")
    assert compare(module, decode, inputs(len(forward), masked)) == []


def test_another_norm_falls_through():
    assert compare(make(norm="sigmoid"), decode, inputs(1)) == ["a norm other than softmax"]


def test_a_window_falls_through():
    module = make(windowing=True).eval()
    patched = copy.deepcopy(module)
    report = patch(patched)
    given = inputs(1)
    arguments = (given["memory"].float(), given["states"].float(), given["mask"])
    with torch.no_grad():
        for expected, got in zip(decode(module, *arguments), decode(patched, *arguments), strict=True):
            assert torch.equal(got, expected)
    assert [(fallback.reason, fallback.calls) for fallback in report.fallbacks] == [("a window", 4)]


def test_all_padding():
    given = inputs(0)
    given["mask"][1] = False
    assert compare(make(), decode, given) == ["a row with nothing to attend"]


def test_copies_and_back():
    check_copies_are_patched(make())
