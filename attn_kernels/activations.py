"""The activations of additive attention, by name, for checks, ops and the reference.

The ops identify an activation by its index here, which equals that in the enumeration of csrc/activations.h.
csrc/activations.h has the arithmetic for the CPU and CUDA, triton/activations.py that for Triton.
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
