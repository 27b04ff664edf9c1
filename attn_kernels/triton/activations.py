"""The parts that differ between activations f, for the kernels of scores v . f(query + keys + bias).

``ACTIVATION`` is "tanh", "relu" or "leaky_relu", and with a gate or several score vectors also "sigmoid" (elsewhere
that is the tanh of half the argument). Only tanh has a form that is made of exponentials once per row (see
additive_attention_fwd.py and additive_attention_bwd.py); here is what a pair takes by itself. relu and leaky_relu are
an instruction or two, exact for all inputs: there is nothing to share, and nothing to guard.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..activations import ACTIVATIONS
from ..scores import ActivatedExtraScore, ActivatedScore, AdditiveExtraScore, AdditiveScore, GatedAdditiveScore
from .additive_math import tanh, tanh_from
from .arguments import two_parts
from .device import divide, reciprocal

SATURATED = tl.constexpr(20.0)  # from here on tanh is 1, in float64 too


class Activation(NamedTuple):
    """name: what kernels call ACTIVATION. slope: that of "leaky_relu" below 0."""

    name: str
    slope: float = 0.0

    def slope_arguments(self, query: Tensor) -> tuple[float | None, float | None]:
        """``slope`` and ``slope_lo`` of a kernel."""
        return two_parts(self.slope, query.dtype) if self.name == "leaky_relu" else (None, None)

    def numbers(self) -> tuple[int, float]:
        """Those of a GatedAdditiveScore."""
        return ACTIVATIONS.index(self.name), self.slope


TANH = Activation("tanh")
_WithActivation = AdditiveScore | ActivatedScore | AdditiveExtraScore | ActivatedExtraScore | GatedAdditiveScore


def activation_of(score: _WithActivation) -> Activation:
    """That of a score with v."""
    if isinstance(score, (AdditiveScore, AdditiveExtraScore)):
        return TANH
    return Activation(ACTIVATIONS[score.activation], score.negative_slope)


@triton.jit
def tanh_and_slope(x, APPROXIMATE: tl.constexpr, ROUNDED: tl.constexpr = False):
    """tanh(x) and 1 - tanh(x)^2, which does not cancel; the slope of SATURATED beyond that.

    ROUNDED: by a division that is rounded; the plain one puts the slope off by four units in the last place.
    """
    magnitude = tl.abs(x)
    e = tl.exp(2.0 * tl.where(magnitude > SATURATED, SATURATED, magnitude))
    if ROUNDED:
        r = divide(tl.full(x.shape, 1.0, x.dtype), 1.0 + e)
    else:
        r = reciprocal(1.0 + e, APPROXIMATE)
    return tanh_from(x, r), 4.0 * e * r * r


@triton.jit
def sigmoid_and_slope(x, APPROXIMATE: tl.constexpr):
    """sigmoid(x) and its derivative; neither cancels, and both are finite for every x but NaN."""
    e = tl.exp(-tl.abs(x))
    r = reciprocal(1.0 + e, APPROXIMATE)
    small = e * r
    return tl.where(x < 0.0, small, r), small * r


@triton.jit
def activate(x, slope, ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr):
    """f(x), NaN where x is; slope: that of "leaky_relu", in the dtype of x."""
    if ACTIVATION == "tanh":
        y = tanh(x, APPROXIMATE)
    elif ACTIVATION == "relu":
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "sigmoid":
        y, _ = sigmoid_and_slope(x, APPROXIMATE)
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


@triton.jit
def activate_and_gradient(x, t, slope, ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr):
    """f(x) and t f'(x), of every activation."""
    if ACTIVATION == "tanh":
        y, derivative = tanh_and_slope(x, APPROXIMATE)
        gradient = t * derivative
    elif ACTIVATION == "sigmoid":
        y, derivative = sigmoid_and_slope(x, APPROXIMATE)
        gradient = t * derivative
    else:
        y = activate(x, slope, ACTIVATION, APPROXIMATE)
        gradient, _ = pair_gradients(x, t, slope, ACTIVATION)
    return y, gradient
