"""Encoder on a PackedSequence: the same results as PyTorch's layers, with one autograd node per layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from attn_kernels import BahdanauAttention
from attn_kernels.seq2seq import Encoder
from ragged import HIDDEN, INPUT, assert_same, encode_sequence, make, packed, results
from test_encoder import OPTIONS

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = torch.tensor([3, 8, 2, 7, 1, 7, 4])
cells = pytest.mark.parametrize("cell", ["lstm", "gru"])


@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS.sort(descending=True).values], ids=["any order", "sorted"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@cells
def test_as_pytorch(cell: str, options: dict[str, Any], lengths: torch.Tensor, encoder_nodes: list[int]) -> None:
    encoder, x, states = make(cell, lengths, **options)
    got = results(encode_sequence, encoder, x, lengths, states)
    assert len(encoder_nodes) == encoder.rnn.num_layers
    assert_same(got, results(packed, encoder, x, lengths, states))


@cells
def test_a_sequence_without_an_order(cell: str, encoder_nodes: list[int]) -> None:
    encoder, _, _ = make(cell)
    sequence = pack_sequence([torch.randn(n, INPUT, dtype=torch.float64) for n in (5, 5, 3, 1)])
    assert sequence.sorted_indices is None
    (got, last), (expected, last_expected) = encoder(sequence), encoder.rnn(sequence)
    torch.testing.assert_close(got.data, expected.data)
    torch.testing.assert_close(last, last_expected)
    assert len(encoder_nodes) == 1 and got.sorted_indices is None


@cells
def test_what_is_not_stock_is_called(cell: str, encoder_nodes: list[int]) -> None:
    encoder, x, _ = make(cell, LENGTHS)
    seen: list[Any] = []
    encoder.rnn.register_forward_hook(lambda module, args, result: seen.append(result))
    sequence = pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
    assert encoder(sequence) is seen[0] and encoder_nodes == []


def test_a_memory_of_its_outputs() -> None:
    """Nothing is padded on the way."""
    encoder, x, _ = make("lstm", LENGTHS, bidirectional=True)
    attention = BahdanauAttention(4, 2 * HIDDEN, 5, dtype=torch.float64)
    outputs, _ = encoder(pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False))
    queries = torch.randn(len(LENGTHS), 3, 4, dtype=torch.float64)
    memory = attention.memory(outputs)
    assert memory.keys.shape == (int(LENGTHS.sum()), 5)
    padded = attention.memory(encoder(x, LENGTHS)[0], LENGTHS)
    got, expected = attention(queries, memory), attention(queries, padded)
    torch.testing.assert_close(got, expected)


def test_errors() -> None:
    encoder = Encoder(INPUT, HIDDEN)
    sequence = pack_sequence([torch.randn(3, INPUT)])
    with pytest.raises(ValueError, match="Encoder: lengths must be None with a PackedSequence, which has its own"):
        encoder(sequence, torch.tensor([3]))
    with pytest.raises(ValueError, match=r"Encoder: inputs must have data \(N, input_size\) = \(\*, 5\), got \(3, 6\)"):
        encoder(pack_sequence([torch.randn(3, INPUT + 1)]))
    with pytest.raises(TypeError, match="Encoder: lengths must be an int32 or int64 tensor, got NoneType"):
        encoder(torch.randn(1, 3, INPUT))
    assert isinstance(encoder.rnn, nn.LSTM)
