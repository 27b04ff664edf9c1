"""The public functions: the contract, the checks of the arguments and the choice of backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import ops, reference
from .backends import choose
from .deferred import Meeting, defers, pays
from .derivatives import transforms_are_active
from .errors import ArgumentTypeError, ArgumentValueError
from .reference import Attention

if TYPE_CHECKING:
    from .memory import Memory

_INFINITY = float("inf")
_SMALL = 1 << 19  # products
_CHECKED = ("cpu", "cuda")  # backends that check the arguments themselves: see the checks below
# What is raised where an argument does not fit: by the dispatcher, a kernel, or Python where it is no tensor at all.
_REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def additive_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    extra: Tensor | None = None,
    scale: float = 1.0,
    memory_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    need_weights: bool = True,
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
    2015, sections 2.2 and 2.3.

    Args:
        query: (B, Tq, A), or (B, A) for one query; projected decoder state.
        keys: (B, Tk, A), projected memory.
        values: (B, Tk, D), what is averaged; None where the alignments are all that is wanted.
        v: (A,), score vector.
        bias: (A,), added before the tanh.
        extra: (B, Tk, A), added before the tanh: what a step adds to the keys, such as projected location features.
        scale: a finite number that multiplies the scores: sharper alignments, or 1 / temperature.
        memory_lengths: (B,) int32 or int64, valid steps of each row, 0..Tk; on the device of ``query``. On a GPU the
            kernels clamp lengths to that range: checking them would wait for the device.
        mask: (B, Tk) or (B, Tq, Tk) bool, True where a step may be attended. With ``memory_lengths``, both must allow
            it.
        need_weights: False to leave out ``alignments`` (None is returned in their place).
        backend: "cpu", "triton", "cuda" or "reference"; None for the fastest that can. See ``attn_kernels.backends()``.
        prepared: what :func:`prepare_keys` made of these ``keys``, to make each of many calls on them faster. Results
            and gradients are the same to within rounding; gradients flow to ``keys``. Not together with ``extra``.

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
    if type(scale) is not float or scale != 1.0:
        _check_scale(name, scale)
        _check_units(name, query, "v", v)
        v = scale * v
    if extra is not None:
        if prepared is not None:
            raise ArgumentValueError(f"{name}: prepared must be None with extra: it was made of keys alone")
        keys = _with_extra(name, query, keys, extra)
    given = values
    if values is None:
        values = _no_values(name, query, keys, need_weights)
    result = _additive_attention(
        query, keys, values, v, bias, prepared, memory_lengths, mask, need_weights, backend, None
    )
    return result if given is not None else Attention(None, result.alignments)


def additive_step(
    query: Tensor, v: Tensor, bias: Tensor | None, memory: Memory, need_weights: bool, backend: str | None
) -> Attention:
    """:func:`additive_attention` on a memory; its gradients may be made with those of other steps: see deferred.py."""
    masks = (memory.memory_lengths, memory.mask)
    return _additive_attention(
        query,
        memory.keys,
        memory.values,
        v,
        bias,
        memory.prepared,
        *masks,
        need_weights,
        backend,
        memory.meeting,
    )


def _additive_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    bias: Tensor | None,
    prepared: Tensor | None,
    memory_lengths: Tensor | None,
    mask: Tensor | None,
    need_weights: bool,
    backend: str | None,
    meeting: Callable[[], Meeting] | None,
) -> Attention:
    try:
        chosen = choose(backend, _device_type(query))
        if chosen not in _CHECKED or is_compiling():
            _check_additive_attention(query, keys, values, v, bias, memory_lengths, mask, prepared, chosen)
        elif not _beside(query, keys, values, v, bias, prepared, memory_lengths, mask):
            raise ArgumentValueError  # whose words _check_additive_attention has
        q, k, x, w, b = _autocast(query, keys, values, v, bias)
        if chosen == "reference":
            return reference.additive_attention(
                q, k, x, w, b, memory_lengths=memory_lengths, mask=mask, need_weights=need_weights
            )
        if q.dim() == 2:
            q = q.unsqueeze(1)
        if meeting is not None and k is keys and x is values and defers(chosen, q, k, x, mask):
            result = meeting().additive_attention(chosen, q, w, b, prepared, memory_lengths, mask, need_weights)
        else:
            result = ops.call("additive_attention", chosen, q, k, x, w, b, prepared, memory_lengths, mask, need_weights)
        return _as_attention(result, query.dim(), need_weights)
    except _REFUSALS:
        _check_additive_attention(query, keys, values, v, bias, memory_lengths, mask, prepared, backend)
        raise


def _check_additive_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    bias: Tensor | None,
    memory_lengths: Tensor | None,
    mask: Tensor | None,
    prepared: Tensor | None,
    backend: str | None,
) -> None:
    name = "additive_attention"
    _check_query_keys(name, query, keys)
    _check_values(name, query, keys, values)
    _check_units(name, query, "v", v)
    _check_units(name, query, "bias", bias)
    _check_masks(name, query, keys, memory_lengths, mask)
    query, keys, values, v, bias = _autocast(query, keys, values, v, bias)
    _check_dtypes(name, query, keys=keys, values=values, v=v, bias=bias)
    if prepared is not None:
        _check_prepared(name, keys, prepared, choose(backend, query.device.type))


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
    _check_tensor(name, "keys", keys)
    if keys.dim() != 3:
        raise ArgumentValueError(f"{name}: keys must have shape (B, Tk, A), got {_shape(keys)}")
    if keys.dtype not in _DTYPES:
        raise ArgumentTypeError(f"{name}: keys must be float32, bfloat16, float16 or float64, got {keys.dtype}")
    chosen = choose(backend, keys.device.type)
    if keys.dtype == torch.float64 or chosen not in ("cpu", "cuda"):
        return None
    if chosen == "cuda" and keys.dtype == torch.float16:
        return None  # float32 would be twice the bytes, and reading them is what takes the time there
    if transforms_are_active() if is_compiling() else torch._C._is_tracing():
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
    need_weights: bool = True,
    backend: str | None = None,
) -> Attention:
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
        memory_lengths, mask, need_weights, backend: as in :func:`additive_attention`.

    Returns, dtypes, errors: as in :func:`additive_attention`.
    """
    if values is not None:
        return _dot_attention(query, keys, values, scale, memory_lengths, mask, need_weights, backend, None)
    values = _no_values("dot_attention", query, keys, need_weights)
    result = _dot_attention(query, keys, values, scale, memory_lengths, mask, need_weights, backend, None)
    return Attention(None, result.alignments)


def dot_step(query: Tensor, memory: Memory, need_weights: bool, backend: str | None) -> Attention:
    """:func:`dot_attention` on a memory; its gradients may be made with those of other steps: see deferred.py."""
    masks = (memory.memory_lengths, memory.mask)
    return _dot_attention(query, memory.keys, memory.values, 1.0, *masks, need_weights, backend, memory.meeting)


def _dot_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    memory_lengths: Tensor | None,
    mask: Tensor | None,
    need_weights: bool,
    backend: str | None,
    meeting: Callable[[], Meeting] | None,
) -> Attention:
    try:
        if (
            backend is None
            and memory_lengths is None
            and mask is None
            and _is_small(query, keys, values, scale)
            and not (meeting is not None and pays(query, keys, values))
        ):
            scores = torch.bmm(query, keys.mT)
            alignments = torch.softmax(scores if scale == 1.0 else scale * scores, -1)
            return Attention(torch.bmm(alignments, values), alignments if need_weights else None)
        chosen = choose(backend, _device_type(query))
        if chosen not in _CHECKED or is_compiling():
            _check_dot_attention(query, keys, values, scale, memory_lengths, mask)
        elif not (
            isinstance(scale, (int, float))
            and -_INFINITY < scale < _INFINITY
            and _beside(query, keys, values, memory_lengths, mask)
        ):
            raise ArgumentValueError  # whose words _check_dot_attention has
        q, k, x = _autocast(query, keys, values)
        if chosen == "reference":
            return reference.dot_attention(
                q, k, x, scale=scale, memory_lengths=memory_lengths, mask=mask, need_weights=need_weights
            )
        if q.dim() == 2:
            q = q.unsqueeze(1)
        if meeting is not None and k is keys and x is values and defers(chosen, q, k, x, mask):
            result = meeting().dot_attention(chosen, q, scale, memory_lengths, mask, need_weights)
        else:
            result = ops.call("dot_attention", chosen, q, k, x, scale, memory_lengths, mask, need_weights)
        return _as_attention(result, query.dim(), need_weights)
    except _REFUSALS:
        _check_dot_attention(query, keys, values, scale, memory_lengths, mask)
        raise


def _check_dot_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    memory_lengths: Tensor | None,
    mask: Tensor | None,
) -> None:
    name = "dot_attention"
    _check_scale(name, scale)
    _check_query_keys(name, query, keys)
    _check_values(name, query, keys, values)
    _check_masks(name, query, keys, memory_lengths, mask)
    query, keys, values = _autocast(query, keys, values)
    _check_dtypes(name, query, keys=keys, values=values)


def additive_scores(
    query: Tensor,
    keys: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    extra: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""The scores of additive attention, for other normalisers than softmax.

    .. math:: scores_{ij} = v \cdot \tanh(query_i + keys_j + extra_j + bias)

    Args:
        query: (B, Tq, A), or (B, A) for one query.
        keys: (B, Tk, A).
        v: (A,), score vector.
        bias: (A,), added before the tanh.
        extra: (B, Tk, A), added before the tanh.
        backend: as in :func:`additive_attention`.

    Returns:
        (B, Tq, Tk), or (B, Tk) for a 2-D query, in the dtype of the inputs.

    Source, dtypes, errors: as in :func:`additive_attention`.
    """
    if extra is not None:
        keys = _with_extra("additive_scores", query, keys, extra)
    try:
        chosen = choose(backend, _device_type(query))
        if chosen not in _CHECKED or is_compiling():
            _check_additive_scores(query, keys, v, bias)
        elif not _beside(query, keys, v, bias):
            raise ArgumentValueError  # whose words _check_additive_scores has
        q, k, w, b = _autocast(query, keys, v, bias)
        if chosen == "reference":
            return reference.additive_scores(q, k, w, b)
        if q.dim() == 2:
            return ops.call("additive_scores", chosen, q.unsqueeze(1), k, w, b).squeeze(1)
        return ops.call("additive_scores", chosen, q, k, w, b)
    except _REFUSALS:
        _check_additive_scores(query, keys, v, bias)
        raise


def _check_additive_scores(query: Tensor, keys: Tensor, v: Tensor, bias: Tensor | None) -> None:
    name = "additive_scores"
    _check_query_keys(name, query, keys)
    _check_units(name, query, "v", v)
    _check_units(name, query, "bias", bias)
    query, keys, v, bias = _autocast(query, keys, v, bias)
    _check_dtypes(name, query, keys=keys, v=v, bias=bias)


def _with_extra(name: str, query: Tensor, keys: Tensor, extra: Tensor) -> Tensor:
    """keys + extra, in the dtype they come in: under autocast the sum is cast, not its parts."""
    _check_query_keys(name, query, keys)
    _check_tensor(name, "extra", extra)
    if extra.shape != keys.shape:
        raise ArgumentValueError(f"{name}: extra must have shape (B, Tk, A) = {_shape(keys)}, got {_shape(extra)}")
    _check_device(name, query, "extra", extra)
    if extra.dtype != keys.dtype:
        raise ArgumentTypeError(f"{name}: extra must have the dtype of keys, {keys.dtype}, got {extra.dtype}")
    return keys + extra


def _no_values(name: str, query: Tensor, keys: Tensor, need_weights: bool) -> Tensor:
    """Values of size 0, for a call that wants the alignments only."""
    if not need_weights:
        raise ArgumentValueError(f"{name}: need_weights must be True without values: nothing else would be returned")
    _check_query_keys(name, query, keys)
    return keys.new_empty((*keys.shape[:2], 0))


def _as_attention(result: Tensor | tuple[Tensor, Tensor], query_axes: int, need_weights: bool) -> Attention:
    """What an op returned, without the axis that a query in two axes was given."""
    if isinstance(result, Tensor):
        context, alignments = result, None
    else:
        context, alignments = result
        if not need_weights:
            alignments = None
    if query_axes == 2:
        return Attention(context.squeeze(1), None if alignments is None else alignments.squeeze(1))
    return Attention(context, alignments)


def _is_small(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> bool:
    """Whether a dot attention that needs gradients is faster as three calls of PyTorch than as one of ours.

    Below about half a million products the time is that of the calls, and autograd's nodes in C++, which an extension
    on the stable ABI cannot have, cost less than a node in Python. What does not fit together, PyTorch refuses, too.
    """
    return (
        torch.is_grad_enabled()
        and (query.requires_grad or keys.requires_grad or values.requires_grad)
        and query.is_cpu
        and query.dtype == torch.float32
        and query.dim() == keys.dim() == 3
        and query.numel() * keys.size(1) <= _SMALL
        and values.numel() * query.size(1) <= _SMALL
        and isinstance(scale, (int, float))
        and -_INFINITY < scale < _INFINITY
        and not is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


def _device_type(query: Tensor) -> str:
    return "cpu" if query.is_cpu else query.device.type  # which makes a device and a string


def _beside(query: Tensor, *tensors: Tensor | None) -> bool:
    """Whether all are on the device of query; the dispatcher would take one on "meta" for a call that wants shapes."""
    if query.is_cpu:
        for tensor in tensors:  # noqa: SIM110 - all() of a generator takes four times as long
            if tensor is not None and not tensor.is_cpu:
                return False
        return True
    device = query.device
    return all(tensor is None or tensor.device == device for tensor in tensors)


# Checks: each reads sizes and dtypes only, so that none of them waits for a device or breaks a graph ------------------
#
# The compiled backends check shapes and dtypes (and lengths, on the CPU) themselves, in a tenth of the time: with them,
# these run only when something was refused, and find the words for it.


def _check_scale(name: str, scale: object) -> None:
    if not isinstance(scale, (int, float)):
        raise ArgumentTypeError(f"{name}: scale must be a number, got {type(scale).__name__}")
    if not -_INFINITY < scale < _INFINITY:
        raise ArgumentValueError(f"{name}: scale must be a finite number, got {scale}")


def _check_query_keys(name: str, query: Tensor, keys: Tensor) -> None:
    _check_tensor(name, "query", query)
    _check_tensor(name, "keys", keys)
    if query.dim() not in (2, 3):
        raise ArgumentValueError(f"{name}: query must have shape (B, Tq, A) or (B, A), got {_shape(query)}")
    if keys.dim() != 3 or keys.shape[0] != query.shape[0] or keys.shape[2] != query.shape[-1]:
        expected = f"({query.shape[0]}, *, {query.shape[-1]})"
        raise ArgumentValueError(f"{name}: keys must have shape (B, Tk, A) = {expected}, got {_shape(keys)}")
    _check_device(name, query, "keys", keys)


def _check_values(name: str, query: Tensor, keys: Tensor, values: Tensor) -> None:
    _check_tensor(name, "values", values)
    if values.dim() != 3 or values.shape[0] != keys.shape[0] or values.shape[1] != keys.shape[1]:
        expected = f"({keys.shape[0]}, {keys.shape[1]}, *)"
        raise ArgumentValueError(f"{name}: values must have shape (B, Tk, D) = {expected}, got {_shape(values)}")
    _check_device(name, query, "values", values)


def _check_units(name: str, query: Tensor, argument: str, units: Tensor | None) -> None:
    if units is None and argument == "bias":
        return
    _check_tensor(name, argument, units)
    if units.dim() != 1 or units.shape[0] != query.shape[-1]:
        raise ArgumentValueError(f"{name}: {argument} must have shape (A,) = ({query.shape[-1]},), got {_shape(units)}")
    _check_device(name, query, argument, units)


def _check_masks(name: str, query: Tensor, keys: Tensor, memory_lengths: Tensor | None, mask: Tensor | None) -> None:
    batch, steps = keys.shape[0], keys.shape[1]
    if memory_lengths is not None:
        _check_tensor(name, "memory_lengths", memory_lengths)
        if memory_lengths.dtype not in (torch.int32, torch.int64):
            raise ArgumentTypeError(f"{name}: memory_lengths must be int32 or int64, got {memory_lengths.dtype}")
        if memory_lengths.dim() != 1 or memory_lengths.shape[0] != batch:
            raise ArgumentValueError(
                f"{name}: memory_lengths must have shape (B,) = ({batch},), got {_shape(memory_lengths)}"
            )
        _check_device(name, query, "memory_lengths", memory_lengths)
        _check_range(name, memory_lengths, steps)
    if mask is not None:
        _check_tensor(name, "mask", mask)
        if mask.dtype != torch.bool:
            raise ArgumentTypeError(f"{name}: mask must be bool (True = attend), got {mask.dtype}")
        queries = query.shape[1] if query.dim() == 3 else 1
        if mask.dim() == 2:
            fits = mask.shape[0] == batch and mask.shape[1] == steps
        else:
            fits = mask.dim() == 3 and mask.shape[0] == batch and mask.shape[1] == queries and mask.shape[2] == steps
        if not fits:
            expected = f"({batch}, {steps}) or ({batch}, {queries}, {steps})"
            raise ArgumentValueError(
                f"{name}: mask must have shape (B, Tk) or (B, Tq, Tk) = {expected}, got {_shape(mask)}"
            )
        _check_device(name, query, "mask", mask)


def _check_range(name: str, memory_lengths: Tensor, steps: int) -> None:
    """Whether lengths are within 0..Tk: where they can be read without waiting for a device, or at all."""
    if memory_lengths.device.type != "cpu" or is_compiling() or torch._C._is_tracing():
        return
    try:
        lengths = memory_lengths.tolist()
        fits = not lengths or (min(lengths) >= 0 and max(lengths) <= steps)
    except RuntimeError:  # there are no values in fake tensors, and none to be seen in those of a transform or a trace
        return
    if not fits:
        got = f"{min(lengths)}..{max(lengths)}"
        raise ArgumentValueError(f"{name}: memory_lengths must be in 0..Tk = 0..{steps}, got {got}")


def _check_prepared(name: str, keys: Tensor, prepared: Tensor, backend: str) -> None:
    _check_tensor(name, "prepared", prepared)
    if backend not in ("cpu", "cuda", "reference"):  # the reference needs no preparation and is right without
        raise ArgumentValueError(f"{name}: prepared must be None with backend={backend!r}, which prepares nothing")
    dtype = torch.bfloat16 if keys.dtype == torch.bfloat16 else torch.float32
    if keys.dtype == torch.float64 or prepared.dtype != dtype:
        raise ArgumentTypeError(
            f"{name}: prepared must be what prepare_keys makes of {keys.dtype} keys, got {prepared.dtype}"
        )
    if prepared.dim() != 3 or prepared.shape[0] != keys.shape[0] or prepared.shape[1] < keys.shape[1]:
        expected = f"({keys.shape[0]}, >= {keys.shape[1]}, *)"
        raise ArgumentValueError(
            f"{name}: prepared must be what prepare_keys made of keys, {expected}, got {_shape(prepared)}"
        )
    _check_device(name, keys, "prepared", prepared)


def _check_dtypes(name: str, query: Tensor, **others: Tensor | None) -> None:
    dtype = query.dtype
    if dtype not in _DTYPES:
        raise ArgumentTypeError(f"{name}: query must be float32, bfloat16, float16 or float64, got {dtype}")
    for argument, tensor in others.items():
        if tensor is not None and tensor.dtype != dtype:
            raise ArgumentTypeError(f"{name}: {argument} must have the dtype of query, {dtype}, got {tensor.dtype}")


def _check_tensor(name: str, argument: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise ArgumentTypeError(f"{name}: {argument} must be a tensor, got {kind(tensor)}")


def kind(value: object) -> str:
    """The type of what is no tensor, for an error message."""
    if isinstance(value, torch.fx.Proxy):
        return "Proxy: torch.fx.symbolic_trace cannot look into this call, torch.export and leaf modules can"
    return type(value).__name__


def _check_device(name: str, query: Tensor, argument: str, tensor: Tensor) -> None:
    if tensor.device != query.device:
        raise ArgumentValueError(
            f"{name}: {argument} must be on the device of query, {query.device}, got {tensor.device}"
        )


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    device_type = _device_type(tensors[0])
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t if t is None or t.dtype not in _DTYPES[:3] else t.to(dtype) for t in tensors)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
