"""Coverage attention: scores depend on the sum of all previous alignments."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_tensor, shape_of
from ..errors import ArgumentValueError
from ..memory import Memory
from ..types import wide_dtype
from .additive import StatefulAdditiveAttention
from .alignments import INITIAL, as_state, check_initial
from .location_features import AlignmentFilters
from .stateful import StatefulResult


class CoverageState(NamedTuple):
    """coverage: (B, K, Tk), the sum of the alignments of all steps so far, float32 or wider."""

    coverage: Tensor


class CoverageAttention(StatefulAdditiveAttention):
    r"""Additive attention whose scores depend on coverage, the sum of all alignments so far.

    .. math::
        scores_j = scale \; v \cdot \tanh(W_q \, query + W_m \, memory_j + w_c \, coverage_j + bias), \quad
        coverage = \sum alignments^{before}, \quad alignments = softmax(scores)

    Source: See, Liu, Manning, "Get to the point: summarization with pointer-generator networks", 2017, section 2.2
    (equations 10 and 11); :func:`coverage_loss` is equation 12. ESPnet's AttCov is the same formula, with
    ``initial="uniform"`` and ``scale=2.0``; ``bias`` is the sum of its three biases.

    Args:
        query_size: size of the decoder state.
        memory_size: size of the encoder outputs.
        units: A, size of the hidden layer that scores.
        scale: a finite number that multiplies the scores.
        bias: whether to learn a bias, initially 0.
        activation, negative_slope: in place of tanh, as for :class:`attn_kernels.BahdanauAttention`.
        initial: coverage before the first step: "zeros", or "uniform" over the steps that may be attended (ESPnet).
        backend: as for :func:`attn_kernels.additive_attention`.
        device, dtype: of the parameters; query and memory must have the same.

    Parameters: ``query_projection.weight`` (units, query_size), ``memory_projection.weight`` (units, memory_size),
    ``coverage_weight`` (units,), ``v`` (units,), ``bias`` (units,).

    State: ``CoverageState(coverage)``.
    """

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        units: int,
        scale: float = 1.0,
        *,
        bias: bool = True,
        activation: str = "tanh",
        negative_slope: float = 0.01,
        initial: str = "zeros",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = (activation, negative_slope, backend, device, dtype)
        super().__init__(query_size, memory_size, units, scale, bias, *options)
        check_initial(self._name, initial)
        self.initial = initial
        self.coverage_weight: nn.Parameter = self._parameter(self.units)
        self._reset_scores()

    def _reset_scores(self) -> None:
        super()._reset_scores()
        nn.init.uniform_(self.coverage_weight, -1.0, 1.0)  # as the weight of nn.Linear(1, units)

    def initial_state(self, memory: Memory, hypotheses: int = 1) -> CoverageState:
        return CoverageState(INITIAL[self.initial](memory, hypotheses, wide_dtype(memory.keys.dtype)))

    def _alignment_filters(self, state: CoverageState) -> AlignmentFilters:
        return AlignmentFilters(self.coverage_weight[:, None, None], None, state.coverage.squeeze(1))

    def _step(self, query: Tensor, memory: Memory, state: Any) -> StatefulResult:
        (coverage,) = as_state(self._name, CoverageState, state, (memory.keys.shape[1],))
        extra = coverage.to(self.coverage_weight.dtype).unsqueeze(3) * self.coverage_weight
        context, alignments = self._attend(self.make_query(query), memory, extra)
        return StatefulResult(context, alignments, CoverageState(coverage + alignments))

    def extra_repr(self) -> str:
        return self._repr(units=self.units, scale=self.scale, initial=self.initial)


def coverage_loss(alignments: Tensor, coverage: Tensor | None = None) -> Tensor:
    r"""The penalty for attending again to steps that were attended before.

    .. math:: loss_t = \sum_j \min(alignments_{tj}, coverage_{tj})

    Source: See, Liu, Manning 2017, section 2.2, equation 12.

    Args:
        alignments: (..., Tk), of a step; without ``coverage`` (B, T, Tk), of all steps of a sequence.
        coverage: (..., Tk), the sum of the alignments of all steps before. None: it is computed here, starting at 0.

    Returns:
        (...,), without the last axis, in float32 or wider: one loss per step. The caller leaves out the steps that are
        padding of the target.

    Raises:
        ArgumentValueError: a shape does not fit. ArgumentTypeError: a type does not.
    """
    check_tensor("coverage_loss", "alignments", alignments)
    if coverage is None:
        if alignments.dim() != 3:
            got = shape_of(alignments)
            raise ArgumentValueError(f"coverage_loss: alignments must be (B, T, Tk) without coverage, got {got}")
        alignments = alignments.to(wide_dtype(alignments.dtype))
        coverage = alignments.cumsum(1) - alignments
    check_tensor("coverage_loss", "coverage", coverage)
    if coverage.shape != alignments.shape:
        expected = f"the shape of alignments, {shape_of(alignments)}"
        raise ArgumentValueError(f"coverage_loss: coverage must have {expected}, got {shape_of(coverage)}")
    dtype = wide_dtype(alignments.dtype)
    return torch.minimum(alignments.to(dtype), coverage.to(dtype)).sum(-1)
