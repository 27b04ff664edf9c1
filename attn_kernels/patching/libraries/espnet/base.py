"""The base of the adapters of ESPnet: the state of a batch, and a step of one head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ....attending import attend
from ....errors import ArgumentTypeError
from ....functional import additive_attention
from ....memory import Memory
from ....scores import AdditiveScore, DotScore
from ....stock import is_stock_linear
from ....types import Attention, alignments_of
from ...adapter import MIN_PRODUCTS, Fused, NotSupported
from ...cache import cached, clear
from ...masks import as_original, mask_without_empty_rows

MODULE = "espnet.nets.pytorch_backend.rnn.attentions"
LIBRARY = {"library": "ESPnet", "versions": "202511"}


class Step(NamedTuple):
    """The inputs of a step: state (B, dunits) of the decoder; allowed (B, T) bool, True = attend, None: all."""

    state: Tensor
    allowed: Tensor | None


class FusedStep(Fused):
    """The state of a batch is stored in the module's attributes, which decoders read and write, as in the original."""

    min_products = MIN_PRODUCTS
    h_length: int  # like enc_h, None before the first step
    enc_h: Tensor
    mask: Tensor | None
    dunits: int
    han_mode = False  # for classes that do not have it

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        clear(self)

    def _begin(self, memory: Tensor, lengths: Any, state: Tensor | None) -> Step | NotSupported:
        """memory: (B, T, eprojs). lengths: B numbers. state: (B, dunits) or None."""
        if is_compiling():
            return NotSupported("torch.compile")
        if not _are_stock_linear(getattr(self, "gvec", None)):
            return NotSupported("a score layer that is no plain nn.Linear")
        self._project(memory)
        if self.mask is None:
            self.mask = _padding(lengths).to(memory.device)
        if self.mask.dtype != torch.bool or self.mask.shape != self.enc_h.shape[:2]:
            return NotSupported("a mask of another kind")
        allowed = mask_without_empty_rows(self, self.mask, torch.logical_not)
        if isinstance(allowed, NotSupported):
            return allowed
        size = (len(memory), self.dunits)
        return Step(memory.new_zeros(size) if state is None else state.view(size), allowed)

    def _project(self, memory: Tensor) -> None:
        raise NotImplementedError

    def _remember(self, memory: Tensor) -> None:
        self.enc_h = memory
        self.h_length = memory.size(1)

    def _additive(
        self,
        step: Step,
        head: int,
        query: Tensor,
        keys: Tensor,
        values: Tensor | None,
        score: AdditiveScore,
        extra: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """query: (B, A). keys, extra: (B, T, A). values: (B, T, D) or, with extra, None."""
        if extra is None:
            assert values is not None
            result = attend(score, query, self._memory(step, head, keys, values), True, None)
        else:
            result = additive_attention(query, keys, values, score.v, extra=extra, mask=step.allowed)
        return _as_espnet(result, step, values)

    def _dot(self, step: Step, head: int, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """query: (B, A). keys: (B, T, A). values: (B, T, D)."""
        result = attend(DotScore(), query.unsqueeze(1), self._memory(step, head, keys, values), True, None)
        return _as_espnet(Attention(result.context.squeeze(1), alignments_of(result).squeeze(1)), step, values)

    def _memory(self, step: Step, head: int, keys: Tensor, values: Tensor) -> Memory:
        allowed = step.allowed
        return cached(self, f"memory {head}", lambda: Memory(keys, values, mask=allowed), held=(keys, values, allowed))


def additive_score(gvec: Any, scale: Any) -> AdditiveScore:
    """gvec: a linear layer, A -> 1, whose result is multiplied by scale."""
    if not isinstance(scale, int | float):
        raise ArgumentTypeError("a scaling that is no number")
    v = gvec.weight.view(-1)
    if scale != 1:
        v = scale * v
    if gvec.bias is not None and gvec.bias.requires_grad and torch.is_grad_enabled():
        v = torch.add(v, gvec.bias, alpha=0)  # the bias adds the same to all scores of a softmax: its gradient is 0
    return AdditiveScore(v)


def _as_espnet(result: Attention, step: Step, values: Tensor | None) -> tuple[Tensor, Tensor]:
    result = as_original(result, step.allowed)
    context, alignments = result.context, alignments_of(result)
    return context if values is None else as_product(context, alignments, values), alignments


def as_product(context: Tensor, alignments: Tensor, values: Tensor) -> Tensor:
    """The context in the dtype of alignments * values: under autocast that is not the dtype of a matrix product."""
    return context.to(torch.promote_types(alignments.dtype, values.dtype))


def uniform(lengths: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The first alignments, (B, longest): 1 / length within each, 0 beyond."""
    if not isinstance(lengths, list):
        raise ArgumentTypeError("lengths that are no list")
    within = (~_padding(lengths)).to(device=device, dtype=dtype)
    return within / torch.tensor(lengths, device=device, dtype=dtype).unsqueeze(-1)


def _padding(lengths: Any) -> Tensor:
    """(B, longest), True beyond each length."""
    lengths = torch.as_tensor(lengths).long()  # floats are truncated, as in the original
    padding: Tensor = torch.arange(int(lengths.max()), device=lengths.device) >= lengths[:, None]
    return padding


def _are_stock_linear(layers: Any) -> bool:
    """layers: one, a list of them, or None."""
    if layers is None:
        return True
    return all(map(is_stock_linear, layers)) if isinstance(layers, nn.ModuleList) else is_stock_linear(layers)
