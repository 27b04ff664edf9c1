"""NVIDIA's Tacotron 2 (PyPI tacotron2 22.12.28): its attention, original against patched."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch

if importlib.util.find_spec("tacotron2") is None:
    pytest.skip("tacotron2 is not installed: see tests/peers/requirements.txt", allow_module_level=True)
if importlib.util.find_spec("librosa") is None:  # for audio, which is not used here
    librosa, filters, util = (types.ModuleType(name) for name in ("librosa", "librosa.filters", "librosa.util"))
    librosa.filters, librosa.util = filters, util
    filters.mel = util.pad_center = util.tiny = None
    sys.modules.update({module.__name__: module for module in (librosa, filters, util)})

model = pytest.importorskip("tacotron2.model", reason="tacotron2: something that it imports is missing")

from attn_kernels.mechanisms import LocationSensitiveAttention
from steps import check_copies_are_patched, compare, decoding

pytestmark = pytest.mark.usefixtures("at_any_size")


def decode(module, memory, states, mask=None):
    """As the decoder does: previous and cumulative alignments in, their gradients back through all steps."""
    processed = module.memory_layer(memory)
    alignments = memory.new_zeros(memory.shape[:2])
    total, results = alignments, []
    for state in states:
        both = torch.stack([alignments, total], dim=1)
        context, alignments = module(state, memory, processed, both, mask)
        total = total + alignments
        results += [context, alignments]
    return results


def inputs(seed, masked=True):
    given, padding = decoding(seed)
    return given | {"mask": padding} if masked else given


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_decoding(seed, masked):
    assert compare(model.Attention(6, 7, 9, 4, 5), decode, inputs(seed, masked)) == []


def test_all_padding():
    given = inputs(0)
    given["mask"][1] = True
    assert compare(model.Attention(6, 7, 9, 4, 5), decode, given) == ["a row with nothing to attend"]


def test_copies_and_back():
    check_copies_are_patched(model.Attention(6, 7, 9, 4, 5))


@pytest.mark.parametrize("masked", [True, False])
def test_mechanism(masked):
    """LocationSensitiveAttention with the same weights: contexts, alignments and gradients of four steps."""
    given = inputs(7, masked)
    module = model.Attention(6, 7, 9, 4, 5).double()
    ours = LocationSensitiveAttention(6, 7, 9, 4, 5, cumulative=True, bias=False, dtype=torch.float64)
    named = module.state_dict()
    ours.load_state_dict(
        {
            "query_projection.weight": named["query_layer.linear_layer.weight"],
            "memory_projection.weight": named["memory_layer.linear_layer.weight"],
            "v": named["v.linear_layer.weight"][0],
            "location_convolution.weight": named["location_layer.location_conv.conv.weight"],
            "location_projection.weight": named["location_layer.location_dense.linear_layer.weight"],
        }
    )
    memory, states = given["memory"].requires_grad_(), given["states"].requires_grad_()
    expected = decode(module, **given)
    allowed = None if given.get("mask") is None else ~given["mask"]
    projected = ours.memory(memory, mask=allowed)
    state, results = ours.initial_state(projected), []
    for query in states:
        context, alignments, state = ours(query, projected, state)
        results += [context, alignments]
    torch.testing.assert_close(results, expected)
    gradients = []
    for outputs in (results, expected):
        torch.manual_seed(1)
        loss = sum((x * torch.randn_like(x)).sum() for x in outputs)
        gradients.append(torch.autograd.grad(loss, [memory, states]))
    torch.testing.assert_close(*gradients)
