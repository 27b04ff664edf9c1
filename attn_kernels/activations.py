"""The activations of additive attention, by name: what checks, ops and the reference know of them.

The number of an activation in the ops is its place here, and in the enumeration of csrc/activations.h, which has the
arithmetic of the CPU and CUDA; that of Triton is in triton/activations.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FORMULAS: dict[str, Callable[..., Tensor]] = {
    "tanh": lambda x, negative_slope: torch.tanh(x),
    "relu": lambda x, negative_slope: torch.relu(x),
    "leaky_relu": torch.nn.functional.leaky_relu,
    "sigmoid": lambda x, negative_slope: torch.sigmoid(x),
}
ACTIVATIONS = tuple(FORMULAS)
