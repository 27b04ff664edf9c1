"""What is particular to an activation f in the kernels of scores v . f(query + keys + bias).

``ACTIVATION`` is "tanh", "relu" or "leaky_relu". Only tanh has a form that is made of exponentials once per row (see
additive_attention_fwd.py and additive_attention_bwd.py); here is what a pair takes by itself. relu and leaky_relu are
an instruction or two, exact for all inputs: there is nothing to share, and nothing to guard.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .additive_math import tanh
from .launch import two_parts


class Activation(NamedTuple):
    """name: what kernels call ACTIVATION. slope: that of "leaky_relu" below 0."""

    name: str
    slope: float = 0.0

    def slope_arguments(self, query: Tensor) -> tuple[float | None, float | None]:
        """``slope`` and ``slope_lo`` of a kernel."""
        return two_parts(self.slope, query.dtype) if self.name == "leaky_relu" else (None, None)


TANH = Activation("tanh")


def activation_of(negative_slope: float) -> Activation:
    """relu has kernels of its own: -Inf times a slope of 0 would be NaN."""
    return Activation("leaky_relu", negative_slope) if negative_slope != 0 else Activation("relu")


@triton.jit
def activate(x, slope, ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr):
    """f(x), NaN where x is; slope: that of "leaky_relu", in the dtype of x."""
    if ACTIVATION == "tanh":
        y = tanh(x, APPROXIMATE)
    elif ACTIVATION == "relu":
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        tl.static_assert(ACTIVATION == "leaky_relu")
        y = tl.where(x > 0.0, x, x * slope)
    return y


@triton.jit
def pair_gradients(x, ds, slope, ACTIVATION: tl.constexpr):
    """ds f'(x) and ds f(x), for the gradients ds of scores; not of tanh."""
    if ACTIVATION == "relu":  # as of PyTorch, which lets the gradient pass where x is NaN
        gradient = tl.where(x <= 0.0, 0.0, ds)
        weighted = ds * activate(x, slope, ACTIVATION, False)  # not the gradient times x: NaN where ds is
    else:
        tl.static_assert(ACTIVATION == "leaky_relu")
        gradient = tl.where(x > 0.0, ds, ds * slope)
        weighted = gradient * x
    return gradient, weighted
