"""Attention pooling, without a query: a sentence, a bag or an utterance becomes one vector per head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..activations import FORMULAS
from ..attending import GATED
from ..backends import choose_among
from ..checks import as_number, check_activation, check_lengths, check_mask, check_range, check_size, check_tensor
from ..errors import ArgumentValueError
from ..functional import additive_attention, dot_attention
from ..types import Attention, alignments_of, attention_mask, device_type, upcast
from .normalizers import weighted_sum


class AttentionPooling(nn.Module):
    r"""Weighted means of a memory, with weights computed from the memory alone.

    .. math:: scores_{rj} = v_r \cdot activation(W \, memory_j + b), \quad
        alignments_r = softmax_j(scores_{rj}), \quad context_r = \sum_j alignments_{rj} \, memory_j

    and with ``gated=True``

    .. math:: scores_{rj} = v_r \cdot (\tanh(W \, memory_j + b) \odot \sigma(U \, memory_j + c))

    Source: Yang et al., "Hierarchical attention networks for document classification", 2016, equations 5-7, for one
    head; Lin et al., "A structured self-attentive sentence embedding", 2017, equations 5-7, for several (their r);
    gated: Ilse, Tomczak, Welling, "Attention-based deep multiple instance learning", 2018, equation 9.

    Memory: besides the result, a bag of N rows needs its projection, (N, units), and with a gate a second one. On a GPU
    several heads or a gate need the activated product, too. With lengths or a mask, the memory is copied with zeros in
    padding.

    Args:
        memory_size: D, size of the rows.
        units: A, size of the hidden layer that scores.
        heads: R, the number of score vectors.
        gated: multiply by a gate; ``activation`` must then be "tanh".
        activation: "tanh", "relu", "leaky_relu" or "sigmoid".
        negative_slope: of "leaky_relu".
        backend: as for :func:`attn_kernels.additive_attention`.
        device, dtype: of the parameters; the memory must have the same.

    Parameters: ``memory_projection.weight`` (units, memory_size) and ``.bias`` (units,), ``v`` (heads, units); with
    ``gated`` also ``gate_projection.weight`` and ``.bias``. The scores have no bias: softmax is invariant to it.
    """

    def __init__(
        self,
        memory_size: int,
        units: int,
        heads: int = 1,
        gated: bool = False,
        activation: str = "tanh",
        *,
        negative_slope: float = 0.01,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._name = type(self).__name__
        self.memory_size: int = check_size(self._name, "memory_size", memory_size)
        self.units: int = check_size(self._name, "units", units)
        self.heads: int = check_size(self._name, "heads", heads)
        check_activation(self._name, activation, negative_slope)
        if gated and activation != "tanh":
            raise ArgumentValueError(f"{self._name}: activation must be 'tanh' with gated=True, got {activation!r}")
        self.gated = gated
        self.activation = activation
        self.negative_slope = negative_slope
        self.backend = backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.memory_projection: nn.Linear = nn.Linear(self.memory_size, self.units, **factory)
        self.gate_projection: nn.Linear | None = nn.Linear(self.memory_size, self.units, **factory) if gated else None
        self.v: nn.Parameter = nn.Parameter(torch.empty(self.heads, self.units, **factory))
        self._reset_scores()

    def reset_parameters(self) -> None:
        """Initialises all parameters as the constructor does."""
        self.memory_projection.reset_parameters()
        if self.gate_projection is not None:
            self.gate_projection.reset_parameters()
        self._reset_scores()

    def _reset_scores(self) -> None:
        bound = self.units**-0.5  # as nn.Linear(units, heads)
        nn.init.uniform_(self.v, -bound, bound)

    def forward(
        self,
        memory: Tensor,
        memory_lengths: Tensor | None = None,
        mask: Tensor | None = None,
        need_weights: bool = True,
    ) -> Attention:
        """The weighted means of each sentence or bag.

        memory: (B, Tk, memory_size), or (Tk, memory_size) for one bag without a batch axis.
        memory_lengths: (B,) int32 or int64, valid steps of each row, 0..Tk.
        mask: (B, Tk) bool, or (Tk,), True where a step may be attended. With lengths, both must allow it.
        need_weights: False to return no alignments.

        Returns ``Attention(context, alignments)``: (B, heads, memory_size) and (B, heads, Tk), without the head axis
        for one head, and without the batch axis if the memory has none. A row with nothing to attend, such as a bag of
        0 steps, gets zeros.

        Raises ValueError or TypeError if an argument does not fit the module or the others.
        """
        check_tensor(self._name, "memory", memory)
        if memory.dim() == 2:
            if memory_lengths is not None:
                raise ArgumentValueError(f"{self._name}: memory_lengths must be None for a memory without a batch")
            batched = mask[None] if isinstance(mask, Tensor) else mask
            context, alignments = self(memory[None], None, batched, need_weights)
            return Attention(context[0], None if alignments is None else alignments[0])
        if memory.dim() != 3 or memory.shape[2] != self.memory_size:
            expected = f"(B, Tk, memory_size) = (*, *, {self.memory_size}) or (*, {self.memory_size})"
            raise ArgumentValueError(f"{self._name}: memory must have shape {expected}, got {tuple(memory.shape)}")
        allowed = self._allowed(memory, memory_lengths, mask)
        if allowed is not None:
            # The op ignores padding, but the gradient of a projection sums over it: 0 * NaN would be NaN.
            memory = memory.masked_fill(~allowed[..., None], 0.0)
        return self._pool(memory, allowed, need_weights)

    if TYPE_CHECKING:
        __call__ = forward

    def _pool(self, memory: Tensor, allowed: Tensor | None, need_weights: bool) -> Attention:
        """memory: (B, Tk, D), finite in padding; allowed: (B, Tk)."""
        return self._attend(self._keys(memory), memory, allowed, need_weights)

    def _keys(self, memory: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, Tk, A): keys and gate for the additive op, or gated, activated keys (and no gate) for the dot op."""
        rows = memory.flatten(0, 1)  # a 3-D product is a view, which autograd would copy before an in-place write
        gate = None
        if self._is_additive(memory):
            keys = nn.functional.linear(rows, self.memory_projection.weight)
            if self.gate_projection is not None:
                gate = self.gate_projection(rows).unflatten(0, memory.shape[:2])
        else:
            keys = self._activate(self.memory_projection(rows))
            if self.gate_projection is not None:
                keys = keys * self.gate_projection(rows).sigmoid_()
        return keys.unflatten(0, memory.shape[:2]), gate

    def _is_additive(self, memory: Tensor) -> bool:
        """Whether the additive op applies the activation itself, so that it is never stored."""
        if self.heads == 1 and not self.gated:
            return True
        able = choose_among(GATED.backends, self.backend, device_type(memory))
        return able in GATED.backends or (able == "reference" and device_type(memory) == "cpu")

    def _activate(self, hidden: Tensor) -> Tensor:
        if self.activation == "leaky_relu":
            return nn.functional.leaky_relu_(hidden, self.negative_slope)
        in_place = {"tanh": torch.tanh_, "relu": torch.relu_, "sigmoid": torch.sigmoid_}.get(self.activation)
        return FORMULAS[self.activation](hidden, self.negative_slope) if in_place is None else in_place(hidden)

    def _attend(
        self,
        keys_and_gate: tuple[Tensor, Tensor | None],
        values: Tensor | None,
        allowed: Tensor | None,
        need_weights: bool,
    ) -> Attention:
        """The weighted means of values, (B, Tk, *), finite in padding. values None: the alignments only."""
        keys, gate = keys_and_gate
        if values is not None and torch.is_grad_enabled() and keys.requires_grad and not values.requires_grad:
            # Usually features of a frozen encoder: the op would compute a gradient of their size that nobody needs.
            weights = alignments_of(self._attend(keys_and_gate, None, allowed, True))
            return Attention(weighted_sum(weights, values), weights if need_weights else None)
        options: dict[str, Any] = {"mask": allowed, "need_weights": need_weights, "backend": self.backend}
        v = self.v.to(keys.dtype)
        if self._is_additive(keys):
            bias = self.memory_projection.bias.to(keys.dtype)
            options |= {"activation": self.activation, "negative_slope": self.negative_slope, "gate": gate}
            result = additive_attention(None, keys, values, v[0] if self.heads == 1 else v, bias, **options)
            return Attention(result.context, result.alignments)
        # The scores are dot products of v and the activated keys.
        result = dot_attention(v.expand(keys.shape[0], -1, -1), keys, values, **options)
        context, alignments = result.context, result.alignments
        if self.heads == 1:
            context = None if context is None else context[:, 0]
            alignments = None if alignments is None else alignments[:, 0]
        return Attention(context, alignments)

    def _allowed(self, memory: Tensor, memory_lengths: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Which steps may be attended: (B, Tk), or None for all."""
        if memory_lengths is not None:
            check_lengths(self._name, memory.shape[0], memory_lengths, memory=memory)
            check_range(self._name, memory_lengths, memory.shape[1])
        if mask is not None:
            check_mask(self._name, memory.shape[0], 1, memory.shape[1], mask, memory=memory)
            mask = mask[:, 0] if mask.dim() == 3 else mask
        allowed = attention_mask(memory, memory_lengths, mask)
        return None if allowed is None else allowed[:, 0]

    def extra_repr(self) -> str:
        settings: dict[str, Any] = {
            "memory_size": self.memory_size,
            "units": self.units,
            "heads": self.heads,
            "gated": self.gated,
        }
        settings["activation"] = self.activation
        if self.backend is not None:
            settings["backend"] = self.backend
        return ", ".join(f"{name}={value!r}" for name, value in settings.items())


class AttentiveStatisticsPooling(AttentionPooling):
    r"""Weighted means and standard deviations of a memory.

    .. math:: mean_r = \sum_j alignments_{rj} \, memory_j, \quad
        std_r = \sqrt{\max(\sum_j alignments_{rj} \, memory_j^2 - mean_r^2, \, eps)}

    with the alignments of :class:`AttentionPooling`. To avoid cancellation, the variance is computed from squared
    differences to the mean, and 16-bit inputs are summed in float32.

    Source: Okabe, Koshinaka, Shinoda, "Attentive statistics pooling for deep speaker embedding", 2018,
    equations 3 onwards.

    Args:
        eps: lower bound of the variance; where it applies, the gradient of the standard deviation is 0.
        others: as for :class:`AttentionPooling`.

    ``forward`` is that of :class:`AttentionPooling`, with a context of 2 memory_size: means, then standard deviations.
    A row with nothing to attend gets zeros for both.
    """

    def __init__(
        self,
        memory_size: int,
        units: int,
        heads: int = 1,
        gated: bool = False,
        activation: str = "tanh",
        *,
        eps: float = 1e-5,
        negative_slope: float = 0.01,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: dict[str, Any] = {"backend": backend, "device": device, "dtype": dtype}
        super().__init__(memory_size, units, heads, gated, activation, negative_slope=negative_slope, **options)
        self.eps: float = as_number(self._name, eps, "eps")
        if self.eps <= 0:
            raise ArgumentValueError(f"{self._name}: eps must be positive, got {eps}")

    def _pool(self, memory: Tensor, allowed: Tensor | None, need_weights: bool) -> Attention:
        (values,) = upcast(memory)
        alignments = alignments_of(self._attend(self._keys(memory), None, allowed, True))
        with torch.autocast(device_type(memory), enabled=False):
            wide = alignments.to(values.dtype)
            mean = weighted_sum(wide, values)
            # Subtracting any constant leaves the variance as it is; with the mean, nothing cancels. Heads share one.
            center = mean.detach() if self.heads == 1 else mean.detach().mean(1)
            difference = values - center[:, None]
            squares = difference.square() if difference.requires_grad else difference.square_()
            offset = mean - (center if self.heads == 1 else center[:, None])
            variance = weighted_sum(wide, squares) - offset.square()
        std = variance.clamp(min=self.eps).sqrt()
        if memory.shape[1] == 0:
            std = torch.zeros_like(std)
        elif allowed is not None:
            std = std.masked_fill(~allowed.any(1).reshape(-1, *[1] * (std.dim() - 1)), 0.0)
        return Attention(torch.cat([mean, std], dim=-1).to(memory.dtype), alignments if need_weights else None)
