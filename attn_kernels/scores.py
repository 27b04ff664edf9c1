"""Scores: the arguments in which attention ops differ, as named tuples.

The fields are the op's arguments after query, keys and values, in the order of its schema, so that a call can unpack
``*score``. A new mechanism is a class here, its rows in ops.py and formulas.py, and its kernels.
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

_SMALL = 1 << 19  # multiply-adds


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
    extra: Tensor | None = None
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
    """Base of the scores with a score vector v (A,) and a bias."""

    __slots__ = ()
    name = "additive_attention"  # the public function, for error messages
    tensors = 2  # number of leading fields that are tensors
    gradients = 2  # number of leading fields whose gradients the backward returns
    has_extra = False  # whether a field is added to the keys
    v: Tensor
    bias: Tensor | None

    @property
    def addends(self) -> tuple[Tensor | None, ...]:
        """The arguments of the op with options between score_bias and the numbers: what is added to the keys."""
        return (None,)

    def check(self, query: Tensor, keys: Tensor) -> None:
        """Checks types and shapes against the query, (B, Tq, A) or (B, A), and the keys."""
        checks.check_units(self.name, query, "v", self.v)
        checks.check_units(self.name, query, "bias", self.bias)

    def autocast(self, query: Tensor) -> Self:
        """A copy with tensors in autocast's dtype, as query, keys and values are cast."""
        # _replace comes from the named tuple of the subclass.
        _, v, bias = types.autocast(query, self.v, self.bias)
        cast: Self = self._replace(v=v, bias=bias)  # type: ignore[attr-defined]
        return cast

    def check_dtypes(self, query: Tensor, keys: Tensor, backend: Callable[[], str]) -> None:
        """Checks dtypes against query and keys, after autocast. backend: returns the chosen backend."""
        checks.check_dtypes(self.name, query, v=self.v, bias=self.bias)


class _WithExtra(_OfUnits):
    """Base of the scores that also add a tensor ``extra``, (B, Tk, A), to the keys. The caller checks its shape."""

    __slots__ = ()
    tensors = 3
    has_extra = True
    extra: Tensor

    @property
    def addends(self) -> tuple[Tensor | None, ...]:
        return (self.extra,)

    def autocast(self, query: Tensor) -> Self:
        _, v, bias, extra = types.autocast(query, self.v, self.bias, self.extra)
        cast: Self = self._replace(v=v, bias=bias, extra=extra)  # type: ignore[attr-defined]
        return cast

    def check_dtypes(self, query: Tensor, keys: Tensor, backend: Callable[[], str]) -> None:
        checks.check_dtypes(self.name, query, v=self.v, bias=self.bias, extra=self.extra)


class AdditiveScore(_AdditiveArguments, _OfUnits):
    """v . tanh(query + keys + bias).

    v: (A,), score vector. bias: (A,). prepared: result of ``prepare_keys`` for these keys; it is never cast.
    """

    __slots__ = ()
    op = "additive_attention"
    with_options = "additive_attention_with_options"
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
    """v . f(query + keys + bias), with an activation f other than tanh and sigmoid: it does not factor, so each pair
    computes it.

    v: (A,), score vector. bias: (A,). activation: its index in activations.py. negative_slope: of leaky_relu.
    """

    __slots__ = ()
    op = "activated_attention"
    with_options = "activated_attention_with_options"

    def with_extra(self, extra: Tensor) -> ActivatedExtraScore:
        return ActivatedExtraScore(self.v, self.bias, extra, *self[2:])

    def packed(self, columns: int) -> ActivatedPackedScore:
        return ActivatedPackedScore(*self, columns)


class AdditiveExtraScore(_AdditiveExtraArguments, _WithExtra):
    """v . tanh(query + keys + extra + bias).

    extra: (B, Tk, A), of one decoding step. Its gradient equals that of the keys, so the backward does not return it
    separately. Prepared keys are of no use here: e^{2 (keys + extra)} needs an exponential per element in any case.
    """

    __slots__ = ()
    op = "additive_attention_with_extra"
    with_options = "additive_attention_with_options"


class ActivatedExtraScore(_ActivatedExtraArguments, _WithExtra):
    """v . f(query + keys + extra + bias)."""

    __slots__ = ()
    op = "activated_attention_with_extra"
    with_options = "activated_attention_with_options"


class AdditivePackedScore(_AdditivePackedArguments):
    """AdditiveScore for packed keys, (N, A).

    columns: width of the alignments, (B, Tq, columns), at least the largest length; 0 for packed alignments.
    """

    __slots__ = ()
    op = "additive_attention_packed"
    tensors = 2
    gradients = 2
    has_extra = False


class ActivatedPackedScore(_ActivatedPackedArguments):
    """ActivatedScore for packed keys."""

    __slots__ = ()
    op = "activated_attention_packed"
    tensors = 2
    gradients = 2
    has_extra = False


class GatedAdditiveScore(_GatedAdditiveArguments):
    """v_r . (activation(query + keys + extra + bias) * sigmoid(gate)) for each row v_r of v.

    It has only the op with options. v: (R, A), score vectors, or (A,) for one, without an axis R in the results. bias:
    (A,). gate, extra: (B, Tk, A); the gradient of extra equals that of the keys. activation: its index in
    activations.py. negative_slope: of leaky_relu.
    """

    __slots__ = ()
    op = with_options = "gated_additive_attention"
    name = "additive_attention"
    tensors = 4
    gradients = 3
    has_extra = False

    @property
    def addends(self) -> tuple[Tensor | None, ...]:
        return (self.extra,)

    @property
    def vectors(self) -> int | None:
        """R; None for a single vector, (A,)."""
        return self.v.shape[0] if self.v.dim() == 2 else None

    def autocast(self, query: Tensor) -> GatedAdditiveScore:
        _, v, bias, gate, extra = types.autocast(query, self.v, self.bias, self.gate, self.extra)
        return self._replace(v=v, bias=bias, gate=gate, extra=extra)

    def check(self, query: Tensor, keys: Tensor) -> None:
        checks.check_score_vectors(self.name, query, self.v)
        checks.check_units(self.name, query, "bias", self.bias)
        checks.check_like_keys(self.name, query, keys, "gate", self.gate)
        checks.check_like_keys(self.name, query, keys, "extra", self.extra)

    def check_dtypes(self, query: Tensor, keys: Tensor, backend: Callable[[], str]) -> None:
        checks.check_dtypes(self.name, query, v=self.v, bias=self.bias, gate=self.gate, extra=self.extra)

    def rows(self) -> GatedAdditiveScore:
        """This score with v as (R, A), as the op takes it."""
        return self if self.v.dim() == 2 else GatedAdditiveScore(self.v[None], *self[1:])


class DotScore(_DotArguments):
    """scale * query . keys. scale: a finite number."""

    __slots__ = ()
    op = name = "dot_attention"
    with_options = "dot_attention_with_options"
    tensors = 0
    gradients = 0
    has_extra = False
    addends: tuple[Tensor | None, ...] = ()

    def autocast(self, query: Tensor) -> DotScore:
        return self

    def check(self, query: Tensor, keys: Tensor) -> None:
        checks.check_scale(self.name, self.scale)

    def check_dtypes(self, query: Tensor, keys: Tensor, backend: Callable[[], str]) -> None:
        """No tensors, nothing to check."""

    def packed(self, columns: int) -> DotPackedScore:
        return DotPackedScore(self.scale, columns)

    def is_small(self, query: Tensor, keys: Tensor, values: Tensor) -> bool:
        """Whether attention with gradients is faster as three PyTorch ops than as our single op.

        Below about half a million multiply-adds, call overhead dominates. PyTorch's autograd nodes are in C++ and cost
        less than our node in Python (the stable ABI offers no C++ nodes). PyTorch checks the shapes itself.
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
        """The attention as three PyTorch ops, for calls that ``is_small``."""
        scores = torch.bmm(query, keys.mT)
        alignments = torch.softmax(scores if self.scale == 1.0 else self.scale * scores, -1)
        return Attention(torch.bmm(alignments, values), alignments if need_weights else None)


class DotPackedScore(_DotPackedArguments):
    """DotScore for packed keys."""

    __slots__ = ()
    op = "dot_attention_packed"
    tensors = 0
    gradients = 0
    has_extra = False


PackedScore = AdditivePackedScore | ActivatedPackedScore | DotPackedScore
Score = AdditiveScore | ActivatedScore | AdditiveExtraScore | ActivatedExtraScore | GatedAdditiveScore | DotScore


def clipped(scores: Tensor, clip: float | None) -> Tensor:
    """C tanh(scores) in PyTorch; clip None: the scores unchanged."""
    if clip is None:
        return scores
    wide: Tensor = types.upcast(scores)[0]
    return (clip * torch.tanh(wide)).to(scores.dtype)


def unit_length(x: Tensor, eps: float) -> Tensor:
    """x / |x| along the last axis; vectors with a norm of at most eps are returned unchanged."""
    wide = x if x.dtype == torch.float64 else x.float()  # in float16, eps would be 0
    squares = torch.linalg.vecdot(wide, wide).unsqueeze(-1)
    # Short vectors are divided by 1, not by eps, which would scale their gradients by 1 / eps. They are replaced before
    # the square root, whose second derivative at 0 would be NaN.
    return (wide / torch.where(squares > eps**2, squares, 1.0).sqrt()).to(x.dtype)
