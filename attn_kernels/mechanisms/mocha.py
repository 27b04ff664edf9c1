"""Monotonic chunkwise attention: a softmax over a chunk of steps that ends where monotonic attention stops."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_size
from ..modules import _reset_score_vector
from .energy import ChoosingAttention
from .monotonic import MODES, monotonic_alignments
from .reading import Source, additive_energies, dot_energies
from .steps import AlignmentsState, recurrence


class MonotonicChunkwiseAttention(ChoosingAttention):
    r"""Monotonic chunkwise attention (MoChA), and with ``chunk_size=None`` monotonic infinite look-back (MILk).

    If monotonic attention stops at step k, a softmax over a second energy u attends the chunk of the last
    ``chunk_size`` steps up to k. The alignments are its expectation over k, which has the distribution :math:`\alpha`
    of :class:`MonotonicAttention`:

    .. math::
        \beta_{ij} = \sum_{k=j}^{j+w-1} \alpha_{ik} \frac{\exp u_{ij}}{\sum_{l=k-w+1}^{k} \exp u_{il}}, \quad
        context_i = \sum_j \beta_{ij} values_j

    .. math::
        \text{additive:} \; u = v_c \cdot \tanh(W_{qc} query + W_{mc} memory + bias_c) \qquad
        \text{dot:} \; u = query \cdot W_{mc} memory

    Source: Chiu, Raffel, "Monotonic chunkwise attention", 2018, section 2, equations 7 to 20.
    MILk: Arivazhagan et al., "Monotonic infinite lookback attention for simultaneous machine translation", 2019,
    section 3.2; there the chunk is everything read so far. Numerics: quotients are computed as exponentials of
    differences, each at most 1. A moving sum of exponentials could underflow to 0 far from the largest energy.

    Args:
        query_size, memory_size, units, mode, noise, score_bias_init, score, normalize: as for
            :class:`MonotonicAttention`; ``units`` is the size of each energy. ``noise``, r and ``normalize`` apply to
            the monotonic energy only.
        activation, negative_slope, backend: also as there.
        chunk_size: w, the number of steps in a chunk; None for all steps up to the one at which it stops.
        device, dtype: of the parameters; query and memory must have the same.

    Parameters: those of :class:`MonotonicAttention`, with projections of both energies in one weight, (2 A, *), the
    monotonic one first; additive: ``chunk_v`` (A,), ``chunk_bias`` (A,), initially 0.

    State: :class:`AlignmentsState`, the monotonic alignments :math:`\alpha` of the step before, not the returned
    :math:`\beta`.
    """

    modes: ClassVar[tuple[str, ...]] = MODES

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        units: int | None = None,
        chunk_size: int | None = 4,
        mode: str = "recursive",
        noise: float = 0.0,
        score_bias_init: float = 0.0,
        *,
        score: str = "additive",
        normalize: bool = False,
        activation: str = "tanh",
        negative_slope: float = 0.01,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: dict[str, Any] = {"score": score, "normalize": normalize, "backend": backend}
        options |= {"activation": activation, "negative_slope": negative_slope}
        options["factory"] = {"device": device, "dtype": dtype}
        super().__init__(query_size, memory_size, units, mode, noise, score_bias_init, 2, **options)
        self.chunk_size: int | None = None if chunk_size is None else check_size(self._name, "chunk_size", chunk_size)
        additive = score == "additive"
        self.chunk_v: nn.Parameter | None = self._parameter(self.units) if additive else None
        self.chunk_bias: nn.Parameter | None = self._parameter(self.units) if additive else None
        self._reset_scores()

    def _reset_scores(self) -> None:
        super()._reset_scores()
        if self.chunk_v is not None:
            _reset_score_vector(self.chunk_v)
        if self.chunk_bias is not None:
            nn.init.zeros_(self.chunk_bias)

    def _alignments(self, query: Tensor, source: Source, state: AlignmentsState) -> tuple[Tensor, AlignmentsState]:
        allowed = source.allowed
        source, of_chunks = source.split_keys(self.units)
        if self.chunk_v is not None:
            query, chunk_query = self.make_query(query).split(self.units, -1)
            score = self._additive_score(self.chunk_v, self.chunk_bias)
            energy = additive_energies(chunk_query, of_chunks, score)
        else:
            energy = dot_energies(query, of_chunks)
        p_choose = self._choices(query, source)
        stops = monotonic_alignments(p_choose, self._previous(state, source.keys).to(p_choose.dtype), self.mode)
        # Finite, not -inf: the gradients of a chunk with only padding, where alpha is 0, must be 0, not NaN.
        if allowed is not None:
            energy = energy.masked_fill(~allowed, -_far(energy))
        alignments = _look_back(stops, energy) if self.chunk_size is None else _chunks(stops, energy, self.chunk_size)
        if allowed is not None:
            alignments = alignments.masked_fill(~allowed, 0.0)
        return alignments, AlignmentsState(stops)

    def extra_repr(self) -> str:
        return self._repr(**self._choice_settings(), chunk_size=self.chunk_size)


def _far(x: Tensor) -> float:
    """A number far above any energy whose differences are still finite."""
    return torch.finfo(x.dtype).max / 4


def _chunks(stops: Tensor, energy: Tensor, width: int) -> Tensor:
    """(B, K, Tk): alignments from alpha (``stops``) and energies, by windows rather than moving sums."""
    steps = stops.shape[-1]
    if steps == 0:
        return stops
    if not torch.compiler.is_exporting():  # an exported program has a dynamic number of steps
        width = min(width, steps)
    far = _far(energy)
    behind = F.pad(energy, (width - 1, 0), value=-far)
    normalisers = torch.logsumexp(_windows(behind, width), -1)  # of the chunk that ends at each step
    ends = _windows(F.pad(stops, (0, width - 1)), width)
    normalisers = _windows(F.pad(normalisers, (0, width - 1), value=far), width)
    return (ends * torch.exp(energy[..., None] - normalisers)).sum(-1)


def _windows(x: Tensor, width: int) -> Tensor:
    """(..., n) to its sliding windows, (..., n - width + 1, width)."""
    if not torch.compiler.is_exporting():
        return x.unfold(-1, width, 1)
    count = x.shape[-1] - width + 1  # torch.export would ask for n >= 2 width - 1
    return torch.stack([x.narrow(-1, first, count) for first in range(width)], -1)


def _look_back(stops: Tensor, energy: Tensor) -> Tensor:
    """As _chunks, with chunks that begin at the first step.

    With Z_j the sum of the exponentials up to step j, alignments_j = exp(u_j) / Z_j S_j, where
    S_j = stops_j + Z_j / Z_{j+1} S_{j+1} is a recurrence from the end. Z_j, relative to the largest exponential so far,
    is another recurrence. (torch.logcumsumexp would give it, but its double backward is wrong.)
    """
    if stops.shape[-1] == 0:
        return stops
    most = energy.detach().cummax(-1).values
    own, decay = torch.exp(energy - most), torch.exp(most[..., :-1] - most[..., 1:])
    sums = recurrence(F.pad(decay, (1, 0)), own)
    factors = F.pad(decay * sums[..., :-1] / sums[..., 1:], (0, 1))
    return own / sums * recurrence(factors.flip(-1), stops.flip(-1)).flip(-1)
