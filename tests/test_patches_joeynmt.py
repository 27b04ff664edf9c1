"""The adapters of JoeyNMT, on classes written like its own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from attn_kernels import patch, unpatch
from steps import compare, stand_in

MECHANISMS = ("bahdanau", "luong")


class Mechanism(nn.Module):
    """What both have: keys projected ahead, masked softmax of scores (B, 1, Tk), weighted mean."""

    def __init__(self, hidden_size, key_size):
        super().__init__()
        self.key_layer = nn.Linear(key_size, hidden_size, bias=False)
        self.proj_keys = None

    def compute_proj_keys(self, keys):
        self.proj_keys = self.key_layer(keys)

    def _check_input_shapes_forward(self, query, mask, values):
        assert query.shape[:2] == mask.shape[:2] == (len(values), 1)
        assert values.shape[2] == self.key_layer.in_features and mask.shape[2] == values.shape[1]

    def forward(self, query, mask, values):
        self._check_input_shapes_forward(query, mask, values)
        assert self.proj_keys is not None
        alphas = self.scores(query).masked_fill(mask == 0, -torch.inf).softmax(-1)
        return torch.bmm(alphas, values), alphas


class Bahdanau(Mechanism):
    def __init__(self, hidden_size=1, key_size=1, query_size=1):
        super().__init__(hidden_size, key_size)
        self.query_layer = nn.Linear(query_size, hidden_size, bias=False)
        self.energy_layer = nn.Linear(hidden_size, 1, bias=False)
        self.proj_query = None

    def compute_proj_query(self, query):
        self.proj_query = self.query_layer(query)

    def scores(self, query):
        self.compute_proj_query(query)
        return self.energy_layer((self.proj_keys + self.proj_query).tanh()).mT


class Luong(Mechanism):
    def scores(self, query):
        return torch.bmm(query, self.proj_keys.mT)


@pytest.fixture(autouse=True)
def library(monkeypatch):
    stand_in(monkeypatch, "joeynmt.attention:BahdanauAttention", Bahdanau)
    stand_in(monkeypatch, "joeynmt.attention:LuongAttention", Luong)


def make(mechanism, hidden=8, size=6):
    torch.manual_seed(0)
    return Bahdanau(hidden, size, hidden) if mechanism == "bahdanau" else Luong(hidden, size)


def some_inputs(batch=4, steps=7, hidden=8, size=6):
    lengths = torch.randint(1, steps + 1, (batch, 1, 1))
    inputs = {"memory": torch.randn(batch, steps, size), "queries": torch.randn(3, batch, 1, hidden)}
    return {**inputs, "mask": torch.arange(steps) < lengths}


def decode(module, memory, queries, mask):
    module.compute_proj_keys(memory)
    outputs = [x for query in queries for x in module(query, mask, memory)]
    return [*outputs, module.proj_keys, *([module.proj_query] if isinstance(module, Bahdanau) else [])]


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("mask", ["bool", "number", "empty row"])
@pytest.mark.parametrize(
    "sizes", [{}, {"batch": 16, "steps": 30, "hidden": 130, "size": 100}], ids=["small", "gathered"]
)
def test_steps(mechanism, mask, sizes):
    module, inputs = make(mechanism, sizes.get("hidden", 8), sizes.get("size", 6)), some_inputs(**sizes)
    if mask == "number":
        inputs["mask"] = inputs["mask"].long()
    if mask == "empty row":
        inputs["mask"][1] = False
    reasons = compare(module, decode, {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()})
    assert reasons == (["a row with nothing to attend"] if mask == "empty row" else [])


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_steps_of_a_search(mechanism):
    """Keys are asked for in every step, of rows re-ordered and left out; then of other sentences."""
    original = make(mechanism)
    module = copy.deepcopy(original)
    report = patch(module)
    inputs = some_inputs()
    memory, mask, query = inputs["memory"], inputs["mask"], inputs["queries"][0]
    with torch.no_grad():
        for order in ([0, 0, 1, 1, 2, 2, 3, 3], [1, 0, 2, 2, 4, 5, 7, 6], [2, 3, 5, 4], [0, 1]):
            memory, mask, query = (x[order] for x in (memory, mask, query))
            for _ in range(2):
                for m in (original, module):
                    m.compute_proj_keys(memory)
                torch.testing.assert_close(module(query, mask, memory), original(query, mask, memory))
                query = query + 1
        memory = memory + 1
        for m in (original, module):
            m.compute_proj_keys(memory)
        torch.testing.assert_close(module(query, mask, memory), original(query, mask, memory))
    assert not report.fallbacks


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_what_does_not_fit_is_refused_by_the_original(mechanism):
    module, inputs = make(mechanism), some_inputs()
    patch(module)
    memory, mask, query = inputs["memory"], inputs["mask"], inputs["queries"][0]
    with pytest.raises(AssertionError):
        module(query, mask, memory)  # no keys yet
    module.compute_proj_keys(memory)
    with pytest.raises(AssertionError):
        module(query, mask[:, :, :3], memory)
    with pytest.raises(RuntimeError):
        module(query.double(), mask, memory)


def test_an_energy_layer_of_another_kind_is_called():
    module, inputs = make("bahdanau"), some_inputs()
    report = patch(module)
    module.compute_proj_keys(inputs["memory"])
    calls = []
    module.energy_layer.register_forward_hook(lambda *_: calls.append(None))
    module(inputs["queries"][0], inputs["mask"], inputs["memory"])
    assert len(calls) == 1 and len(report.fallbacks) == 1


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_compiled(mechanism):
    original = make(mechanism)
    module = copy.deepcopy(original)
    patch(module)
    inputs = some_inputs()
    inputs["mask"][1] = False

    def step(memory, query, mask):
        module.compute_proj_keys(memory)
        return module(query, mask, memory)

    arguments = inputs["memory"], inputs["queries"][0], inputs["mask"]
    ours = torch.compile(step, fullgraph=True, backend="eager")(*arguments)
    original.compute_proj_keys(arguments[0])
    expected = original(arguments[1], arguments[2], arguments[0])
    torch.testing.assert_close(ours, expected, equal_nan=True)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_copies_pickles_and_back(mechanism):
    original, inputs = make(mechanism), some_inputs()
    module = copy.deepcopy(original)
    patch(module)
    with torch.no_grad():
        expected = decode(original, **inputs)
        decode(module, **inputs)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert other.__dict__.keys() == original.__dict__.keys()
            torch.testing.assert_close(decode(other, **inputs), expected)
        unpatch(module)
        torch.testing.assert_close(decode(module, **inputs), expected, rtol=0, atol=0)
