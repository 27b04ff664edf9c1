"""Forward attention: alignments that stay where they were or move forward by one step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..memory import Memory
from ..types import wide_dtype
from .additive import StatefulAdditiveAttention
from .alignments import allowed_steps, as_state, average, first_step_alignments
from .location_features import make_location_layers, project_locations
from .stateful import StatefulResult

_LEAST = 1e-6  # total probability within the memory below which the transition agent is ignored
_NONE = 1e-30  # a step with a smaller prior counts as unreachable: products with it would underflow


class ForwardState(NamedTuple):
    """alignments: (B, K, Tk), of the step before. move: (B, K, 1), the probability of moving on. Float32 or wider."""

    alignments: Tensor
    move: Tensor


class ForwardAttention(StatefulAdditiveAttention):
    r"""Additive attention whose softmax is multiplied by the previous alignments, kept and moved forward by one step.

    .. math::
        alignments_j \propto ((1 - u) \, alignments^{before}_j + u \, alignments^{before}_{j-1}) \, \exp(scores_j),
        \quad scores_j = scale \; v \cdot \tanh(W_q \, query + W_m \, memory_j + bias)

    with u = 1/2 or, with ``transition_agent=True``,

    .. math:: u^{next} = sigmoid(w \cdot [context; query] + c)

    which is 1/2 in the first step. The initial alignments are 1 at the first step of the memory that may be attended.
    Rows are normalised, so the denominator of the softmax, which is part of the paper's y, cancels.

    Source: Zhang, Ling, Dai, "Forward attention in sequence-to-sequence acoustic modeling for speech synthesis", 2018,
    algorithms 1 and 2. The agent of the paper also reads the output of the step before, which a decoder with input
    feeding has in its query; the layer is that of ESPnet and coqui-tts. With ``channels``, scores have the location
    features of :class:`LocationSensitiveAttention`, as in ESPnet's AttForward and AttForwardTA. ESPnet's probability is
    that of staying, 1 - u. ESPnet also clamps each alignment, padding included, to at least 1e-6; this module does not.

    Numerics: the softmax is over the reachable steps, those with a prior above 1e-30, so that a row does not underflow
    if unreachable steps have much larger scores. The state is float32 or wider. If the agent leaves less than 1e-6 of
    the probability within the memory, as when it moves on from the last step, this decoding step uses u = 1/2. If no
    reachable step may be attended, alignments and context are 0.

    Args:
        query_size: size of the decoder state.
        memory_size: size of the encoder outputs.
        units: A, size of the hidden layer that scores.
        transition_agent: learn u, the probability of moving on.
        channels: output channels of the convolution of location features; None for no such features.
        kernel_size: width of that convolution, odd.
        scale: a finite number that multiplies the scores.
        bias: whether to learn a bias, initially 0.
        activation, negative_slope: in place of tanh, as for :class:`attn_kernels.BahdanauAttention`.
        backend: as for :func:`attn_kernels.additive_attention`.
        device, dtype: of the parameters; query and memory must have the same.

    Parameters: ``query_projection.weight`` (units, query_size), ``memory_projection.weight`` (units, memory_size),
    ``v`` (units,), ``bias`` (units,); with ``transition_agent`` ``transition.weight`` (1, memory_size + query_size) and
    ``transition.bias`` (1,); with ``channels`` ``location_convolution.weight`` (channels, 1, kernel_size) and
    ``location_projection.weight`` (units, channels).

    State: ``ForwardState(alignments, move)``.
    """

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        units: int,
        transition_agent: bool = False,
        channels: int | None = None,
        kernel_size: int = 31,
        scale: float = 1.0,
        *,
        bias: bool = True,
        activation: str = "tanh",
        negative_slope: float = 0.01,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = (activation, negative_slope, backend, device, dtype)
        super().__init__(query_size, memory_size, units, scale, bias, *options)
        sizes = self.memory_size + self.query_size
        self.transition: nn.Linear | None = nn.Linear(sizes, 1, **self._factory) if transition_agent else None
        self.location_convolution: nn.Conv1d | None = None
        self.location_projection: nn.Linear | None = None
        if channels is not None:
            self.location_convolution, self.location_projection = make_location_layers(
                self._name, 1, channels, kernel_size, self.units, self._factory
            )
        self._reset_scores()

    def _reset_scores(self) -> None:
        super()._reset_scores()
        for layer in (self.transition, self.location_convolution, self.location_projection):
            if layer is not None:
                layer.reset_parameters()

    def initial_state(self, memory: Memory, hypotheses: int = 1) -> ForwardState:
        dtype = wide_dtype(memory.keys.dtype)
        move = memory.keys.new_full((memory.batch_size, hypotheses, 1), 0.5, dtype=dtype)
        return ForwardState(first_step_alignments(memory, hypotheses, dtype), move)

    def _step(self, query: Tensor, memory: Memory, state: Any) -> StatefulResult:
        before, move = as_state(self._name, ForwardState, state, (memory.keys.shape[1], 1))
        extra = None
        if self.location_convolution is not None and self.location_projection is not None:
            extra = project_locations(self.location_convolution, self.location_projection, before)
        weights = _moved_on(before, None if self.transition is None else move, allowed_steps(memory))
        likely = self._align(self.make_query(query), memory, extra, weights > _NONE)
        products = weights * likely
        total = products.sum(-1, keepdim=True)
        alignments = products / torch.where(total > 0, total, 1.0)
        result = alignments.to(likely.dtype)
        context = average(result, memory, self.backend)
        if self.transition is not None:
            move = torch.sigmoid(self.transition(torch.cat([context, query], dim=2))).to(alignments.dtype)
        return StatefulResult(context, result, ForwardState(alignments, move))

    def extra_repr(self) -> str:
        return self._repr(units=self.units, transition_agent=self.transition is not None, scale=self.scale)


def _moved_on(before: Tensor, move: Tensor | None, allowed: Tensor | None) -> Tensor:
    """The prior of this step's alignments, (1 - u) before_j + u before_{j-1}; 0 in padding. move: u; None for 1/2."""
    one_later = F.pad(before, (1, 0))[..., :-1]

    def within(weights: Tensor) -> Tensor:
        return weights if allowed is None else weights.masked_fill(~allowed, 0.0)

    halves = within(0.5 * (before + one_later))
    if move is None:
        return halves
    weights = within((1 - move) * before + move * one_later)
    return torch.where(weights.sum(-1, keepdim=True) < _LEAST, halves, weights)
