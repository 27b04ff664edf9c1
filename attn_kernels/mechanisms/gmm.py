"""Attention by a mixture of Gaussians over positions, whose means only move forward."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_size
from ..errors import ArgumentValueError
from ..memory import Memory
from ..types import wide_dtype
from .energy import check_number
from .reading import Source
from .steps import PositionalAttention

_MOST = 30.0  # e^30 is far beyond any position; e^89 overflows float32, and a gradient Inf * 0 would be NaN
_LEAST_WIDTH = 1e-5  # sigma is a divisor, and softplus or exp of a large negative number is 0


class GMMState(NamedTuple):
    """means: (B, K, mixtures), of the components after the step before, in float32 or wider."""

    means: Tensor


class GMMAttention(PositionalAttention):
    r"""Mixture of Gaussians over the positions of the memory: location alone, no content.

    .. math::
        alignments_{ij} = \sum_k \frac{w_{ik}}{Z_{ik}} \exp(-\frac{(j - \mu_{ik})^2}{2 \sigma_{ik}^2}), \quad
        \mu_i = \mu_{i-1} + \Delta_i, \quad (\hat w, \hat \Delta, \hat \sigma) = W \tanh(W_h \, query + b_h) + b

    ======= ======================= ============ =============== =================================
    version Z                       w            :math:`\Delta`  :math:`\sigma`
    ======= ======================= ============ =============== =================================
    0       1                       exp w^       exp D^          sqrt(exp(-s^) / 2)
    1       sqrt(2 pi sigma^2)      softmax w^   exp D^          sqrt(exp s^)
    2       sqrt(2 pi sigma^2)      softmax w^   softplus D^     softplus s^
    ======= ======================= ============ =============== =================================

    where w^, D^ and s^ are the three parts of the projection. Alignments do not sum to 1. The first step of the memory
    is at position 1, as in the sums of both papers, and the means start at 0.

    Source: version 0: Graves, "Generating sequences with recurrent neural networks", 2013, section 5.1, equations 46
    to 51, where :math:`\beta = 1 / (2 \sigma^2) = \exp \hat \sigma`. All: Battenberg et al., "Location-relative
    attention mechanisms for robust long-form speech synthesis", 2020, section 2.1 and table 1.

    To keep gradients finite, exponents are clamped to at most 30, and :math:`\sigma` of versions 1 and 2 to at least
    1e-5.

    Args:
        query_size: size of the decoder state.
        memory_size: size of the encoder outputs.
        units: size of the tanh layer; None for no such layer: the parameters are linear in the query, as in Graves.
        mixtures: the number of Gaussians.
        version: 0, 1 or 2.
        initial_delta, initial_sigma: :math:`\Delta` and :math:`\sigma` for a zero hidden layer, which set the initial
            bias b; None for a bias of 0. The defaults, 1 and 10, are "v1b" and "v2b" of Battenberg et al.
        device, dtype: of the parameters; query and memory must have the same.

    Parameters: ``hidden`` (units, query_size) with a bias, of ``units``; ``mixture`` (3 * mixtures, units or
    query_size) with a bias.

    State: :class:`GMMState`, the means; 0 at first.
    """

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        units: int | None = None,
        mixtures: int = 5,
        version: int = 2,
        *,
        initial_delta: float | None = 1.0,
        initial_sigma: float | None = 10.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(query_size, memory_size, backend=None, factory={"device": device, "dtype": dtype})
        if version not in (0, 1, 2):
            raise ArgumentValueError(f"{self._name}: version must be 0, 1 or 2, got {version!r}")
        self.units: int | None = None if units is None else check_size(self._name, "units", units)
        self.mixtures: int = check_size(self._name, "mixtures", mixtures)
        self.version: int = int(version)
        self.initial_delta: float | None = _check_initial(self._name, "initial_delta", initial_delta)
        self.initial_sigma: float | None = _check_initial(self._name, "initial_sigma", initial_sigma)
        self.hidden: nn.Linear | None = (
            None if self.units is None else nn.Linear(self.query_size, self.units, **self._factory)
        )
        self.mixture: nn.Linear = nn.Linear(self.units or self.query_size, 3 * self.mixtures, **self._factory)
        self._reset_scores()

    def _reset_scores(self) -> None:
        _, delta, sigma = self.mixture.bias.detach().view(3, self.mixtures)
        nn.init.zeros_(self.mixture.bias)
        if self.initial_delta is not None:
            nn.init.constant_(
                delta, math.log(self.initial_delta) if self.version < 2 else _unsoftplus(self.initial_delta)
            )
        if self.initial_sigma is not None:
            logarithm = 2 * math.log(self.initial_sigma)
            inverse = (-math.log(2) - logarithm, logarithm, _unsoftplus(self.initial_sigma))
            nn.init.constant_(sigma, inverse[self.version])

    def initial_state(self, memory: Memory, hypotheses: int = 1) -> GMMState:
        shape = (*self._check_axes(memory, hypotheses), self.mixtures)
        return GMMState(memory.values.new_zeros(shape, dtype=wide_dtype(memory.values.dtype)))

    def _alignments(self, query: Tensor, source: Source, state: GMMState) -> tuple[Tensor, GMMState]:
        keys, allowed = source.keys, source.allowed
        if state[0].dim() != 3 or state[0].shape[2] != self.mixtures:
            expected = f"(B, K, mixtures) = ({query.shape[0]}, *, {self.mixtures})"
            raise ArgumentValueError(f"{self._name}: state must have means {expected}, got {tuple(state[0].shape)}")
        hidden = query if self.hidden is None else torch.tanh(self.hidden(query))
        parameters = self.mixture(hidden)
        wide = wide_dtype(parameters.dtype)
        weights, deltas, sigmas = parameters.to(wide).unflatten(-1, (3, self.mixtures)).unbind(-2)
        if self.version == 0:
            weights, precisions = _exp(weights), 2.0 * _exp(sigmas)
        else:
            widths = _exp(0.5 * sigmas) if self.version == 1 else nn.functional.softplus(sigmas)
            widths = widths.clamp_min(_LEAST_WIDTH)
            weights = torch.softmax(weights, -1) / (math.sqrt(2 * math.pi) * widths)
            precisions = widths**-2
        means = state[0].to(wide) + (nn.functional.softplus(deltas) if self.version == 2 else _exp(deltas))
        positions = torch.arange(1, keys.shape[1] + 1, device=keys.device, dtype=wide)
        distances = positions - means[..., None]
        components = torch.exp(-0.5 * precisions[..., None] * distances.square())
        alignments = (weights[..., None] * components).sum(-2)
        if allowed is not None:
            alignments = alignments.masked_fill(~allowed, 0.0)
        return alignments, GMMState(means)

    def extra_repr(self) -> str:
        return self._repr(units=self.units, mixtures=self.mixtures, version=self.version)


def _exp(x: Tensor) -> Tensor:
    return torch.exp(x.clamp_max(_MOST))


def _unsoftplus(x: float) -> float:
    """y with softplus(y) = x."""
    return x + math.log(-math.expm1(-x))


def _check_initial(name: str, argument: str, value: float | None) -> float | None:
    if value is None:
        return None
    number = check_number(name, argument, value)
    if number <= 0:
        raise ArgumentValueError(f"{name}: {argument} must be > 0 or None, got {value}")
    return number
