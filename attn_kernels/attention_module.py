"""The base module of all attention mechanisms: projections, the memory, a decoding step, and checks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .activations import ACTIVATIONS
from .attending import attend, attend_once, make_options
from .checks import check_activation, check_size, check_tensor
from .errors import ArgumentTypeError, ArgumentValueError
from .memory import Memory
from .packed_attention import attend_packed, packed_backend
from .packed_memory import is_packed, packed_rows, padding_needed
from .scores import ActivatedScore, AdditiveScore, Score
from .types import Attention, attention_mask

_ACTIVATIONS = ("tanh", "relu", "leaky_relu")  # sigmoid is tanh of halves, and a constant that softmax takes out


class AttentionModule(nn.Module):
    """The base of all mechanisms: projections, the memory of a sentence, and a decoding step.

    A mechanism defines its score (``make_score``) and how a decoder state becomes a query (``make_query``). ``forward``
    calls both. A search and the fused decoder of ``Seq2Seq`` call them, too, unless scores are clipped.

    self_contained: set to True in the body of a class whose steps may be separate graphs of autograd, so that
    ``Seq2Seq(decoder="loop")`` trains with it as one op. This has three conditions. Gradients flow only to query,
    memory, state and the parameters of the module. No tensor of a step is used outside of it, for example in a loss,
    except through its results. A step does not modify its arguments. Subclasses do not inherit it. The classes of this
    package need no declaration.
    """

    self_contained: ClassVar[bool] = False
    clip: float | None = None  # C: the score is replaced by C tanh(score)
    activation: str = "tanh"  # of an additive score
    negative_slope: float = 0.0  # of leaky_relu

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        key_size: int,
        *,
        project_query: bool = True,
        project_memory: bool = True,
        backend: str | None,
        factory: dict[str, Any],
    ) -> None:
        super().__init__()
        self._name = type(self).__name__
        self.query_size: int = check_size(self._name, "query_size", query_size)
        self.memory_size: int = check_size(self._name, "memory_size", memory_size)
        self.key_size: int = check_size(self._name, "units", key_size)
        self.backend = backend
        linear: Any = partial(nn.Linear, bias=False, **factory)
        self.query_projection: nn.Linear | None = linear(self.query_size, self.key_size) if project_query else None
        self.memory_projection: nn.Linear | None = linear(self.memory_size, self.key_size) if project_memory else None
        self._factory = factory

    def _parameter(self, *shape: int) -> nn.Parameter:
        """A new parameter, for use in a constructor, which calls ``_reset_scores`` at its end to initialise it."""
        return nn.Parameter(torch.empty(shape, **self._factory))

    def reset_parameters(self) -> None:
        """Initialises all parameters as the constructor does."""
        for projection in (self.query_projection, self.memory_projection):
            if projection is not None:
                projection.reset_parameters()
        self._reset_scores()

    def _reset_scores(self) -> None:
        """Initialises the parameters that do not belong to a projection."""

    def forward(self, query: Tensor, memory: Memory, need_weights: bool = True) -> Attention:
        """query: (B, Tq, query_size) or (B, query_size), decoder states. Returns (context, alignments).

        Raises ValueError or TypeError if query or memory do not fit the module or each other.
        """
        self._check(query, memory)
        score, made = self.make_score(memory), self.make_query(query)
        if self.clip is not None:
            options = make_options(score.name, made, None, 0.0, "softmax", self.clip)
            return attend_once(score, made, memory, options, need_weights, self.backend)
        if memory.memory_offsets is not None:
            return attend_packed(score, made, memory._packed(), need_weights, self.backend, memory)
        return attend(score, made, memory, need_weights, self.backend)

    if TYPE_CHECKING:
        __call__ = forward

    def make_score(self, memory: Memory) -> Score:
        """The score of this mechanism for a memory, with its parameters."""
        raise NotImplementedError

    def make_query(self, state: Tensor) -> Tensor:
        """The projected queries, (..., A), of decoder states, (..., query_size)."""
        projection = self.query_projection
        return state if projection is None else projection(state)

    def _set_activation(self, activation: str, negative_slope: object, additive: bool = True) -> None:
        """For a constructor. additive: whether the score has one."""
        if activation not in _ACTIVATIONS:
            expected = ", ".join(map(repr, _ACTIVATIONS))
            raise ArgumentValueError(f"{self._name}: activation must be one of {expected}, got {activation!r}")
        if not additive and activation != "tanh":
            raise ArgumentValueError(
                f"{self._name}: activation must be 'tanh', the default, with score='dot', got {activation!r}"
            )
        self.activation = activation
        self.negative_slope = check_activation(self._name, activation, negative_slope)[1]

    def _additive_score(
        self, v: Tensor, bias: Tensor | None, prepared: Tensor | None = None
    ) -> AdditiveScore | ActivatedScore:
        """v . activation(query + keys + bias)."""
        if self.activation == "tanh":
            return AdditiveScore(v, bias, prepared)
        return ActivatedScore(v, bias, ACTIVATIONS.index(self.activation), self.negative_slope)

    def query_factor(self) -> Tensor | float | None:
        """A factor of the query; None for 1."""
        return None

    def query_eps(self) -> float | None:
        """If not None, queries are normalised to length 1; those with a norm of at most this count as zero."""
        return None

    def memory(
        self,
        memory: Tensor | PackedSequence,
        memory_lengths: Tensor | None = None,
        mask: Tensor | None = None,
        memory_offsets: Tensor | None = None,
    ) -> Memory:
        """Projects the encoder outputs once per sentence; each decoding step reads the result.

        memory: (B, Tk, memory_size), encoder outputs. Or without padding: a jagged tensor (B, j, memory_size), a
            ``PackedSequence``, or (N, memory_size) with ``memory_offsets``. The result is then a packed memory if the
            backend ("cpu" or "triton") and the mechanism support it; else it is padded here, once.
        memory_lengths: (B,) int32 or int64, valid steps of each row, 0..Tk.
        mask: (B, Tk) or (B, Tq, Tk) bool, True where a step may be attended. With lengths, both must allow it.
        memory_offsets: (B + 1,) int32 or int64, where each sentence begins, as in :class:`attn_kernels.Memory`.
        """
        if memory_offsets is not None or is_packed(memory):
            name, others = f"{self._name}.memory", {"memory_lengths": memory_lengths, "mask": mask}
            rows, offsets, longest = packed_rows(name, memory, memory_offsets, self.memory_size, **others)
            if self._takes_packed() and packed_backend(self.backend, rows.device.type) is not None:
                return Memory(self._keys(rows), rows, memory_offsets=offsets, max_length=longest)
            padded = Memory(rows, rows, memory_offsets=offsets, max_length=longest).padded()
            return self.memory(padded.values, padded.memory_lengths)
        memory = cast(Tensor, memory)
        check_tensor(f"{self._name}.memory", "memory", memory)
        if memory.dim() != 3 or memory.shape[2] != self.memory_size:
            expected = f"(B, Tk, memory_size) = (*, *, {self.memory_size})"
            raise ArgumentValueError(
                f"{self._name}.memory: memory must have shape {expected}, got {tuple(memory.shape)}"
            )
        values = Memory(memory, memory, memory_lengths, mask).values  # checks lengths and mask, used below
        allowed = attention_mask(values, memory_lengths, mask)
        if allowed is not None:
            # The ops ignore padding, but the gradient of a projection sums over it: 0 * NaN would be NaN.
            values = values.masked_fill(~allowed.any(1)[..., None], 0.0)
        made = Memory(self._keys(values), values, memory_lengths, mask)
        return made if allowed is None else made.with_zero_padding()

    def __prepare_scriptable__(self) -> None:
        others = "torch.jit.trace, torch.export, torch.compile and torch.onnx.export take it"
        raise RuntimeError(f"{self._name}: torch.jit.script cannot compile a Memory; {others}")

    def _keys(self, values: Tensor) -> Tensor:
        return values if self.memory_projection is None else self.memory_projection(values)

    def _takes_packed(self) -> bool:
        return type(self).forward is AttentionModule.forward and self.clip is None

    def _check(self, query: Tensor, memory: Memory) -> None:
        if not isinstance(memory, Memory):
            self._refuse(memory, "a Memory")
        check_tensor(self._name, "memory.keys", memory.keys)
        if memory.memory_offsets is not None and not self._takes_packed():
            raise padding_needed(self._name)
        *axes, key_size = memory.keys.shape
        self._check_query(query, memory.batch_size)
        if key_size != self.key_size or memory.values.shape[-1] != self.memory_size:
            expected = f"keys {(*axes, self.key_size)} and values {(*axes, self.memory_size)}"
            got = f"{tuple(memory.keys.shape)} and {tuple(memory.values.shape)}, as of another module's memory"
            raise ArgumentValueError(f"{self._name}: memory must have {expected}, got {got}")

    def _check_query(self, query: Tensor, batch: int) -> None:
        check_tensor(self._name, "query", query)
        if query.dim() not in (2, 3) or query.shape[0] != batch or query.shape[-1] != self.query_size:
            expected = f"(B, Tq, query_size) = ({batch}, *, {self.query_size}) or ({batch}, {self.query_size})"
            raise ArgumentValueError(f"{self._name}: query must have shape {expected}, got {tuple(query.shape)}")

    def _refuse(self, memory: object, expected: str) -> NoReturn:
        made, got = f"made by {self._name}.memory(...)", type(memory).__name__
        raise ArgumentTypeError(f"{self._name}: memory must be {expected}, {made}, got {got}")

    def _repr(self, **settings: Any) -> str:
        sizes = {"query_size": self.query_size, "memory_size": self.memory_size}
        activation: dict[str, Any] = {} if self.activation == "tanh" else {"activation": self.activation}
        if self.activation == "leaky_relu":
            activation["negative_slope"] = self.negative_slope
        clip = {} if self.clip is None else {"clip": self.clip}
        backend = {} if self.backend is None else {"backend": self.backend}
        everything = {**sizes, **settings, **activation, **clip, **backend}
        return ", ".join(f"{name}={value!r}" for name, value in everything.items())
