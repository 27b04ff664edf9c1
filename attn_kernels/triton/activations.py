"""The parts that differ between activations f, for the kernels of scores v . f(query + keys + bias).

``ACTIVATION`` is "tanh", "relu" or "leaky_relu", and with a gate or several score vectors also "sigmoid" (other kernels
compute sigmoid as the tanh of half the argument). Only tanh has a factored form, with exponentials that are computed
once per row (see additive_attention_fwd.py and additive_attention_bwd.py); this file has the direct form, for one pair.
relu and leaky_relu take one or two instructions and are exact for all inputs, so they need no factored form and no
guards.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..activations import ACTIVATIONS
from ..scores import ActivatedExtraScore, ActivatedScore, AdditiveExtraScore, AdditiveScore, GatedAdditiveScore
from .additive_math import exp2x_of_size, tanh, tanh_from
from .arguments import two_parts
from .device import divide, reciprocal

SATURATED = tl.constexpr(20.0)  # from here on tanh rounds to 1, also in float64


class Activation(NamedTuple):
    """name: the value of ACTIVATION in kernels. slope: that of "leaky_relu" below 0."""

    name: str
    slope: float = 0.0

    def slope_arguments(self, query: Tensor) -> tuple[float | None, float | None]:
        """``slope`` and ``slope_lo`` of a kernel."""
        return two_parts(self.slope, query.dtype) if self.name == "leaky_relu" else (None, None)

    def numbers(self) -> tuple[int, float]:
        """The numbers of a GatedAdditiveScore: the index of the activation, and the slope."""
        return ACTIVATIONS.index(self.name), self.slope


TANH = Activation("tanh")
_WithActivation = AdditiveScore | ActivatedScore | AdditiveExtraScore | ActivatedExtraScore | GatedAdditiveScore


def activation_of(score: _WithActivation) -> Activation:
    """The activation of a score with v."""
    if isinstance(score, (AdditiveScore, AdditiveExtraScore)):
        return TANH
    return Activation(ACTIVATIONS[score.activation], score.negative_slope)


@triton.jit
def tanh_and_slope(x, APPROXIMATE: tl.constexpr, ROUNDED: tl.constexpr = False):
    """tanh(x) and its slope, 1 - tanh(x)^2, computed without cancellation; beyond SATURATED, the slope there.

    ROUNDED: use a correctly rounded division; with the plain one the slope is off by four units in the last place.
    """
    magnitude = tl.abs(x)
    e = exp2x_of_size(tl.where(magnitude > SATURATED, SATURATED, magnitude), APPROXIMATE)
    if ROUNDED:
        r = divide(tl.full(x.shape, 1.0, x.dtype), 1.0 + e)
    else:
        r = reciprocal(1.0 + e, APPROXIMATE)
    return tanh_from(x, r), 4.0 * e * r * r


@triton.jit
def sigmoid_and_slope(x, APPROXIMATE: tl.constexpr):
    """sigmoid(x) and its derivative, computed without cancellation; both are finite for every x except NaN."""
    e = tl.exp(-tl.abs(x))
    r = reciprocal(1.0 + e, APPROXIMATE)
    small = e * r
    return tl.where(x < 0.0, small, r), small * r


@triton.jit
def activate(x, slope, ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr):
    """f(x); NaN for NaN. slope: that of "leaky_relu", in the dtype of x."""
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
    if ACTIVATION == "relu":  # like PyTorch's relu, which passes the gradient where x is NaN
        gradient = tl.where(x <= 0.0, 0.0, ds)
        weighted = ds * activate(x, slope, ACTIVATION, False)  # not gradient * x: a NaN in ds must be kept
    else:
        tl.static_assert(ACTIVATION == "leaky_relu")
        gradient = tl.where(x > 0.0, ds, ds * slope)
        weighted = gradient * x
    return gradient, weighted


@triton.jit
def activate_and_gradient(x, t, slope, ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr):
    """f(x) and t f'(x), for every activation."""
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
