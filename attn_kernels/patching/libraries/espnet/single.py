"""Attention with one head: dot, additive, with coverage and with location features."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...adapter import NotSupported
from ...registry import adapts
from .base import LIBRARY, MODULE, FusedStep, Step, additive_score, uniform


class FusedSingle(FusedStep):
    """One head, with the projected encoder output in ``pre_compute_enc_h``."""

    pre_compute_enc_h: Tensor | None
    mlp_enc: Any
    mlp_dec: Any
    gvec: Any

    def _project(self, memory: Tensor) -> None:
        if self.pre_compute_enc_h is None or self.han_mode:
            self._remember(memory)
            self.pre_compute_enc_h = self.mlp_enc(self.enc_h)

    def _projected(self) -> Tensor:
        assert self.pre_compute_enc_h is not None  # made by _project
        return self.pre_compute_enc_h

    def _single(self, step: Step, query: Tensor, scale: Any, extra: Tensor | None = None) -> tuple[Tensor, Tensor]:
        score = additive_score(self.gvec, scale)
        return self._additive(step, 0, query, self._projected(), self.enc_h, score, extra)


class FusedLocation(FusedSingle):
    """Features of alignments by a convolution."""

    loc_conv: Any
    mlp_att: Any

    def _features(self, alignments: Tensor) -> Tensor:
        """alignments: (B, T). Returns (B, T, A)."""
        features = self.loc_conv(alignments.view(len(alignments), 1, 1, self.h_length))
        projected: Tensor = self.mlp_att(features.squeeze(2).transpose(1, 2))
        return projected


@adapts(f"{MODULE}:AttDot", **LIBRARY, sources=("a0ae0b1b088d",))
class FusedAttDot(FusedSingle):
    """scores_j = tanh(mlp_dec(z)) . tanh(mlp_enc(h_j))."""

    def _project(self, memory: Tensor) -> None:
        if self.pre_compute_enc_h is None or self.han_mode:
            self._remember(memory)
            self.pre_compute_enc_h: Any = torch.tanh(self.mlp_enc(self.enc_h))

    def attend(self, enc_hs_pad: Tensor, enc_hs_len: Any, dec_z: Any, att_prev: Any, scaling: float = 2.0) -> Any:
        step = self._begin(enc_hs_pad, enc_hs_len, dec_z)
        if isinstance(step, NotSupported):
            return step
        query = scaling * torch.tanh(self.mlp_dec(step.state))
        return self._dot(step, 0, query, self._projected(), self.enc_h)


@adapts(f"{MODULE}:AttAdd", **LIBRARY, sources=("4f7be4b3459e",))
class FusedAttAdd(FusedSingle):
    """scores_j = gvec . tanh(mlp_dec(z) + mlp_enc(h_j)): Bahdanau et al. 2015, appendix A.1.2."""

    def attend(self, enc_hs_pad: Tensor, enc_hs_len: Any, dec_z: Any, att_prev: Any, scaling: float = 2.0) -> Any:
        step = self._begin(enc_hs_pad, enc_hs_len, dec_z)
        if isinstance(step, NotSupported):
            return step
        return self._single(step, self.mlp_dec(step.state), scaling)


@adapts(f"{MODULE}:AttLoc", **LIBRARY, sources=("7db40d2f39dc",))
class FusedAttLoc(FusedLocation):
    """With location features: Chorowski et al., "Attention-based models for speech recognition", 2015, section 2.1."""

    default_scaling: float = 2.0

    def attend(
        self,
        enc_hs_pad: Tensor,
        enc_hs_len: Any,
        dec_z: Any,
        att_prev: Any,
        scaling: float | None = None,
        last_attended_idx: int | None = None,
        backward_window: int = 1,
        forward_window: int = 3,
    ) -> Any:
        scaling = self.default_scaling if scaling is None else scaling
        if last_attended_idx is not None:
            return NotSupported("a window around the last attended frame")
        step = self._begin(enc_hs_pad, enc_hs_len, dec_z)
        if isinstance(step, NotSupported):
            return step
        return self._attend(step, enc_hs_pad, enc_hs_len, att_prev, scaling)

    def _attend(self, step: Step, memory: Tensor, lengths: Any, previous: Any, scaling: Any) -> Any:
        if previous is None:
            previous = uniform(lengths, step.state.device, step.state.dtype)
        return self._single(step, self.mlp_dec(step.state), scaling, self._features(previous))


@adapts(f"{MODULE}:AttCov", **LIBRARY, sources=("1df44dd08bc1",))
class FusedAttCov(FusedSingle):
    """With the sum of all alignments so far: See et al., "Get to the point", 2017, section 2.3."""

    wvec: Any

    def attend(
        self, enc_hs_pad: Tensor, enc_hs_len: Any, dec_z: Any, att_prev_list: list[Tensor] | None, scaling: float = 2.0
    ) -> Any:
        step = self._begin(enc_hs_pad, enc_hs_len, dec_z)
        if isinstance(step, NotSupported):
            return step
        if att_prev_list is None:
            att_prev_list = [uniform(enc_hs_len, enc_hs_pad.device, torch.float32)]
        extra = self._covered(sum(att_prev_list))  # type: ignore[arg-type]
        context, alignments = self._single(step, self.mlp_dec(step.state), scaling, extra)
        att_prev_list += [alignments]  # in place, as in the original
        return context, att_prev_list

    def _covered(self, coverage: Tensor) -> Tensor:
        projected: Tensor = self.wvec(coverage.unsqueeze(-1))
        return projected


@adapts(f"{MODULE}:AttCovLoc", **LIBRARY, sources=("4997ba0d9c15",))
class FusedAttCovLoc(FusedAttCov, FusedLocation):
    """With location features of the sum of all alignments so far."""

    def _covered(self, coverage: Tensor) -> Tensor:
        return self._features(coverage)


@adapts(f"{MODULE}:AttLoc2D", **LIBRARY, sources=("1a6d6dae68e6",))
class FusedAttLoc2D(FusedLocation):
    """With location features of the last ``att_win`` alignments."""

    att_win: int

    def attend(
        self, enc_hs_pad: Tensor, enc_hs_len: Any, dec_z: Any, att_prev: Tensor | None, scaling: float = 2.0
    ) -> Any:
        step = self._begin(enc_hs_pad, enc_hs_len, dec_z)
        if isinstance(step, NotSupported):
            return step
        if att_prev is None:
            first = uniform(enc_hs_len, enc_hs_pad.device, torch.float32)
            att_prev = first.unsqueeze(1).expand(-1, self.att_win, -1)
        extra = self.mlp_att(self.loc_conv(att_prev.unsqueeze(1)).squeeze(2).transpose(1, 2))
        context, alignments = self._single(step, self.mlp_dec(step.state), scaling, extra)
        return context, torch.cat([att_prev, alignments.unsqueeze(1)], dim=1)[:, 1:]


@adapts(f"{MODULE}:AttLocRec", **LIBRARY, sources=("e03080b5588f",))
class FusedAttLocRec(FusedSingle):
    """With an LSTM over pooled features of the previous alignments, whose state is added to the query."""

    att_dim: int
    loc_conv: Any
    att_lstm: Any

    def attend(
        self, enc_hs_pad: Tensor, enc_hs_len: Any, dec_z: Any, att_prev_states: Any, scaling: float = 2.0
    ) -> Any:
        step = self._begin(enc_hs_pad, enc_hs_len, dec_z)
        if isinstance(step, NotSupported):
            return step
        batch = len(enc_hs_pad)
        if att_prev_states is None:
            zeros = enc_hs_pad.new_zeros(batch, self.att_dim)
            att_prev_states = (uniform(enc_hs_len, enc_hs_pad.device, torch.float32), (zeros, zeros))
        previous, states = att_prev_states
        features = F.relu(self.loc_conv(previous.view(batch, 1, 1, self.h_length)))
        states = self.att_lstm(F.max_pool2d(features, (1, features.size(3))).view(batch, -1), states)
        context, alignments = self._single(step, self.mlp_dec(step.state) + states[0], scaling)
        return context, (alignments, states)
