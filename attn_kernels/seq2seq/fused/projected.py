"""The context's part of the attentional vector, from projected values: W [c; h] = W_c c + W_h h, and W_c c is a sum of
W_c v over the values v.

So the values are multiplied with W_c once, in one product over all source steps, and each step's attention averages
the results, which are smaller: with a bidirectional encoder M = 2 H. B sentences, T steps, S source steps, M
memory_size, H hidden_size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...gemm import linear_of_rows, weight_gradient
from ...memory import Memory
from ...types import attention_mask
from .inputs import Inputs

# The attention of a step reads its memory for one query, which takes about as long as 8 times as many multiply-adds of
# a product over all steps. Estimated on Sapphire Rapids with 16 to 64 sentences.
_COST_OF_READING = 8


def gains(inputs: Inputs) -> bool:
    """Whether projecting the values is faster, and as exact."""
    values = inputs.memory.values
    source, memory_size, size = values.shape[1], values.shape[2], inputs.feed.shape[1]
    product = memory_size * size
    saved = inputs.steps * (_COST_OF_READING * source * (memory_size - size) + product)
    return (
        inputs.called is None
        and values.is_cpu
        and values.dtype in (torch.float32, torch.float64)
        and saved >= source * product
    )


class Projection(NamedTuple):
    values: Tensor  # (N, M), those that may be attended: others may be NaN
    rows: Tensor | None  # (N,), their rows in (B * S, *); None: all
    weight: Tensor  # (H, M), W_c

    def forward(self, memory: Memory) -> Tensor:
        """(B, S, H): the projected values."""
        return self._spread(linear_of_rows(self.values, self.weight), memory)

    def gradients(self, dprojected: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """The gradients of the values, (B, S, M), and of W_c. dprojected: (B, S, H)."""
        d = dprojected.flatten(0, 1)
        d = d if self.rows is None else d.index_select(0, self.rows)
        dvalues = self._spread(linear_of_rows(d, self.weight.t()), memory)
        return dvalues, weight_gradient(d, self.values)

    def _spread(self, x: Tensor, memory: Memory) -> Tensor:
        """(N, *) -> (B, S, *), with zeros in other rows."""
        shape = memory.values.shape[:2]
        if self.rows is not None:
            x = x.new_zeros(shape.numel(), x.shape[1]).index_copy_(0, self.rows, x)
        result: Tensor = x.unflatten(0, shape)
        return result


def find_projection(inputs: Inputs) -> Projection:
    values, memory = inputs.memory.values.flatten(0, 1), inputs.memory
    rows = None
    allowed = attention_mask(memory.values, memory.memory_lengths, memory.mask)
    if allowed is not None:
        rows = allowed[:, 0].flatten().nonzero().squeeze(1)
        values = values.index_select(0, rows)
    return Projection(values, rows, inputs.attentional_weight[:, : values.shape[1]])


def with_values(inputs: Inputs, values: Tensor) -> Inputs:
    """The inputs with other values in their memory."""
    memory = inputs.memory
    return inputs._replace(memory=Memory(memory.keys, values, memory.memory_lengths, memory.mask))
