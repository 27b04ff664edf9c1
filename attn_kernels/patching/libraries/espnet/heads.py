"""Attention with several heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...adapter import NotSupported
from ...registry import adapts
from .base import LIBRARY, MODULE, FusedStep, Step, additive_score, uniform


class _FusedHeads(FusedStep):
    """Several heads, each with its own projections; lists of these are in ``pre_compute_k`` and ``pre_compute_v``."""

    aheads: int
    scaling: float
    pre_compute_k: list[Tensor] | None
    pre_compute_v: list[Tensor] | None
    mlp_q: Any
    mlp_k: Any
    mlp_v: Any
    mlp_o: Any
    gvec: Any

    def _project(self, memory: Tensor) -> None:
        if self.pre_compute_k is None or self.han_mode:
            self._remember(memory)
            self.pre_compute_k = [self._keys(project) for project in self.mlp_k]
        if self.pre_compute_v is None or self.han_mode:
            self._remember(memory)
            self.pre_compute_v = [project(self.enc_h) for project in self.mlp_v]

    def _keys(self, project: Any) -> Tensor:
        projected: Tensor = project(self.enc_h)
        return projected

    def _join(self, heads: Sequence[Any]) -> tuple[Tensor, list[Tensor]]:
        contexts, alignments = zip(*heads, strict=True)
        return self.mlp_o(torch.cat(contexts, dim=1)), list(alignments)

    def _projected(self, h: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a head."""
        assert self.pre_compute_k is not None and self.pre_compute_v is not None  # made by _project
        return self.pre_compute_k[h], self.pre_compute_v[h]

    def _head(self, step: Step, h: int, scale: Any, extra: Tensor | None = None) -> tuple[Tensor, Tensor]:
        query = self.mlp_q[h](step.state)
        score = additive_score(self.gvec[h], scale)
        return self._additive(step, h, query, *self._projected(h), score, extra)


@adapts(f"{MODULE}:AttMultiHeadDot", **LIBRARY, sources=("add51694aeb4",))
class FusedAttMultiHeadDot(_FusedHeads):
    """Heads of AttDot with a scale of 1 / sqrt(att_dim_k)."""

    def _keys(self, project: Any) -> Tensor:
        return torch.tanh(project(self.enc_h))

    def attend(self, enc_hs_pad: Tensor, enc_hs_len: Any, dec_z: Any, att_prev: Any, **kwargs: Any) -> Any:
        step = self._begin(enc_hs_pad, enc_hs_len, dec_z)
        if isinstance(step, NotSupported):
            return step
        heads = []
        for h in range(self.aheads):
            query = self.scaling * torch.tanh(self.mlp_q[h](step.state))
            heads.append(self._dot(step, h, query, *self._projected(h)))
        return self._join(heads)


@adapts(f"{MODULE}:AttMultiHeadAdd", **LIBRARY, sources=("6c3fd45dfd37",))
class FusedAttMultiHeadAdd(_FusedHeads):
    """Heads of AttAdd with a scale of 1 / sqrt(att_dim_k)."""

    def attend(self, enc_hs_pad: Tensor, enc_hs_len: Any, dec_z: Any, att_prev: Any, **kwargs: Any) -> Any:
        step = self._begin(enc_hs_pad, enc_hs_len, dec_z)
        if isinstance(step, NotSupported):
            return step
        return self._join([self._head(step, h, self.scaling) for h in range(self.aheads)])


class _FusedHeadsLocation(_FusedHeads):
    loc_conv: Any
    mlp_att: Any

    def _located(self, memory: Tensor, lengths: Any, state: Any, previous: list[Tensor] | None, scale: Any) -> Any:
        step = self._begin(memory, lengths, state)
        if isinstance(step, NotSupported):
            return step
        if previous is None:
            previous = [uniform(lengths, memory.device, torch.float32)] * self.aheads
        heads = []
        for h in range(self.aheads):
            features = self.loc_conv[h](previous[h].view(len(memory), 1, 1, self.h_length))
            extra = self.mlp_att[h](features.squeeze(2).transpose(1, 2))
            heads.append(self._head(step, h, scale, extra))
        return self._join(heads)


@adapts(f"{MODULE}:AttMultiHeadLoc", **LIBRARY, sources=("bbd1724454ff",))
class FusedAttMultiHeadLoc(_FusedHeadsLocation):
    """Heads of AttLoc."""

    def attend(
        self, enc_hs_pad: Tensor, enc_hs_len: Any, dec_z: Any, att_prev: Any, scaling: float = 2.0, **kwargs: Any
    ) -> Any:
        return self._located(enc_hs_pad, enc_hs_len, dec_z, att_prev, scaling)


@adapts(f"{MODULE}:AttMultiHeadMultiResLoc", **LIBRARY, sources=("ae6c47b54f5b",))
class FusedAttMultiHeadMultiResLoc(_FusedHeadsLocation):
    """Heads of AttLoc, each with its own width, and a scale of 1 / sqrt(att_dim_k)."""

    def attend(self, enc_hs_pad: Tensor, enc_hs_len: Any, dec_z: Any, att_prev: Any, **kwargs: Any) -> Any:
        return self._located(enc_hs_pad, enc_hs_len, dec_z, att_prev, self.scaling)
