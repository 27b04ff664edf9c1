"""An LSTM or GRU over few sentences on the CPU, without gradients. The products with the inputs are one product over
all steps, and one op runs all steps of a direction.

PyTorch's LSTM copies its weights into the layout of oneDNN in each call, which takes as long as the steps of one
sentence. Its GRU calls operators for each step. The op here reads the weights of the states in place, once in each step
for all sentences.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ... import ops
from ...gemm import linear
from .ragged_cells import DirectionWeights

# Measured on Sapphire Rapids with 64 to 512 units: with more sentences and no padding, oneDNN's LSTM catches up.
MAX_SENTENCES = 8
MAX_WITHOUT_PADDING = 4  # of an LSTM


def run_few(rnn: nn.LSTM | nn.GRU, x: Tensor, lengths: Tensor, first: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """x: (B, S, n), float32 or float64. lengths: (B,) int64, 0..S. first: the first states, one or two tensors
    (layers * D, B, H), or an empty tuple for zeros. No dropout between the layers.

    Returns outputs, (B, S, D * H), with zeros in the padding, and the last states, with the shapes of the first ones.
    """
    steps = ops.kernel("recurrent_steps", "cpu")
    lengths = lengths.contiguous()
    batch, source = x.shape[:2]
    units, directions, is_lstm = rnn.hidden_size, 2 if rnn.bidirectional else 1, isinstance(rnn, nn.LSTM)
    shape = (rnn.num_layers * directions, batch, units)
    states = [state.clone(memory_format=torch.contiguous_format) for state in first]
    states = states or [x.new_zeros(shape) for _ in range(1 + is_lstm)]
    for layer in range(rnn.num_layers):
        rows = x.reshape(batch * source, -1)
        outputs = x.new_empty(batch, source, directions * units)
        for direction in range(directions):
            n = layer * directions + direction
            weights = DirectionWeights(*rnn.all_weights[n])
            known, own = weights.bias_x, weights.bias_h  # biases of the products with inputs, and with states
            if known is not None and own is not None and is_lstm:
                known, own = known + own, None
            gates = linear(rows, weights.x, known).view(batch, source, -1)
            hidden, cell = (*(state[n] for state in states), None)[:2]
            part = outputs[..., direction * units : (direction + 1) * units]
            weight = weights.h if weights.h.stride(1) == 1 else weights.h.contiguous()
            own = None if own is None else own.contiguous()
            steps(gates, weight, own, lengths, direction == 1, hidden, cell, part)
        x = outputs
    return x, *states
