"""Additive scores with an addend of their own for each step and hypothesis: the base of mechanisms that use them."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import as_number
from ..errors import ArgumentValueError
from ..functional import additive_attention
from ..memory import Memory
from ..types import Attention
from .alignments import average
from .stateful import StatefulAttention


class StatefulAdditiveAttention(StatefulAttention):
    """scores_j = scale v . tanh(W_q query + W_m memory_j + extra_j + bias), where ``extra`` is made of the state.

    bias: whether there is a ``bias``, initially 0. scale: a factor of the scores. The rest is as of AttentionModule.
    """

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        units: int,
        *,
        bias: bool,
        scale: float,
        backend: str | None,
        factory: dict[str, Any],
    ) -> None:
        super().__init__(
            query_size, memory_size, units, project_query=True, project_memory=True, backend=backend, factory=factory
        )
        self.units = self.key_size
        self.scale = as_number(self._name, scale)
        self.v = nn.Parameter(torch.empty(self.units, **factory))
        self.bias = nn.Parameter(torch.empty(self.units, **factory)) if bias else None

    def _reset_scores(self) -> None:
        bound = 1 / math.sqrt(self.units)  # as the weight of nn.Linear(units, 1)
        nn.init.uniform_(self.v, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _attend(self, query: Tensor, memory: Memory, extra: Tensor) -> Attention:
        """Alignments by softmax, and their context. query: (B, K, A), projected. extra: (B, K, Tk, A)."""
        if query.shape[1] > 1:
            alignments = self._align(query, memory, extra, memory.mask)
            return Attention(average(alignments, memory), alignments)
        options: dict[str, Any] = {
            "memory_lengths": memory.memory_lengths,
            "mask": memory.mask,
            "backend": self.backend,
        }
        extra = extra.squeeze(1).to(memory.keys.dtype)
        return additive_attention(
            query, memory.keys, memory.values, self.v, self.bias, extra=extra, scale=self.scale, **options
        )

    def _align(self, query: Tensor, memory: Memory, extra: Tensor | None, mask: Tensor | None) -> Tensor:
        """(B, K, Tk), alignments by softmax. query, extra: as of ``_attend``. mask: in place of that of the memory."""
        keys, lengths, hypotheses = memory.keys, memory.memory_lengths, query.shape[1]
        if extra is not None:  # each hypothesis has keys of its own, and is a row of the batch
            keys = (keys.unsqueeze(1) + extra).flatten(0, 1)
            query = query.reshape(-1, 1, query.shape[2])
            lengths = None if lengths is None else lengths.repeat_interleave(hypotheses, 0)
            if mask is not None:
                mask = mask.flatten(0, 1) if mask.dim() == 3 else mask.repeat_interleave(hypotheses, 0)
        options: dict[str, Any] = {"memory_lengths": lengths, "mask": mask, "backend": self.backend}
        alignments = additive_attention(query, keys, None, self.v, self.bias, scale=self.scale, **options).alignments
        return alignments.reshape(memory.batch_size, hypotheses, keys.shape[1])

    def _check(self, query: Tensor, memory: Memory) -> None:
        super()._check(query, memory)
        hypotheses = query.shape[1] if query.dim() == 3 else 1
        if memory.mask is not None and memory.mask.dim() == 3 and memory.mask.shape[1] != hypotheses:
            batch, _, steps = memory.mask.shape
            expected = f"(B, Tk) or (B, K, Tk) = ({batch}, {steps}) or ({batch}, {hypotheses}, {steps})"
            got = tuple(memory.mask.shape)
            raise ArgumentValueError(f"{self._name}: memory.mask must have shape {expected}, got {got}")


def make_location_layers(
    name: str, inputs: int, channels: int, kernel_size: int, units: int, factory: dict[str, Any]
) -> tuple[nn.Conv1d, nn.Linear]:
    """The convolution F of ``inputs`` kinds of alignments and the projection U of what it finds."""
    for argument, size in (("channels", channels), ("kernel_size", kernel_size)):
        if not isinstance(size, Integral) or size < 1:
            raise ArgumentValueError(f"{name}: {argument} must be a positive integer, got {size!r}")
    if kernel_size % 2 == 0:  # the features of a step are to be around it
        raise ArgumentValueError(f"{name}: kernel_size must be odd, got {kernel_size}")
    channels, kernel_size = int(channels), int(kernel_size)  # numpy has its own
    convolution = nn.Conv1d(inputs, channels, kernel_size, padding=kernel_size // 2, bias=False, **factory)
    return convolution, nn.Linear(channels, units, bias=False, **factory)


def project_locations(convolution: nn.Conv1d, projection: nn.Linear, *alignments: Tensor) -> Tensor:
    """(B, K, Tk, A): U f, with f = F * alignments. alignments: (B, K, Tk) of each input of the convolution.

    Both maps are linear: U F is multiplied out first, (A, inputs taps), so that there is one product with the
    neighbourhoods of the steps and no tensor of features.
    """
    weight = projection.weight @ convolution.weight.flatten(1)
    taps = convolution.weight.shape[2]
    inputs = torch.stack(alignments, dim=2) if len(alignments) > 1 else alignments[0].unsqueeze(2)
    if inputs.shape[3] == 0:  # which unfold refuses
        return weight.new_zeros(*inputs.shape[:2], 0, weight.shape[0])
    padded = F.pad(inputs.to(weight.dtype), (taps // 2, taps // 2))
    neighbourhoods = padded.unfold(3, taps, 1).transpose(2, 3).flatten(3)  # (B, K, Tk, inputs taps)
    return F.linear(neighbourhoods, weight)
