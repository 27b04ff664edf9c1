"""LSTM and GRU layers as a scan over the steps, for export with a dynamic number of steps.

An exported graph cannot hold packed sentences, and exporters unroll PyTorch's own layers for the number of steps in the
example. Both directions of a layer are one scan, and one product computes the input projections of all steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from ..stock import is_watched


def can_scan(rnn: object) -> TypeGuard[nn.LSTM | nn.GRU]:
    """Whether this is a plain LSTM or GRU without hooks. Its weights may be parametrized."""
    if not isinstance(rnn, nn.LSTM | nn.GRU) or rnn.proj_size:
        return False
    return parametrize.type_before_parametrizations(rnn) in (nn.LSTM, nn.GRU) and not is_watched(rnn)


def run_scanned(
    rnn: nn.LSTM | nn.GRU, x: Tensor, lengths: Tensor, states: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """As ``run_recurrent``, with S >= 1. lengths: (B,) int. states: the initial states, one or two tensors, or none.

    Returns outputs and the last states: [hidden, cell], or [hidden] for a GRU.
    """
    if not rnn.batch_first:
        x = x.transpose(0, 1)
    batch, steps, directions = x.shape[0], x.shape[1], 2 if rnn.bidirectional else 1
    valid = torch.arange(steps, device=x.device)[:, None] < lengths.to(x.device)  # (S, B)
    valid = torch.stack([valid, valid.flip(0)][:directions], dim=1)[..., None]  # (S, D, B, 1)
    kinds = 2 if isinstance(rnn, nn.LSTM) else 1
    first = list(states) or [x.new_zeros(rnn.num_layers * directions, batch, rnn.hidden_size)] * kinds
    last = []
    for layer in range(rnn.num_layers):
        if layer > 0 and rnn.dropout > 0:
            x = functional.dropout(x, rnn.dropout, rnn.training)
        own = slice(layer * directions, (layer + 1) * directions)
        x, after = _run_layer(x, valid, rnn.all_weights[own], [state[own] for state in first])
        last.append(after)
    outputs = x if rnn.batch_first else x.transpose(0, 1)
    return outputs, [torch.cat(of_kind) for of_kind in zip(*last, strict=True)]


def _run_layer(
    x: Tensor, valid: Tensor, weights: Sequence[Sequence[Tensor]], first: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """x: (B, S, n). valid: (S, D, B, 1), in the order of each direction. weights: of D directions. first: (D, B, H)."""
    from torch._higher_order_ops.scan import scan  # here: it imports half of torch.compile

    batch, directions = x.shape[0], first[0].shape[0]
    is_lstm = len(first) == 2
    products = [functional.linear(x, w[0], w[2] if len(w) > 2 else None).transpose(0, 1) for w in weights]
    inputs = torch.stack([products[0], *(backward.flip(0) for backward in products[1:])], dim=1)  # (S, D, B, G)
    by_state = torch.stack([w[1].t() for w in weights])  # (D, H, G)
    bias = torch.stack([w[3] if len(w) > 2 else w[1].new_zeros(w[1].shape[0]) for w in weights])[:, None]  # (D, 1, G)

    def step(before: tuple[Tensor, ...], given: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
        of_inputs, is_valid = given
        # Inductor needs the size of the outputs among the variables that a step refers to.
        of_state = torch.baddbmm(bias, before[0], by_state).view(directions, batch, -1)
        after = (_lstm_cell if is_lstm else _gru_cell)(of_inputs, of_state, *before)
        kept = tuple(torch.where(is_valid, new, old) for new, old in zip(after, before, strict=True))
        return kept, torch.where(is_valid, after[0], torch.zeros_like(after[0]))

    last, outputs = scan(step, tuple(state.clone() for state in first), (inputs, valid), dim=0)
    forward, *backward = outputs.unbind(1)
    joined = torch.cat([forward, *(direction.flip(0) for direction in backward)], dim=-1)
    return joined.transpose(0, 1), tuple(last)


def _lstm_cell(of_inputs: Tensor, of_state: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """The equations of ``nn.LSTM``, given the products with its weights."""
    i, f, g, o = (of_inputs + of_state).chunk(4, dim=-1)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def _gru_cell(of_inputs: Tensor, of_state: Tensor, hidden: Tensor) -> tuple[Tensor]:
    """The equations of ``nn.GRU``."""
    (r, z, n), (of_r, of_z, of_n) = of_inputs.chunk(3, dim=-1), of_state.chunk(3, dim=-1)
    new = torch.tanh(n + torch.sigmoid(r + of_r) * of_n)
    return (torch.lerp(new, hidden, torch.sigmoid(z + of_z)),)
