"""Local attention: a window of the memory, around the number of the decoding step or around a predicted position."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attending import attend_arrays
from ..checks import check_lengths, check_masks, check_size, check_tensor, shape_of
from ..errors import ArgumentTypeError, ArgumentValueError
from ..memory import Memory
from ..modules import _reset_score_vector
from ..scores import DotScore, Score
from ..types import Attention, Masks, alignments_of, attention_mask, wide_dtype
from .energy import EnergyAttention, check_choice, check_number
from .reading import read, weighted_sum, without_autocast
from .stateful import StatefulResult
from .steps import result_dtype

MODES = ("local-m", "local-p")


class LocalState(NamedTuple):
    """step: (B, K, 1) int64, the number of the next decoding step, counted from 0."""

    step: Tensor


def window_mask(
    centres: Tensor, radius: float | tuple[float, float], memory_steps: int, memory_lengths: Tensor | None = None
) -> Tensor:
    """The steps that are at most ``radius`` from a centre; each row and hypothesis has its own centre.

    Args:
        centres: (B, K), positions, integer or not; step j is at position j, counted from 0.
        radius: a number >= 0, or two: how far before and after the centre.
        memory_steps: Tk.
        memory_lengths: (B,) int32 or int64; steps beyond the length are in no window.

    Returns:
        (B, K, Tk) bool, a ``mask`` for the attention functions.

    Raises:
        ArgumentValueError: a shape or number does not fit. ArgumentTypeError: a dtype or type does not.
    """
    name = "window_mask"
    check_tensor(name, "centres", centres)
    if centres.dim() != 2:
        raise ArgumentValueError(f"{name}: centres must have shape (B, K), got {shape_of(centres)}")
    if centres.dtype == torch.bool or centres.is_complex():
        raise ArgumentTypeError(f"{name}: centres must be numbers, got {centres.dtype}")
    sides = radius if isinstance(radius, tuple) else (radius, radius)
    if len(sides) != 2:
        raise ArgumentValueError(f"{name}: radius must be a number or two, before and after, got {radius}")
    before, after = (check_number(name, "radius", side, 0.0) for side in sides)
    if centres.dtype in (torch.float16, torch.bfloat16):
        centres = centres.float()
    steps = torch.arange(memory_steps, device=centres.device)
    distances = steps - centres[..., None]
    mask = (distances >= -before) & (distances <= after)
    if memory_lengths is None:
        return mask
    check_lengths(name, centres.shape[0], memory_lengths, centres=centres)
    return mask & (steps < memory_lengths[:, None, None])


class LocalAttention(EnergyAttention):
    r"""Attention to a window of 2 D + 1 steps of the memory around a position p.

    .. math::
        \text{local-m:} \; p_i = i \qquad
        \text{local-p:} \; p_i = S \, \sigma(v_p \cdot \tanh(W_p \, query_i))

    where S is the number of steps of the sentence. The softmax is over the window [p - D, p + D]. local-p then
    multiplies by a Gaussian, through which p is learned, without normalising again:

    .. math::
        alignments_{ij} = softmax_{j \in window}(scores_{ij}) \exp(-\frac{(j - p_i)^2}{2 \sigma^2}), \quad
        \sigma = D / 2

    Source: Luong, Pham, Manning, "Effective approaches to attention-based neural machine translation", 2015, section
    3.2, equations 9 and 10. Steps are counted from 0. A window of local-m beyond the end of a sentence is empty: its
    alignments and context are zeros.

    Args:
        query_size: size of the decoder state.
        memory_size: size of the encoder outputs.
        units: A, size of the hidden layer of additive scores; None, or query_size, with score="dot".
        window: D, in steps.
        mode: "local-p", predictive, or "local-m", monotonic.
        score: "additive", or "dot" (the "general" of the paper).
        normalize, activation, negative_slope: as for :class:`MonotonicAttention`.
        backend: as for :func:`attn_kernels.additive_attention`.
        device, dtype: of the parameters; query and memory must have the same.

    Parameters: ``memory_projection.weight`` (A, memory_size); additive: ``query_projection.weight`` (A, query_size),
    ``v`` (A,); with ``normalize`` ``g`` (), additive also ``bias`` (A,); local-p: ``position_projection.weight``
    (A, query_size), W_p, and ``position_v`` (A,).

    State: :class:`LocalState`, the number of the step; local-p ignores it.
    """

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        units: int | None = None,
        window: int = 10,
        mode: str = "local-p",
        *,
        score: str = "additive",
        normalize: bool = False,
        activation: str = "tanh",
        negative_slope: float = 0.01,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: dict[str, Any] = {"score": score, "normalize": normalize, "backend": backend}
        options |= {"activation": activation, "negative_slope": negative_slope}
        options["factory"] = {"device": device, "dtype": dtype}
        super().__init__(query_size, memory_size, units, **options)
        check_choice(self._name, "mode", mode, MODES)
        self.window: int = check_size(self._name, "window", window)
        self.mode = mode
        predicts = mode == "local-p"
        self.position_projection: nn.Linear | None = (
            nn.Linear(query_size, self.units, bias=False, **self._factory) if predicts else None
        )
        self.position_v: nn.Parameter | None = self._parameter(self.units) if predicts else None
        self._reset_scores()

    def _reset_scores(self) -> None:
        super()._reset_scores()
        if self.position_v is not None:
            _reset_score_vector(self.position_v)

    def initial_state(self, memory: Memory, hypotheses: int = 1) -> LocalState:
        shape = (*self._check_axes(memory, hypotheses), 1)
        return LocalState(memory.keys.new_zeros(shape, dtype=torch.int64))

    def _step(self, query: Tensor, memory: Memory, state: LocalState) -> StatefulResult:
        check_masks(self._name, query, memory.keys, memory.memory_lengths, memory.mask)
        if state[0].dim() != 3 or state[0].shape[2] != 1:
            raise ArgumentValueError(f"{self._name}: state must have step (B, K, 1), got {tuple(state[0].shape)}")
        step = state[0][..., 0]
        next_state = LocalState(state[0] + 1)
        if self.position_projection is None:
            result = self._windowed(query, memory, step)
            return StatefulResult(result.context, alignments_of(result), next_state)
        allowed = attention_mask(memory.keys, memory.memory_lengths, memory.mask)
        if allowed is not None:  # a NaN in a query that may attend nothing would reach the gradient of W_p
            query = query.masked_fill(~allowed.any(2)[..., None], 0.0)
        centres = self._positions(query, memory, allowed)
        softmax = alignments_of(self._windowed(query, memory, centres.detach(), alone=True))
        with without_autocast(query):
            distances = torch.arange(softmax.shape[2], device=centres.device) - centres[..., None]
            alignments = softmax.to(centres.dtype) * torch.exp(distances.square() * (-2.0 / self.window**2))
            context = weighted_sum(alignments, read(memory, allowed, query, self.backend, reads_keys=False))
        dtype = result_dtype(query)
        return StatefulResult(context.to(dtype), alignments.to(dtype), next_state)

    def _positions(self, query: Tensor, memory: Memory, allowed: Tensor | None) -> Tensor:
        """(B, K), in float32 or wider."""
        projection, v = self.position_projection, self.position_v
        assert projection is not None and v is not None  # of local-p
        hidden = projection(query)
        wide = wide_dtype(hidden.dtype)
        position = torch.sigmoid((torch.tanh(hidden.to(wide)) * v.to(wide)).sum(-1))
        steps = memory.keys.shape[1]
        if memory.mask is not None and allowed is not None and steps:
            # A sentence ends with the last step that may be attended.
            numbers = torch.arange(1, steps + 1, device=position.device)
            return position * torch.where(allowed, numbers, 0).amax(-1)
        return position * (steps if memory.memory_lengths is None else memory.memory_lengths[:, None])

    def _windowed(self, query: Tensor, memory: Memory, centres: Tensor, alone: bool = False) -> Attention:
        """Softmax over the allowed steps of the windows. alone: return only the alignments, without a context."""
        mask = window_mask(centres, self.window, memory.keys.shape[1])
        if memory.mask is not None:
            mask = mask & (memory.mask if memory.mask.dim() == 3 else memory.mask[:, None])
        score: Score
        if self.v is None:
            score, query = DotScore(1.0), query if self.g is None else self.g * query
        else:
            score, query = self._additive_score(self.score_vector(), self.bias), self.make_query(query)
        masks = Masks(memory.memory_lengths, mask)
        memory = memory.keys_alone() if alone else memory
        inputs = (query, memory.keys, memory.values)
        return attend_arrays(score, *inputs, masks, True, self.backend, memory)

    def extra_repr(self) -> str:
        return self._repr(**self._score_settings(), window=self.window, mode=self.mode)
