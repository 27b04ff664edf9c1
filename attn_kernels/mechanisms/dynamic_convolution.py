"""Dynamic convolution attention: scores are static and query-dependent convolutions of the previous alignments."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_size
from ..functional import additive_scores
from ..memory import Memory
from ..modules import _reset_score_vector
from .energy import check_number
from .reading import Source, without_autocast
from .steps import AlignmentsState, PositionalAttention, masked_softmax

_LEAST_PRIOR = 1e-6  # of the paper: the log prior of a step out of reach is -13.8, not -Inf


class DynamicConvolutionAttention(PositionalAttention):
    r"""Location-relative attention: filters of the previous alignments, without the content of the memory.

    .. math::
        scores_i = v \cdot \tanh(U f_i + T g_i + b) + p_i, \quad alignments_i = softmax(scores_i)

    .. math::
        f_i = F * alignments_{i-1}, \quad g_i = G(query_i) * alignments_{i-1}, \quad
        p_i = \log \max(P * alignments_{i-1}, 10^{-6}), \quad G(query) = V_G \tanh(W_G query + b_G)

    F are static filters, the same for all queries, and G(query) are dynamic filters, computed from the query; both are
    centred on the step. P is a fixed causal filter: it moves forward by 0 to n = ``prior_length`` - 1 steps, with the
    probabilities of BetaBinomial(n, alpha, beta), by n alpha / (alpha + beta) on average.

    Source: Battenberg et al., "Location-relative attention mechanisms for robust long-form speech synthesis", 2020,
    section 3.2.

    Args:
        query_size: size of the decoder state.
        memory_size: size of the encoder outputs.
        units: A, size of the hidden layers of the scores and of G.
        static_filters, static_length, dynamic_filters, dynamic_length: numbers and lengths of the filters F and G;
            lengths are odd.
        prior_length, prior_alpha, prior_beta: length, alpha and beta of the prior filter P.
        backend: as for :func:`attn_kernels.additive_scores`.
        device, dtype: of the parameters; query and memory must have the same.

    Parameters: ``filter_hidden`` (A, query_size) with a bias, W_G and b_G; ``filter_output.weight``
    (dynamic_filters * dynamic_length, A), V_G; ``static_filters`` (static_filters, static_length), F;
    ``static_projection`` (A, static_filters), U; ``dynamic_projection`` (A, dynamic_filters), T; ``bias`` (A,), b;
    ``v`` (A,). A buffer that is not saved: ``prior`` (prior_length,), P.

    State: :class:`AlignmentsState`, the alignments of the step before; at first all weight is on the first step that
    may be attended.
    """

    prior: Tensor

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        units: int,
        static_filters: int = 8,
        static_length: int = 21,
        dynamic_filters: int = 8,
        dynamic_length: int = 21,
        prior_length: int = 11,
        prior_alpha: float = 0.1,
        prior_beta: float = 0.9,
        *,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(query_size, memory_size, backend=backend, factory={"device": device, "dtype": dtype})
        name = self._name
        self.units: int = check_size(name, "units", units)
        static_filters = check_size(name, "static_filters", static_filters)
        static_length = check_size(name, "static_length", static_length, odd=True)
        self.dynamic_filters: int = check_size(name, "dynamic_filters", dynamic_filters)
        self.dynamic_length: int = check_size(name, "dynamic_length", dynamic_length, odd=True)
        self.prior_length: int = check_size(name, "prior_length", prior_length)
        self.prior_alpha: float = check_number(name, "prior_alpha", prior_alpha, 1e-6)
        self.prior_beta: float = check_number(name, "prior_beta", prior_beta, 1e-6)
        self.filter_hidden: nn.Linear = nn.Linear(self.query_size, self.units, **self._factory)
        self.filter_output: nn.Linear = nn.Linear(
            self.units, self.dynamic_filters * self.dynamic_length, bias=False, **self._factory
        )
        self.static_filters: nn.Parameter = self._parameter(static_filters, static_length)
        self.static_projection: nn.Parameter = self._parameter(self.units, static_filters)
        self.dynamic_projection: nn.Parameter = self._parameter(self.units, self.dynamic_filters)
        self.bias: nn.Parameter = self._parameter(self.units)
        self.v: nn.Parameter = self._parameter(self.units)
        self.register_buffer("prior", torch.empty(self.prior_length, **self._factory), persistent=False)
        self._reset_scores()

    def _reset_scores(self) -> None:
        for weight in (self.static_filters, self.static_projection, self.dynamic_projection):
            bound = 1 / math.sqrt(weight.shape[1])  # like nn.Conv1d and nn.Linear
            nn.init.uniform_(weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
        _reset_score_vector(self.v)
        prior = beta_binomial(self.prior_length - 1, self.prior_alpha, self.prior_beta)
        self.prior.copy_(torch.tensor(prior, dtype=torch.float64))

    def initial_state(self, memory: Memory, hypotheses: int = 1) -> AlignmentsState:
        return self._first_step(memory, hypotheses, attended=True)

    def _alignments(self, query: Tensor, source: Source, state: AlignmentsState) -> tuple[Tensor, AlignmentsState]:
        keys, allowed = source.keys, source.allowed
        previous = self._previous(state, keys)
        if previous.shape[2] == 0:
            return previous, state
        filters = self.filter_output(torch.tanh(self.filter_hidden(query)))
        with without_autocast(query):
            wide = previous.dtype
            filters = filters.to(wide).unflatten(-1, (self.dynamic_filters, self.dynamic_length))
            dynamic = _windows(previous, self.dynamic_length) @ filters.mT
            static = _windows(previous, self.static_filters.shape[1]) @ self.static_filters.to(wide).mT
            weight = torch.cat([self.static_projection, self.dynamic_projection], 1).to(wide)
            features = F.linear(torch.cat([static, dynamic], -1), weight).flatten(0, 1)
            none = features.new_zeros(features.shape[0], self.units)
            v, bias = self.v.to(wide), self.bias.to(wide)
            scores = additive_scores(none, features, v, bias, backend=self.backend).view(previous.shape)
            moved = F.pad(previous, (self.prior_length - 1, 0)).unfold(-1, self.prior_length, 1)
            prior = moved @ self.prior.to(wide).flip(0)
            alignments = masked_softmax(scores + torch.log(prior.clamp_min(_LEAST_PRIOR)), allowed)
        return alignments, AlignmentsState(alignments)

    def extra_repr(self) -> str:
        return self._repr(
            units=self.units,
            static_filters=self.static_filters.shape[0],
            static_length=self.static_filters.shape[1],
            dynamic_filters=self.dynamic_filters,
            dynamic_length=self.dynamic_length,
            prior_length=self.prior_length,
        )


def beta_binomial(n: int, alpha: float, beta: float) -> list[float]:
    """The probabilities of 0..n: choose(n, k) B(k + alpha, n - k + beta) / B(alpha, beta)."""

    def log_beta(a: float, b: float) -> float:
        return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

    return [math.comb(n, k) * math.exp(log_beta(k + alpha, n - k + beta) - log_beta(alpha, beta)) for k in range(n + 1)]


def _windows(x: Tensor, length: int) -> Tensor:
    """(B, K, Tk) to (B, K, Tk, length): the window centred on each step, with zeros outside."""
    return F.pad(x, (length // 2, length // 2)).unfold(-1, length, 1)
