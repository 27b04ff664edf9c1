"""The scores of additive attention with a gate or several score vectors: from the arguments to the op."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import formulas, ops
from .attending import ARGUMENT_ERRORS, GATED, SELF_CHECKING, choose_or_reference
from .backends import choose_among
from .checks import (
    check_dtypes,
    check_like_keys,
    check_query_keys,
    check_score_vectors,
    check_units,
)
from .scores import GatedAdditiveScore
from .types import autocast, device_type

NAME = "additive_scores"  # the public function, for error messages


def adds_extra(query: Tensor, backend: str | None) -> bool:
    """Whether these ops, with one score vector and no gate, are the fastest way to add ``extra`` to the keys.

    More queries share factors of keys + extra, which these ops do not make.
    """
    one = query.dim() == 2 or query.shape[1] == 1
    return one and choose_among(GATED.backends, backend, device_type(query)) in GATED.backends


def gated_scores(score: GatedAdditiveScore, query: Tensor, keys: Tensor, backend: str | None) -> Tensor:
    try:
        chosen = choose_or_reference(NAME, backend, device_type(query), GATED)
        q, k, made = query, keys, score
        if chosen not in SELF_CHECKING or is_compiling() or torch._C._is_any_autocast_enabled():
            _check(score, query, keys)
            q, k = autocast(query, keys)
            made = score.autocast(query)
        arguments = (q if q.dim() == 3 else q.unsqueeze(1), k, *made.rows())
        op = "gated_additive_scores"
        scores = formulas.apply_formula(op, arguments) if chosen == "reference" else ops.call(op, chosen, *arguments)
    except ARGUMENT_ERRORS:
        _check(score, query, keys)
        raise
    if score.vectors is not None:
        scores = scores.unflatten(1, (arguments[0].shape[1], score.vectors))
    result: Tensor = scores if q.dim() == 3 else scores.squeeze(1)
    return result


def _check(score: GatedAdditiveScore, query: Tensor, keys: Tensor) -> None:
    check_query_keys(NAME, query, keys)
    check_score_vectors(NAME, query, score.v)
    check_units(NAME, query, "bias", score.bias)
    check_like_keys(NAME, query, keys, "gate", score.gate)
    check_like_keys(NAME, query, keys, "extra", score.extra)
    score = score.autocast(query)
    query, keys = autocast(query, keys)
    check_dtypes(NAME, query, keys=keys, v=score.v, bias=score.bias, gate=score.gate, extra=score.extra)
