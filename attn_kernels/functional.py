"""The public functions: the contract, the checks of the arguments and the choice of backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import derivatives, formulas, ops
from .attending import (
    ARGUMENT_ERRORS,
    SELF_CHECKING,
    attend_arrays,
    attend_with_extra,
    attend_with_options,
    make_options,
    new,
)
from .backends import choose
from .checks import (
    INFINITY,
    as_number,
    check_activation,
    check_clip,
    check_dtypes,
    check_extra,
    check_query_keys,
    check_score_vectors,
    check_tensor,
    check_units,
    shape_of,
)
from .errors import ArgumentTypeError, ArgumentValueError
from .gated import adds_extra, gated_scores
from .packed_attention import attend_packed, given_options
from .packed_memory import check_memory, check_query, is_jagged, packed_memory
from .scores import ActivatedScore, AdditiveScore, DotScore, GatedAdditiveScore, clipped
from .types import DTYPES, Attention, autocast, device_type, on_one_device, upcast


def additive_attention(
    query: Tensor | None,
    keys: Tensor,
    values: Tensor | None,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "tanh",
    negative_slope: float = 0.01,
    gate: Tensor | None = None,
    extra: Tensor | None = None,
    scale: float = 1.0,
    clip: float | None = None,
    memory_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    score_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    normalizer: str = "softmax",
    need_weights: bool = True,
    need_log_total: bool = False,
    memory_offsets: Tensor | None = None,
    backend: str | None = None,
    prepared: Tensor | None = None,
) -> Attention:
    r"""Additive (Bahdanau) attention: score, masked softmax and context in one pass.

    .. math::
        scores_{ij} = scale \; v \cdot \tanh(query_i + keys_j + extra_j + bias), \quad
        alignments_i = softmax_j(scores_{ij}), \quad context_i = \sum_j alignments_{ij} values_j

    Source: Bahdanau, Cho, Bengio, "Neural machine translation by jointly learning to align and translate", 2015,
    appendix A.1.2; ``query`` and ``keys`` are the projections W s and U h there. ``extra`` and ``scale`` are the U f
    and the sharpening of Chorowski et al., "Attention-based models for speech recognition",
    2015, sections 2.2 and 2.3. With a gate, the formula is that of Ilse, Tomczak, Welling, "Attention-based deep
    multiple instance learning", 2018, section 2.4, equation 9:

    .. math:: scores_{ij} = scale \; v \cdot (\tanh(query_i + keys_j + extra_j + bias) \odot \sigma(gate_j))

    With R rows v_r of ``v``, each query has R rows of scores and a context for each: Lin et al., "A structured
    self-attentive sentence embedding", 2017, section 2. The activations are computed once for all R.

    Args:
        query: (B, Tq, A), or (B, A) for one query; projected decoder state. None for pooling: the scores then depend
            on the keys only, and the results have the shapes of a 2-D query.
        keys: (B, Tk, A), projected memory.
        values: (B, Tk, D), averaged to the context; None to compute the alignments only.
        v: (A,), score vector, or (R, A), several of them.
        bias: (A,), added before the activation.
        activation: "tanh", "relu", "leaky_relu" or "sigmoid"; it replaces tanh in the formula.
        negative_slope: of "leaky_relu", a finite number.
        gate: (B, Tk, A), before the sigmoid; the activation is multiplied by sigmoid(gate). A gate or several score
            vectors have kernels on the CPU and in Triton; elsewhere the reference runs, which stores (B, Tq, Tk, A).
        extra: (B, Tk, A), added to the keys before the activation, such as projected location features of a step. The
            kernels compute the sum, and one gradient serves both. With ``activation="sigmoid"`` the sum is a tensor for
            more than one query, and in ``backend="cuda"``.
        scale: a finite number that multiplies the scores: sharper alignments, or 1 / temperature.
        clip: C > 0, replaces each score by C tanh(score), which limits how sure a pointer network is (Bello et al.,
            "Neural combinatorial optimization with reinforcement learning", 2017, appendix A.2, equation 16). It
            applies to the scaled score, before ``score_bias`` is added. For soft-capping, C tanh(score / C), also pass
            ``scale=1 / C``.
        memory_lengths: (B,) int32 or int64, valid steps of each row, 0..Tk; on the device of ``query``. On a GPU the
            kernels clamp lengths to that range: checking them would wait for the device.
        mask: (B, Tk) or (B, Tq, Tk) bool, True where a step may be attended. With ``memory_lengths``, both must allow
            it.
        score_bias: (B, Tq, Tk), or (B, Tk) for a 2-D query, added to the scores: a prior, a coverage penalty. With R
            score vectors it is added to the scores of each one; or one bias for each, (B, Tq, R, Tk) or (B, R, Tk).
        dropout_p: the probability of dropping each weight from the context; the others are multiplied by 1 / (1 - p).
            For training. The seed comes from the device's default generator. ``alignments`` are those before dropout.
        normalizer: "softmax", or "sigmoid": alignments are sigmoid(scores) over their sum (Chorowski et al. 2015,
            section 2.3, "smoothing").
        need_weights: False to leave out ``alignments`` (None is returned in their place).
        need_log_total: True to return :class:`AttentionWithLogTotal`, with the logarithm of the sum that normalises the
            alignments: the log-probability of a step is its score minus this logarithm.
        memory_offsets: (B + 1,) int32 or int64, for keys and values without padding; see below.
        backend: "cpu", "triton", "cuda" or "reference"; None: the fastest available. See ``attn_kernels.backends()``.
        prepared: the result of :func:`prepare_keys` for these ``keys``, which makes each of many calls faster. Results
            and gradients are the same to within rounding; gradients flow to ``keys``. With ``extra`` it is accepted
            but has no effect, so that callers need no special case. It must be None with a ``gate``, several score
            vectors or another activation than tanh.

    Returns:
        ``Attention(context, alignments)``: (B, Tq, D) and (B, Tq, Tk), or (B, D) and (B, Tk) for a 2-D query, in the
        dtype of the inputs; with v (R, A), also R = 1, (B, Tq, R, D) and (B, Tq, R, Tk), or (B, R, D) and (B, R, Tk). A
        query with nothing to attend gets zeros. Gradients flow through both. The context is None without ``values``.

    Packed memories: keys (N, A) and values (N, D) hold the steps of all sentences one after the other. Sentence b has
    steps ``memory_offsets[b]`` to ``memory_offsets[b + 1] - 1``; the first offset is 0, the last one N.
    Jagged keys (B, j, A) and values (B, j, D) of equal lengths are also accepted (``torch.nested``,
    ``layout=torch.jagged``). The query remains a dense tensor. The context is (B, Tq, D), and zero for an empty
    sentence. Alignments are (B, Tq, Tk) with zeros after the end of each sentence. Tk is the largest length, or the
    ``max_seqlen`` of jagged tensors. Backends "cpu" and "triton" do no work for padding; on a GPU "triton" is the
    default. Other backends run on a padded copy. On a GPU offsets are not checked. The call waits for the device if it
    needs the largest length, for alignments or a copy, and no ``max_seqlen`` is known. Packed memories exclude
    ``memory_lengths``, ``mask``, ``gate``, several score vectors, ``extra``, ``prepared``, ``score_bias``,
    ``dropout_p``, ``normalizer``, ``clip`` and ``need_log_total``.

    Dtypes: float64, float32, bfloat16, float16, the same for all tensors; sums are float32 or wider. Under autocast the
    inputs are cast to its dtype (float64 excepted), like those of ``scaled_dot_product_attention``.

    Raises:
        ArgumentValueError (a ValueError): a shape, device, length or backend does not fit. ArgumentTypeError (a
            TypeError): a dtype or type does not. Both are ``attn_kernels.ArgumentError``.
    """
    name = "additive_attention"
    memory = None
    if memory_offsets is not None or (type(keys) is not Tensor and is_jagged(keys)):
        seeded = keys if query is None else query
        few = given_options(make_options(name, seeded, score_bias, dropout_p, normalizer, clip), need_log_total)
        of_padded = dict(memory_lengths=memory_lengths, mask=mask, extra=extra, prepared=prepared)
        memory = packed_memory(name, keys, values, memory_offsets, **of_padded, **few)
        keys = memory.keys
        if query is None:
            check_memory(name, memory)
            query = keys.new_zeros(()).expand(memory.offsets.shape[0] - 1, keys.shape[1])
        if activation == "sigmoid" or scale != 1.0:  # arithmetic below needs checked arguments
            check_query(name, query, memory)
    if query is None:
        check_tensor(name, "keys", keys)
        query = keys.new_zeros(()).expand(keys.shape[0], keys.shape[-1])
    gated = gate is not None or (isinstance(v, Tensor) and v.dim() > 1)  # v may be anything: it is checked later
    if type(scale) is not float or scale != 1.0:
        scale = as_number(name, scale)
        if gated:
            check_score_vectors(name, query, v)
        else:
            check_units(name, query, "v", v)
        v = scale * v
    more = gated or clip is not None or score_bias is not None
    with_options = more or dropout_p != 0.0 or normalizer != "softmax" or need_log_total
    if gated and (memory is not None or prepared is not None):
        given = "prepared" if memory is None else "memory_offsets"
        raise ArgumentValueError(f"{name}: {given} must be None with a gate or several score vectors")
    if extra is not None and (with_options or activation == "sigmoid"):
        check_extra(name, query, keys, extra)
        prepared = None
        if activation == "sigmoid" and not gated:
            gated = adds_extra(query, backend)
            keys, extra = (keys, extra) if gated else (keys + extra, None)
    masks = (memory_lengths, mask)
    score: AdditiveScore | ActivatedScore
    if activation == "tanh" and not gated:
        score = new(AdditiveScore, (v, bias, prepared))
    else:
        numbers = check_activation(name, activation, negative_slope)
        # The usual form of sigmoid omits a constant in all scores. These options depend on it: see _half_of_sigmoid.
        if activation == "sigmoid" and (clip is not None or need_log_total or normalizer != "softmax"):
            gated = gated or prepared is None
        if gated:
            of_gate = GatedAdditiveScore(v, bias, gate, extra, *numbers)
            options = make_options(name, query, score_bias, dropout_p, normalizer, clip)
            inputs = (query, keys, values)
            return attend_with_options(of_gate, inputs, masks, options, need_weights, need_log_total, backend)
        if prepared is not None:
            raise ArgumentValueError(f"{name}: prepared must be None with activation={activation!r}: only tanh uses it")
        if activation == "sigmoid":
            if memory is None:
                check_query_keys(name, query, keys)
            query, keys, v, bias = _half_of_sigmoid(name, query, keys, v, bias)
            score = AdditiveScore(v, bias)
        else:
            score = ActivatedScore(v, bias, *numbers)
    if memory is not None:
        return attend_packed(score, query, memory._replace(keys=keys), need_weights, backend)
    if extra is not None and not with_options:
        return attend_with_extra(score, (query, keys, values), extra, masks, need_weights, backend)
    if with_options:
        if prepared is not None:
            raise ArgumentValueError(
                f"{name}: prepared must be None with score_bias, dropout_p, normalizer, clip or need_log_total"
            )
        options = make_options(name, query, score_bias, dropout_p, normalizer, clip)
        of_sum = score if extra is None else score.with_extra(extra)
        return attend_with_options(of_sum, (query, keys, values), masks, options, need_weights, need_log_total, backend)
    return attend_arrays(score, query, keys, values, masks, need_weights, backend)


def prepare_keys(keys: Tensor, *, backend: str | None = None) -> Tensor | None:
    """Computes once what :func:`additive_attention` would compute from ``keys`` in each call, for decoding steps.

    Args:
        keys: (B, Tk, A), projected memory, in the dtype of the later calls.
        backend: as in :func:`additive_attention`.

    Returns:
        A tensor for ``additive_attention(..., prepared=...)`` on the same keys: e^(2 keys) in float32, or in bfloat16
        for bfloat16 keys. It is about as large as the keys. The first axis is B, so that rows may be selected; the
        layout of the other axes depends on the backend. None if the backend has nothing to prepare: "triton" and
        "reference", float64 keys, float16 keys with "cuda".
        It is a constant for autograd, and it is invalid after a write to ``keys``.

    Raises:
        ValueError: keys do not have three axes, or the backend cannot run. TypeError: a dtype or type does not fit.
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
        return None  # float32 would double the bytes read, and memory bandwidth limits that kernel
    if derivatives.transforms_are_active() if is_compiling() else torch._C._is_tracing():
        return None  # under these, ops run as formulas: see ops.call
    prepared: Tensor | None = ops.call("additive_prepare", chosen, keys.detach())
    return prepared


def dot_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    *,
    scale: float = 1.0,
    clip: float | None = None,
    memory_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    score_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    normalizer: str = "softmax",
    need_weights: bool = True,
    need_log_total: bool = False,
    memory_offsets: Tensor | None = None,
    backend: str | None = None,
) -> Attention:
    r"""Dot-product (Luong) attention: score, masked softmax and context in one pass.

    .. math::
        scores_{ij} = scale \; query_i \cdot keys_j, \quad
        alignments_i = softmax_j(scores_{ij}), \quad context_i = \sum_j alignments_{ij} values_j

    Source: Luong, Pham, Manning, "Effective approaches to attention-based neural machine translation", 2015, section
    3.1 ("dot"; "general" is ``keys`` = memory W). For a learned scale, multiply ``query`` by it instead.

    Args:
        query: (B, Tq, A), or (B, A) for one query.
        keys: (B, Tk, A).
        values: (B, Tk, D), averaged to the context; None to compute the alignments only.
        scale: a finite number that multiplies the scores; 1.0 as in the paper, not 1/sqrt(A).
        clip, memory_lengths, mask, score_bias: as in :func:`additive_attention`.
        dropout_p, normalizer, need_weights, need_log_total, memory_offsets, backend: also as there.

    Returns, packed memories, dtypes, errors: as in :func:`additive_attention`.
    """
    if type(scale) is not float or not -INFINITY < scale < INFINITY:
        scale = as_number("dot_attention", scale)
    if memory_offsets is not None or (type(keys) is not Tensor and is_jagged(keys)):
        few = given_options(
            make_options("dot_attention", query, score_bias, dropout_p, normalizer, clip), need_log_total
        )
        of_padded = dict(memory_lengths=memory_lengths, mask=mask)
        memory = packed_memory("dot_attention", keys, values, memory_offsets, **of_padded, **few)
        return attend_packed(DotScore(scale), query, memory, need_weights, backend)
    masks = (memory_lengths, mask)
    score = new(DotScore, (scale,))
    if score_bias is not None or dropout_p != 0.0 or normalizer != "softmax" or need_log_total or clip is not None:
        options = make_options("dot_attention", query, score_bias, dropout_p, normalizer, clip)
        return attend_with_options(score, (query, keys, values), masks, options, need_weights, need_log_total, backend)
    return attend_arrays(score, query, keys, values, masks, need_weights, backend)


def additive_scores(
    query: Tensor,
    keys: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "tanh",
    negative_slope: float = 0.01,
    gate: Tensor | None = None,
    extra: Tensor | None = None,
    clip: float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""The scores of additive attention, for normalisers other than softmax.

    .. math:: scores_{ij} = v \cdot (\tanh(query_i + keys_j + extra_j + bias) \odot \sigma(gate_j))

    Args:
        query: (B, Tq, A), or (B, A) for one query.
        keys: (B, Tk, A).
        v: (A,), score vector, or (R, A), several of them.
        bias: (A,), added before the activation.
        activation, negative_slope, gate: as in :func:`additive_attention`; without a gate, the formula has no sigmoid.
        extra: (B, Tk, A), added before the activation.
        clip: C > 0, for C tanh(score) as in :func:`additive_attention`; two more operators compute it from the scores.
        backend: as in :func:`additive_attention`.

    Returns:
        (B, Tq, Tk), or (B, Tk) for a 2-D query; with v (R, A), (B, Tq, R, Tk) or (B, R, Tk); in the dtype of the
        inputs.

    Source, dtypes, errors: as in :func:`additive_attention`.
    """
    if clip is not None:
        clip = check_clip("additive_scores", clip)
        options: dict[str, Any] = dict(activation=activation, negative_slope=negative_slope, gate=gate, extra=extra)
        return clipped(additive_scores(query, keys, v, bias, **options, backend=backend), clip)
    gated = gate is not None or (isinstance(v, Tensor) and v.dim() > 1)
    if extra is not None:
        check_extra("additive_scores", query, keys, extra)
        if not gated:
            keys, extra = keys + extra, None
    if gated:
        numbers = check_activation("additive_scores", activation, negative_slope)
        return gated_scores(GatedAdditiveScore(v, bias, gate, extra, *numbers), query, keys, backend)
    op: tuple[str, tuple[float, ...]] = ("additive_scores", ())
    if activation != "tanh":
        numbers = check_activation("additive_scores", activation, negative_slope)
        if activation == "sigmoid":  # = (1 + tanh(x / 2)) / 2
            check_query_keys("additive_scores", query, keys)
            q, k, w, b = _half_of_sigmoid("additive_scores", query, keys, v, bias)
            scores = additive_scores(q, k, w, b, backend=backend)
            return (upcast(scores)[0] + upcast(w)[0].sum()).to(scores.dtype)
        op = ("activated_scores", numbers)
    try:
        device = device_type(query)
        chosen = choose(backend, device)
        if chosen not in SELF_CHECKING or is_compiling():
            _check_additive_scores(query, keys, v, bias)
        elif device != "cpu" and not on_one_device(query, keys, v, bias):
            raise ArgumentValueError  # raised again below, with a full message
        given = (query, keys, v, bias)
        q, k, w, b = autocast(*given) if torch._C._is_any_autocast_enabled() else given
        if chosen == "reference":
            result: Tensor = formulas.apply_formula(op[0], (q, k, w, b, *op[1]))
        elif q.dim() == 2:
            result = ops.call(op[0], chosen, q.unsqueeze(1), k, w, b, *op[1]).squeeze(1)
        else:
            result = ops.call(op[0], chosen, q, k, w, b, *op[1])
        return result
    except ARGUMENT_ERRORS:
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
    """Arguments whose scores with tanh are those with sigmoid minus a constant: sigmoid(x) = (1 + tanh(x / 2)) / 2.

    Halving is exact except where the result is denormal.
    """
    check_units(name, query, "v", v)
    check_units(name, query, "bias", bias)
    return 0.5 * query, 0.5 * keys, 0.5 * v, None if bias is None else 0.5 * bias
