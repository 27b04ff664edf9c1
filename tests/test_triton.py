"""What only the Triton backend has: splits of a decoding step."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from conftest import available
from matrix import OPS, Case, Op, check

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'attn_kernels[triton]'"
)

attending = pytest.mark.parametrize("op", [op for op in OPS.values() if op.masked], ids=lambda op: op.name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(B=2, Tq=1, Tk=45, A=17, D=33),
        Case(B=3, Tq=5, Tk=37, A=8, D=130, lengths="random"),
        Case(B=2, Tq=8, Tk=33, A=16, D=16, lengths="random", mask="pairs"),
    ],
    ids=["plain", "lengths", "mask"],
)
@attending
def test_steps_split_over_programs(op: Op, case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same results whether one program walks the steps of a row or several do, some of which find nothing."""
    available("triton")
    decode = importlib.import_module("attn_kernels.triton.decode")
    monkeypatch.setattr(decode, "BYTES_OF_PROGRAM", 1)
    monkeypatch.setattr(decode, "PROCESSORS", 10)
    launched = []
    launch = decode.launch
    monkeypatch.setattr(decode, "launch", lambda kernel, *args: launched.append(kernel) or launch(kernel, *args))
    check(op, case, dtype, "triton")
    assert decode.combine_kernel in launched
