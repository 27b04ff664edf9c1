"""Checks of arguments, with readable messages: what was expected, and what was got.

They read only sizes and dtypes, so that they never wait for a device or break a graph. The compiled backends check
shapes and dtypes (and lengths, on the CPU) themselves, ten times as fast. For them, these checks run only after an
error, to produce its message.
"""

from __future__ import annotations

from numbers import Integral, Real

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .activations import ACTIVATIONS
from .errors import ArgumentTypeError, ArgumentValueError
from .types import DTYPES

INFINITY = float("inf")


def as_number(name: str, given: object, argument: str = "scale") -> float:
    """Checks that a number, which may be NumPy's, is finite, and returns it as a Python number."""
    number = float(given) if isinstance(given, Real) else given
    check_scale(name, number, argument)
    return number  # type: ignore[return-value]


def check_scale(name: str, scale: object, argument: str = "scale") -> None:
    if not isinstance(scale, (int, float)):
        raise ArgumentTypeError(f"{name}: {argument} must be a number, got {type(scale).__name__}")
    if not -INFINITY < scale < INFINITY:
        raise ArgumentValueError(f"{name}: {argument} must be a finite number, got {scale}")


def check_clip(name: str, clip: object) -> float | None:
    """C of C tanh(score) as a Python number; None for no clipping."""
    if clip is None:
        return None
    number = as_number(name, clip, "clip")
    if number <= 0:
        raise ArgumentValueError(f"{name}: clip must be positive, got {number}")
    return number


def check_size(name: str, argument: str, size: object, least: int = 1, odd: bool = False) -> int:
    """A size or a count as a Python int; NumPy integers are accepted. odd: it must be odd."""
    if not isinstance(size, Integral) or size < least or (odd and size % 2 == 0):
        integer = "an odd positive integer" if odd else "a positive integer"
        expected = integer if least == 1 else f"an integer of at least {least}"
        raise ArgumentValueError(f"{name}: {argument} must be {expected}, got {size!r}")
    return int(size)


def check_activation(name: str, activation: str, negative_slope: object) -> tuple[int, float]:
    """The index of the activation in ACTIVATIONS, and the slope of leaky_relu; 0 for the others."""
    if activation not in ACTIVATIONS:
        names = ", ".join(map(repr, ACTIVATIONS[:-1]))
        raise ArgumentValueError(f"{name}: activation must be {names} or {ACTIVATIONS[-1]!r}, got {activation!r}")
    slope = as_number(name, negative_slope, "negative_slope") if activation == "leaky_relu" else 0.0
    return ACTIVATIONS.index(activation), slope


def check_query_keys(name: str, query: Tensor, keys: Tensor) -> None:
    check_tensor(name, "query", query)
    check_tensor(name, "keys", keys)
    if query.dim() not in (2, 3):
        raise ArgumentValueError(f"{name}: query must have shape (B, Tq, A) or (B, A), got {shape_of(query)}")
    if keys.dim() != 3 or keys.shape[0] != query.shape[0] or keys.shape[2] != query.shape[-1]:
        expected = f"({query.shape[0]}, *, {query.shape[-1]})"
        raise ArgumentValueError(f"{name}: keys must have shape (B, Tk, A) = {expected}, got {shape_of(keys)}")
    check_device(name, "keys", keys, query=query)


def check_values(name: str, query: Tensor, keys: Tensor, values: Tensor) -> None:
    check_tensor(name, "values", values)
    if values.dim() != 3 or values.shape[0] != keys.shape[0] or values.shape[1] != keys.shape[1]:
        expected = f"({keys.shape[0]}, {keys.shape[1]}, *)"
        raise ArgumentValueError(f"{name}: values must have shape (B, Tk, D) = {expected}, got {shape_of(values)}")
    check_device(name, "values", values, query=query)


def check_units(name: str, query: Tensor, argument: str, units: Tensor | None) -> None:
    if units is None and argument == "bias":
        return
    units = check_tensor(name, argument, units)
    if units.dim() != 1 or units.shape[0] != query.shape[-1]:
        raise ArgumentValueError(
            f"{name}: {argument} must have shape (A,) = ({query.shape[-1]},), got {shape_of(units)}"
        )
    check_device(name, argument, units, query=query)


def check_extra(name: str, query: Tensor, keys: Tensor, extra: Tensor) -> None:
    check_query_keys(name, query, keys)
    check_tensor(name, "extra", extra)
    check_like_keys(name, query, keys, "extra", extra)
    if extra.dtype != keys.dtype:
        raise ArgumentTypeError(f"{name}: extra must have the dtype of keys, {keys.dtype}, got {extra.dtype}")


def check_score_vectors(name: str, query: Tensor, v: Tensor) -> None:
    """v: (A,) or (R, A)."""
    check_tensor(name, "v", v)
    if v.dim() not in (1, 2) or v.shape[-1] != query.shape[-1] or (v.dim() == 2 and v.shape[0] == 0):
        units = query.shape[-1]
        raise ArgumentValueError(
            f"{name}: v must have shape (A,) or (R, A) = ({units},) or (>= 1, {units}), got {shape_of(v)}"
        )
    check_device(name, "v", v, query=query)


def check_like_keys(name: str, query: Tensor, keys: Tensor, argument: str, tensor: Tensor | None) -> None:
    if tensor is None:
        return
    check_tensor(name, argument, tensor)
    if tensor.shape != keys.shape:
        raise ArgumentValueError(
            f"{name}: {argument} must have shape (B, Tk, A) = {shape_of(keys)}, got {shape_of(tensor)}"
        )
    check_device(name, argument, tensor, query=query)


def check_score_bias(
    name: str, query: Tensor, keys: Tensor, score_bias: Tensor | None, vectors: int | None = None
) -> None:
    """vectors: R, where there are several score vectors, each of which may have scores of its own."""
    if score_bias is None:
        return
    check_tensor(name, "score_bias", score_bias)
    expected = (*query.shape[:-1], keys.shape[1])
    own = None if vectors is None else (*query.shape[:-1], vectors, keys.shape[1])
    if tuple(score_bias.shape) not in (expected, own):
        axes = "(B, Tq, Tk)" if query.dim() == 3 else "(B, Tk)"
        if own is not None:
            axes = f"{axes} = {expected} or {axes.replace('Tk', 'R, Tk')}"
            expected = own
        raise ArgumentValueError(f"{name}: score_bias must have shape {axes} = {expected}, got {shape_of(score_bias)}")
    check_device(name, "score_bias", score_bias, query=query)
    if score_bias.dtype != query.dtype:
        raise ArgumentTypeError(
            f"{name}: score_bias must have the dtype of query, {query.dtype}, got {score_bias.dtype}"
        )


def check_masks(name: str, query: Tensor, keys: Tensor, memory_lengths: Tensor | None, mask: Tensor | None) -> None:
    batch, steps = keys.shape[0], keys.shape[1]
    if memory_lengths is not None:
        check_lengths(name, batch, memory_lengths, query=query)
        check_range(name, memory_lengths, steps)
    if mask is not None:
        check_mask(name, batch, query.shape[1] if query.dim() == 3 else 1, steps, mask, query=query)


def check_lengths(name: str, batch: int, memory_lengths: Tensor, **beside: Tensor) -> None:
    """beside: the argument whose device it is to be on, by its name."""
    check_tensor(name, "memory_lengths", memory_lengths)
    if memory_lengths.dtype not in (torch.int32, torch.int64):
        raise ArgumentTypeError(f"{name}: memory_lengths must be int32 or int64, got {memory_lengths.dtype}")
    if memory_lengths.dim() != 1 or memory_lengths.shape[0] != batch:
        expected = f"(B,) = ({batch},)"
        raise ArgumentValueError(f"{name}: memory_lengths must have shape {expected}, got {shape_of(memory_lengths)}")
    check_device(name, "memory_lengths", memory_lengths, **beside)


def check_mask(name: str, batch: int, queries: int | None, steps: int, mask: Tensor, **beside: Tensor) -> None:
    """queries: None for any number. beside: as of :func:`check_lengths`."""
    check_tensor(name, "mask", mask)
    if mask.dtype != torch.bool:
        raise ArgumentTypeError(f"{name}: mask must be bool (True = attend), got {mask.dtype}")
    fits = mask.dim() in (2, 3) and mask.shape[0] == batch and mask.shape[-1] == steps
    if not fits or (mask.dim() == 3 and queries is not None and mask.shape[1] != queries):
        expected = f"({batch}, {steps}) or ({batch}, {'*' if queries is None else queries}, {steps})"
        raise ArgumentValueError(
            f"{name}: mask must have shape (B, Tk) or (B, Tq, Tk) = {expected}, got {shape_of(mask)}"
        )
    check_device(name, "mask", mask, **beside)


def check_range(name: str, memory_lengths: Tensor, steps: int) -> None:
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


def check_prepared(name: str, keys: Tensor, prepared: Tensor, backend: str) -> None:
    check_tensor(name, "prepared", prepared)
    if backend not in ("cpu", "cuda", "reference"):  # the reference needs no preparation and is right without
        raise ArgumentValueError(
            f"{name}: prepared must be None with backend={backend!r}, which does not use prepared keys"
        )
    dtype = torch.bfloat16 if keys.dtype == torch.bfloat16 else torch.float32
    if keys.dtype == torch.float64 or prepared.dtype != dtype:
        raise ArgumentTypeError(
            f"{name}: prepared must be what prepare_keys makes of {keys.dtype} keys, got {prepared.dtype}"
        )
    if prepared.dim() != 3 or prepared.shape[0] != keys.shape[0] or prepared.shape[1] < keys.shape[1]:
        expected = f"({keys.shape[0]}, >= {keys.shape[1]}, *)"
        raise ArgumentValueError(
            f"{name}: prepared must be what prepare_keys made of keys, {expected}, got {shape_of(prepared)}"
        )
    check_device(name, "prepared", prepared, keys=keys)


def check_dtypes(name: str, query: Tensor, **others: Tensor | None) -> None:
    dtype = query.dtype
    if dtype not in DTYPES:
        raise ArgumentTypeError(f"{name}: query must be float32, bfloat16, float16 or float64, got {dtype}")
    for argument, tensor in others.items():
        if tensor is not None and tensor.dtype != dtype:
            raise ArgumentTypeError(f"{name}: {argument} must have the dtype of query, {dtype}, got {tensor.dtype}")


def check_tensor(name: str, argument: str, tensor: object) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ArgumentTypeError(f"{name}: {argument} must be a tensor, got {_type_of(tensor)}")
    if tensor.is_nested:
        padded = "torch.nested.to_padded_tensor(..., 0.0), with the lengths as memory_lengths"
        raise ArgumentTypeError(f"{name}: {argument} must be a padded tensor, got a nested one; pass {padded}")
    return tensor


def _type_of(value: object) -> str:
    """The type of what is no tensor, for an error message."""
    if isinstance(value, torch.fx.Proxy):
        return "Proxy: torch.fx.symbolic_trace cannot look into this call, torch.export and leaf modules can"
    return type(value).__name__


def check_device(name: str, argument: str, tensor: Tensor, **beside: Tensor) -> None:
    """beside: the argument whose device it is to be on, by its name."""
    for other, reference in beside.items():
        if tensor.device != reference.device:
            raise ArgumentValueError(
                f"{name}: {argument} must be on the device of {other}, {reference.device}, got {tensor.device}"
            )


def shape_of(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
