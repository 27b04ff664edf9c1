"""Encoders on sentences of different lengths, and the computations that they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from attn_kernels.seq2seq import Encoder

INPUT, HIDDEN, STEPS = 5, 6, 8
LENGTHS = torch.tensor([3, 0, 7, 1, 7, 4])


def make(cell: str, lengths: Tensor = LENGTHS, *, states: bool = False, **options: Any) -> tuple[Encoder, Tensor, Any]:
    """An encoder, inputs with NaN as padding, and initial states or None."""
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
    """Encodes each sentence separately, without padding."""
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
    """Encodes with PyTorch's packed sequences, as written without this package."""
    axis = encoder.rnn.batch_first
    rows = pack_padded_sequence(x, lengths, batch_first=axis, enforce_sorted=False)
    outputs, last = encoder.rnn(rows, states)
    return pad_packed_sequence(outputs, batch_first=axis, total_length=x.shape[int(axis)])[0], last


def encode_sequence(encoder: Encoder, x: Tensor, lengths: Tensor, states: Any = None) -> tuple[Tensor, Any]:
    """Encodes a ``PackedSequence``; its output is a ``PackedSequence`` too."""
    axis = encoder.rnn.batch_first
    sequence = pack_padded_sequence(x, lengths, batch_first=axis, enforce_sorted=False)
    outputs, last = encoder(sequence, states=states)
    assert outputs.batch_sizes is sequence.batch_sizes
    return pad_packed_sequence(outputs, batch_first=axis, total_length=x.shape[int(axis)])[0], last


def by_state(prefix: str, states: Any) -> dict[str, Tensor]:
    """States by name: (hidden, cell) of an LSTM, hidden of a GRU."""
    if isinstance(states, Tensor):
        return {f"{prefix}hidden": states}
    return {f"{prefix}hidden": states[0], f"{prefix}cell": states[1]}


def results(
    run: Callable[..., Any], encoder: Encoder, x: Tensor, lengths: Tensor, states: Any = None
) -> dict[str, Tensor]:
    """Outputs, final states, and all gradients, by name."""
    outputs, last = run(encoder, x, lengths, states)
    found = {"outputs": outputs, **by_state("", last)}
    generator = torch.Generator().manual_seed(1)
    loss = sum((y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum() for y in found.values())
    inputs = {"x": x, **{name: p for name, p in encoder.named_parameters() if p.requires_grad}}
    if states is not None:
        inputs |= by_state("first ", states)
    inputs = {name: y for name, y in inputs.items() if y.requires_grad}
    of_inputs = torch.autograd.grad(loss, list(inputs.values()))
    return found | {f"gradient of {name}": y for name, y in zip(inputs, of_inputs, strict=True)}


def encode(encoder: Encoder, *arguments: Any) -> tuple[Tensor, Any]:
    return encoder(*arguments)


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, y in expected.items():
        torch.testing.assert_close(got[name], y, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
