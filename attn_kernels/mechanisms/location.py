"""Location-sensitive attention: scores depend on a convolution of the previous alignments."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..memory import Memory
from ..types import wide_dtype
from .additive import StatefulAdditiveAttention
from .alignments import INITIAL, as_state, check_initial
from .location_features import AlignmentFilters, make_location_layers, project_locations
from .stateful import StatefulResult


class LocationState(NamedTuple):
    """alignments: (B, K, Tk), of the step before."""

    alignments: Tensor


class CumulativeLocationState(NamedTuple):
    """alignments: (B, K, Tk), of the step before. cumulative: (B, K, Tk), the sum of all, float32 or wider."""

    alignments: Tensor
    cumulative: Tensor


class LocationSensitiveAttention(StatefulAdditiveAttention):
    r"""Additive attention with convolutional features of the previous alignments.

    .. math::
        scores_j = scale \; v \cdot \tanh(W_q \, query + W_m \, memory_j + U f_j + bias), \quad
        f = F * alignments^{before}, \quad alignments = softmax(scores)

    where F is a convolution along the memory. With ``cumulative=True`` it has two input channels: the alignments of the
    step before, and the sum of the alignments of all steps so far.

    Source: Chorowski, Bahdanau, Serdyuk, Cho, Bengio, "Attention-based models for speech recognition", 2015, sections
    2.1 and 2.2 (equations 8 and 9); ``scale`` is the sharpening of section 2.3. Cumulative: Shen et al., "Natural TTS
    synthesis by conditioning WaveNet on mel spectrogram predictions", 2018, section 2.2, in the form of NVIDIA's
    Tacotron 2, which has no bias. Gradients flow through the alignments of the steps before; detach the state to stop
    them.

    Args:
        query_size: size of the decoder state.
        memory_size: size of the encoder outputs.
        units: A, size of the hidden layer that scores.
        channels: number of output channels of the convolution F.
        kernel_size: width of F, odd, so that it is centred on the step.
        cumulative: the convolution also reads the sum of all alignments so far.
        scale: a finite number that multiplies the scores.
        bias: whether to learn a bias, initially 0.
        activation, negative_slope: in place of tanh, as for :class:`attn_kernels.BahdanauAttention`.
        initial: alignments before the first step: "zeros", or "uniform" over the steps that may be attended (ESPnet).
        backend: as for :func:`attn_kernels.additive_attention`.
        device, dtype: of the parameters; query and memory must have the same.

    Parameters: ``query_projection.weight`` (units, query_size), ``memory_projection.weight`` (units, memory_size),
    ``location_convolution.weight`` (channels, 1 or, with ``cumulative``, 2, kernel_size),
    ``location_projection.weight`` (units, channels), ``v`` (units,), ``bias`` (units,).

    State: ``LocationState(alignments)``, or ``CumulativeLocationState(alignments, cumulative)``.
    """

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        units: int,
        channels: int = 32,
        kernel_size: int = 31,
        cumulative: bool = False,
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
        self.cumulative = cumulative
        self.initial = initial
        self.location_convolution: nn.Conv1d
        self.location_projection: nn.Linear
        self.location_convolution, self.location_projection = make_location_layers(
            self._name, 2 if cumulative else 1, channels, kernel_size, self.units, self._factory
        )
        self._reset_scores()

    def _reset_scores(self) -> None:
        super()._reset_scores()
        self.location_convolution.reset_parameters()
        self.location_projection.reset_parameters()

    def initial_state(self, memory: Memory, hypotheses: int = 1) -> LocationState | CumulativeLocationState:
        dtype = memory.keys.dtype
        first = INITIAL[self.initial](memory, hypotheses, dtype)
        return CumulativeLocationState(first, first.to(wide_dtype(dtype))) if self.cumulative else LocationState(first)

    def _alignment_filters(self, state: LocationState | CumulativeLocationState) -> AlignmentFilters:
        weight = self.location_projection.weight @ self.location_convolution.weight.flatten(1)
        weight = weight.unflatten(1, self.location_convolution.weight.shape[1:])
        total = state.cumulative.squeeze(1) if isinstance(state, CumulativeLocationState) else None
        return AlignmentFilters(weight, state.alignments.squeeze(1), total)

    def _step(self, query: Tensor, memory: Memory, state: Any) -> StatefulResult:
        steps = memory.keys.shape[1]
        if self.cumulative:
            state = as_state(self._name, CumulativeLocationState, state, (steps, steps))
        else:
            state = as_state(self._name, LocationState, state, (steps,))
        extra = project_locations(self.location_convolution, self.location_projection, *state)
        context, alignments = self._attend(self.make_query(query), memory, extra)
        if not self.cumulative:
            return StatefulResult(context, alignments, LocationState(alignments))
        return StatefulResult(context, alignments, CumulativeLocationState(alignments, state.cumulative + alignments))

    def extra_repr(self) -> str:
        return self._repr(units=self.units, cumulative=self.cumulative, scale=self.scale, initial=self.initial)
