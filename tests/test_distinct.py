"""Products of embedded tokens once for each distinct token: results and gradients are those of single tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import formulas
from attn_kernels.seq2seq import Seq2Seq, decoder, recurrent
from attn_kernels.seq2seq.fused import distinct
from sentences import LOSSES, Batch, random_batch, run

VOCABULARY = 7


def models(**options: Any) -> tuple[Seq2Seq, Seq2Seq]:
    """The same model twice."""
    torch.manual_seed(0)
    made = [Seq2Seq(VOCABULARY, VOCABULARY, 5, 6, 7, dtype=torch.float64, **options) for _ in range(2)]
    made[1].load_state_dict(made[0].state_dict())
    return made[0], made[1]


def batch() -> Batch:
    source, lengths, target = random_batch(torch.tensor([9, 4, 0, 1, 6]), 9, 8, torch.Generator().manual_seed(1))
    return source % VOCABULARY, lengths, target % VOCABULARY  # tokens include the padding token


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call of ``embed_distinct``, whether it returned rows."""
    calls: list[bool] = []

    def watched(*given: Any) -> distinct.Distinct | None:
        result = distinct.embed_distinct(*given)
        calls.append(result is not None)
        return result

    for module in (decoder, recurrent):
        monkeypatch.setattr(module, "embed_distinct", watched)
    return calls


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_results_and_gradients(cell: str, num_layers: int, found: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, plain = models(cell=cell, num_layers=num_layers)
    got = run(ours, batch(), LOSSES["both"])
    assert found == [True, True]
    for module in (decoder, recurrent):
        monkeypatch.setattr(module, "embed_distinct", lambda *_: None)
    formulas.assert_same(got, run(plain, batch(), LOSSES["both"]), atol=1e-12, rtol=1e-9)
    assert not ours.encoder.embedding.weight.grad[0].any()  # of the padding token


def test_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for model in models():
        logits, alignments = model(*batch())
        loss = LOSSES["both"](logits, alignments)
        parameters = list(model.parameters())
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        second = torch.autograd.grad(sum(x.sin().sum() for x in first), parameters, allow_unused=True)
        gradients.append([x for x in second if x is not None])
        for module in (decoder, recurrent):
            monkeypatch.setattr(module, "embed_distinct", lambda *_: None)
    assert len(gradients[0]) > 20
    torch.testing.assert_close(*gradients, atol=1e-11, rtol=1e-8)


def test_without_padding_as_one_padded_layer(found: list[bool]) -> None:
    """In float32, oneDNN's LSTM may take over: it reads the rows of all tokens."""
    ours, plain = (model.float() for model in models())
    source, _, target = batch()
    data = source, torch.full((5,), 9), target
    got = run(ours, data, LOSSES["both"])
    assert found == [True, True]
    expected = run(plain.double(), data, LOSSES["both"])
    for name, y in expected.items():
        torch.testing.assert_close(got[name].double(), y, atol=2e-5, rtol=2e-4, msg=name)


def _hook(model: Seq2Seq) -> None:
    model.encoder.embedding.register_forward_hook(lambda *_: None)
    model.decoder.embedding.register_forward_hook(lambda *_: None)


def _max_norm(model: Seq2Seq) -> None:
    for part in (model.encoder, model.decoder):
        part.embedding.max_norm = 0.5


def _many_tokens(model: Seq2Seq) -> None:
    for part in (model.encoder, model.decoder):
        part.embedding = nn.Embedding(1000, 5, dtype=torch.float64)


@pytest.mark.parametrize("change", [_hook, _max_norm, _many_tokens])
def test_where_tokens_are_embedded_one_by_one(change: Callable[[Seq2Seq], None], found: list[bool]) -> None:
    model, _ = models()
    change(model)
    source, lengths, target = batch()
    if change is _many_tokens:
        source, target = (torch.arange(x.numel()).view_as(x) for x in (source, target))
    model(source, lengths, target)
    assert found == [False, False]


def test_dropout(found: list[bool]) -> None:
    """Equal tokens have different dropout factors. In evaluation mode there are none."""
    model, _ = models(dropout=0.5)
    model(*batch())
    assert found == [False, False]
    model.eval()
    model(*batch())
    assert found[2:] == [True, True]
