"""Stepwise monotonic attention: each decoding step stays where it is or moves forward by one."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .monotonic import MonotonicAttention
from .reading import Source
from .steps import AlignmentsState, shifted


class StepwiseMonotonicAttention(MonotonicAttention):
    r"""Monotonic attention that skips no step of the memory: a decoding step stays, or moves forward by one.

    .. math::
        p_{ij} = \sigma(energy(query_i, memory_j) + r + noise \; \epsilon_{ij}), \quad
        alignments_{ij} = alignments_{i-1,j} \, p_{ij} + alignments_{i-1,j-1} (1 - p_{i,j-1})

    where p is the probability of staying. Energies are those of :class:`MonotonicAttention`. Steps that may not be
    attended are skipped: an alignment moves on to the next step that may be attended. Probability that moves on from
    the last step is lost, so that alignments sum to at most 1.

    Source: He, Deng, He, "Robust sequence-to-sequence acoustic modeling with stepwise monotonic attention for neural
    TTS", 2019, section 3, equations 8 to 10.

    Args:
        mode: "soft", the formula; "hard" for decoding: stays where the energy plus r is above 0, and moves on
            elsewhere. None for "soft". ``module.mode`` may be set at any time; "hard" needs a hard state, such as the
            initial one.
        score_bias_init: initial value of r; None for 3.5, the value of the authors' code for speech synthesis. Where
            energies are near 0, an alignment moves on every 1 + e^r steps: training is sensitive to r.
        query_size, memory_size, units, noise, score, normalize, activation, negative_slope, backend, device, dtype: as
            for :class:`MonotonicAttention`.

    Parameters: those of :class:`MonotonicAttention`.

    State: :class:`AlignmentsState`, the alignments of the step before; at first all weight is on the first step that
    may be attended.
    """

    modes: ClassVar[tuple[str, ...]] = ("soft", "hard")
    default_score_bias: ClassVar[float] = 3.5
    starts_attended = True

    def _alignments(self, query: Tensor, source: Source, state: AlignmentsState) -> tuple[Tensor, AlignmentsState]:
        allowed = source.allowed
        stay = self._choices(self.make_query(query), source)
        previous = self._previous(state, source.keys).to(stay.dtype)
        alignments = previous * stay + _to_next(previous * (1.0 - stay), allowed)
        if allowed is not None:
            alignments = alignments.masked_fill(~allowed, 0.0)
        return alignments, AlignmentsState(alignments)


def _to_next(x: Tensor, allowed: Tensor | None) -> Tensor:
    """x, (B, K, Tk), moved forward: for each step, x of the last allowed step before it; 0 if there is none."""
    if allowed is None:
        return shifted(x)
    steps = torch.arange(1, x.shape[-1] + 1, device=x.device)
    last = shifted(torch.where(allowed, steps, 0)).cummax(-1).values  # 0: none
    return torch.nn.functional.pad(x, (1, 0)).gather(-1, last.expand(x.shape))
