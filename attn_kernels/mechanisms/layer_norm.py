"""Additive attention with layer normalisation before the tanh."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..attention_module import AttentionModule
from ..checks import as_number
from ..errors import ArgumentValueError
from ..memory import Memory
from ..modules import _reset_score_vector
from ..types import Attention, autocast, upcast
from .normalizers import Normalizer, check_normalizer, mask_queries, normalize, weighted_sum
from .recompute import recompute

_CHUNK_BYTES = 1 << 24  # of a tensor (B, queries, Tk, A); a chunk needs a few of these


class LayerNormBahdanauAttention(AttentionModule):
    r"""Additive attention with layer normalisation of the hidden layer, over the units of each pair (i, j).

    .. math::
        x_{ij} = W_q \, query_i + W_m \, memory_j, \quad
        scores_{ij} = v \cdot \tanh\left(gain \, \frac{x_{ij} - mean(x_{ij})}{\sqrt{var(x_{ij}) + eps}} + shift\right)

    Source: Ba, Kiros, Hinton, "Layer normalization", 2016, section 3, in additive attention as in Sockeye and Marian.

    **This is not a fused kernel.** Mean and variance of a pair are cheap, since mean(q + k) = mean q + mean k and
    var(q + k) = var q + var k + 2 cov(q, k), where the covariances are a matrix product. But r_ij = 1 / sqrt(var)
    differs for each pair and is inside the tanh: e^(2 r_ij (q + k)) does not factor into a term of the query and a term
    of the step, as e^(2 (q + k)) does. So the scores are computed in PyTorch, for a chunk of queries at a time, and
    recomputed in the backward. That is the arithmetic of the eager formula with one more forward, but without a tensor
    of (B, Tq, Tk, A): intermediate tensors have 16 MiB, or the size of the keys.

    A step that no query may attend is padding and may hold NaN; with a mask (B, Tq, Tk), a step that only some queries
    may attend must be finite.

    Args:
        query_size: size of the decoder state.
        memory_size: size of the encoder outputs.
        units: A, size of the hidden layer that scores.
        eps: added to the variance.
        normalizer: as for :func:`normalize`.
        device, dtype: of the parameters; query and memory must have the same.

    Parameters: ``query_projection.weight`` (units, query_size), ``memory_projection.weight`` (units, memory_size),
    ``v``, ``gain`` (initially 1) and ``shift`` (initially 0), each (units,).
    """

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        units: int,
        eps: float = 1e-5,
        normalizer: Normalizer = "softmax",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(query_size, memory_size, units, backend=None, factory={"device": device, "dtype": dtype})
        self.eps: float = as_number(self._name, eps, "eps")
        if self.eps <= 0:
            raise ArgumentValueError(f"{self._name}: eps must be positive, got {eps}")
        check_normalizer(self._name, normalizer)
        self.units = units
        self.normalizer = normalizer
        self.v: nn.Parameter = self._parameter(units)
        self.gain: nn.Parameter = self._parameter(units)
        self.shift: nn.Parameter = self._parameter(units)
        self._reset_scores()

    def _reset_scores(self) -> None:
        _reset_score_vector(self.v)
        nn.init.ones_(self.gain)
        nn.init.zeros_(self.shift)

    def forward(self, query: Tensor, memory: Memory, need_weights: bool = True) -> Attention:
        """query: (B, Tq, query_size) or (B, query_size), decoder states. Returns (context, alignments).

        Raises ValueError or TypeError if query or memory do not fit the module or each other.
        """
        self._check(query, memory)
        made = self.make_query(mask_queries(query, memory))
        scores = self.scores(made if made.dim() == 3 else made[:, None], memory.keys)
        scores = scores if query.dim() == 3 else scores[:, 0]
        alignments = normalize(scores, memory.memory_lengths, memory.mask, self.normalizer)
        return Attention(weighted_sum(alignments, memory.values), alignments if need_weights else None)

    def scores(self, query: Tensor, keys: Tensor) -> Tensor:
        """query: (B, Tq, A); keys: (B, Tk, A), both projected. Returns (B, Tq, Tk)."""
        query, keys, v, gain, shift = autocast(query, keys, self.v, self.gain, self.shift)
        wide = upcast(query, keys, v, gain, shift)
        row = max(1, keys.numel() * wide[1].element_size())
        wide_query: Tensor = wide[0]
        chunks = wide_query.split(max(1, _CHUNK_BYTES // row), dim=1)
        if len(chunks) == 1:
            return _scores(self.eps, *wide).to(query.dtype)
        parts = [recompute(partial(_scores, self.eps), chunk, *wide[1:]) for chunk in chunks]
        return torch.cat(parts, dim=1).to(query.dtype)

    def extra_repr(self) -> str:
        return self._repr(units=self.units, eps=self.eps, normalizer=self.normalizer)


def _scores(eps: float, query: Tensor, keys: Tensor, v: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    hidden = query[:, :, None] + keys[:, None]
    hidden = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], gain, shift, eps)
    return torch.tanh(hidden) @ v
