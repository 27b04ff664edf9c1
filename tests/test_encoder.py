"""Encoder: LSTMs and GRUs on sentences of different lengths, against single sentences and PyTorch's packed layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_kernels.seq2seq import Encoder, recurrent
from attn_kernels.seq2seq.fused import cell_steps, few_sentences, ragged
from ragged import HIDDEN, INPUT, LENGTHS, assert_same, encode, make, one_by_one, packed, results

pytestmark = pytest.mark.usefixtures("one_thread")
cells = pytest.mark.parametrize("cell", ["lstm", "gru"])


OPTIONS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "both directions": {"bidirectional": True},
    "layers": {"bidirectional": True, "num_layers": 3},
    "no biases": {"bias": False, "num_layers": 2},
    "first states": {"states": True, "bidirectional": True, "num_layers": 2},
    "steps first": {"states": True, "batch_first": False, "bidirectional": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@cells
def test_each_sentence_alone(cell: str, options: dict[str, Any], encoder_nodes: list[int]) -> None:
    encoder, x, states = make(cell, **options)
    got = results(encode, encoder, x, LENGTHS, states)
    assert len(encoder_nodes) == encoder.rnn.num_layers
    assert_same(got, results(one_by_one, encoder, x, LENGTHS, states))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@cells
def test_packed(cell: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, and for modules that are not stock."""
    monkeypatch.setattr(recurrent, "_is_stock_call", lambda *_: False)
    encoder, x, states = make(cell, **options)
    got = results(encode, encoder, x, LENGTHS, states)
    assert_same(got, results(one_by_one, encoder, x, LENGTHS, states))


@cells
def test_float32(cell: str, encoder_nodes: list[int]) -> None:
    """As near to float64 as PyTorch's packed layer. Rows of many sentences, with weights in oneDNN's layout."""
    torch.manual_seed(0)
    lengths = torch.randint(1, 15, (70,))
    lengths[7:10] = 14
    encoder = Encoder(9, 160, cell=cell, bidirectional=True)
    x = torch.randn(70, 14, 9, requires_grad=True)
    exact, x64 = copy.deepcopy(encoder).double(), x.detach().double().requires_grad_()
    got, eager = (results(run, encoder, x, lengths) for run in (encode, packed))
    assert encoder_nodes == [1]
    for name, right in results(packed, exact, x64, lengths).items():
        bound = 2 * (eager[name] - right).abs().max() + 1e-6 * right.abs().max().clamp(min=1)
        assert (got[name] - right).abs().max() <= bound, name


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, compiled: str) -> list[int]:
    """An element for each call of few sentences without gradients, by the C++ kernels."""
    calls: list[int] = []
    run = recurrent.run_few
    monkeypatch.setattr(recurrent, "run_few", lambda *given: calls.append(1) or run(*given))
    return calls


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@cells
@torch.no_grad()
def test_few_sentences(cell: str, options: dict[str, Any], few: list[int]) -> None:
    """Without gradients all steps of a direction are one op."""
    for lengths in (LENGTHS, torch.tensor([8]), torch.tensor([0, 0])):
        encoder, x, states = make(cell, lengths, **options)
        before = copy.deepcopy(states)
        got, expected = encoder(x, lengths, states), one_by_one(encoder, x, lengths, states)
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(states, before, atol=0, rtol=0)
    assert len(few) == 3


@pytest.mark.every_level
@cells
@torch.no_grad()
def test_few_sentences_in_float32(cell: str, few: list[int]) -> None:
    """Sizes that are no whole vectors, weights in columns, and a number that is none."""
    lengths = torch.tensor([9, 14, 3])
    encoder = Encoder(9, 165, cell=cell, num_layers=2, bidirectional=True)
    weight = encoder.rnn.weight_hh_l0
    encoder.rnn.weight_hh_l0 = torch.nn.Parameter(weight.t().contiguous().t())
    x = torch.randn(3, 14, 9)
    exact = copy.deepcopy(encoder).double()
    got, eager = (y[0] for y in (encoder(x, lengths), packed(encoder, x, lengths)))
    assert len(few) == 1
    right = packed(exact, x.double(), lengths)[0]
    assert (got - right).abs().max() <= 2 * (eager - right).abs().max() + 1e-6
    table = torch.stack([lengths, lengths], 1)  # lengths that do not lie side by side
    torch.testing.assert_close(encoder(x, table[:, 0])[0], got, rtol=0, atol=0)
    x[1, 5, 0] = torch.nan
    outputs, _ = encoder(x, lengths)
    assert torch.equal(outputs.isnan(), packed(encoder, x, lengths)[0].isnan())


@cells
def test_where_sentences_are_not_run_as_few(cell: str, few: list[int]) -> None:
    """Gradients, many sentences, dropout between layers, and modules with hooks."""
    encoder, x, _ = make(cell, num_layers=2, dropout=0.5)
    encoder(x, LENGTHS)
    with torch.no_grad():
        encoder(x, LENGTHS)
        encoder.eval()
        most = few_sentences.MAX_SENTENCES
        count, length = (most + 1, 7) if cell == "gru" else (few_sentences.MAX_WITHOUT_PADDING + 1, 8)
        encoder(torch.zeros(count, 8, INPUT, dtype=torch.float64), torch.full((count,), length))
        encoder(torch.zeros(most + 1, 8, INPUT, dtype=torch.float64), torch.full((most + 1,), 7))
        seen: list[int] = []
        hook = encoder.rnn.register_forward_hook(lambda *_: seen.append(1))
        encoder(x, LENGTHS)
        hook.remove()
        assert seen == [1] and not few
        encoder(x, LENGTHS)
    assert few == [1]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
@pytest.mark.parametrize("bidirectional", [True, False], ids=["both directions", "one direction"])
def test_little_padding(bidirectional: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 by oneDNN's padded LSTM, with its gates shut in the padding."""
    calls: list[int] = []
    run = ragged._run_padded
    monkeypatch.setattr(ragged, "_run_padded", lambda *given: calls.append(1) or run(*given))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    lengths = torch.tensor([8, 6, 0, 7, 8, 4, 8])
    options = {"num_layers": 2, "bidirectional": bidirectional}
    encoder, x, _ = make("lstm", lengths, dtype=torch.float32, **options)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(3)
    exact, x64 = copy.deepcopy(encoder).double(), x.detach().double().requires_grad_()
    right = results(one_by_one, exact, x64, lengths)
    eager, got = results(one_by_one, encoder, x, lengths), results(encode, encoder, x, lengths)
    assert len(calls) == 2
    for name, y in right.items():
        bound = 2 * (eager[name] - y).abs().max() + 1e-6 * y.abs().max().clamp(min=1)
        assert (got[name] - y).abs().max() <= bound, name
    with torch.no_grad():
        torch.testing.assert_close(encoder(x, lengths)[0], got["outputs"])
    # Twice, changed in place, and differentiated again.
    outputs, (hidden, cell) = encoder(x, lengths)
    loss = outputs.square().sum() + hidden.sum() + cell.sum()
    once = torch.autograd.grad(loss, x, retain_graph=True)[0]
    with torch.no_grad():
        hidden.zero_(), cell.zero_()
    assert torch.equal(torch.autograd.grad(loss, x, retain_graph=True)[0], once)
    found = []
    for net, inputs in ((encoder, x), (exact, x64)):
        gradient = torch.autograd.grad(net(inputs, lengths)[0].sin().sum(), inputs, create_graph=True)[0]
        found.append(torch.autograd.grad(gradient.square().sum(), net.rnn.weight_hh_l0)[0])
    torch.testing.assert_close(found[0].double(), found[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "lengths", [[8, 8, 8], [5, 5, 5], [0, 0, 0], [0, 8, 0], [1], [0], [1, 1, 8]], ids=lambda x: ",".join(map(str, x))
)
@cells
def test_lengths(cell: str, lengths: list[int]) -> None:
    encoder, x, states = make(cell, torch.tensor(lengths), states=True, bidirectional=True)
    got = results(encode, encoder, x, torch.tensor(lengths), states)
    if any(lengths):
        assert_same(got, results(one_by_one, encoder, x, torch.tensor(lengths), states))
    else:
        assert not any(y.any() for name, y in got.items() if "first" not in name and name not in ("hidden", "cell"))
        first = states if cell == "lstm" else (states,)
        assert all(torch.equal(got[name], y) for name, y in zip(("hidden", "cell"), first, strict=False))


@cells
def test_no_steps_and_no_sentences(cell: str) -> None:
    encoder, _, states = make(cell, torch.tensor([0, 0]), states=True)
    outputs, last = encoder(torch.zeros(2, 0, INPUT, dtype=torch.float64), torch.tensor([0, 0]), states)
    assert outputs.shape == (2, 0, HIDDEN)
    torch.testing.assert_close(last, states)
    outputs, last = encoder(torch.zeros(0, 4, INPUT, dtype=torch.float64), torch.zeros(0, dtype=torch.int64))
    assert outputs.shape == (0, 4, HIDDEN)
    assert {state.shape for state in (last if cell == "lstm" else (last,))} == {(1, 0, HIDDEN)}


@cells
def test_dropout_is_that_of_packed_layers(cell: str, encoder_nodes: list[int]) -> None:
    lengths = torch.tensor([3, 2, 7, 1, 7, 4])
    encoder, x, _ = make(cell, lengths, num_layers=3, dropout=0.4, bidirectional=True)
    found = []
    for run in (encode, packed):
        torch.manual_seed(2)
        found.append(results(run, encoder, x, lengths))
    assert_same(*found)
    encoder.eval()
    assert_same(results(encode, encoder, x, lengths), results(packed, encoder, x, lengths))
    assert len(encoder_nodes) == 6


@cells
def test_without_the_op(cell: str, monkeypatch: pytest.MonkeyPatch, encoder_nodes: list[int]) -> None:
    monkeypatch.setattr(cell_steps, "choose", lambda *_: "reference")
    encoder, x, states = make(cell, states=True, bidirectional=True)
    assert_same(results(encode, encoder, x, LENGTHS, states), results(one_by_one, encoder, x, LENGTHS, states))
    assert encoder_nodes == [1]


@cells
def test_derivatives_of_gradients(cell: str, encoder_nodes: list[int]) -> None:
    lengths = torch.tensor([2, 0, 3, 1])
    encoder, x, states = make(cell, lengths, states=True, bidirectional=True)
    x = x.detach()[:, :4].nan_to_num().requires_grad_()
    first = states if cell == "lstm" else (states,)
    weights = list(encoder.parameters())

    def run(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        names = [name for name, _ in encoder.named_parameters()]
        given = dict(zip(names, others[len(first) :], strict=True))
        outputs, last = torch.func.functional_call(
            encoder, given, (x, lengths, others[: len(first)] if cell == "lstm" else others[0])
        )
        return (outputs, *(last if cell == "lstm" else (last,)))

    inputs = (x, *first, *weights)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)
    assert encoder_nodes
    # Several gradients at once are computed as a batch.
    outputs = run(*inputs)[0]
    several = torch.randn(3, *outputs.shape, dtype=torch.float64)
    got = torch.autograd.grad(outputs, inputs, several, is_grads_batched=True, retain_graph=True, allow_unused=True)
    for i in range(3):
        one = torch.autograd.grad(outputs, inputs, several[i], retain_graph=True, allow_unused=True)
        for y, right in zip(got, one, strict=True):
            torch.testing.assert_close(y[i], right)


@pytest.mark.parametrize("frozen", ["x", "weight_hh", "rnn"])
@cells
def test_some_need_no_gradient(cell: str, frozen: str, encoder_nodes: list[int]) -> None:
    encoder, x, states = make(cell, states=True, num_layers=2, bidirectional=True)
    x.requires_grad_(frozen != "x")
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(frozen not in name)
    expected = results(one_by_one, encoder, x, LENGTHS, states)
    assert_same(results(encode, encoder, x, LENGTHS, states), expected)
    assert len(encoder_nodes) == 2
    with torch.no_grad():
        outputs, _ = encoder(x, LENGTHS, states)
    torch.testing.assert_close(outputs, expected["outputs"])


@cells
def test_one_result_alone(cell: str) -> None:
    """What is not used has no gradient, not one of zeros."""
    encoder, x, states = make(cell, states=True, bidirectional=True)
    for n in range(3 if cell == "lstm" else 2):
        found = []
        for run in (encode, one_by_one):
            outputs, last = run(encoder, x, LENGTHS, states)
            y = (outputs, *(last if cell == "lstm" else (last,)))[n]
            found.append(torch.autograd.grad(y.square().sum(), [x, *encoder.parameters()]))
        torch.testing.assert_close(*found)


@cells
def test_results_and_inputs_changed_in_place(cell: str) -> None:
    encoder, x, _ = make(cell, num_layers=2)
    expected = torch.autograd.grad(encoder(x, LENGTHS)[0].sum(), x)[0]
    outputs, last = encoder(x, LENGTHS)
    loss = outputs.sum()
    with torch.no_grad():
        outputs.zero_()
        (last[0] if cell == "lstm" else last).zero_()
    torch.testing.assert_close(torch.autograd.grad(loss, x, retain_graph=True)[0], expected)
    with torch.no_grad():
        encoder.rnn.weight_hh_l0.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, x)
