"""Keras, with its torch backend: ``keras.layers.AdditiveAttention``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ...functional import additive_attention
from ..adapter import Fused, NotSupported, run
from ..masks import mask_without_empty_rows
from ..registry import adapts


@adapts(
    "keras.src.layers.attention.additive_attention:AdditiveAttention",
    library="Keras (torch backend)",
    versions="3.15.0",
    sources=("bf6a8d305ef2",),
)
class FusedAdditiveAttention(Fused):
    r"""scores_ij = sum(scale tanh(query_i + key_j)), without projections.

    Source: Bahdanau, Cho, Bengio, "Neural machine translation by jointly learning to align and translate", 2015,
    appendix A.1.2, as ``keras.layers.AdditiveAttention`` documents it.

    Not supported, so that the original runs: float64, dropout in training, more than three axes, masks within
    torch.compile, and a mask under which a query may attend nothing. (Keras then subtracts 1e9 from all scores of the
    query, without effect.) Values are ignored where the mask is False, even if they are NaN. Pickle and Keras's own
    saving write the original layer.
    """

    scale: Any
    use_scale: bool
    dropout: float
    _validate_inputs: Any

    def call(
        self,
        inputs: Any,
        mask: Any = None,
        training: bool = False,
        return_attention_scores: bool = False,
        use_causal_mask: bool = False,
    ) -> Any:
        options = (mask, training, return_attention_scores, use_causal_mask)
        return run(self, super().call, (inputs, *options), {})  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super(Fused, self).forward(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return super(Fused, self).__reduce_ex__(protocol)

    def attend(
        self, inputs: Any, mask: Any, training: bool, return_attention_scores: bool, use_causal_mask: bool
    ) -> Any:
        self._validate_inputs(inputs=inputs, mask=mask)
        query, values, *rest = inputs
        keys = rest[0] if rest else values
        if not all(isinstance(x, Tensor) and x.dim() == 3 and x.device.type != "meta" for x in (query, keys, values)):
            return NotSupported("inputs that are not tensors in three axes")
        if query.dtype == torch.float64:
            return NotSupported("float64, of which Keras's matmul makes float32")
        if training and self.dropout > 0:
            return NotSupported("dropout of the alignments")
        query_mask, value_mask = (mask[0], mask[1]) if mask else (None, None)
        allowed: Any = None
        if value_mask is not None or use_causal_mask:
            if is_compiling():
                return NotSupported("a mask within torch.compile")
            allowed = _allowed(self, value_mask, use_causal_mask, query.shape[1], keys)
            if isinstance(allowed, NotSupported):
                return allowed
        v = self.scale.value if self.use_scale else query.new_ones(query.shape[2])
        context, alignments = additive_attention(
            query, keys, values, v, mask=allowed, need_weights=return_attention_scores
        )
        if query_mask is not None:
            context = torch.where(query_mask.unsqueeze(-1), context, 0.0)
        return (context, alignments) if return_attention_scores else context


def _allowed(module: Any, value_mask: Any, causal: bool, queries: int, keys: Tensor) -> Tensor | NotSupported | None:
    """(B, Tk), or (B, Tq, Tk) for a causal mask, True = attend; None: all."""
    batch, steps = keys.shape[:2]
    if value_mask is not None and not (
        isinstance(value_mask, Tensor) and value_mask.dtype == torch.bool and value_mask.shape == (batch, steps)
    ):
        return NotSupported("a mask of another kind")
    allowed = value_mask
    if causal:
        past = torch.ones(queries, steps, dtype=torch.bool, device=keys.device).tril()
        allowed = past.expand(batch, -1, -1) if allowed is None else past & allowed.unsqueeze(1)
    assert allowed is not None  # one of them is given
    return mask_without_empty_rows(module, allowed, lambda x: x, wait=True)
