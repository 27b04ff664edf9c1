"""arabic-diacritizer 1.0.0: its own model with its own weights, original against patched."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

model_module = pytest.importorskip(
    "diacritize.baseline.model", reason="arabic-diacritizer: tests/peers/requirements.txt"
)

from attn_kernels import patch, patched, unpatch
from steps import compare

TEXT = "بسم الله الرحمن الرحيم الحمد لله رب العالمين"


@pytest.fixture(scope="module")
def model():
    return model_module.BiLSTMDiacritizer.from_pretrained()


@pytest.mark.parametrize("seed", range(5))
def test_attention(seed):
    torch.manual_seed(seed)
    batch, steps, size = (int(torch.randint(1, n, ())) for n in (5, 60, 50))
    states = torch.randn(batch, steps, size, dtype=torch.float64)
    assert (
        compare(model_module.BahdanauAttention(size), lambda module, states: [module(states)], {"states": states}) == []
    )


def test_the_whole_model(model):
    expected = model.diacritize(TEXT)
    names = list(model.state_dict())
    report = patch(model)
    try:
        assert [name for name, _ in report.replaced] == ["attention"] and report.skipped == []
        assert model.diacritize(TEXT) == expected and report.fallbacks == []
        assert list(model.state_dict()) == names
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert patch(other).replaced == report.replaced
            assert other.diacritize(TEXT) == expected
    finally:
        unpatch(model)
    assert type(model.attention) is model_module.BahdanauAttention and model.diacritize(TEXT) == expected


def gradients(model, ids, context):
    """Of a step of training. Dropout draws the same numbers in both dtypes."""
    model.train()
    model.zero_grad()
    torch.manual_seed(0)
    with context or torch.enable_grad():
        torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), torch.arange(80) % 15).backward()
    model.eval()
    return {name: parameter.grad.double() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("seed", range(5))
def test_a_step_of_training(model, seed):
    """In float64 they are equal. In float32 three layers of LSTM make 1e-5 of what either rounds differently."""
    torch.manual_seed(seed)
    ids = torch.randint(4, model.tokenizer.vocab_size, (2, 40))
    wide = copy.deepcopy(model).double()
    exact = gradients(wide, ids, None)

    def error(given):
        return max(((given[name] - x).abs().max() / x.abs().max()).item() for name, x in exact.items())

    assert error(gradients(wide, ids, patched(wide))) < 1e-12
    assert error(gradients(model, ids, patched(model))) <= 4 * error(gradients(model, ids, None)) + 1e-6
