"""Attention over packed keys and values: the steps of all sentences one after the other, and no padding.

The public functions in ``functional.py`` call these functions for jagged keys or ``memory_offsets``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import ops, packing
from .attending import ARGUMENT_ERRORS, attend_arrays, new, to_result
from .backends import choose, choose_among
from .checks import check_dtypes
from .errors import ArgumentValueError
from .memory_gradient import should_defer
from .packed_memory import PackedMemory, check_offsets, check_query
from .scores import ActivatedScore, AdditiveScore, DotScore, Score
from .types import Attention, Options, autocast, device_type

if TYPE_CHECKING:
    from .memory import Memory


def given_options(options: Options, need_log_total: bool) -> dict[str, object]:
    """The options by name. An option with its default value (for numbers, 0) is None."""
    numbers = {name: number or None for name, number in zip(Options._fields[1:], options[1:], strict=True)}
    return dict(score_bias=options.score_bias, **numbers, need_log_total=need_log_total or None)


def _check(score: Score, query: Tensor, memory: PackedMemory, backend: str | None) -> None:
    check_query(score.name, query, memory)
    score.check(query, memory.keys)
    check_offsets(score.name, memory)
    score = score.autocast(query)
    query, keys, values = autocast(query, memory.keys, memory.values)
    check_dtypes(score.name, query, keys=keys, values=values)
    score.check_dtypes(query, keys, lambda: choose(backend, query.device.type))


def packed_backend(backend: str | None, device_type: str) -> str | None:
    """The backend with kernels for packed memories; None if there is none and the memory has to be padded."""
    chosen = choose_among(("triton", "cpu"), backend, device_type)
    return None if chosen == "reference" else chosen


def attend_packed(
    score: Score,
    query: Tensor,
    memory: PackedMemory,
    need_weights: bool,
    backend: str | None,
    gathered_by: Memory | None = None,
) -> Attention:
    """Runs the op of a score on a packed memory, or on a padded copy if the backend has no kernels for packed ones.

    gathered_by: the Memory that holds the arrays, if their gradients may be deferred; see memory_gradient.py.
    """
    keys, values, offsets, max_length = memory

    def longest() -> int:
        if max_length is not None:
            return max_length
        return packing.longest(offsets) if gathered_by is None else gathered_by._longest()

    if values is None and not need_weights:
        raise ArgumentValueError(f"{score.name}: need_weights must be True without values: nothing else is returned")
    try:
        chosen = packed_backend(backend, device_type(query))
        if chosen is None:
            _check(score, query, memory, backend)
            columns = longest()
            keys = packing.pad(keys, offsets, columns)
            values = None if values is None else packing.pad(values, offsets, columns)
            masks = (packing.lengths(offsets), None)
            return attend_arrays(score, query, keys, values, masks, need_weights, backend)
        if chosen != "cpu" or is_compiling():  # the CPU kernels check their arguments themselves
            _check(score, query, memory, backend)
        q, k, x = query, keys, keys.new_empty((keys.shape[0], 0)) if values is None else values
        if torch._C._is_any_autocast_enabled():
            score, (q, k, x) = score.autocast(query), autocast(q, k, x)
        if q.dim() == 2:
            q = q.unsqueeze(1)
        columns = 0  # packed alignments
        is_same = gathered_by is not None and k is keys and x is values
        is_deferred = is_same and should_defer(chosen, (q, k, x), None)
        if need_weights or is_deferred:  # a deferred gradient joins the alignments of steps along the query axis
            columns = max(1, longest())
        if gathered_by is not None and is_deferred and isinstance(score, AdditiveScore | ActivatedScore | DotScore):
            made = gathered_by.gradient()
            result = made.attend(score.packed(columns), chosen, q, (offsets,), need_weights)
        else:
            own, numbers = score[: score.gradients], score[score.tensors :]
            result = ops.call(f"{score.op}_packed", chosen, q, k, x, *own, *numbers, columns, offsets, need_weights)
        context, alignments = to_result(result, query.dim(), need_weights)
    except ARGUMENT_ERRORS:
        _check(score, query, memory, backend)
        raise
    if alignments is not None and columns == 1 and keys.shape[0] == 0:  # nothing to attend
        alignments = alignments[..., :0]
    attention: Attention = new(Attention, (None if values is None else context, alignments))
    return attention
