"""fairseq 0.12.2: the attention of its LSTM decoder and of the Berard model, original against patched."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

FOUND = importlib.util.find_spec("fairseq")
if FOUND is None:
    pytest.skip("fairseq's source is not on the path: see tests/peers/requirements.txt", allow_module_level=True)


class _Anything(types.ModuleType):
    """A module of every name: fairseq does not import on Python 3.11, and the two files need base classes only."""

    def __getattr__(self, name):
        if name == "__path__":
            return []
        if name.startswith("__"):
            raise AttributeError(name)
        return (lambda *_, **__: lambda decorated: decorated) if name.startswith("register") else nn.Module


def load(name: str) -> types.ModuleType:
    """One file of fairseq, with stand-ins for all that it imports of the rest."""
    parents = ("fairseq", "fairseq.utils", "fairseq.models", "fairseq.models.speech_to_text", "fairseq.modules")
    for parent in (*parents, "fairseq.checkpoint_utils", "fairseq.data", "fairseq.data.data_utils"):
        sys.modules.setdefault(parent, _Anything(parent))
    file = Path(FOUND.origin).parent.joinpath(*name.split(".")[1:]).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


AttentionLayer = load("fairseq.models.lstm").AttentionLayer
MLPAttention = load("fairseq.models.speech_to_text.berard").MLPAttention

from attn_kernels import patch
from steps import check_copies, check_nothing_is_stale, compare

pytestmark = pytest.mark.usefixtures("at_any_size")

CLASSES = ("lstm", "lstm with bias", "berard")
WITH_PADDING = 1e-6  # tolerance of float64: with a padding mask the originals round their scores to float32


def make(cls: str, hidden: int, size: int) -> nn.Module:
    if cls == "berard":
        return MLPAttention(hidden, size, 20)
    return AttentionLayer(hidden, size, hidden, bias=cls == "lstm with bias")


def some_padding(steps: int, batch: int) -> torch.Tensor:
    return torch.arange(steps)[:, None] >= torch.randint(1, steps + 1, (batch,))


def decode(module, memory, queries, padding=None):
    return [x for query in queries.unbind(0) for x in module(query, memory, padding)]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("seed", range(6))
def test_steps(cls, seed):
    torch.manual_seed(seed)
    batch, steps, hidden, size = (int(torch.randint(1, n, ())) for n in (6, 20, 40, 30))
    inputs = {"memory": torch.randn(steps, batch, size).double(), "queries": torch.randn(3, batch, hidden).double()}
    assert compare(make(cls, hidden, size), decode, inputs) == []
    inputs["padding"] = some_padding(steps, batch)
    assert compare(make(cls, hidden, size), decode, inputs, WITH_PADDING) == []


@pytest.mark.parametrize("cls", CLASSES)
def test_gradients_that_are_gathered(cls):
    """A memory large enough for its gradients to be made once for all steps; another mask in one of them."""

    def two_masks(module, memory, queries, padding, other):
        masks = (padding, padding, other, padding)
        return [x for q, m in zip(queries.unbind(0), masks, strict=True) for x in module(q, memory, m)]

    torch.manual_seed(0)
    inputs = {
        "memory": torch.randn(40, 16, 200).double(),
        "queries": torch.randn(4, 16, 50).double(),
        "padding": some_padding(40, 16),
        "other": some_padding(40, 16),
    }
    assert compare(make(cls, 50, 200), two_masks, inputs, WITH_PADDING) == []


@pytest.mark.parametrize("cls", CLASSES)
def test_a_row_that_is_all_padding(cls):
    torch.manual_seed(0)
    padding = some_padding(7, 3)
    padding[:, 1] = True
    inputs = {"memory": torch.randn(7, 3, 6).double(), "queries": torch.randn(2, 3, 5).double(), "padding": padding}
    assert compare(make(cls, 5, 6), decode, inputs, WITH_PADDING) == ["a row with nothing to attend"]


@pytest.mark.parametrize("cls", CLASSES)
def test_alignments_are_laid_out_as_before(cls):
    module = make(cls, 5, 6)
    patch(module)
    alignments = module(torch.randn(3, 5), torch.randn(7, 3, 6), None)[1]
    assert alignments.shape == (7, 3) and alignments.is_contiguous()


@pytest.mark.parametrize("cls", CLASSES)
def test_nothing_stale(cls):
    torch.manual_seed(0)
    inputs = {"memory": torch.randn(7, 3, 6), "queries": torch.randn(1, 3, 5), "padding": some_padding(7, 3)}

    def write(given):
        given["padding"][1] = ~given["padding"][1]
        given["padding"][0] = False

    check_nothing_is_stale(make(cls, 5, 6), decode, inputs, write)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("cls", CLASSES)
def test_scripts(cls):
    """torch.jit.script of a model with a patched module compiles the original, and leaves the module patched."""

    class Model(nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.attention = attention

        def forward(self, query, memory, padding):
            return self.attention(query, memory, padding)

    torch.manual_seed(0)
    model = Model(make(cls, 5, 6))
    query, memory, padding = torch.randn(3, 5), torch.randn(7, 3, 6), some_padding(7, 3)
    expected = model(query, memory, padding)
    report = patch(model)
    assert [r.name for r in report.replaced] == ["attention"]
    torch.testing.assert_close(model(query, memory, padding), expected)
    torch.testing.assert_close(torch.jit.script(model)(query, memory, padding), expected, rtol=0, atol=0)
    assert patch(model).replaced == report.replaced


@pytest.mark.parametrize("cls", CLASSES)
def test_copies_pickles_and_back(cls):
    torch.manual_seed(0)
    check_copies(make(cls, 5, 6), decode, torch.randn(7, 3, 6), torch.randn(2, 3, 5), some_padding(7, 3))
