"""Encoder: LSTMs and GRUs over sentences of different lengths, against sentences alone and PyTorch's packed layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from attn_kernels.seq2seq import Encoder, Seq2Seq, recurrent
from attn_kernels.seq2seq.fused import cell_steps, ragged

pytestmark = pytest.mark.usefixtures("one_thread")

INPUT, HIDDEN, STEPS = 5, 6, 8
LENGTHS = torch.tensor([3, 0, 7, 1, 7, 4])
cells = pytest.mark.parametrize("cell", ["lstm", "gru"])


def make(cell: str, lengths: Tensor = LENGTHS, *, states: bool = False, **options: Any) -> tuple[Encoder, Tensor, Any]:
    """An encoder, inputs whose padding is NaN, and first states or None."""
    torch.manual_seed(0)
    encoder = Encoder(INPUT, HIDDEN, cell=cell, **{"dtype": torch.float64, **options})
    dtype, rnn = next(encoder.parameters()).dtype, encoder.rnn
    x = torch.randn(len(lengths), STEPS, INPUT, dtype=dtype)
    x = x.masked_fill(torch.arange(STEPS)[:, None] >= lengths[:, None, None], torch.nan)
    if not rnn.batch_first:
        x = x.transpose(0, 1)
    shape = (rnn.num_layers * (1 + rnn.bidirectional), len(lengths), HIDDEN)
    first = tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(2 if cell == "lstm" else 1))
    return encoder, x.requires_grad_(), None if not states else (first if cell == "lstm" else first[0])


def one_by_one(encoder: Encoder, x: Tensor, lengths: Tensor, states: Any = None) -> tuple[Tensor, Any]:
    """Each sentence by itself, as long as it is."""
    rnn = encoder.rnn
    x = x if rnn.batch_first else x.transpose(0, 1)
    directions = 1 + rnn.bidirectional
    kinds = 2 if isinstance(rnn, nn.LSTM) else 1
    zeros = x.new_zeros(rnn.num_layers * directions, len(lengths), rnn.hidden_size)
    first = (zeros,) * kinds if states is None else (states if kinds == 2 else (states,))
    outputs, last = [], []
    for i, length in enumerate(lengths.tolist()):
        own = tuple(state[:, i : i + 1].contiguous() for state in first)
        out = x.new_zeros(0, directions * rnn.hidden_size)
        if length > 0:
            sentence = x[i : i + 1, :length] if rnn.batch_first else x[i : i + 1, :length].transpose(0, 1)
            out, own = rnn(sentence, own if kinds == 2 else own[0])
            out, own = out.squeeze(0 if rnn.batch_first else 1), own if kinds == 2 else (own,)
        outputs.append(torch.cat([out, out.new_zeros(x.shape[1] - length, out.shape[1])]))
        last.append(own)
    found = tuple(torch.cat(of_kind, dim=1) for of_kind in zip(*last, strict=True))
    return torch.stack(outputs, dim=0 if rnn.batch_first else 1), found if kinds == 2 else found[0]


def packed(encoder: Encoder, x: Tensor, lengths: Tensor, states: Any = None) -> tuple[Tensor, Any]:
    """As it is written without this package."""
    axis = encoder.rnn.batch_first
    rows = pack_padded_sequence(x, lengths, batch_first=axis, enforce_sorted=False)
    outputs, last = encoder.rnn(rows, states)
    return pad_packed_sequence(outputs, batch_first=axis, total_length=x.shape[int(axis)])[0], last


def results(
    run: Callable[..., Any], encoder: Encoder, x: Tensor, lengths: Tensor, states: Any = None
) -> dict[str, Tensor]:
    """Outputs, last states, and the gradients of all by name."""
    outputs, last = run(encoder, x, lengths, states)
    found = {"outputs": outputs, **dict(zip(("hidden", "cell"), (last,) if isinstance(last, Tensor) else last))}  # noqa: B905
    generator = torch.Generator().manual_seed(1)
    loss = sum((y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum() for y in found.values())
    inputs = {"x": x, **{name: p for name, p in encoder.named_parameters() if p.requires_grad}}
    if states is not None:
        inputs |= dict(zip(("first hidden", "first cell"), (states,) if isinstance(states, Tensor) else states))  # noqa: B905
    inputs = {name: y for name, y in inputs.items() if y.requires_grad}
    of_inputs = torch.autograd.grad(loss, list(inputs.values()))
    return found | {f"gradient of {name}": y for name, y in zip(inputs, of_inputs, strict=True)}


def encode(encoder: Encoder, *arguments: Any) -> tuple[Tensor, Any]:
    return encoder(*arguments)


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, y in expected.items():
        torch.testing.assert_close(got[name], y, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers were run as one node."""
    layers: list[int] = []
    run = recurrent.run_layer
    monkeypatch.setattr(recurrent, "run_layer", lambda *arguments: layers.append(1) or run(*arguments))
    return layers


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
def test_each_sentence_alone(cell: str, options: dict[str, Any], fused: list[int]) -> None:
    encoder, x, states = make(cell, **options)
    got = results(encode, encoder, x, LENGTHS, states)
    assert len(fused) == encoder.rnn.num_layers
    assert_same(got, results(one_by_one, encoder, x, LENGTHS, states))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@cells
def test_packed(cell: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, and for modules that are not stock."""
    monkeypatch.setattr(recurrent, "_can_fuse", lambda *_: False)
    encoder, x, states = make(cell, **options)
    got = results(encode, encoder, x, LENGTHS, states)
    assert_same(got, results(one_by_one, encoder, x, LENGTHS, states))


@cells
def test_float32(cell: str, fused: list[int]) -> None:
    """As near to float64 as PyTorch's packed layer. Rows of many sentences, with weights in oneDNN's layout."""
    torch.manual_seed(0)
    lengths = torch.randint(1, 15, (70,))
    lengths[7:10] = 14
    encoder = Encoder(9, 160, cell=cell, bidirectional=True)
    x = torch.randn(70, 14, 9, requires_grad=True)
    exact, x64 = copy.deepcopy(encoder).double(), x.detach().double().requires_grad_()
    got, eager = (results(run, encoder, x, lengths) for run in (encode, packed))
    assert fused == [1]
    for name, right in results(packed, exact, x64, lengths).items():
        bound = 2 * (eager[name] - right).abs().max() + 1e-6 * right.abs().max().clamp(min=1)
        assert (got[name] - right).abs().max() <= bound, name


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
@pytest.mark.parametrize("bidirectional", [True, False], ids=["both directions", "one direction"])
def test_little_padding(bidirectional: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 by oneDNN's padded LSTM, with its gates shut in the padding."""
    calls: list[int] = []
    run = ragged._run_padded
    monkeypatch.setattr(ragged, "_run_padded", lambda *given: calls.append(1) or run(*given))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    lengths = torch.tensor([8, 6, 0, 7, 8, 3, 8])
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
def test_dropout_is_that_of_packed_layers(cell: str, fused: list[int]) -> None:
    lengths = torch.tensor([3, 2, 7, 1, 7, 4])
    encoder, x, _ = make(cell, lengths, num_layers=3, dropout=0.4, bidirectional=True)
    found = []
    for run in (encode, packed):
        torch.manual_seed(2)
        found.append(results(run, encoder, x, lengths))
    assert_same(*found)
    encoder.eval()
    assert_same(results(encode, encoder, x, lengths), results(packed, encoder, x, lengths))
    assert len(fused) == 6


@cells
def test_without_the_op(cell: str, monkeypatch: pytest.MonkeyPatch, fused: list[int]) -> None:
    monkeypatch.setattr(cell_steps, "choose", lambda *_: "reference")
    encoder, x, states = make(cell, states=True, bidirectional=True)
    assert_same(results(encode, encoder, x, LENGTHS, states), results(one_by_one, encoder, x, LENGTHS, states))
    assert fused == [1]


@cells
def test_derivatives_of_gradients(cell: str, fused: list[int]) -> None:
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
    assert fused
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
def test_some_need_no_gradient(cell: str, frozen: str, fused: list[int]) -> None:
    encoder, x, states = make(cell, states=True, num_layers=2, bidirectional=True)
    x.requires_grad_(frozen != "x")
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(frozen not in name)
    expected = results(one_by_one, encoder, x, LENGTHS, states)
    assert_same(results(encode, encoder, x, LENGTHS, states), expected)
    with torch.no_grad():
        outputs, _ = encoder(x, LENGTHS, states)
    torch.testing.assert_close(outputs, expected["outputs"])
    assert len(fused) == 4


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


# What is done to the layer --------------------------------------------------------------------------------------------


def hook(rnn: nn.Module) -> None:
    rnn.register_forward_hook(
        lambda module, arguments, result: (result[0]._replace(data=2 * result[0].data), result[1])
    )


def other_forward(rnn: nn.Module) -> None:
    original = rnn.forward
    rnn.forward = lambda rows, states=None: original(rows._replace(data=2 * rows.data), states)


def subclass(rnn: nn.Module) -> None:
    cls = type(rnn)
    rnn.__class__ = type("Mine", (cls,), {"forward": lambda self, rows, states=None: cls.forward(self, rows, states)})


def pruned(rnn: nn.Module) -> None:
    prune.random_unstructured(rnn, "weight_hh_l0", amount=0.5)


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized(rnn: nn.Module) -> None:
    parametrize.register_parametrization(rnn, "weight_ih_l0", _Doubled())


def other_dtype(rnn: nn.Module) -> None:
    rnn.to(torch.bfloat16)


WAYS = [hook, other_forward, subclass, pruned, parametrized]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@cells
def test_changed_layers_are_called(cell: str, way: Callable[[nn.Module], None], fused: list[int]) -> None:
    lengths = torch.tensor([3, 2, 7, 1, 7, 4])
    encoder, x, _ = make(cell, lengths, bidirectional=True)
    way(encoder.rnn)
    assert_same(results(encode, encoder, x, lengths), results(packed, encoder, x, lengths))
    assert fused == []


@cells
def test_projections_bfloat16_and_autocast(cell: str, fused: list[int]) -> None:
    lengths = torch.tensor([3, 2, 7, 1, 7, 4])
    encoder, x, _ = make(cell, lengths, dtype=torch.bfloat16)
    assert_same(results(encode, encoder, x, lengths), results(packed, encoder, x, lengths))
    encoder, x, _ = make(cell, lengths, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(results(encode, encoder, x, lengths), results(packed, encoder, x, lengths))
    if cell == "lstm":
        encoder = Encoder.from_module(nn.LSTM(INPUT, HIDDEN, proj_size=3, batch_first=True))
        assert_same(results(encode, encoder, x, lengths), results(packed, encoder, x, lengths))
    assert fused == []


@cells
def test_state_dicts(cell: str) -> None:
    encoder, x, _ = make(cell, num_layers=2, bidirectional=True)
    other = type(encoder.rnn)(INPUT, HIDDEN, 2, bidirectional=True, batch_first=True, dtype=torch.float64)
    outer, outer_other = nn.ModuleDict({"encoder": encoder}), nn.ModuleDict({"encoder": other})
    outer.load_state_dict(outer_other.state_dict())
    lengths = torch.tensor([3, 2, 7, 1, 7, 4])
    x = x.detach().nan_to_num()
    expected = packed(Encoder.from_module(other), x, lengths)
    torch.testing.assert_close(encoder(x, lengths), expected)
    fresh, _, _ = make(cell, num_layers=2, bidirectional=True)
    fresh.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(copy.deepcopy(fresh)(x, lengths), expected)
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh.load_state_dict({"weight_ih_l0": encoder.rnn.weight_ih_l0})


def test_from_module_shares_the_layer() -> None:
    rnn = nn.GRU(INPUT, HIDDEN).eval()
    encoder = Encoder.from_module(rnn)
    assert encoder.rnn is rnn
    assert not encoder.training
    assert set(encoder.parameters()) == set(rnn.parameters())


def test_compiled(fused: list[int]) -> None:
    encoder, x, _ = make("lstm")
    compiled = torch.compile(encoder, backend="eager")
    assert_same(results(lambda _, *given: compiled(*given), encoder, x, LENGTHS), results(encode, encoder, x, LENGTHS))
    assert fused == [1]  # of the one that is not compiled


def test_refusals() -> None:
    encoder, x, _ = make("lstm")
    for arguments, error, words in (
        ((x.tolist(), LENGTHS), TypeError, "Encoder: inputs must be a tensor, got list"),
        (
            (x[0], LENGTHS),
            ValueError,
            r"Encoder: inputs must have shape \(B, S, input_size\) = \(\*, \*, 5\), got \(8, 5\)",
        ),
        ((x, LENGTHS.tolist()), TypeError, "Encoder: lengths must be an int32 or int64 tensor, got list"),
        ((x, LENGTHS.double()), TypeError, "int32 or int64 tensor, got torch.float64"),
        ((x, LENGTHS[:2]), ValueError, r"Encoder: lengths must have shape \(B,\) = \(6,\), got \(2,\)"),
        ((x, LENGTHS + 2), ValueError, r"Encoder: lengths must be in 0..S = 0..8, got 2..9"),
        ((x, LENGTHS - 1), ValueError, r"got -1..6"),
        ((x[..., :4], LENGTHS), ValueError, r"Encoder: inputs must have shape \(B, S, input_size\) = \(\*, \*, 5\)"),
        ((x.float(), LENGTHS), (ValueError, RuntimeError), "dtype|type"),
    ):
        with pytest.raises(error, match=words):
            encoder(*arguments)
    with pytest.raises(ValueError, match="Encoder: cell must be one of 'lstm', 'gru', got 'rnn'"):
        Encoder(2, 3, cell="rnn")
    with pytest.raises(TypeError, match=r"must be an nn.LSTM or nn.GRU, got Linear"):
        Encoder.from_module(nn.Linear(2, 3))


@cells
def test_seq2seq_uses_it(cell: str, fused: list[int]) -> None:
    model = Seq2Seq(9, 9, 5, 6, 7, cell=cell, num_layers=2)
    model(torch.randint(3, 9, (3, 5)), torch.tensor([5, 2, 3]), torch.randint(3, 9, (3, 4)))
    assert len(fused) == 2
