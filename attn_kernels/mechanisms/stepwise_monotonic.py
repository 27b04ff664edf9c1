"""Stepwise monotonic attention: each decoding step stays where it is or moves on by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .energy import ChoosingAttention
from .steps import AlignmentsState, shifted


class StepwiseMonotonicAttention(ChoosingAttention):
    r"""Monotonic attention that leaves out no step of the memory: a decoding step stays, or moves on by one.

    .. math::
        p_{ij} = \sigma(energy(query_i, memory_j) + r + noise \; \epsilon_{ij}), \quad
        alignments_{ij} = alignments_{i-1,j} \, p_{ij} + alignments_{i-1,j-1} (1 - p_{i,j-1})

    where p is the probability to stay. Energies are those of :class:`MonotonicAttention`. Steps that may not be
    attended count as not there: what moves on goes to the next that may. Behind the last there is nothing: what moves
    on from there is lost, and alignments sum to 1 at most.

    Source: He, Deng, He, "Robust sequence-to-sequence acoustic modeling with stepwise monotonic attention for neural
    TTS", 2019, section 3, equations 8 to 10.

    Args:
        mode: "soft", the formula; "hard" for decoding: stays where the energy plus r is above 0, and moves on
            elsewhere. ``module.mode`` may be set at any time; "hard" needs a hard state, such as the initial one.
        score_bias_init: initial value of r. A sentence moves on every 1 + e^r steps where energies are near 0: training
            is sensitive to it. 3.5, of the authors' own code, is for speech synthesis.
        query_size, memory_size, units, noise, score, normalize, backend, device, dtype: as of
            :class:`MonotonicAttention`.

    Parameters: those of :class:`MonotonicAttention`.

    State: :class:`AlignmentsState`, the alignments of the step before; at first all weight is on the first step that
    may be attended.
    """

    modes: tuple[str, ...] = ("soft", "hard")
    starts_attended = True

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        units: int | None = None,
        mode: str = "soft",
        noise: float = 0.0,
        score_bias_init: float = 3.5,
        *,
        score: str = "additive",
        normalize: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: dict[str, Any] = {"score": score, "normalize": normalize, "backend": backend}
        options["factory"] = {"device": device, "dtype": dtype}
        super().__init__(query_size, memory_size, units, mode, noise, score_bias_init, **options)
        self._reset_scores()

    def _alignments(
        self, query: Tensor, keys: Tensor, allowed: Tensor | None, state: AlignmentsState
    ) -> tuple[Tensor, AlignmentsState]:
        stay = self._choices(self.make_query(query), keys, allowed)
        previous = self._previous(state, keys).to(stay.dtype)
        alignments = previous * stay + _to_next(previous * (1.0 - stay), allowed)
        if allowed is not None:
            alignments = alignments.masked_fill(~allowed, 0.0)
        return alignments, AlignmentsState(alignments)


def _to_next(x: Tensor, allowed: Tensor | None) -> Tensor:
    """x, (B, K, Tk), moved on: at each step the x of the last step before it that is allowed; 0 where there is none."""
    if allowed is None:
        return shifted(x)
    steps = torch.arange(1, x.shape[-1] + 1, device=x.device)
    last = shifted(torch.where(allowed, steps, 0)).cummax(-1).values  # 0: none
    return torch.nn.functional.pad(x, (1, 0)).gather(-1, last.expand(x.shape))
