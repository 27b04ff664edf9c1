"""Multi-head additive and dot-product attention, with projections for each head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..attending import attend
from ..attention_module import AttentionModule
from ..checks import as_number, check_size
from ..errors import ArgumentValueError
from ..memory import Memory
from ..packed_memory import is_packed
from ..scores import AdditiveScore, DotScore, Score
from ..types import Attention, alignments_of
from .normalizers import mask_queries


class HeadsMemory(NamedTuple):
    """The memory of :class:`MultiHeadAttention`: a Memory for each head, all with the same masks.

    Like a Memory it is immutable and a pytree of its tensors. The properties it shares with Memory are those of the
    first head: ``keys`` and ``values`` hold that head only.
    """

    heads: tuple[Memory, ...]

    @property
    def batch_size(self) -> int:
        return self.heads[0].batch_size

    @property
    def keys(self) -> Tensor:
        return self.heads[0].keys

    @property
    def values(self) -> Tensor:
        return self.heads[0].values

    @property
    def memory_lengths(self) -> Tensor | None:
        return self.heads[0].memory_lengths

    @property
    def mask(self) -> Tensor | None:
        return self.heads[0].mask

    def select(self, indices: Tensor) -> HeadsMemory:
        """The rows (sentences) at ``indices``, as :meth:`Memory.select`."""
        return HeadsMemory(tuple(head.select(indices) for head in self.heads))

    def to(self, *args: Any, **kwargs: Any) -> HeadsMemory:
        """A copy on another device or with another floating-point dtype; arguments as for ``Tensor.to``."""
        return HeadsMemory(tuple(head.to(*args, **kwargs) for head in self.heads))


class MultiHeadAttention(AttentionModule):
    r"""Additive or dot-product attention in H heads, whose contexts are concatenated and projected.

    .. math::
        q_{hi} = W^q_h query_i + b_h, \quad k_{hj} = W^k_h memory_j, \quad x_{hj} = W^v_h memory_j

        \text{additive:} \; scores_{hij} = scale \; v_h \cdot \tanh(q_{hi} + k_{hj}) \qquad
        \text{dot:} \; scores_{hij} = scale \; q_{hi} \cdot k_{hj}

        alignments_{hi} = softmax_j(scores_{hij}), \quad
        context_i = W^o [\sum_j alignments_{1ij} x_{1j}; \ldots; \sum_j alignments_{Hij} x_{Hj}]

    With ``tanh=True``, "dot" compares :math:`\tanh(q)` with :math:`\tanh(k)`.

    Source: the decoder attentions of ESPnet (its ``AttMultiHeadAdd`` and, with tanh, ``AttMultiHeadDot``), after
    Vaswani et al., "Attention is all you need", 2017, section 3.2.2. The parameters here are the weights of ESPnet's
    heads, stacked.

    One matrix product computes the projections of all heads; each head is then one call of the op. (Heads as rows of
    the batch would have to share one score vector, and would copy the keys in each step.)

    As the attention of a ``Seq2Seq`` decoder, its alignments, also those of hypotheses, are averaged over the heads, as
    ``torch.nn.MultiheadAttention`` does.

    Args:
        query_size: size of the decoder state.
        memory_size: size of the encoder outputs.
        units: A, size of the queries and keys of a head.
        heads: H, the number of heads.
        score: "additive" or "dot".
        value_size: size of the values of a head; None for ``units``.
        output_size: size of the context; None for ``memory_size``.
        scale: factor of the scores; None for 1 / sqrt(units), ESPnet's for both scores.
        tanh: apply tanh to queries and keys; with "dot" only.
        backend: as for :func:`attn_kernels.additive_attention`.
        device, dtype: of the parameters; query and memory must have the same.

    Parameters: ``query_projection.weight`` (H units, query_size) and ``.bias``, ``memory_projection.weight``
    (H units, memory_size), ``value_projection.weight`` (H value_size, memory_size), ``output_projection.weight``
    (output_size, H value_size); "additive": ``v`` (H, units).
    """

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        units: int,
        heads: int = 4,
        score: str = "additive",
        *,
        value_size: int | None = None,
        output_size: int | None = None,
        scale: float | None = None,
        tanh: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            query_size, memory_size, units, project_query=False, project_memory=False, backend=backend, factory=factory
        )
        if score not in ("additive", "dot"):
            raise ArgumentValueError(f"{self._name}: score must be 'additive' or 'dot', got {score!r}")
        if tanh and score != "dot":
            raise ArgumentValueError(f"{self._name}: tanh must be False with score={score!r}, which has its own")
        self.units: int = self.key_size
        self.heads: int = check_size(self._name, "heads", heads)
        self.value_size: int = check_size(self._name, "value_size", units if value_size is None else value_size)
        self.output_size: int = check_size(
            self._name, "output_size", memory_size if output_size is None else output_size
        )
        self.score = score
        self.scale: float = self.units**-0.5 if scale is None else as_number(self._name, scale)
        self.tanh = tanh
        width = self.heads * self.units
        self.query_projection: nn.Linear = nn.Linear(self.query_size, width, **factory)
        self.memory_projection: nn.Linear = nn.Linear(self.memory_size, width, bias=False, **factory)
        self.value_projection: nn.Linear = nn.Linear(
            self.memory_size, self.heads * self.value_size, bias=False, **factory
        )
        self.output_projection: nn.Linear = nn.Linear(
            self.heads * self.value_size, self.output_size, bias=False, **factory
        )
        self.v: nn.Parameter | None = (
            nn.Parameter(torch.empty(self.heads, self.units, **factory)) if score == "additive" else None
        )
        self._reset_scores()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.value_projection.reset_parameters()
        self.output_projection.reset_parameters()

    def _reset_scores(self) -> None:
        if self.v is not None:
            bound = self.units**-0.5  # as nn.Linear(units, 1)
            nn.init.uniform_(self.v, -bound, bound)

    def memory(  # type: ignore[override]
        self,
        memory: Tensor | PackedSequence,
        memory_lengths: Tensor | None = None,
        mask: Tensor | None = None,
        memory_offsets: Tensor | None = None,
    ) -> HeadsMemory:
        """Projects the encoder outputs once per sentence; arguments as for :meth:`AttentionModule.memory`."""
        if memory_offsets is not None or is_packed(memory):  # the base class pads it and calls this method again
            return cast(HeadsMemory, super().memory(memory, memory_lengths, mask, memory_offsets))
        made = super().memory(memory, memory_lengths, mask)
        keys = _heads_first(made.keys, self.heads)
        values = _heads_first(self.value_projection(made.values), self.heads)
        return HeadsMemory(tuple(Memory(k, x, memory_lengths, mask) for k, x in zip(keys, values, strict=True)))

    def _keys(self, values: Tensor) -> Tensor:
        keys = self.memory_projection(values)
        return torch.tanh(keys) if self.tanh else keys

    def forward(  # type: ignore[override]
        self, query: Tensor, memory: HeadsMemory, need_weights: bool = True, average: bool = False
    ) -> Attention:
        """A decoding step.

        query: (B, Tq, query_size) or (B, query_size), decoder states. Returns (context, alignments): (B, Tq,
        output_size) and (B, H, Tq, Tk), without Tq for a 2-D query. average: return the mean of the alignments over
        the heads, without the axis H. A query with nothing to attend gets zeros.

        Raises ValueError or TypeError if query or memory do not fit the module or each other.
        """
        self._check_heads(query, memory)
        queries = self.query_projection(mask_queries(query, memory.heads[0]))
        queries = torch.tanh(queries) if self.tanh else queries
        parts = queries.unflatten(-1, (self.heads, self.units)).unbind(-2)
        results = [
            attend(self._score(h), parts[h], memory.heads[h], need_weights, self.backend) for h in range(self.heads)
        ]
        context = self.output_projection(torch.cat([result.context for result in results], dim=-1))
        if not need_weights:
            return Attention(context, None)
        alignments = torch.stack([alignments_of(result) for result in results], dim=1)
        return Attention(context, alignments.mean(1) if average else alignments)

    if TYPE_CHECKING:

        def __call__(  # type: ignore[override]
            self, query: Tensor, memory: HeadsMemory, need_weights: bool = True, average: bool = False
        ) -> Attention: ...

    def _score(self, head: int) -> Score:
        return DotScore(self.scale) if self.v is None else AdditiveScore(self.scale * self.v[head])

    def _check_heads(self, query: Tensor, memory: HeadsMemory) -> None:
        if not isinstance(memory, HeadsMemory):
            self._refuse(memory, "a HeadsMemory")
        heads, keys, values = len(memory.heads), memory.heads[0].keys, memory.heads[0].values
        self._check_query(query, keys.shape[0])
        if (heads, keys.shape[2], values.shape[2]) != (self.heads, self.units, self.value_size):
            expected = f"{self.heads} heads with keys of {self.units} and values of {self.value_size}"
            got = f"{heads}, {keys.shape[2]} and {values.shape[2]}, as of another module's memory"
            raise ArgumentValueError(f"{self._name}: memory must have {expected}, got {got}")

    def extra_repr(self) -> str:
        settings: dict[str, Any] = {"units": self.units, "heads": self.heads, "score": self.score}
        settings |= {"value_size": self.value_size, "output_size": self.output_size, "scale": self.scale}
        return self._repr(**settings, tanh=self.tanh)


def _heads_first(x: Tensor, heads: int) -> tuple[Tensor, ...]:
    """(B, T, H * n) -> H contiguous tensors (B, T, n)."""
    parts: tuple[Tensor, ...] = x.unflatten(-1, (heads, -1)).movedim(-2, 0).contiguous().unbind(0)
    return parts
