"""The scores of additive attention with a gate or several score vectors: from their arguments to the op."""

from __future__ import annotations

from torch import Tensor

from . import formulas, ops
from .attending import GATED, choose_or_reference
from .checks import (
    check_dtypes,
    check_like_keys,
    check_query_keys,
    check_score_vectors,
    check_units,
)
from .scores import GatedAdditiveScore
from .types import autocast, device_type


def gated_scores(score: GatedAdditiveScore, query: Tensor, keys: Tensor, backend: str | None) -> Tensor:
    name = "additive_scores"
    check_query_keys(name, query, keys)
    check_score_vectors(name, query, score.v)
    check_units(name, query, "bias", score.bias)
    check_like_keys(name, query, keys, "gate", score.gate)
    chosen = choose_or_reference(name, backend, device_type(query), GATED)
    score = score.autocast(query)
    q, k = autocast(query, keys)
    check_dtypes(name, q, keys=k, v=score.v, bias=score.bias, gate=score.gate)
    arguments = (q if q.dim() == 3 else q.unsqueeze(1), k, *score.rows())
    op = "gated_additive_scores"
    scores = formulas.apply_formula(op, arguments) if chosen == "reference" else ops.call(op, chosen, *arguments)
    if score.vectors is not None:
        scores = scores.unflatten(1, (arguments[0].shape[1], score.vectors))
    result: Tensor = scores if q.dim() == 3 else scores.squeeze(1)
    return result
