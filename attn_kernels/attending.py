"""From the arguments of an attention to its op: checks, the choice of backend, autocast, and the shape of the results.

The public functions in ``functional.py`` build a score from their arguments and call the functions here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import formulas, ops
from .backends import choose, choose_among
from .checks import (
    as_number,
    check_clip,
    check_dtypes,
    check_extra,
    check_masks,
    check_query_keys,
    check_score_bias,
    check_tensor,
    check_values,
)
from .errors import ArgumentValueError
from .memory_gradient import is_worth_deferring, should_defer
from .scores import ActivatedScore, AdditiveScore, DotScore, GatedAdditiveScore, Score
from .types import NORMALIZERS, Attention, AttentionWithLogTotal, Masks, Options, autocast, device_type, on_one_device

if TYPE_CHECKING:
    from .memory import Memory

Inputs = tuple[Tensor, Tensor, Tensor | None]  # query, keys, values
MaskPair = tuple[Tensor | None, Tensor | None]  # memory_lengths, mask: Masks, or a plain tuple, which is cheaper
new: Callable[..., Any] = tuple.__new__  # makes a named tuple, at a third of the cost of its constructor
ADD_BEFOREHAND = ("cuda",)  # backends whose kernels do not add ``extra``: they get keys + extra
SELF_CHECKING = ("cpu", "cuda")  # backends that check the arguments themselves: see checks.py
# Errors that a bad argument may raise in the dispatcher or a kernel, or in Python if it is not a tensor.
ARGUMENT_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError)


def attend(score: Score, query: Tensor, memory: Memory, need_weights: bool, backend: str | None) -> Attention:
    """A step on a memory. Its gradient of the memory may be deferred and joined with others: see memory_gradient.py."""
    masks = (memory.memory_lengths, memory.mask)
    return attend_arrays(score, query, memory.keys, memory.values, masks, need_weights, backend, memory)


def attend_arrays(
    score: Score,
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    masks: MaskPair,
    need_weights: bool,
    backend: str | None,
    memory: Memory | None = None,
) -> Attention:
    """Runs the op of a score. memory: the Memory that holds keys and values, if their gradients may be deferred."""
    memory_lengths, mask = masks
    without_context = values is None
    if values is None:
        values = _empty_values(score.name, query, keys, need_weights)
    try:
        if (
            isinstance(score, DotScore)
            and backend is None
            and memory_lengths is None
            and mask is None
            and score.is_small(query, keys, values)
            and not (memory is not None and is_worth_deferring(query, keys, values))
        ):
            attention = score.attend_small(query, keys, values, need_weights)
            return _alignments_alone(attention) if without_context else attention
        device = device_type(query)
        chosen = choose(backend, device)
        if chosen not in SELF_CHECKING or is_compiling():
            _check(score, query, keys, values, masks, chosen)
        elif device != "cpu" and not on_one_device(query, keys, values, memory_lengths, mask, *score[: score.tensors]):
            raise ArgumentValueError  # raised again below, with a full message
        q, k, x = query, keys, values
        if torch._C._is_any_autocast_enabled() and device != "meta" and torch.is_autocast_enabled(device):
            q, k, x = autocast(query, keys, values)
            score = score.autocast(query)
        op = type(score).op  # Dynamo of torch 2.10 does not see a class's attribute through a named tuple
        if chosen == "reference":
            result = formulas.apply_formula(op, (q, k, x, *score, memory_lengths, mask, need_weights))
            attention = result if need_weights else Attention(result.context, None)
        else:
            axes = q.dim()
            if axes == 2:
                q = q.unsqueeze(1)
            if memory is not None and k is keys and x is values and should_defer(chosen, (q, k, x), mask):
                result = memory.gradient().attend(score, chosen, q, masks, need_weights)
            else:
                result = ops.call(op, chosen, q, k, x, *score, memory_lengths, mask, need_weights)
            attention = new(Attention, result) if need_weights and axes == 3 else to_result(result, axes, need_weights)
    except ARGUMENT_ERRORS:
        _check(score, query, keys, values, masks, backend)
        raise
    return _alignments_alone(attention) if without_context else attention


def attend_with_extra(
    score: AdditiveScore | ActivatedScore,
    inputs: Inputs,
    extra: Tensor,
    masks: MaskPair,
    need_weights: bool,
    backend: str | None,
    memory: Memory | None = None,
) -> Attention:
    """Like attend_arrays, with ``extra``, (B, Tk, A), added to the keys: in the kernel, or before it in CUDA C++."""
    query, keys, values = inputs
    check_extra(score.name, query, keys, extra)
    if choose(backend, device_type(query)) in ADD_BEFOREHAND:
        if isinstance(score, AdditiveScore):
            score = score._replace(prepared=None)  # it was computed from the keys without extra
        return attend_arrays(score, query, keys + extra, values, masks, need_weights, backend)
    return attend_arrays(score.with_extra(extra), *inputs, masks, need_weights, backend, memory)


def attend_once(
    score: Score,
    query: Tensor,
    memory: Memory,
    options: Options,
    need_weights: bool,
    backend: str | None,
) -> Attention:
    """A step with options on a memory that is not packed. It computes the gradients of the memory in its backward."""
    masks = Masks(memory.memory_lengths, memory.mask)
    inputs = (query, memory.keys, memory.values)
    return attend_with_options(score, inputs, masks, options, need_weights, False, backend)


def attend_with_options(
    score: Score,
    inputs: Inputs,
    masks: MaskPair,
    options: Options,
    need_weights: bool,
    need_log_total: bool,
    backend: str | None,
) -> Attention:
    """Runs the op of a score with options. Returns an ``AttentionWithLogTotal`` if ``need_log_total`` is set.

    With several score vectors, v (R, A), results have an axis R before the last.
    """
    query, keys, values = inputs
    attended = _empty_values(score.name, query, keys, need_weights) if values is None else values
    try:
        device = device_type(query)
        gated = isinstance(score, GatedAdditiveScore)
        vectors = score.vectors if isinstance(score, GatedAdditiveScore) else None
        score_bias = options.score_bias
        chosen = choose_or_reference(score.name, backend, device, GATED if gated else OPTIONS)
        if chosen not in SELF_CHECKING or is_compiling() or torch._C._is_any_autocast_enabled():
            _check_with_options(score, query, keys, attended, masks, score_bias, backend)
            query, keys, attended, score_bias = autocast(query, keys, attended, score_bias)
            score = score.autocast(query)
        elif vectors is not None and score_bias is not None:  # the kernels see Tq R rows and cannot check its shape
            check_score_bias(score.name, query, keys, score_bias, vectors)
        axes = query.dim()
        if axes == 2:
            query = query.unsqueeze(1)
            score_bias = None if score_bias is None else score_bias.unsqueeze(1)
        if isinstance(score, GatedAdditiveScore):
            made: Score = score.rows()
            op = made.op
        else:
            op, made = f"{type(score).op}_with_options", score
        if vectors is not None and score_bias is not None:
            score_bias = score_bias.repeat_interleave(vectors, 1) if score_bias.dim() == 3 else score_bias.flatten(1, 2)
        own, numbers = (
            made[: made.gradients],
            made[made.gradients if gated else made.tensors :],
        )  # extra, after score_bias
        arguments = (query, keys, attended, *own, score_bias, *numbers, *options[1:], *masks, need_weights)
        results = formulas.apply_formula(op, arguments) if chosen == "reference" else ops.call(op, chosen, *arguments)
    except ARGUMENT_ERRORS:
        _check_with_options(score, *inputs[:2], attended, masks, options.score_bias, backend)
        raise
    context, alignments, log_total = results
    if values is None:
        context = None
    if not need_weights:
        alignments = None
    if vectors is not None or axes == 2:
        found = [context, alignments, log_total]
        if vectors is not None:
            found = [None if x is None else x.unflatten(1, (query.shape[1], vectors)) for x in found]
        if axes == 2:
            found = [None if x is None else x.squeeze(1) for x in found]
        context, alignments, log_total = found
    if need_log_total:
        return cast(Attention, AttentionWithLogTotal(context, alignments, log_total))
    attention: Attention = new(Attention, (context, alignments))
    return attention


class Kernels(NamedTuple):
    """A feature that only some backends have kernels for. what: its name in the error for a backend without them."""

    what: str
    backends: tuple[str, ...]  # the first one that can run is used


OPTIONS = Kernels("score_bias, dropout_p, normalizer, clip and need_log_total", ("triton", "cpu"))
GATED = Kernels("a gate or several score vectors", ("triton", "cpu"))


def choose_or_reference(name: str, backend: str | None, device_type: str, kernels: Kernels) -> str:
    """A backend that has the kernels, or else the reference. A named backend without the kernels raises an error."""
    found = choose_among(kernels.backends, backend, device_type)
    if found is None and backend is not None:
        raise ArgumentValueError(f"{name}: backend {backend!r} has no kernels for {kernels.what} yet")
    return found or "reference"


def make_options(
    name: str, query: Tensor, score_bias: Tensor | None, dropout_p: float, normalizer: str, clip: float | None
) -> Options:
    """Checks the options and returns them, with a seed if there is dropout."""
    if normalizer not in NORMALIZERS:
        others = "attn_kernels.mechanisms.normalize and NormalizedAttention take others, and functions"
        raise ArgumentValueError(f"{name}: normalizer must be 'softmax' or 'sigmoid', got {normalizer!r}; {others}")
    dropout_p = as_number(name, dropout_p, "dropout_p")
    if not 0 <= dropout_p < 1:
        raise ArgumentValueError(f"{name}: dropout_p must be at least 0 and below 1, got {dropout_p}")
    seed = None
    if dropout_p > 0:
        check_tensor(name, "query", query)
        seed = torch.randint(1 << 62, (), device=query.device)
    return Options(score_bias, dropout_p, NORMALIZERS.index(normalizer), check_clip(name, clip) or 0.0, seed)


def _check(
    score: Score,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    masks: MaskPair,
    backend: str | None,
) -> None:
    check_query_keys(score.name, query, keys)
    check_values(score.name, query, keys, values)
    score.check(query, keys)
    check_masks(score.name, query, keys, *masks)
    score = score.autocast(query)
    query, keys, values = autocast(query, keys, values)
    check_dtypes(score.name, query, keys=keys, values=values)
    score.check_dtypes(query, keys, lambda: choose(backend, query.device.type))


def _check_with_options(
    score: Score,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    masks: MaskPair,
    score_bias: Tensor | None,
    backend: str | None,
) -> None:
    _check(score, query, keys, values, masks, backend)
    vectors = score.vectors if isinstance(score, GatedAdditiveScore) else None
    check_score_bias(score.name, query, keys, score_bias, vectors)


def _empty_values(name: str, query: Tensor, keys: Tensor, need_weights: bool) -> Tensor:
    """Values of size 0, for a call that returns only the alignments."""
    if not need_weights:
        raise ArgumentValueError(f"{name}: need_weights must be True without values: nothing else would be returned")
    check_query_keys(name, query, keys)
    return keys.new_empty((*keys.shape[:2], 0))


def _alignments_alone(attention: Attention) -> Attention:
    """The result of a call with ``values=None``: the context is None, against the type of the field."""
    return Attention(cast("Tensor", None), attention.alignments)


def to_result(result: Tensor | tuple[Tensor, Tensor], query_axes: int, need_weights: bool) -> Attention:
    """The result of an op, without the query axis that was added to a 2-D query."""
    if isinstance(result, Tensor):
        context, alignments = result, None
    else:
        context, alignments = result
        if not need_weights:
            alignments = None
    if query_axes == 2:
        return Attention(context.squeeze(1), None if alignments is None else alignments.squeeze(1))
    attention: Attention = new(Attention, (context, alignments))
    return attention
