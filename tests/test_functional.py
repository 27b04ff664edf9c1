"""The contract of the public functions: invalid arguments and their error messages, dtypes, autocast."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import attn_kernels
from attn_kernels import Attention, reference
from bench import eager
from matrix import CASES, DTYPES, OPS, Case, Op, assert_close, check, eager_errors, make, oracle, run

ops = pytest.mark.parametrize("op", OPS.values(), ids=OPS)

# Bad arguments --------------------------------------------------------------------------------------------------------

SIZES = Case(B=4, Tq=3, Tk=17, A=16, D=5)


class Bad(NamedTuple):
    """argument: the one that is replaced by value. message: what follows "op: " in the error."""

    argument: str
    value: Any
    error: type[Exception]
    message: str


QUERY = "query must have shape (B, Tq, A) or (B, A), got "
KEYS = "keys must have shape (B, Tk, A) = (4, *, 16), got "
VALUES = "values must have shape (B, Tk, D) = (4, 17, *), got "
LENGTHS = "memory_lengths must have shape (B,) = (4,), got "
MASK = "mask must have shape (B, Tk) or (B, Tq, Tk) = (4, 17) or (4, 3, 17), got "
ones = torch.ones
BAD = (
    # Rank
    Bad("query", ones(16), ValueError, QUERY + "(16,)"),
    Bad("query", ones(1, 4, 3, 16), ValueError, QUERY + "(1, 4, 3, 16)"),
    Bad("query", ones(()), ValueError, QUERY + "()"),
    Bad("keys", ones(4, 16), ValueError, KEYS + "(4, 16)"),
    Bad("keys", ones(1, 4, 17, 16), ValueError, KEYS + "(1, 4, 17, 16)"),
    Bad("values", ones(4, 5), ValueError, VALUES + "(4, 5)"),
    Bad("values", ones(4, 17, 5, 1), ValueError, VALUES + "(4, 17, 5, 1)"),
    Bad("v", ones(1, 17), ValueError, "v must have shape (A,) or (R, A) = (16,) or (>= 1, 16), got (1, 17)"),
    Bad("v", ones(1, 1, 16), ValueError, "v must have shape (A,) or (R, A) = (16,) or (>= 1, 16), got (1, 1, 16)"),
    Bad("v", ones(()), ValueError, "v must have shape (A,) = (16,), got ()"),
    Bad("bias", ones(1, 16), ValueError, "bias must have shape (A,) = (16,), got (1, 16)"),
    Bad("memory_lengths", torch.tensor(3), ValueError, LENGTHS + "()"),
    Bad("memory_lengths", ones(4, 1, dtype=torch.int64), ValueError, LENGTHS + "(4, 1)"),
    Bad("mask", ones(17, dtype=torch.bool), ValueError, MASK + "(17,)"),
    Bad("mask", ones(4, 1, 3, 17, dtype=torch.bool), ValueError, MASK + "(4, 1, 3, 17)"),
    # Size; sizes of 1 are not broadcast
    Bad("keys", ones(4, 17, 8), ValueError, KEYS + "(4, 17, 8)"),
    Bad("keys", ones(1, 17, 16), ValueError, KEYS + "(1, 17, 16)"),
    Bad("keys", ones(4, 17, 1), ValueError, KEYS + "(4, 17, 1)"),
    Bad("values", ones(4, 18, 5), ValueError, VALUES + "(4, 18, 5)"),
    Bad("values", ones(1, 17, 5), ValueError, VALUES + "(1, 17, 5)"),
    Bad("values", ones(4, 1, 5), ValueError, VALUES + "(4, 1, 5)"),
    Bad("v", ones(17), ValueError, "v must have shape (A,) = (16,), got (17,)"),
    Bad("v", ones(1), ValueError, "v must have shape (A,) = (16,), got (1,)"),
    Bad("v", ones(0), ValueError, "v must have shape (A,) = (16,), got (0,)"),
    Bad("bias", ones(15), ValueError, "bias must have shape (A,) = (16,), got (15,)"),
    Bad("memory_lengths", ones(5, dtype=torch.int64), ValueError, LENGTHS + "(5,)"),
    Bad("memory_lengths", ones(1, dtype=torch.int64), ValueError, LENGTHS + "(1,)"),
    Bad("mask", ones(4, 16, dtype=torch.bool), ValueError, MASK + "(4, 16)"),
    Bad("mask", ones(1, 17, dtype=torch.bool), ValueError, MASK + "(1, 17)"),
    Bad("mask", ones(4, 1, 17, dtype=torch.bool), ValueError, MASK + "(4, 1, 17)"),
    Bad("mask", ones(4, 17, 3, dtype=torch.bool), ValueError, MASK + "(4, 17, 3)"),
    # Lengths
    Bad(
        "memory_lengths",
        torch.tensor([17, -1, 3, 4]),
        ValueError,
        "memory_lengths must be in 0..Tk = 0..17, got -1..17",
    ),
    Bad(
        "memory_lengths", torch.tensor([17, 18, 3, 4]), ValueError, "memory_lengths must be in 0..Tk = 0..17, got 3..18"
    ),
    Bad(
        "memory_lengths",
        torch.tensor([0, 2**40, 3, -(2**40)]),
        ValueError,
        "memory_lengths must be in 0..Tk = 0..17, got -1099511627776..1099511627776",
    ),
    # Dtype
    Bad(
        "query", ones(4, 3, 16).int(), TypeError, "query must be float32, bfloat16, float16 or float64, got torch.int32"
    ),
    Bad(
        "query",
        ones(4, 3, 16, dtype=torch.complex64),
        TypeError,
        "query must be float32, bfloat16, float16 or float64, got torch.complex64",
    ),
    Bad(
        "keys", ones(4, 17, 16).half(), TypeError, "keys must have the dtype of query, torch.float32, got torch.float16"
    ),
    Bad(
        "values",
        ones(4, 17, 5).double(),
        TypeError,
        "values must have the dtype of query, torch.float32, got torch.float64",
    ),
    Bad("v", ones(16).bfloat16(), TypeError, "v must have the dtype of query, torch.float32, got torch.bfloat16"),
    Bad("bias", ones(16).int(), TypeError, "bias must have the dtype of query, torch.float32, got torch.int32"),
    Bad("memory_lengths", ones(4), TypeError, "memory_lengths must be int32 or int64, got torch.float32"),
    Bad("memory_lengths", ones(4).bool(), TypeError, "memory_lengths must be int32 or int64, got torch.bool"),
    Bad("memory_lengths", ones(4).to(torch.int16), TypeError, "memory_lengths must be int32 or int64, got torch.int16"),
    Bad("mask", ones(4, 17), TypeError, "mask must be bool (True = attend), got torch.float32"),
    Bad("mask", ones(4, 17).to(torch.uint8), TypeError, "mask must be bool (True = attend), got torch.uint8"),
    # Device
    Bad("keys", ones(4, 17, 16, device="meta"), ValueError, "keys must be on the device of query, cpu, got meta"),
    Bad("values", ones(4, 17, 5, device="meta"), ValueError, "values must be on the device of query, cpu, got meta"),
    Bad("v", ones(16, device="meta"), ValueError, "v must be on the device of query, cpu, got meta"),
    Bad("bias", ones(16, device="meta"), ValueError, "bias must be on the device of query, cpu, got meta"),
    Bad(
        "memory_lengths",
        ones(4, dtype=torch.int64, device="meta"),
        ValueError,
        "memory_lengths must be on the device of query, cpu, got meta",
    ),
    Bad("mask", ones(4, 17, device="meta").bool(), ValueError, "mask must be on the device of query, cpu, got meta"),
    # No tensor
    Bad("query", [[1.0]], TypeError, "query must be a tensor, got list"),
    Bad("query", None, TypeError, "query must be a tensor, got NoneType"),
    Bad("keys", None, TypeError, "keys must be a tensor, got NoneType"),
    Bad("values", 1.0, TypeError, "values must be a tensor, got float"),
    Bad("v", None, TypeError, "v must be a tensor, got NoneType"),
    Bad("bias", 0.0, TypeError, "bias must be a tensor, got float"),
    Bad("memory_lengths", [17, 3, 2, 1], TypeError, "memory_lengths must be a tensor, got list"),
    Bad("mask", "causal", TypeError, "mask must be a tensor, got str"),
    # Numbers
    Bad("scale", None, TypeError, "scale must be a number, got NoneType"),
    Bad("scale", "1", TypeError, "scale must be a number, got str"),
    Bad("scale", 1j, TypeError, "scale must be a number, got complex"),
    Bad("scale", ones(()), TypeError, "scale must be a number, got Tensor"),
    Bad("scale", math.nan, ValueError, "scale must be a finite number, got nan"),
    Bad("scale", math.inf, ValueError, "scale must be a finite number, got inf"),
)


def arguments_of(op: Op) -> dict[str, Any]:
    arguments = make(op, SIZES, torch.float32)
    return dict(arguments.tensors)


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: f"{bad.argument}: {bad.message[:40]}")
@ops
def test_bad_argument(op: Op, backend: str, bad: Bad) -> None:
    if bad.argument not in inspect.signature(op.function).parameters:
        pytest.skip(f"{op.name} has no {bad.argument}")
    if bad.argument == "query" and bad.value is None and op.name == "additive_attention":
        pytest.skip("additive_attention pools without a query")
    with pytest.raises(bad.error, match=f"^{re.escape(f'{op.name}: {bad.message}')}$"):
        op.function(**arguments_of(op) | {bad.argument: bad.value}, backend=backend)


def test_error_of_the_documentation() -> None:
    query, keys = ones(4, 3, 128), ones(4, 17, 64)
    expected = "additive_attention: keys must have shape (B, Tk, A) = (4, *, 128), got (4, 17, 64)"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        attn_kernels.additive_attention(query, keys, keys, ones(128))


@ops
def test_sparse_is_refused(op: Op, fused: str, device: str) -> None:
    """By PyTorch, which finds no kernel for it: an error, and nothing read from memory that is not there."""
    for name in op.inputs:
        arguments = {key: t.to(device) for key, t in arguments_of(op).items()}
        arguments[name] = arguments[name].to_sparse()
        with pytest.raises((TypeError, ValueError, NotImplementedError)):
            op.function(**arguments, backend=fused)


@ops
def test_signature(op: Op) -> None:
    """Tensors first, the rest keyword-only; the names of the reference, backend, and what the kernels may be given."""
    parameters = inspect.signature(op.function).parameters
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == list(op.inputs)
    own = [*(["memory_offsets"] if op.masked else []), "backend"]
    own += ["prepared"] if op.name == "additive_attention" else []
    of_reference = parameters_of(op.reference, reference._attend)
    assert [*(name for name in of_reference if name != "seed"), *own] == list(parameters)  # seed: of dropout
    assert set(parameters_of(op.eager, eager._attend)) <= set(of_reference)


def parameters_of(function: Callable[..., Any], with_options: Callable[..., Any]) -> list[str]:
    """Names of parameters; of ``**options`` those with which it calls another function."""
    names = list(inspect.signature(function).parameters)
    if "options" not in names:
        return names
    options = inspect.signature(with_options).parameters.values()
    return names[:-1] + [p.name for p in options if p.kind is p.KEYWORD_ONLY]


# What comes out -------------------------------------------------------------------------------------------------------


@ops
def test_result_type(op: Op, backend: str, device: str) -> None:
    arguments = {key: t.to(device) for key, t in arguments_of(op).items()}
    result = op.function(**arguments, backend=backend)
    if op.masked:
        assert isinstance(result, Attention) and result._fields == ("context", "alignments")
        assert isinstance(op.function(**arguments, backend=backend, need_weights=False), Attention)
    else:
        assert isinstance(result, Tensor)


@ops
def test_results_are_new_and_contiguous(op: Op, fused: str, device: str) -> None:
    arguments = make(op, CASES["time-major"], torch.float32, device)
    memory = {t.data_ptr() for t in arguments.tensors.values()}
    for name, t in run(op.function, op, arguments, backend=fused).items():
        assert t.data_ptr() not in memory, name
        if name in op.outputs:
            assert t.is_contiguous(), name


# Dtypes and autocast --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@ops
def test_mixed_dtypes_are_refused(op: Op, backend: str, device: str, dtype: torch.dtype) -> None:
    other = torch.float32 if dtype != torch.float32 else torch.bfloat16
    for name in op.inputs[1:]:
        arguments = {key: t.to(device, dtype) for key, t in arguments_of(op).items()}
        arguments[name] = arguments[name].to(other)
        expected = f"{op.name}: {name} must have the dtype of query, {dtype}, got {other}"
        with pytest.raises(TypeError, match=f"^{re.escape(expected)}$"):
            op.function(**arguments, backend=backend)


@pytest.mark.parametrize("name", ["plain", "lengths and mask per query"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@ops
def test_autocast(op: Op, backend: str, device: str, dtype: torch.dtype, name: str) -> None:
    """Results in the dtype of autocast, gradients in that of the leaves; the backward pass runs outside autocast."""
    arguments = make(op, CASES[name], torch.float32, device)
    leaves = {key: t.requires_grad_() for key, t in arguments.tensors.items()}
    with torch.autocast(device, dtype=dtype):
        outputs = op.function(**leaves, **op.options, **arguments.masks, backend=backend)
    outputs = dict(zip(op.outputs, outputs if op.masked else (outputs,), strict=True))
    assert all(t.dtype == dtype for t in outputs.values())
    loss = sum((outputs[key] * grad.to(dtype)).sum() for key, grad in arguments.grads.items())
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    assert all(t.dtype == torch.float32 for t in gradients)
    results = outputs | {f"d{key}": t.to(dtype) for key, t in zip(leaves, gradients, strict=True)}
    rounded = make(op, CASES[name], torch.float32, device).to(dtype, device)
    exact = oracle(op, rounded)
    assert_close(results, exact, eager_errors(op, rounded, exact), dtype)


@ops
def test_autocast_mixed_and_float64(op: Op, backend: str, device: str) -> None:
    """Autocast makes mixed dtypes one, as it does for PyTorch's own functions, and leaves float64 alone."""
    arguments = {key: t.to(device) for key, t in arguments_of(op).items()}
    with torch.autocast(device, dtype=torch.bfloat16):
        mixed = op.function(**arguments | {"keys": arguments["keys"].bfloat16()}, backend=backend)
        double = op.function(**{key: t.double() for key, t in arguments.items()}, backend=backend)
    assert (mixed[0] if op.masked else mixed).dtype == torch.bfloat16
    assert (double[0] if op.masked else double).dtype == torch.float64


@ops
def test_autocast_disabled_inside(op: Op, backend: str, device: str) -> None:
    arguments = {key: t.to(device) for key, t in arguments_of(op).items()}
    with torch.autocast(device, dtype=torch.bfloat16), torch.autocast(device, enabled=False):
        result = op.function(**arguments, backend=backend)
    assert (result[0] if op.masked else result).dtype == torch.float32


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("name", ["plain", "one of each", "decode", "Tk = 0, no mask", "B = 0", "query 2-D", "sliced"])
def test_small_dot_attention(name: str, scale: float) -> None:
    """Without a named backend, small calls that need gradients go another way: with the same results."""
    op = OPS["dot_attention"]._replace(options={"scale": scale})
    check(op, CASES[name], torch.float32, "cpu")
    arguments = make(op, CASES[name], torch.float32)
    expected = run(op.function, op, arguments, backend="reference")
    for key, result in run(op.function, op, arguments).items():
        torch.testing.assert_close(result, expected[key], rtol=1e-5, atol=1e-6)
    tensors = [t.requires_grad_() for t in arguments.tensors.values()]
    assert op.function(*tensors, need_weights=False).alignments is None


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("argument", ["keys", "values"])
def test_small_dot_attention_refuses(argument: str, axis: int) -> None:
    if (argument, axis) == ("values", 2):
        return  # the size of values is their own
    tensors = {name: torch.randn(2, 3, 4, requires_grad=True) for name in ("query", "keys", "values")}
    tensors[argument] = torch.randn([n + (i == axis) for i, n in enumerate((2, 3, 4))])
    with pytest.raises(ValueError, match=r"^dot_attention: (keys|values) must have shape"):
        attn_kernels.dot_attention(**tensors)


@pytest.mark.parametrize(
    "scale", [np.float32(2), np.float64(2), np.int64(2), np.float16(2)], ids=lambda s: s.dtype.name
)
@pytest.mark.parametrize("name", ["additive_attention", "dot_attention"])
def test_scale_may_be_a_number_of_numpy(name: str, scale: Any) -> None:
    tensors = [torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 4), torch.randn(4)]
    function = getattr(attn_kernels, name)
    arguments = tensors if name == "additive_attention" else tensors[:3]
    torch.testing.assert_close(function(*arguments, scale=scale), function(*arguments, scale=2.0))
    with pytest.raises(ValueError, match="scale must be a finite number, got nan"):
        function(*arguments, scale=np.float32("nan"))


@pytest.mark.parametrize("argument", ["query", "values"])  # keys and values together: test_packed.py
def test_nested_tensors_are_refused(argument: str, backend: str, device: str) -> None:
    tensors = {"query": torch.randn(2, 3, 4), "keys": torch.randn(2, 5, 4), "values": torch.randn(2, 5, 4)}
    tensors = {name: x.to(device) for name, x in tensors.items()}
    rows = [torch.randn(4, 4, device=device), torch.randn(7, 4, device=device)]
    tensors[argument] = torch.nested.nested_tensor(rows, layout=torch.jagged)
    message = f"dot_attention: {argument} must be a padded tensor, got a nested one; pass .* memory_lengths"
    with pytest.raises(TypeError, match=message):
        attn_kernels.dot_attention(**tensors, backend=backend)
