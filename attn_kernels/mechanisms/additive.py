"""The base of stateful mechanisms whose additive scores have an extra term in the tanh, one per step and hypothesis."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..attending import attend_arrays, attend_with_extra
from ..checks import as_number
from ..errors import ArgumentValueError
from ..functional import additive_attention
from ..memory import Memory
from ..scores import ActivatedScore, AdditiveScore
from ..types import Masks, alignments_of
from .alignments import average
from .location_features import AlignmentFilters
from .stateful import StatefulAttention


class StatefulAdditiveAttention(StatefulAttention):
    """scores_j = scale v . tanh(W_q query + W_m memory_j + extra_j + bias), where ``extra`` is computed from the state.

    bias: whether there is a ``bias``, initially 0. scale: a factor of the scores. The rest is as in AttentionModule.
    """

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        units: int,
        scale: float,
        bias: bool,
        activation: str,
        negative_slope: float,
        backend: str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(query_size, memory_size, units, backend=backend, factory={"device": device, "dtype": dtype})
        self._set_activation(activation, negative_slope)
        self.units: int = self.key_size
        self.scale: float = as_number(self._name, scale)
        self.v: nn.Parameter = self._parameter(self.units)
        self.bias: nn.Parameter | None = self._parameter(self.units) if bias else None

    def _reset_scores(self) -> None:
        bound = 1 / math.sqrt(self.units)  # as the weight of nn.Linear(units, 1)
        nn.init.uniform_(self.v, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def make_score(self, memory: Memory) -> AdditiveScore | ActivatedScore:
        """The score on the keys; a step adds its ``extra`` to them first."""
        return self._additive_score(self.v if self.scale == 1.0 else self.scale * self.v, self.bias)

    def _alignment_filters(self, state: Any) -> AlignmentFilters | None:
        """The filters that compute ``extra`` from the state, for one hypothesis; None if it is no linear filter."""
        return None

    def _attend(self, query: Tensor, memory: Memory, extra: Tensor) -> tuple[Tensor, Tensor]:
        """Context and alignments (softmax). query: (B, K, A), projected. extra: (B, K, Tk, A)."""
        if query.shape[1] > 1:
            alignments = self._align(query, memory, extra, memory.mask)
            return average(alignments, memory, self.backend), alignments
        score = self.make_score(memory)
        masks = Masks(memory.memory_lengths, memory.mask)
        extra = extra.squeeze(1).to(memory.keys.dtype)
        inputs = (query, memory.keys, memory.values)
        result = attend_with_extra(score, inputs, extra, masks, True, self.backend, memory)
        return result.context, alignments_of(result)

    def _align(self, query: Tensor, memory: Memory, extra: Tensor | None, mask: Tensor | None) -> Tensor:
        """(B, K, Tk): alignments (softmax). query, extra: as for ``_attend``. mask: replaces that of the memory."""
        keys, lengths, hypotheses = memory.keys, memory.memory_lengths, query.shape[1]
        if extra is None or hypotheses == 1:  # one call of the op, and the gradient of the keys may be deferred
            score, memory, masks = self.make_score(memory), memory.keys_alone(), Masks(lengths, mask)
            inputs = (query, keys, memory.values)
            if extra is None:
                return alignments_of(attend_arrays(score, *inputs, masks, True, self.backend, memory))
            extra = extra.squeeze(1).to(keys.dtype)
            return alignments_of(attend_with_extra(score, inputs, extra, masks, True, self.backend, memory))
        # The keys differ between hypotheses: each hypothesis becomes a row of the batch.
        keys = (keys.unsqueeze(1) + extra).flatten(0, 1)
        query = query.reshape(-1, 1, query.shape[2])
        if lengths is not None:  # not repeat_interleave: torch.onnx exports it wrongly for one axis
            lengths = lengths[:, None].expand(-1, hypotheses).flatten()
        if mask is not None:
            mask = mask.flatten(0, 1) if mask.dim() == 3 else mask.repeat_interleave(hypotheses, 0)
        options: dict[str, Any] = {"memory_lengths": lengths, "mask": mask, "backend": self.backend}
        options |= {"activation": self.activation, "negative_slope": self.negative_slope, "scale": self.scale}
        result = additive_attention(query, keys, None, self.v, self.bias, **options)
        return alignments_of(result).reshape(memory.batch_size, hypotheses, keys.shape[1])

    def _check(self, query: Tensor, memory: Memory) -> None:
        super()._check(query, memory)
        hypotheses = query.shape[1] if query.dim() == 3 else 1
        if memory.mask is not None and memory.mask.dim() == 3 and memory.mask.shape[1] != hypotheses:
            batch, _, steps = memory.mask.shape
            expected = f"(B, Tk) or (B, K, Tk) = ({batch}, {steps}) or ({batch}, {hypotheses}, {steps})"
            got = tuple(memory.mask.shape)
            raise ArgumentValueError(f"{self._name}: memory.mask must have shape {expected}, got {got}")
