"""Pointer networks: attention whose result is a distribution over the steps of the memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..attention_module import AttentionModule
from ..checks import as_number, check_clip, check_size
from ..errors import ArgumentValueError
from ..functional import additive_attention, additive_scores
from ..memory import Memory
from ..modules import _reset_score_vector
from ..scores import clipped
from ..types import upcast
from .normalizers import allowed_pairs, mask_queries, mask_scores


class PointerAttention(AttentionModule):
    r"""The log-probability of each step of the memory, by additive scores.

    .. math::
        u_{ij} = v \cdot \tanh(W_1 \, memory_j + W_2 \, query_i), \quad
        result_{ij} = \log softmax_j(u_{ij} / temperature)

    With ``clip`` C, :math:`C \tanh(u_{ij})` replaces :math:`u_{ij}`. With ``glimpses``, the query first attends to the
    memory that number of times. The score of a glimpse has the same form and its own parameters, and its context
    becomes the new query:

    .. math:: query_i \leftarrow \sum_j softmax_j(v' \cdot \tanh(W_1' \, memory_j + W_2' \, query_i)) \, memory_j

    Source: Vinyals, Fortunato, Jaitly, "Pointer networks", 2015, equation 3. Glimpses: Vinyals, Bengio, Kudlur, "Order
    matters: sequence to sequence for sets", 2016, section 4, in the form of Bello, Pham, Le, Norouzi, Bengio, "Neural
    combinatorial optimization with reinforcement learning", 2017, appendix A.1; there, too, temperature and clip
    (appendix A.2, equations 15 and 16).

    A step that no query may point to is padding and may hold NaN; with a mask (B, Tq, Tk), a step that only some
    queries may point to must be finite.

    Args:
        query_size: size of the decoder state; with glimpses it must be ``memory_size``.
        memory_size: size of the encoder outputs.
        units: A, size of the hidden layer that scores.
        glimpses: how many times a query attends to the memory before it points.
        clip: C, which bounds the scores to -C..C; None for no bound.
        temperature: above 1 for a flatter distribution.
        backend: as for :func:`attn_kernels.additive_attention`.
        device, dtype: of the parameters; query and memory must have the same.

    Parameters: ``query_projection.weight`` (units, query_size), ``memory_projection.weight`` (units, memory_size),
    ``v`` (units,); with glimpses, the same three with the prefix ``glimpse_``.
    """

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        units: int,
        glimpses: int = 0,
        clip: float | None = None,
        temperature: float = 1.0,
        *,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(query_size, memory_size, units, backend=backend, factory={"device": device, "dtype": dtype})
        self.glimpses: int = check_size(self._name, "glimpses", glimpses, least=0)
        if self.glimpses and query_size != memory_size:
            raise ArgumentValueError(
                f"{self._name}: query_size must be memory_size with glimpses, whose result is the next query, "
                f"got {query_size} and {memory_size}"
            )
        self.clip: float | None = check_clip(self._name, clip)
        self.temperature: float = as_number(self._name, temperature, "temperature")
        if self.temperature <= 0:
            raise ArgumentValueError(f"{self._name}: temperature must be positive, got {self.temperature}")
        self.units: int = self.key_size
        self.v: nn.Parameter = self._parameter(units)
        if self.glimpses:
            self.glimpse_query_projection: nn.Linear = nn.Linear(
                self.query_size, self.units, bias=False, **self._factory
            )
            self.glimpse_memory_projection: nn.Linear = nn.Linear(
                self.memory_size, self.units, bias=False, **self._factory
            )
            self.glimpse_v: nn.Parameter = self._parameter(units)
            self.key_size: int = 2 * self.units  # the keys of the pointer, then those of the glimpses
        self._reset_scores()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.glimpses:
            self.glimpse_query_projection.reset_parameters()
            self.glimpse_memory_projection.reset_parameters()

    def _reset_scores(self) -> None:
        _reset_score_vector(self.v)
        if self.glimpses:
            _reset_score_vector(self.glimpse_v)

    def forward(self, query: Tensor, memory: Memory) -> Tensor:  # type: ignore[override]
        """query: (B, Tq, query_size) or (B, query_size), decoder states. Returns (B, Tq, Tk) or (B, Tk).

        The result has the dtype of the query. It is -inf for steps that may not be attended. A query with nothing to
        point to has -inf everywhere, and contributes nothing to gradients.

        Raises ValueError or TypeError if query or memory do not fit the module or each other.
        """
        self._check(query, memory)
        query = mask_queries(query, memory)
        for _ in range(self.glimpses):
            query = self._glimpse(query, memory)
        made, keys = self.make_query(query), memory.keys[..., : self.units]
        scores = additive_scores(made, keys, self.v, backend=self.backend)
        (wide,) = upcast(scores)
        wide = clipped(wide, self.clip)  # not rounded to 16 bits before the softmax
        if self.temperature != 1.0:
            wide = wide / self.temperature
        allowed = allowed_pairs(scores, memory.memory_lengths, memory.mask)
        if allowed is None:
            return torch.log_softmax(wide, dim=-1).to(scores.dtype)
        result = torch.log_softmax(mask_scores(wide, allowed), dim=-1)
        return result.masked_fill(~allowed, float("-inf")).to(scores.dtype)

    if TYPE_CHECKING:

        def __call__(self, query: Tensor, memory: Memory) -> Tensor: ...  # type: ignore[override]

    def _glimpse(self, query: Tensor, memory: Memory) -> Tensor:
        return additive_attention(
            self.glimpse_query_projection(query),
            memory.keys[..., self.units :],
            memory.values,
            self.glimpse_v,
            memory_lengths=memory.memory_lengths,
            mask=memory.mask,
            need_weights=False,
            backend=self.backend,
        ).context

    def _keys(self, values: Tensor) -> Tensor:
        keys = super()._keys(values)
        return torch.cat([keys, self.glimpse_memory_projection(values)], dim=-1) if self.glimpses else keys

    def extra_repr(self) -> str:
        settings = {"units": self.units, "glimpses": self.glimpses, "clip": self.clip, "temperature": self.temperature}
        return self._repr(**settings)
