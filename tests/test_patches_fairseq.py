"""The adapters of fairseq, on classes written like its own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from attn_kernels import patch
from steps import check_nothing_is_stale, check_two_backward_passes, compare, stand_in

pytestmark = pytest.mark.usefixtures("at_any_size")

CLASSES = ("lstm", "berard")


class Layer(nn.Module):
    """General scores over a time-major memory, and one more layer over context and query."""

    def __init__(self, input_embed_dim, source_embed_dim, output_embed_dim, bias=False):
        super().__init__()
        self.input_proj = nn.Linear(input_embed_dim, source_embed_dim, bias=bias)
        self.output_proj = nn.Linear(input_embed_dim + source_embed_dim, output_embed_dim, bias=bias)

    def forward(self, input, source_hids, encoder_padding_mask):
        scores = (source_hids * self.input_proj(input)).sum(2)
        if encoder_padding_mask is not None:
            scores = scores.masked_fill(encoder_padding_mask, float("-inf"))
        alignments = torch.softmax(scores, 0)
        context = (source_hids * alignments.unsqueeze(2)).sum(0)
        return torch.tanh(self.output_proj(torch.cat([context, input], 1))), alignments


class MLP(nn.Module):
    """Additive scores over a time-major memory."""

    def __init__(self, decoder_hidden_state_dim, context_dim, attention_dim):
        super().__init__()
        self.encoder_proj = nn.Linear(context_dim, attention_dim)
        self.decoder_proj = nn.Linear(decoder_hidden_state_dim, attention_dim, bias=False)
        self.to_scores = nn.Linear(attention_dim, 1, bias=False)

    def forward(self, decoder_state, source_hids, encoder_padding_mask):
        hidden = torch.tanh(self.encoder_proj(source_hids) + self.decoder_proj(decoder_state))
        scores = self.to_scores(hidden).squeeze(2)
        if encoder_padding_mask is not None:
            scores = scores.masked_fill(encoder_padding_mask, float("-inf"))
        alignments = torch.softmax(scores, 0)
        return (source_hids * alignments.unsqueeze(2)).sum(0), alignments


@pytest.fixture(autouse=True)
def library(monkeypatch):
    stand_in(monkeypatch, "fairseq.models.lstm:AttentionLayer", Layer)
    stand_in(monkeypatch, "fairseq.models.speech_to_text.berard:MLPAttention", MLP)


def make(cls, hidden=5, size=6):
    return Layer(hidden, size, hidden, bias=True) if cls == "lstm" else MLP(hidden, size, 9)


def some_inputs(batch=3, steps=7, hidden=5, size=6):
    torch.manual_seed(0)
    padding = torch.arange(steps)[:, None] >= torch.randint(1, steps + 1, (batch,))
    memory, queries = torch.randn(steps, batch, size).double(), torch.randn(3, batch, hidden).double()
    return {"memory": memory, "queries": queries, "padding": padding}


def decode(module, memory, queries, padding=None):
    return [x for query in queries for x in module(query, memory, padding)]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("case", ["padding", "no padding", "large", "empty", "one for all"])
def test_results(cls, case):
    inputs, module = some_inputs(), make(cls)
    if case == "large":
        inputs, module = some_inputs(16, 30, 20, 120), make(cls, 20, 120)
    if case == "no padding":
        del inputs["padding"]
    if case == "empty":
        inputs["padding"][:, 1] = True
    if case == "one for all":  # broadcast by the original
        inputs["padding"] = inputs["padding"][:, :1].clone()
        inputs["padding"][0] = False
    reasons = {"empty": ["a row with nothing to attend"], "one for all": ["a padding mask that is not (Tk, B) bool"]}
    assert compare(module, decode, inputs) == reasons.get(case, [])


@pytest.mark.parametrize("cls", CLASSES)
def test_two_backward_passes_on_one_memory(cls):
    check_two_backward_passes(make(cls, 20, 120).double(), decode, some_inputs(16, 30, 20, 120))


@pytest.mark.parametrize("cls", CLASSES)
def test_without_gradients_nothing_is_stale(cls):
    check_nothing_is_stale(make(cls).double(), decode, some_inputs(), lambda given: given["padding"][:2].fill_(False))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("cls", CLASSES)
def test_scripts(cls):
    inputs = some_inputs()
    model = nn.ModuleList([make(cls).double()])
    arguments = inputs["queries"][0], inputs["memory"], inputs["padding"]
    expected = model[0](*arguments)
    patch(model)
    scripted = torch.jit.script(model[0])
    torch.testing.assert_close(scripted(*arguments), expected, rtol=0, atol=0)
    torch.testing.assert_close(model[0](*arguments), expected)


@pytest.mark.parametrize("cls", CLASSES)
def test_compiled(cls):
    original, inputs = make(cls).double(), some_inputs()
    inputs["padding"][:, 1] = True
    module = copy.deepcopy(original)
    patch(module)
    arguments = inputs["queries"][0], inputs["memory"], inputs["padding"]
    ours = torch.compile(lambda *args: module(*args), fullgraph=True, backend="eager")(*arguments)
    torch.testing.assert_close(ours, original(*arguments), equal_nan=True)
