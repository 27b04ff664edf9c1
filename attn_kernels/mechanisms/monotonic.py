"""Monotonic attention: each decoding step scans the memory from where the previous one stopped."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_tensor, shape_of
from ..errors import ArgumentTypeError, ArgumentValueError
from ..types import DTYPES, upcast
from .energy import ChoosingAttention, check_choice
from .reading import Source
from .steps import AlignmentsState, recurrence, shifted

MODES = ("recursive", "parallel", "hard")
_LEAST_PRODUCT = 1e-10  # of TensorFlow Addons


def monotonic_alignments(p_choose: Tensor, previous: Tensor, mode: str = "recursive") -> Tensor:
    r"""The distribution over the step at which the scan stops, from the probabilities of stopping.

    .. math::
        q_j = (1 - p_{j-1}) q_{j-1} + previous_j, \quad alignments_j = p_j q_j

    where q_j is the probability of reaching step j, and q before the first step is 0. The probability of stopping
    nowhere is lost: the alignments sum to at most the sum of ``previous``, not to 1.

    Source: Raffel, Luong, Liu, Weiss, Eck, "Online and linear-time attention by enforcing monotonic alignments", 2017,
    section 2; the modes are those of ``monotonic_attention`` of TensorFlow Addons.

    Args:
        p_choose: (..., Tk), in 0..1.
        previous: (..., Tk), the alignments of the step before; all weight on the first step, 1 0 0 ..., at first.
        mode: "recursive" computes the recursion above: exact. "parallel" is TensorFlow's closed form,
            :math:`p \, c \, cumsum(previous / \max(c, 10^{-10}))` where c is the exclusive cumulative product of
            1 - p. It is too small where c falls below 1e-10, after steps with p near 1 or after many steps. Over many
            decoding steps on a memory of 1000 steps nearly all the probability is lost.
            "hard" requires 0 or 1 in both: it stops at the first step with p = 1 from the previous one on. The modes
            take similar times: the recursion takes log2 Tk passes.

    Returns:
        (..., Tk) in the dtype of the arguments; computed in float32, of float64 in float64. Gradients flow to both.

    Raises:
        ArgumentValueError: a shape or the mode does not fit. ArgumentTypeError: a dtype or type does not.
    """
    name = "monotonic_alignments"
    check_tensor(name, "p_choose", p_choose)
    check_tensor(name, "previous", previous)
    check_choice(name, "mode", mode, MODES)
    if p_choose.dim() < 1 or p_choose.shape != previous.shape:
        expected = f"(..., Tk) = {shape_of(p_choose)}" if p_choose.dim() else "(..., Tk)"
        raise ArgumentValueError(f"{name}: previous must have shape {expected}, got {shape_of(previous)}")
    if p_choose.dtype not in DTYPES or previous.dtype != p_choose.dtype:
        got = f"{p_choose.dtype} and {previous.dtype}"
        raise ArgumentTypeError(f"{name}: p_choose and previous must have one floating-point dtype, got {got}")
    p, before = upcast(p_choose, previous)
    if mode == "recursive":
        return (p * recurrence(shifted(1.0 - p), before)).to(p_choose.dtype)
    if mode == "parallel":
        # Factors are clamped to the smallest normal number: the logarithm of 0, and a quotient by it, are not finite.
        logarithms = torch.log(torch.clamp(1.0 - p, torch.finfo(p.dtype).tiny, 1.0))
        products = torch.exp(torch.cumsum(shifted(logarithms), -1))
        arrivals = products * torch.cumsum(before / torch.clamp(products, _LEAST_PRODUCT, 1.0), -1)
        return (p * arrivals).to(p_choose.dtype)
    p = p * torch.cumsum(before, -1)
    return (p * torch.cumprod(shifted(1.0 - p, 1.0), -1)).to(p_choose.dtype)


class MonotonicAttention(ChoosingAttention):
    r"""Monotonic attention: the memory is scanned from left to right, and no decoding step goes back.

    A decoding step starts where the previous one stopped, and stops at step j with probability

    .. math::
        p_{ij} = \sigma(energy(query_i, memory_j) + r + noise \; \epsilon_{ij}), \quad \epsilon \sim N(0, 1)

    Its alignments are the distribution of where it stops, :func:`monotonic_alignments`; they sum to at most 1.

    .. math::
        \text{additive:} \; energy = v \cdot \tanh(W_q query + W_m memory) \qquad
        \text{dot:} \; energy = query \cdot W_m memory

    With ``normalize=True``: :math:`g \frac{v}{\|v\|} \cdot \tanh(W_q query + W_m memory + bias)`, or g times the dot.

    Source: Raffel, Luong, Liu, Weiss, Eck, "Online and linear-time attention by enforcing monotonic alignments", 2017,
    section 2; ``BahdanauMonotonicAttention`` and ``LuongMonotonicAttention`` of TensorFlow Addons.

    Args:
        query_size: size of the decoder state.
        memory_size: size of the encoder outputs.
        units: A, size of the hidden layer of additive energies; None, or query_size, with score="dot".
        mode: "recursive", exact, or "parallel", TensorFlow's, for training; "hard" for decoding: see
            :func:`monotonic_alignments`. None for "recursive". ``module.mode`` may be set at any time. Hard choices
            stop where the energy plus r is above 0, and have no gradient.
        noise: standard deviation of Gaussian noise added to the energies, in training mode only. It is drawn from
            PyTorch's default generator.
        score_bias_init: initial value of r; None for 0. Negative for long memories, so that not all the probability
            is used up at the beginning.
        score: "additive" or "dot".
        normalize: learn ``g``; additive: initially sqrt(1 / units), with a ``bias``, initially 0; dot: initially 1.
        activation, negative_slope: of additive energies, in place of tanh: as for
            :class:`attn_kernels.BahdanauAttention`.
        backend: as for :func:`attn_kernels.additive_scores`.
        device, dtype: of the parameters; query and memory must have the same.

    Parameters: ``memory_projection.weight`` (A, memory_size), ``score_bias`` (), r; additive:
    ``query_projection.weight`` (A, query_size), ``v`` (A,); with ``normalize``: ``g`` (), additive also ``bias`` (A,).

    State: :class:`AlignmentsState`, the alignments of the step before; at first all weight is on the first step.
    """

    modes: ClassVar[tuple[str, ...]] = MODES  # the first is the default
    default_score_bias: ClassVar[float] = 0.0

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        units: int | None = None,
        mode: str | None = None,
        noise: float = 0.0,
        score_bias_init: float | None = None,
        *,
        score: str = "additive",
        normalize: bool = False,
        activation: str = "tanh",
        negative_slope: float = 0.01,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        mode = self.modes[0] if mode is None else mode
        bias = self.default_score_bias if score_bias_init is None else score_bias_init
        options: dict[str, Any] = {"score": score, "normalize": normalize, "backend": backend}
        options |= {"activation": activation, "negative_slope": negative_slope}
        options["factory"] = {"device": device, "dtype": dtype}
        super().__init__(query_size, memory_size, units, mode, noise, bias, **options)
        self._reset_scores()

    def _alignments(self, query: Tensor, source: Source, state: AlignmentsState) -> tuple[Tensor, AlignmentsState]:
        p_choose = self._choices(self.make_query(query), source)
        alignments = monotonic_alignments(p_choose, self._previous(state, source.keys).to(p_choose.dtype), self.mode)
        return alignments, AlignmentsState(alignments)
