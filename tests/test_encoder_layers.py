"""Encoder: after any change of its layer, it computes the same as PyTorch's packed layer; parameters, and errors."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from attn_kernels.seq2seq import Encoder, Seq2Seq
from ragged import HIDDEN, INPUT, LENGTHS, assert_same, encode, make, packed, results

pytestmark = pytest.mark.usefixtures("one_thread")
cells = pytest.mark.parametrize("cell", ["lstm", "gru"])


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


WAYS = [hook, other_forward, subclass, pruned, parametrized]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@cells
def test_changed_layers_are_called(cell: str, way: Callable[[nn.Module], None], encoder_nodes: list[int]) -> None:
    lengths = torch.tensor([3, 2, 7, 1, 7, 4])
    encoder, x, _ = make(cell, lengths, bidirectional=True)
    way(encoder.rnn)
    assert_same(results(encode, encoder, x, lengths), results(packed, encoder, x, lengths))
    assert encoder_nodes == []


@cells
def test_projections_bfloat16_and_autocast(cell: str, encoder_nodes: list[int]) -> None:
    lengths = torch.tensor([3, 2, 7, 1, 7, 4])
    encoder, x, _ = make(cell, lengths, dtype=torch.bfloat16)
    assert_same(results(encode, encoder, x, lengths), results(packed, encoder, x, lengths))
    encoder, x, _ = make(cell, lengths, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(results(encode, encoder, x, lengths), results(packed, encoder, x, lengths))
    if cell == "lstm":
        encoder = Encoder.from_module(nn.LSTM(INPUT, HIDDEN, proj_size=3, batch_first=True))
        assert_same(results(encode, encoder, x, lengths), results(packed, encoder, x, lengths))
    assert encoder_nodes == []


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


@pytest.mark.slow
def test_compiled(encoder_nodes: list[int]) -> None:
    encoder, x, _ = make("lstm")
    compiled = torch.compile(encoder, backend="eager")
    assert_same(results(lambda _, *given: compiled(*given), encoder, x, LENGTHS), results(encode, encoder, x, LENGTHS))
    assert encoder_nodes == [1]  # of the one that is not compiled


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
def test_seq2seq_uses_it(cell: str, encoder_nodes: list[int]) -> None:
    model = Seq2Seq(9, 9, 5, 6, 7, cell=cell, num_layers=2)
    model(torch.randint(3, 9, (3, 5)), torch.tensor([5, 2, 3]), torch.randint(3, 9, (3, 4)))
    assert len(encoder_nodes) == 2
