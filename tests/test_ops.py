"""The matrix: op x backend x dtype x case, results and every gradient by name, against the reference in float64."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

from attn_kernels.backends import NAMES
from matrix import (
    CASES,
    CORE,
    DTYPES,
    MAIN,
    OPS,
    VARIANTS,
    Arguments,
    Case,
    Op,
    assert_bit_equal,
    call,
    check,
    interpreted,
    is_slow,
    make,
    of_variants,
    run,
    skip_if_slow,
    slow_if,
    slow_interpreted,
)

pytestmark = pytest.mark.every_level
ops = of_variants()
masked_ops = pytest.mark.parametrize("op", [op for op in OPS.values() if op.masked], ids=lambda op: op.name)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def is_left_out(op: Op, dtype: torch.dtype, case: Case) -> bool:
    """Variants share most code with MAIN: beyond CORE each case has one dtype, another one for the next variant."""
    if op in MAIN.values() or case in CORE:
        return False
    turn = list(VARIANTS.values()).index(op) + list(CASES.values()).index(case)
    return dtype != DTYPES[turn % len(DTYPES)]


MATRIX = [
    pytest.param(op, dtype, case, id=f"{name}-{str(dtype).removeprefix('torch.')}-{case_name}")
    for (name, op), dtype, (case_name, case) in itertools.product(VARIANTS.items(), DTYPES, CASES.items())
    if os.environ.get("ATTN_WHOLE_MATRIX") == "1" or not is_left_out(op, dtype, case)
]


@pytest.mark.every_form
@slow_if(
    lambda op, backend, case, **_: (
        case not in (CORE[:3] if is_slow(backend) else CORE) and (interpreted(backend) or op not in MAIN.values())
    )
)
@pytest.mark.parametrize(("op", "dtype", "case"), MATRIX)
def test_results_and_gradients(op: Op, backend: str, dtype: torch.dtype, case: Case) -> None:
    skip_if_slow(backend, case, dtype)
    check(op, case, dtype, backend)


def test_make_test_has_every_op_backend_and_dtype() -> None:
    """Whatever is slow: results and all gradients of some case stay."""
    (slow,) = (mark.args[0] for mark in test_results_and_gradients.pytestmark if mark.name == "slow_if")
    for op, backend, dtype in itertools.product(VARIANTS.values(), NAMES, DTYPES):
        if backend in op.lacks:
            continue
        kept = [case for case in CASES.values() if not slow(op=op, backend=backend, dtype=dtype, case=case)]
        assert any(set(op.outputs) <= set(case.receives) and not case.without for case in kept), (op.name, backend)


@slow_if(
    lambda backend, dtype, name, **_: (
        interpreted(backend) and (name != "lengths and mask per query" or (is_slow(backend) and dtype != torch.float32))
    )
)
@pytest.mark.parametrize("name", ["plain", "decode, long", "lengths and mask per query", "query 2-D, masked"])
@dtypes
@masked_ops
def test_without_weights(op: Op, backend: str, device: str, dtype: torch.dtype, name: str) -> None:
    """need_weights=False leaves out alignments and changes nothing else, with gradients and without."""
    skip_if_slow(backend, CASES[name], dtype)
    check(op, CASES[name]._replace(receives=("context",)), dtype, backend, need_weights=False)
    check(op, CASES[name]._replace(receives=()), dtype, backend, need_weights=False)
    arguments = make(op, CASES[name], dtype, device)
    outputs = call(op.function, op, arguments.tensors, **arguments.masks, backend=backend, need_weights=False)
    assert outputs["alignments"] is None


@slow_interpreted("plain", "Tk = 0")
@pytest.mark.parametrize("name", ["plain", "lengths all 0", "B = 0", "Tk = 0"])
@ops
def test_without_gradients(op: Op, backend: str, device: str, name: str) -> None:
    """The same results under no_grad, in inference mode and where only some inputs need a gradient."""
    arguments = make(op, CASES[name], torch.float32, device)
    expected = run(op.function, op, arguments, backend=backend)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            results = run(op.function, op, arguments._replace(grads={}), backend=backend)
            assert_bit_equal(results, {name: expected[name] for name in op.outputs})
    for needed in arguments.tensors:
        tensors = {key: t.detach().requires_grad_(key == needed) for key, t in arguments.tensors.items()}
        outputs = call(op.function, op, tensors, **arguments.masks, backend=backend)
        loss = sum((outputs[key] * grad).sum() for key, grad in arguments.grads.items())
        (gradient,) = torch.autograd.grad(loss, [tensors[needed]])
        assert_bit_equal({"d" + needed: gradient}, {"d" + needed: expected["d" + needed]})


@slow_interpreted("lengths", "sliced")
@pytest.mark.parametrize("name", ["plain", "lengths", "mask (B, Tq, Tk)", "sliced", "stride 0", "gradient stride 0"])
@ops
def test_inputs_are_not_written(op: Op, fused: str, device: str, name: str) -> None:
    arguments = make(op, CASES[name], torch.float32, device)
    before = Arguments(*({key: t.clone() for key, t in part.items()} for part in arguments))
    run(op.function, op, arguments, backend=fused)
    for part, copy in zip(arguments, before, strict=True):
        assert_bit_equal(part, copy)


@slow_interpreted(torch.float32)
@dtypes
@ops
def test_second_backward_is_bit_equal(op: Op, fused: str, device: str, dtype: torch.dtype) -> None:
    arguments = make(op, CASES["lengths"], dtype, device)
    leaves = [t.requires_grad_() for t in arguments.tensors.values()]
    outputs = list(call(op.function, op, arguments.tensors, **arguments.masks, backend=fused).values())
    grads = list(arguments.grads.values())
    first = torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
    second = torch.autograd.grad(outputs, leaves, grads)
    names = ["d" + name for name in arguments.tensors]
    assert_bit_equal(dict(zip(names, second, strict=True)), dict(zip(names, first, strict=True)))


@slow_interpreted()
@ops
def test_negative_bit_is_resolved(op: Op, backend: str, device: str) -> None:
    """Views that PyTorch negates lazily, as imag of a conjugate: their memory holds the other sign."""
    arguments = make(op, CASES["plain"], torch.float32, device)
    lazy = {name: torch.complex(t, -t).conj().imag for name, t in arguments.tensors.items()}
    assert all(t.is_neg() for t in lazy.values())
    plain = {name: t.resolve_neg() for name, t in lazy.items()}
    results = run(op.function, op, arguments._replace(tensors=lazy), backend=backend)
    assert_bit_equal(results, run(op.function, op, arguments._replace(tensors=plain), backend=backend))
