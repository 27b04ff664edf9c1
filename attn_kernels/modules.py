"""Attention mechanisms as modules, with parameters: Bahdanau's, Luong's and cosine attention.

All have the same interface. ``memory()`` projects the encoder outputs once per sentence; ``forward`` is a decoding
step or, with many queries, all steps at once::

    attention = BahdanauAttention(query_size, memory_size, units)
    memory = attention.memory(encoder_outputs, memory_lengths)
    context, alignments = attention(decoder_state, memory)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .attention_module import AttentionModule
from .checks import check_clip
from .errors import ArgumentValueError
from .memory import Memory
from .scores import AdditiveScore, DotScore, Score, unit_length

_DOT = DotScore()


class BahdanauAttention(AttentionModule):
    r"""Additive attention.

    .. math:: scores_{ij} = v \cdot \tanh(W_q \, query_i + W_m \, memory_j)

    and with ``normalize=True``, weight normalisation with a learned length ``g`` and a bias:

    .. math:: scores_{ij} = g \frac{v}{\|v\|} \cdot \tanh(W_q \, query_i + W_m \, memory_j + bias)

    Source: Bahdanau, Cho, Bengio, "Neural machine translation by jointly learning to align and translate", 2015,
    appendix A.1.2. Normalised: Salimans, Kingma, "Weight normalization", 2016, section 2, in the form of GNMT.
    ``activation`` replaces tanh.

    Args:
        query_size: size of the decoder state.
        memory_size: size of the encoder outputs.
        units: A, size of the hidden layer that scores.
        normalize: learn ``g``, initially sqrt(1 / units), and ``bias``, initially 0.
        clip: C, to replace each score by C tanh(score), as in :func:`attn_kernels.additive_attention`. A clipped
            mechanism pads a packed memory, and each step computes the gradients of the whole memory.
        activation: "tanh", "relu" or "leaky_relu". Sigmoid would be no other mechanism: under softmax it is tanh with
            halved weights.
        negative_slope: of "leaky_relu", a finite number.
        backend: as in :func:`attn_kernels.additive_attention`.
        device, dtype: of the parameters; query and memory must have the same.

    Parameters: ``query_projection.weight`` (units, query_size), ``memory_projection.weight`` (units, memory_size),
    ``v`` (units,); with ``normalize`` also ``g`` () and ``bias`` (units,).
    """

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        units: int,
        normalize: bool = False,
        *,
        clip: float | None = None,
        activation: str = "tanh",
        negative_slope: float = 0.01,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(query_size, memory_size, units, backend=backend, factory={"device": device, "dtype": dtype})
        self.units = units
        self.normalize = normalize
        self._set_activation(activation, negative_slope)
        self.clip: float | None = check_clip(self._name, clip)
        self.v: nn.Parameter = self._parameter(units)
        self.g: nn.Parameter | None = self._parameter() if normalize else None
        self.bias: nn.Parameter | None = self._parameter(units) if normalize else None
        self._reset_scores()

    def _reset_scores(self) -> None:
        _reset_score_vector(self.v)
        if self.g is not None and self.bias is not None:
            nn.init.constant_(self.g, math.sqrt(1 / self.units))
            nn.init.zeros_(self.bias)

    def make_score(self, memory: Memory) -> Score:
        return self._additive_score(self.score_vector(), self.bias, memory.prepared)

    def score_vector(self) -> Tensor:
        """(A,): ``v``, or with ``normalize`` ``g v / |v|``."""
        return self.v if self.g is None else self.v * (self.g / torch.linalg.vector_norm(self.v))

    def extra_repr(self) -> str:
        return self._repr(units=self.units, normalize=self.normalize)


class LuongAttention(AttentionModule):
    r"""Multiplicative attention ("dot" and "general"), and the additive "concat" form of the same paper.

    .. math::
        \text{dot:} \; scores_{ij} = query_i \cdot memory_j \qquad
        \text{general:} \; scores_{ij} = query_i \cdot W memory_j \qquad
        \text{concat:} \; scores_{ij} = v \cdot \tanh(W [query_i; memory_j])

    Source: Luong, Pham, Manning, "Effective approaches to attention-based neural machine translation", 2015,
    section 3.1. The W of "concat" is stored as two blocks, ``query_projection`` and ``memory_projection``, so that the
    memory is projected once per sentence.

    Args:
        query_size: size of the decoder state.
        memory_size: size of the encoder outputs; for "dot" it must be ``query_size``.
        units: size of the hidden layer of "concat"; must be None for the other scores.
        score: "dot", "general" or "concat".
        scale: learn a factor ``g`` of the scores, initially 1 (TensorFlow's ``LuongAttention(scale=True)``).
        clip: as in :class:`BahdanauAttention`, applied after the factor ``g``.
        backend: as of :func:`attn_kernels.dot_attention`.
        device, dtype: of the parameters; query and memory must have the same.

    Parameters: general: ``memory_projection.weight`` (query_size, memory_size); concat: ``query_projection.weight``
    (units, query_size), ``memory_projection.weight`` (units, memory_size), ``v`` (units,); with ``scale``: ``g`` ().
    """

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        units: int | None = None,
        score: str = "general",
        scale: bool = False,
        *,
        clip: float | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if score not in ("dot", "general", "concat"):
            raise ArgumentValueError(f"LuongAttention: score must be 'dot', 'general' or 'concat', got {score!r}")
        if score == "dot" and query_size != memory_size:
            raise ArgumentValueError(
                "LuongAttention: score='dot' needs query_size = memory_size, "
                f"got {query_size} and {memory_size}; score='general' projects the memory to query_size"
            )
        if (units is not None) != (score == "concat"):
            expected = "a size" if score == "concat" else "None"
            raise ArgumentValueError(f"LuongAttention: units must be {expected} with score={score!r}, got {units!r}")
        super().__init__(
            query_size,
            memory_size,
            query_size if units is None else units,
            project_query=score == "concat",
            project_memory=score != "dot",
            backend=backend,
            factory={"device": device, "dtype": dtype},
        )
        self.units = units
        self.score = score
        self.scale = scale
        self.clip: float | None = check_clip(self._name, clip)
        self.v: nn.Parameter | None = None if units is None else self._parameter(units)
        self.g: nn.Parameter | None = self._parameter() if scale else None
        self._reset_scores()

    def _reset_scores(self) -> None:
        if self.v is not None:
            _reset_score_vector(self.v)
        if self.g is not None:
            nn.init.ones_(self.g)

    def make_score(self, memory: Memory) -> Score:
        return _DOT if self.v is None else AdditiveScore(self.score_vector(), None, memory.prepared)

    def make_query(self, state: Tensor) -> Tensor:
        if self.v is not None:
            return super().make_query(state)
        return state if self.g is None else self.g * state

    def query_factor(self) -> Tensor | None:
        return self.g if self.v is None else None  # for "concat", g is part of the score vector

    def score_vector(self) -> Tensor:
        """(A,), for "concat": ``v``, or with ``scale`` g v."""
        v = self.v
        assert v is not None  # of "concat"
        return v if self.g is None else self.g * v

    def extra_repr(self) -> str:
        units = {} if self.units is None else {"units": self.units}
        return self._repr(**units, score=self.score, scale=self.scale)


class CosineAttention(AttentionModule):
    r"""Cosine similarity times a sharpness (inverse temperature): the softmax of plain cosines, in -1..1, is too flat.

    .. math:: scores_{ij} = sharpness \; \frac{q_i \cdot m_j}{\|q_i\| \|m_j\|}

    where q and m are query and memory, or with ``units`` their projections :math:`W_q query` and :math:`W_m memory`. A
    vector with a norm of at most ``eps`` has cosine 0 with every other, and bounded gradients.

    Source: Graves, Wayne, Danihelka, "Neural Turing machines", 2014, section 3.3.1 (equations 5 and 6).

    Args:
        query_size: size of the decoder state.
        memory_size: size of the encoder outputs; without ``units`` it must be ``query_size``.
        units: size to which both are projected; None to compare them as they are.
        sharpness: factor of the cosine; its initial value if it is learned.
        learn_sharpness: whether ``sharpness`` is a parameter or fixed.
        eps: the norm up to which a vector counts as zero.
        backend: as of :func:`attn_kernels.dot_attention`.
        device, dtype: of the parameters; query and memory must have the same.

    Parameters: with ``units``: ``query_projection.weight`` (units, query_size) and ``memory_projection.weight``
    (units, memory_size); with ``learn_sharpness``: ``sharpness`` ().
    """

    sharpness: Tensor | float

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        units: int | None = None,
        sharpness: float = 10.0,
        learn_sharpness: bool = True,
        *,
        eps: float = 1e-8,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if units is None and query_size != memory_size:
            raise ArgumentValueError(
                "CosineAttention: without units, query_size must be memory_size, "
                f"got {query_size} and {memory_size}; units=... projects both to that size"
            )
        super().__init__(
            query_size,
            memory_size,
            query_size if units is None else units,
            project_query=units is not None,
            project_memory=units is not None,
            backend=backend,
            factory={"device": device, "dtype": dtype},
        )
        self.units = units
        self.learn_sharpness = learn_sharpness
        self.eps = eps
        self.initial_sharpness: float = float(sharpness)
        self.sharpness = self._parameter() if learn_sharpness else self.initial_sharpness
        self._reset_scores()

    def _reset_scores(self) -> None:
        if isinstance(self.sharpness, Tensor):
            nn.init.constant_(self.sharpness, self.initial_sharpness)

    def make_score(self, memory: Memory) -> DotScore:
        return _DOT

    def make_query(self, state: Tensor) -> Tensor:
        return self.sharpness * unit_length(super().make_query(state), self.eps)

    def query_factor(self) -> Tensor | float:
        return self.sharpness

    def query_eps(self) -> float:
        return self.eps

    def _keys(self, values: Tensor) -> Tensor:
        return unit_length(super()._keys(values), self.eps)

    def extra_repr(self) -> str:
        units = {} if self.units is None else {"units": self.units}
        sharpness = {} if self.learn_sharpness else {"sharpness": self.sharpness}
        return self._repr(**units, **sharpness, learn_sharpness=self.learn_sharpness)


def _reset_score_vector(v: Tensor) -> None:
    """Initialises v, (A,), as the weight of ``nn.Linear(A, 1)``."""
    bound = 1 / math.sqrt(v.shape[0])
    nn.init.uniform_(v, -bound, bound)
