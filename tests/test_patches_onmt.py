"""The adapter of OpenNMT-py, on a class written like its own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from attn_kernels import patch
from steps import check_nothing_is_stale, check_two_backward_passes, compare, stand_in

TYPES = ("dot", "general", "mlp")


class Global(nn.Module):
    """Dot, general or mlp scores over the memory, and one more layer over context and query."""

    def __init__(self, dim, coverage=False, attn_type="dot", attn_func="softmax"):
        super().__init__()
        self.attn_type, self.attn_func = attn_type, attn_func
        if attn_type == "general":
            self.linear_in = nn.Linear(dim, dim, bias=False)
        if attn_type == "mlp":
            self.linear_context, self.linear_query = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim)
            self.v = nn.Linear(dim, 1, bias=False)
        self.linear_out = nn.Linear(2 * dim, dim, bias=attn_type == "mlp")
        if coverage:
            self.linear_cover = nn.Linear(1, dim, bias=False)

    def scores(self, query, memory):
        if self.attn_type == "mlp":
            hidden = self.linear_query(query)[:, :, None] + self.linear_context(memory)[:, None]
            return self.v(hidden.tanh()).squeeze(3)
        return (self.linear_in(query) if self.attn_type == "general" else query) @ memory.mT

    def forward(self, src, enc_out, src_len=None, coverage=None):
        query = src[:, None] if src.dim() == 2 else src
        if coverage is not None:
            enc_out += self.linear_cover(coverage[..., None])
            enc_out = enc_out.tanh()
        scores = self.scores(query, enc_out)
        if src_len is not None:
            scores = scores.masked_fill(torch.arange(enc_out.shape[1]) >= src_len[:, None, None], -torch.inf)
        alignments = scores.softmax(-1)
        output = self.linear_out(torch.cat([alignments @ enc_out, query], 2))
        output = output if self.attn_type == "mlp" else output.tanh()
        return (output[:, 0], alignments[:, 0]) if src.dim() == 2 else (output, alignments)


@pytest.fixture(autouse=True)
def library(monkeypatch):
    stand_in(monkeypatch, "onmt.modules.global_attention:GlobalAttention", Global)


def calls(module, memory, steps, queries, lengths=None):
    """Some single steps, and many queries at once."""
    outputs = [x for query in steps for x in module(query, memory, src_len=lengths)]
    return [*outputs, *module(queries, memory, lengths)]


def some_inputs(batch=3, steps=7, dim=6):
    torch.manual_seed(0)
    memory, steps_, queries = torch.randn(batch, steps, dim), torch.randn(3, batch, dim), torch.randn(batch, 5, dim)
    lengths = torch.randint(1, steps + 1, (batch,))
    return {"memory": memory.double(), "steps": steps_.double(), "queries": queries.double(), "lengths": lengths}


@pytest.mark.parametrize("attn_type", TYPES)
@pytest.mark.parametrize("case", ["lengths", "no lengths", "large", "empty"])
def test_results(attn_type, case):
    inputs = some_inputs(16, 30, 70) if case == "large" else some_inputs()
    if case == "no lengths":
        del inputs["lengths"]
    if case == "empty":
        inputs["lengths"][1] = 0
    reasons = compare(Global(inputs["memory"].shape[2], attn_type=attn_type), calls, inputs)
    assert reasons == (["a row with nothing to attend"] if case == "empty" else [])


@pytest.mark.parametrize("attn_type", TYPES)
def test_two_backward_passes_on_one_memory(attn_type):
    check_two_backward_passes(Global(70, attn_type=attn_type).double(), calls, some_inputs(16, 30, 70))


@pytest.mark.parametrize("attn_type", TYPES)
def test_without_gradients_nothing_is_stale(attn_type):
    module = Global(6, attn_type=attn_type).double()
    check_nothing_is_stale(module, calls, some_inputs(), lambda given: given["lengths"][:1].fill_(2))


@pytest.mark.parametrize("attn_type", TYPES)
def test_coverage_is_left_to_the_original(attn_type):
    original, inputs = Global(6, coverage=True, attn_type=attn_type).double(), some_inputs()
    module = copy.deepcopy(original)
    report = patch(module)
    memories = inputs["memory"].clone(), inputs["memory"].clone()
    coverage = torch.rand(3, 7).double()
    with torch.no_grad():
        ours = module(inputs["steps"][0], memories[0], coverage=coverage)
        expected = original(inputs["steps"][0], memories[1], coverage=coverage)
    torch.testing.assert_close((*ours, memories[0]), (*expected, memories[1]))
    assert [f.reason for f in report.fallbacks] == ["coverage"]


def test_what_is_not_covered():
    assert patch(Global(6, attn_func="sparsemax")).skipped[0].reason == "attn_func='sparsemax'"
    module, inputs = Global(6, attn_type="mlp").double(), some_inputs()
    module.v = nn.Sequential(module.v)
    report = patch(module)
    calls(module, **inputs)
    assert report.fallbacks[0].calls == 4


@pytest.mark.parametrize("attn_type", TYPES)
def test_compiled(attn_type):
    original, inputs = Global(6, attn_type=attn_type).double(), some_inputs()
    inputs["lengths"][1] = 0
    module = copy.deepcopy(original)
    patch(module)
    for queries in (inputs["steps"][0], inputs["queries"]):
        arguments = queries, inputs["memory"], inputs["lengths"]
        ours = torch.compile(lambda *args: module(*args), fullgraph=True, backend="eager")(*arguments)
        torch.testing.assert_close(ours, original(*arguments), equal_nan=True)
