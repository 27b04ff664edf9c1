"""Forward attention, with and without a transition agent."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...registry import adapts
from .base import LIBRARY, MODULE, Step, additive_score, as_product
from .single import FusedAttLoc


class _FusedForward(FusedAttLoc):
    """Alignments re-weighted by the previous ones: Zhang et al., "Forward attention in sequence-to-sequence acoustic
    modelling for speech synthesis", 2018.
    """

    default_scaling: float = 1.0

    def _forward_step(self, step: Step, previous: Tensor, scaling: Any, stay: Any, move: Any) -> tuple[Tensor, Tensor]:
        """stay, move: probabilities, or 1, of the previously attended frame and of the frame after it."""
        keys, extra = self._projected(), self._features(previous)
        score = additive_score(self.gvec, scaling)
        _, alignments = self._additive(step, 0, self.mlp_dec(step.state), keys, None, score, extra)
        alignments = (stay * previous + move * F.pad(previous, (1, 0))[:, :-1]) * alignments
        alignments = F.normalize(torch.clamp(alignments, 1e-6), p=1, dim=1)  # padding gets a small weight, too
        context = torch.bmm(alignments.unsqueeze(1), self.enc_h).squeeze(1)
        return as_product(context, alignments, self.enc_h), alignments

    def _first(self, memory: Tensor) -> Tensor:
        first = memory.new_zeros(memory.shape[:2])
        first[:, 0] = 1.0
        return first


@adapts(f"{MODULE}:AttForward", **LIBRARY, sources=("fa9f43f7449a",))
class FusedAttForward(_FusedForward):
    """Forward attention, section 3.1 of the paper."""

    def _attend(self, step: Step, memory: Tensor, lengths: Any, previous: Any, scaling: Any) -> Any:
        previous = self._first(memory) if previous is None else previous
        return self._forward_step(step, previous, scaling, 1, 1)


@adapts(f"{MODULE}:AttForwardTA", **LIBRARY, sources=("e4737a7768ef",))
class FusedAttForwardTA(_FusedForward):
    """Forward attention with a transition agent, section 3.2 of the paper."""

    mlp_ta: Any
    trans_agent_prob: Any

    def attend(  # type: ignore[override]
        self,
        enc_hs_pad: Tensor,
        enc_hs_len: Any,
        dec_z: Any,
        att_prev: Tensor | None,
        out_prev: Tensor,
        scaling: float | None = None,
        *window: Any,
        **w: Any,
    ) -> Any:
        return super().attend(enc_hs_pad, enc_hs_len, dec_z, (att_prev, out_prev), scaling, *window, **w)

    def _attend(self, step: Step, memory: Tensor, lengths: Any, previous: Any, scaling: Any) -> Any:
        previous, out_prev = previous
        previous = self._first(memory) if previous is None else previous
        stay = self.trans_agent_prob
        context, alignments = self._forward_step(step, previous, scaling, stay, 1 - stay)
        self.trans_agent_prob = torch.sigmoid(self.mlp_ta(torch.cat([context, out_prev, step.state], dim=1)))
        return context, alignments
