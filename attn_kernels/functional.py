"""The public functions: the contract, the checks of the arguments and the choice of backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import derivatives, ops
from .backends import choose
from .checks import (
    INFINITY,
    as_number,
    check_activation,
    check_device,
    check_dtypes,
    check_masks,
    check_query_keys,
    check_score_bias,
    check_tensor,
    check_units,
    check_values,
    shape_of,
)
from .errors import ArgumentTypeError, ArgumentValueError
from .memory_gradient import is_worth_deferring, should_defer
from .scores import AdditiveScore, DotScore, ReluScore, Score
from .types import (
    DTYPES,
    NORMALIZERS,
    Attention,
    AttentionWithLogTotal,
    Masks,
    Options,
    autocast,
    device_type,
    on_one_device,
    upcast,
)

if TYPE_CHECKING:
    from .memory import Memory

_new = tuple.__new__  # of a named tuple, at a third of the cost of its constructor
_SELF_CHECKING = ("cpu", "cuda")  # backends that check the arguments themselves: see checks.py
# What a bad argument raises in the dispatcher, in a kernel, or in Python where it is no tensor at all.
_ARGUMENT_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError)


def additive_attention(
    query: Tensor | None,
    keys: Tensor,
    values: Tensor | None,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "tanh",
    negative_slope: float = 0.01,
    extra: Tensor | None = None,
    scale: float = 1.0,
    memory_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    score_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    normalizer: str = "softmax",
    need_weights: bool = True,
    need_log_total: bool = False,
    backend: str | None = None,
    prepared: Tensor | None = None,
) -> Attention | AttentionWithLogTotal:
    r"""Additive (Bahdanau) attention: score, masked softmax and context in one pass.

    .. math::
        scores_{ij} = scale \; v \cdot \tanh(query_i + keys_j + extra_j + bias), \quad
        alignments_i = softmax_j(scores_{ij}), \quad context_i = \sum_j alignments_{ij} values_j

    Source: Bahdanau, Cho, Bengio, "Neural machine translation by jointly learning to align and translate", 2015,
    appendix A.1.2; ``query`` and ``keys`` are the projections W s and U h there. ``extra`` and ``scale`` are the U f
    and the sharpening of Chorowski et al., "Attention-based models for speech recognition",
    2015, sections 2.2 and 2.3.

    Args:
        query: (B, Tq, A), or (B, A) for one query; projected decoder state. None for pooling, without a query: the
            scores are then those of the keys alone, and the results those of a 2-D query.
        keys: (B, Tk, A), projected memory.
        values: (B, Tk, D), what is averaged; None where the alignments are all that is wanted.
        v: (A,), score vector.
        bias: (A,), added before the activation.
        activation: "tanh", "relu", "leaky_relu" or "sigmoid", in the place of tanh.
        negative_slope: of "leaky_relu", a finite number.
        extra: (B, Tk, A), added before the activation: what a step adds to the keys, such as projected location
            features.
        scale: a finite number that multiplies the scores: sharper alignments, or 1 / temperature.
        memory_lengths: (B,) int32 or int64, valid steps of each row, 0..Tk; on the device of ``query``. On a GPU the
            kernels clamp lengths to that range: checking them would wait for the device.
        mask: (B, Tk) or (B, Tq, Tk) bool, True where a step may be attended. With ``memory_lengths``, both must allow
            it.
        score_bias: (B, Tq, Tk), or (B, Tk) for a 2-D query, added to the scores: a prior, a coverage penalty.
        dropout_p: how likely each weight is left out of the context, those that stay multiplied by 1 / (1 - p); for
            training. The seed comes from PyTorch's default generator. ``alignments`` are those before dropout.
        normalizer: "softmax", or "sigmoid": alignments are sigmoid(scores) over their sum (Chorowski et al. 2015,
            section 2.3, "smoothing").
        need_weights: False to leave out ``alignments`` (None is returned in their place).
        need_log_total: True to return :class:`AttentionWithLogTotal`, with the logarithm of the sum that the
            alignments were divided by: the log-probability of a step is its score minus that.
        backend: "cpu", "triton", "cuda" or "reference"; None for the fastest that can. See ``attn_kernels.backends()``.
        prepared: what :func:`prepare_keys` made of these ``keys``, to make each of many calls on them faster. Results
            and gradients are the same to within rounding; gradients flow to ``keys``. Not together with ``extra``, nor
            with another activation than tanh.

    Returns:
        ``Attention(context, alignments)``: (B, Tq, D) and (B, Tq, Tk), or (B, D) and (B, Tk) for a 2-D query, in the
        dtype of the inputs. A query with nothing to attend gets zeros. Gradients flow through both. The context is None
        without ``values``.

    Dtypes: float64, float32, bfloat16, float16, the same for all tensors; sums are float32 or wider. Under autocast the
    inputs are cast to its dtype (float64 excepted), like those of ``scaled_dot_product_attention``.

    Raises:
        ArgumentValueError (a ValueError): a shape, device, length or backend does not fit. ArgumentTypeError (a
            TypeError): a dtype or type does not. Both are ``attn_kernels.ArgumentError``.
    """
    name = "additive_attention"
    if query is None:
        check_tensor(name, "keys", keys)
        query = keys.new_zeros(()).expand(keys.shape[0], keys.shape[-1])
    if type(scale) is not float or scale != 1.0:
        scale = as_number(name, scale)
        check_units(name, query, "v", v)
        v = scale * v
    if extra is not None:
        if prepared is not None:
            raise ArgumentValueError(f"{name}: prepared must be None with extra: it was made of keys alone")
        keys = _with_extra(name, query, keys, extra)
    score: Score
    if activation == "tanh":
        score = _new(AdditiveScore, (v, bias, prepared))
    else:
        slope = check_activation(name, activation, negative_slope)
        if prepared is not None:
            raise ArgumentValueError(f"{name}: prepared must be None with activation={activation!r}: it is for tanh")
        if slope is None:
            query, keys, v, bias = _half_of_sigmoid(name, query, keys, v, bias)
            score = AdditiveScore(v, bias)
        else:
            score = ReluScore(v, bias, slope)
    masks = _new(Masks, (memory_lengths, mask))
    if score_bias is not None or dropout_p != 0.0 or normalizer != "softmax" or need_log_total:
        if prepared is not None:
            raise ArgumentValueError(
                f"{name}: prepared must be None with score_bias, dropout_p, normalizer or log_total"
            )
        options = make_options(name, score_bias, dropout_p, normalizer)
        return _attend_with_options(score, query, keys, values, masks, options, need_weights, need_log_total, backend)
    return _attend(score, query, keys, values, masks, need_weights, backend)


def attend(score: Score, query: Tensor, memory: Memory, need_weights: bool, backend: str | None) -> Attention:
    """A step on a memory. The gradients of the memory may be made with those of other steps: see memory_gradient.py."""
    masks = _new(Masks, (memory.memory_lengths, memory.mask))
    return _attend(score, query, memory.keys, memory.values, masks, need_weights, backend, memory)


def _attend(
    score: Score,
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    masks: Masks,
    need_weights: bool,
    backend: str | None,
    memory: Memory | None = None,
) -> Attention:
    """The op of a score. memory: what keys and values are of, where the gradients of steps may be gathered."""
    memory_lengths, mask = masks
    op = type(score).op  # Dynamo of torch 2.10 does not see a class's attribute through a named tuple
    without_context = values is None
    if without_context:
        values = _empty_values(score.name, query, keys, need_weights)
    try:
        if (
            backend is None
            and memory_lengths is None
            and mask is None
            and isinstance(score, DotScore)
            and score.is_small(query, keys, values)
            and not (memory is not None and is_worth_deferring(query, keys, values))
        ):
            attention = score.attend_small(query, keys, values, need_weights)
            return Attention(None, attention.alignments) if without_context else attention
        device = device_type(query)
        chosen = choose(backend, device)
        if chosen not in _SELF_CHECKING or is_compiling():
            _check(score, query, keys, values, masks, chosen)
        elif not on_one_device(query, keys, values, *masks, *score):
            raise ArgumentValueError  # raised again below, with a full message
        q, k, x = query, keys, values
        if torch._C._is_any_autocast_enabled() and device != "meta" and torch.is_autocast_enabled(device):
            q, k, x = autocast(query, keys, values)
            score = score.autocast(query)
        if chosen == "reference":
            result = derivatives.apply_formula(op, (q, k, x, *score, memory_lengths, mask, need_weights))
            attention = result if need_weights else Attention(result.context, None)
        else:
            if q.dim() == 2:
                q = q.unsqueeze(1)
            if memory is not None and k is keys and x is values and should_defer(chosen, q, k, x, mask):
                result = memory.gradient().attend(score, chosen, q, memory_lengths, mask, need_weights)
            else:
                result = ops.call(op, chosen, q, k, x, *score, memory_lengths, mask, need_weights)
            attention = to_result(result, query.dim(), need_weights)
    except _ARGUMENT_ERRORS:
        _check(score, query, keys, values, masks, backend)
        raise
    return Attention(None, attention.alignments) if without_context else attention


def _attend_with_options(
    score: Score,
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    masks: Masks,
    options: Options,
    need_weights: bool,
    need_log_total: bool,
    backend: str | None,
) -> Attention | AttentionWithLogTotal:
    """The op of a score with options."""
    without_context = values is None
    if without_context:
        values = _empty_values(score.name, query, keys, need_weights)
    device = device_type(query)
    chosen = choose(backend, device)
    if chosen in ("cuda", "triton"):
        if backend is not None:
            what = "score_bias, dropout_p, normalizer and need_log_total"
            raise ArgumentValueError(f"{score.name}: backend {backend!r} has no kernels for {what} yet")
        chosen = "reference"
    _check(score, query, keys, values, masks, backend)
    check_score_bias(score.name, query, keys, options.score_bias)
    axes = query.dim()
    query, keys, values, score_bias = autocast(query, keys, values, options.score_bias)
    score = score.autocast(query)
    if axes == 2:
        query = query.unsqueeze(1)
        score_bias = None if score_bias is None else score_bias.unsqueeze(1)
    own, numbers = score[: score.gradients], score[score.tensors :]
    arguments = (query, keys, values, *own, score_bias, *numbers, *options[1:], *masks, need_weights)
    op = f"{score.op}_with_options"
    results = derivatives.apply_formula(op, arguments) if chosen == "reference" else ops.call(op, chosen, *arguments)
    context, alignments, log_total = results
    context = None if without_context else context
    alignments = alignments if need_weights else None
    if axes == 2:
        context, alignments, log_total = (None if x is None else x.squeeze(1) for x in (context, alignments, log_total))
    return AttentionWithLogTotal(context, alignments, log_total) if need_log_total else Attention(context, alignments)


def make_options(name: str, score_bias: Tensor | None, dropout_p: float, normalizer: str) -> Options:
    """Checked, with a seed where there is dropout."""
    if normalizer not in NORMALIZERS:
        raise ArgumentValueError(f"{name}: normalizer must be 'softmax' or 'sigmoid', got {normalizer!r}")
    dropout_p = as_number(name, dropout_p, "dropout_p")
    if not 0 <= dropout_p < 1:
        raise ArgumentValueError(f"{name}: dropout_p must be at least 0 and below 1, got {dropout_p}")
    seed = int(torch.randint(1 << 62, ()).item()) if dropout_p > 0 else 0
    return Options(score_bias, dropout_p, seed, NORMALIZERS.index(normalizer))


def _check(
    score: Score,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    masks: Masks,
    backend: str | None,
) -> None:
    check_query_keys(score.name, query, keys)
    check_values(score.name, query, keys, values)
    score.check(query)
    check_masks(score.name, query, keys, *masks)
    score = score.autocast(query)
    query, keys, values = autocast(query, keys, values)
    check_dtypes(score.name, query, keys=keys, values=values)
    score.check_dtypes(query, keys, backend)


def prepare_keys(keys: Tensor, *, backend: str | None = None) -> Tensor | None:
    """What :func:`additive_attention` makes of ``keys`` in each call, made once: for the steps of a decoder.

    Args:
        keys: (B, Tk, A), projected memory, in the dtype that they will be called with.
        backend: as in :func:`additive_attention`.

    Returns:
        A tensor for ``additive_attention(..., prepared=...)`` on the same keys, about as large as they are: e^(2 keys)
        in float32, for bfloat16 keys in bfloat16. Its layout is the backend's own but for the first axis, B: rows may
        be selected along it. None where the backend has nothing to prepare: "triton" and "reference", float64 keys,
        float16 keys with "cuda".
        It is a constant for autograd, and stale once ``keys`` are written to.

    Raises:
        ValueError: keys do not have three axes, or the backend cannot. TypeError: a dtype or type does not fit.
    """
    name = "prepare_keys"
    check_tensor(name, "keys", keys)
    if keys.dim() != 3:
        raise ArgumentValueError(f"{name}: keys must have shape (B, Tk, A), got {shape_of(keys)}")
    if keys.dtype not in DTYPES:
        raise ArgumentTypeError(f"{name}: keys must be float32, bfloat16, float16 or float64, got {keys.dtype}")
    chosen = choose(backend, keys.device.type)
    if keys.dtype == torch.float64 or chosen not in ("cpu", "cuda"):
        return None
    if chosen == "cuda" and keys.dtype == torch.float16:
        return None  # float32 would be twice the bytes, and reading them is what takes the time there
    if derivatives.transforms_are_active() if is_compiling() else torch._C._is_tracing():
        return None  # there ops are formulas: see ops.call
    return ops.call("additive_prepare", chosen, keys.detach())


def dot_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    *,
    scale: float = 1.0,
    memory_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    score_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    normalizer: str = "softmax",
    need_weights: bool = True,
    need_log_total: bool = False,
    backend: str | None = None,
) -> Attention | AttentionWithLogTotal:
    r"""Dot-product (Luong) attention: score, masked softmax and context in one pass.

    .. math::
        scores_{ij} = scale \; query_i \cdot keys_j, \quad
        alignments_i = softmax_j(scores_{ij}), \quad context_i = \sum_j alignments_{ij} values_j

    Source: Luong, Pham, Manning, "Effective approaches to attention-based neural machine translation", 2015, section
    3.1 ("dot"; "general" is ``keys`` = memory W). A scale that is learned multiplies ``query`` instead.

    Args:
        query: (B, Tq, A), or (B, A) for one query.
        keys: (B, Tk, A).
        values: (B, Tk, D), what is averaged; None where the alignments are all that is wanted.
        scale: a finite number that multiplies the scores; 1.0 as in the paper, not 1/sqrt(A).
        memory_lengths, mask, score_bias, dropout_p, normalizer, need_weights, need_log_total, backend: as in
            :func:`additive_attention`.

    Returns, dtypes, errors: as in :func:`additive_attention`.
    """
    if type(scale) is not float or not -INFINITY < scale < INFINITY:
        scale = as_number("dot_attention", scale)
    masks = _new(Masks, (memory_lengths, mask))
    score = _new(DotScore, (scale,))
    if score_bias is not None or dropout_p != 0.0 or normalizer != "softmax" or need_log_total:
        options = make_options("dot_attention", score_bias, dropout_p, normalizer)
        return _attend_with_options(score, query, keys, values, masks, options, need_weights, need_log_total, backend)
    return _attend(score, query, keys, values, masks, need_weights, backend)


def additive_scores(
    query: Tensor,
    keys: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "tanh",
    negative_slope: float = 0.01,
    extra: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""The scores of additive attention, for other normalisers than softmax.

    .. math:: scores_{ij} = v \cdot \tanh(query_i + keys_j + extra_j + bias)

    Args:
        query: (B, Tq, A), or (B, A) for one query.
        keys: (B, Tk, A).
        v: (A,), score vector.
        bias: (A,), added before the activation.
        activation, negative_slope: as in :func:`additive_attention`.
        extra: (B, Tk, A), added before the activation.
        backend: as in :func:`additive_attention`.

    Returns:
        (B, Tq, Tk), or (B, Tk) for a 2-D query, in the dtype of the inputs.

    Source, dtypes, errors: as in :func:`additive_attention`.
    """
    if extra is not None:
        keys = _with_extra("additive_scores", query, keys, extra)
    op: tuple[str, tuple[float, ...]] = ("additive_scores", ())
    if activation != "tanh":
        slope = check_activation("additive_scores", activation, negative_slope)
        if slope is None:  # sigmoid(x) = (1 + tanh(x / 2)) / 2
            q, k, w, b = _half_of_sigmoid("additive_scores", query, keys, v, bias)
            scores = additive_scores(q, k, w, b, backend=backend)
            return (upcast(scores)[0] + upcast(w)[0].sum()).to(scores.dtype)
        op = ("relu_scores", (slope,))
    try:
        chosen = choose(backend, device_type(query))
        if chosen not in _SELF_CHECKING or is_compiling():
            _check_additive_scores(query, keys, v, bias)
        elif not on_one_device(query, keys, v, bias):
            raise ArgumentValueError  # raised again below, with a full message
        q, k, w, b = autocast(query, keys, v, bias)
        if chosen == "reference":
            return derivatives.apply_formula(op[0], (q, k, w, b, *op[1]))
        if q.dim() == 2:
            return ops.call(op[0], chosen, q.unsqueeze(1), k, w, b, *op[1]).squeeze(1)
        return ops.call(op[0], chosen, q, k, w, b, *op[1])
    except _ARGUMENT_ERRORS:
        _check_additive_scores(query, keys, v, bias)
        raise


def _check_additive_scores(query: Tensor, keys: Tensor, v: Tensor, bias: Tensor | None) -> None:
    name = "additive_scores"
    check_query_keys(name, query, keys)
    check_units(name, query, "v", v)
    check_units(name, query, "bias", bias)
    query, keys, v, bias = autocast(query, keys, v, bias)
    check_dtypes(name, query, keys=keys, v=v, bias=bias)


def _half_of_sigmoid(
    name: str, query: Tensor, keys: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What gives with tanh what the arguments give with sigmoid, less a constant: (1 + tanh(x / 2)) / 2.

    Halving is exact but for what becomes denormal.
    """
    check_query_keys(name, query, keys)
    check_units(name, query, "v", v)
    check_units(name, query, "bias", bias)
    return 0.5 * query, 0.5 * keys, 0.5 * v, None if bias is None else 0.5 * bias


def _with_extra(name: str, query: Tensor, keys: Tensor, extra: Tensor) -> Tensor:
    """keys + extra, in the dtype they come in: under autocast the sum is cast, not its parts."""
    check_query_keys(name, query, keys)
    check_tensor(name, "extra", extra)
    if extra.shape != keys.shape:
        raise ArgumentValueError(f"{name}: extra must have shape (B, Tk, A) = {shape_of(keys)}, got {shape_of(extra)}")
    check_device(name, "extra", extra, query=query)
    if extra.dtype != keys.dtype:
        raise ArgumentTypeError(f"{name}: extra must have the dtype of keys, {keys.dtype}, got {extra.dtype}")
    return keys + extra


def _empty_values(name: str, query: Tensor, keys: Tensor, need_weights: bool) -> Tensor:
    """Values of size 0, for a call that wants the alignments only."""
    if not need_weights:
        raise ArgumentValueError(f"{name}: need_weights must be True without values: nothing else would be returned")
    check_query_keys(name, query, keys)
    return keys.new_empty((*keys.shape[:2], 0))


def to_result(result: Tensor | tuple[Tensor, Tensor], query_axes: int, need_weights: bool) -> Attention:
    """What an op returned, without the axis that a query in two axes was given."""
    if isinstance(result, Tensor):
        context, alignments = result, None
    else:
        context, alignments = result
        if not need_weights:
            alignments = None
    if query_axes == 2:
        return Attention(context.squeeze(1), None if alignments is None else alignments.squeeze(1))
    return _new(Attention, (context, alignments))
