"""Scores: what is particular to an attention op among its arguments.

The fields are the op's arguments after query, keys and values, in the order of its schema, so that ``*score`` is
spliced into a call. A new mechanism is a class here, its row in ops.py and formulas.py, and its kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import checks, types
from .types import Attention

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing from Python 3.11 on

_SMALL = 1 << 19  # products


class _AdditiveArguments(NamedTuple):
    v: Tensor
    bias: Tensor | None = None
    prepared: Tensor | None = None


class _ActivatedArguments(NamedTuple):
    v: Tensor
    bias: Tensor | None
    activation: int
    negative_slope: float = 0.0


class _AdditiveExtraArguments(NamedTuple):
    v: Tensor
    bias: Tensor | None
    extra: Tensor


class _ActivatedExtraArguments(NamedTuple):
    v: Tensor
    bias: Tensor | None
    extra: Tensor
    activation: int
    negative_slope: float


class _GatedAdditiveArguments(NamedTuple):
    v: Tensor
    bias: Tensor | None = None
    gate: Tensor | None = None
    activation: int = 0
    negative_slope: float = 0.0


class _DotArguments(NamedTuple):
    scale: float = 1.0


class _AdditivePackedArguments(NamedTuple):
    v: Tensor
    bias: Tensor | None
    columns: int


class _ActivatedPackedArguments(NamedTuple):
    v: Tensor
    bias: Tensor | None
    activation: int
    negative_slope: float
    columns: int


class _DotPackedArguments(NamedTuple):
    scale: float
    columns: int


class _OfUnits:
    """What scores of v (A,) and bias have in common."""

    __slots__ = ()
    name = "additive_attention"  # of the public function, for messages
    # Fields that are tensors, before the numbers; those whose gradients the backward returns, before those; whether
    # one is added to the keys.
    tensors = 2
    gradients = 2
    has_extra = False
    v: Tensor
    bias: Tensor | None

    def check(self, query: Tensor, keys: Tensor) -> None:
        """Whether types and shapes fit the query, (B, Tq, A) or (B, A), and the keys."""
        checks.check_units(self.name, query, "v", self.v)
        checks.check_units(self.name, query, "bias", self.bias)

    def autocast(self, query: Tensor) -> Self:
        """In the dtype that autocast gives the other arguments."""
        # _replace is that of the named tuples which these are a part of.
        _, v, bias = types.autocast(query, self.v, self.bias)
        cast: Self = self._replace(v=v, bias=bias)  # type: ignore[attr-defined]
        return cast

    def check_dtypes(self, query: Tensor, keys: Tensor, backend: Callable[[], str]) -> None:
        """Whether dtypes fit those of query and keys, all as autocast leaves them. backend: that is chosen."""
        checks.check_dtypes(self.name, query, v=self.v, bias=self.bias)


class _WithExtra(_OfUnits):
    """What is added to the keys, (B, Tk, A), beside v and bias. Its shape is checked where it comes in."""

    __slots__ = ()
    tensors = 3
    has_extra = True
    extra: Tensor

    def autocast(self, query: Tensor) -> Self:
        _, v, bias, extra = types.autocast(query, self.v, self.bias, self.extra)
        cast: Self = self._replace(v=v, bias=bias, extra=extra)  # type: ignore[attr-defined]
        return cast

    def check_dtypes(self, query: Tensor, keys: Tensor, backend: Callable[[], str]) -> None:
        checks.check_dtypes(self.name, query, v=self.v, bias=self.bias, extra=self.extra)


class AdditiveScore(_AdditiveArguments, _OfUnits):
    """v . tanh(query + keys + bias).

    v: (A,), score vector. bias: (A,). prepared: what ``prepare_keys`` made of the keys; it is never cast.
    """

    __slots__ = ()
    op = "additive_attention"
    tensors = 3

    def check_dtypes(self, query: Tensor, keys: Tensor, backend: Callable[[], str]) -> None:
        checks.check_dtypes(self.name, query, v=self.v, bias=self.bias)
        if self.prepared is not None:
            checks.check_prepared(self.name, keys, self.prepared, backend())

    def with_extra(self, extra: Tensor) -> AdditiveExtraScore:
        return AdditiveExtraScore(self.v, self.bias, extra)

    def packed(self, columns: int) -> AdditivePackedScore:
        return AdditivePackedScore(self.v, self.bias, columns)


class ActivatedScore(_ActivatedArguments, _OfUnits):
    """v . f(query + keys + bias), with an activation f that each pair computes: neither tanh nor sigmoid.

    v: (A,), score vector. bias: (A,). activation: its place in activations.py. negative_slope: of leaky_relu.
    """

    __slots__ = ()
    op = "activated_attention"

    def with_extra(self, extra: Tensor) -> ActivatedExtraScore:
        return ActivatedExtraScore(self.v, self.bias, extra, *self[2:])

    def packed(self, columns: int) -> ActivatedPackedScore:
        return ActivatedPackedScore(*self, columns)


class AdditiveExtraScore(_AdditiveExtraArguments, _WithExtra):
    """v . tanh(query + keys + extra + bias).

    extra: (B, Tk, A), of a step. Its gradient is that of the keys, and no result of the backward by itself. Prepared
    keys have no part in it: e^{2 (keys + extra)} takes an exponential of each element, whether e^{2 keys} is known or
    not.
    """

    __slots__ = ()
    op = "additive_attention_with_extra"


class ActivatedExtraScore(_ActivatedExtraArguments, _WithExtra):
    """v . f(query + keys + extra + bias)."""

    __slots__ = ()
    op = "activated_attention_with_extra"


class AdditivePackedScore(_AdditivePackedArguments):
    """AdditiveScore of packed keys, (N, A). columns: of the alignments, (B, Tq, columns), at least the largest length;
    0 for packed ones.
    """

    __slots__ = ()
    op = "additive_attention_packed"
    tensors = 2
    gradients = 2
    has_extra = False


class ActivatedPackedScore(_ActivatedPackedArguments):
    """ActivatedScore of packed keys."""

    __slots__ = ()
    op = "activated_attention_packed"
    tensors = 2
    gradients = 2
    has_extra = False


class GatedAdditiveScore(_GatedAdditiveArguments):
    """For each row v_r of v, v_r . (activation(query + keys + bias) * sigmoid(gate)). With options only.

    v: (R, A), score vectors, or (A,) for one, without an axis R in the results. bias: (A,). gate: (B, Tk, A).
    activation: its place in activations.py. negative_slope: of leaky_relu.
    """

    __slots__ = ()
    op = "gated_additive_attention"
    name = "additive_attention"
    tensors = 3
    gradients = 3
    has_extra = False

    @property
    def vectors(self) -> int | None:
        """R; None for one vector without that axis."""
        return self.v.shape[0] if self.v.dim() == 2 else None

    def autocast(self, query: Tensor) -> GatedAdditiveScore:
        _, v, bias, gate = types.autocast(query, self.v, self.bias, self.gate)
        return self._replace(v=v, bias=bias, gate=gate)

    def check(self, query: Tensor, keys: Tensor) -> None:
        checks.check_score_vectors(self.name, query, self.v)
        checks.check_units(self.name, query, "bias", self.bias)
        checks.check_like_keys(self.name, query, keys, "gate", self.gate)

    def check_dtypes(self, query: Tensor, keys: Tensor, backend: Callable[[], str]) -> None:
        checks.check_dtypes(self.name, query, v=self.v, bias=self.bias, gate=self.gate)

    def rows(self) -> GatedAdditiveScore:
        """With v (R, A), as the op takes it."""
        return self if self.v.dim() == 2 else GatedAdditiveScore(self.v[None], *self[1:])


class DotScore(_DotArguments):
    """scale * query . keys. scale: a finite number."""

    __slots__ = ()
    op = name = "dot_attention"
    tensors = 0
    gradients = 0
    has_extra = False

    def autocast(self, query: Tensor) -> DotScore:
        return self

    def check(self, query: Tensor, keys: Tensor) -> None:
        checks.check_scale(self.name, self.scale)

    def check_dtypes(self, query: Tensor, keys: Tensor, backend: Callable[[], str]) -> None:
        """A number fits all."""

    def packed(self, columns: int) -> DotPackedScore:
        return DotPackedScore(self.scale, columns)

    def is_small(self, query: Tensor, keys: Tensor, values: Tensor) -> bool:
        """Whether attention that needs gradients is faster as three calls of PyTorch than as one of ours.

        Below about half a million products the time is that of the calls, and autograd's nodes in C++, which an
        extension on the stable ABI cannot have, cost less than a node in Python. What does not fit together, PyTorch
        refuses, too.
        """
        return (
            torch.is_grad_enabled()
            and (query.requires_grad or keys.requires_grad or values.requires_grad)
            and query.is_cpu
            and query.dtype == torch.float32
            and query.dim() == keys.dim() == 3
            and query.numel() * keys.size(1) <= _SMALL
            and values.numel() * query.size(1) <= _SMALL
            and not is_compiling()
            and not torch.is_autocast_enabled("cpu")
        )

    def attend_small(self, query: Tensor, keys: Tensor, values: Tensor, need_weights: bool) -> Attention:
        """By PyTorch, what is small."""
        scores = torch.bmm(query, keys.mT)
        alignments = torch.softmax(scores if self.scale == 1.0 else self.scale * scores, -1)
        return Attention(torch.bmm(alignments, values), alignments if need_weights else None)


class DotPackedScore(_DotPackedArguments):
    """DotScore of packed keys."""

    __slots__ = ()
    op = "dot_attention_packed"
    tensors = 0
    gradients = 0
    has_extra = False


PackedScore = AdditivePackedScore | ActivatedPackedScore | DotPackedScore
Score = AdditiveScore | ActivatedScore | AdditiveExtraScore | ActivatedExtraScore | GatedAdditiveScore | DotScore


def clipped(scores: Tensor, clip: float | None) -> Tensor:
    """C tanh(scores), by PyTorch; None: as they are."""
    if clip is None:
        return scores
    wide: Tensor = types.upcast(scores)[0]
    return (clip * torch.tanh(wide)).to(scores.dtype)


def unit_length(x: Tensor, eps: float) -> Tensor:
    """x / |x| along the last axis; vectors that are not longer than eps stay as they are."""
    wide = x if x.dtype == torch.float64 else x.float()  # in float16, eps would be 0
    squares = torch.linalg.vecdot(wide, wide).unsqueeze(-1)
    # Dividing zero vectors by 1 and not by eps keeps their gradients from growing to 1 / eps. They are left out
    # before the root, not after it: its second derivative at 0 is NaN.
    return (wide / torch.where(squares > eps**2, squares, 1.0).sqrt()).to(x.dtype)
