"""How the tests run: where Triton's kernels run, how many threads a process has, and which backends a test sees.

A backend that cannot run here is skipped with the reason that ``attn_kernels.backends()`` gives.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

# Threads of numpy and OpenMP are fixed when they are loaded: before torch is.
IN_XDIST = "PYTEST_XDIST_WORKER" in os.environ
if IN_XDIST:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Without a GPU the Triton kernels run on CPU tensors in Triton's interpreter, which must be chosen before triton is
# imported. With one they run on it. TRITON_INTERPRET in the environment, 0 or 1, overrules both.
if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # for bench.eager, the formulas in eager PyTorch; last, so that an installed package wins

import attn_kernels
from attn_kernels.backends import NAMES
from matrix import device_of

if IN_XDIST:
    torch.set_num_threads(1)


def pytest_report_header() -> list[str]:
    return [f"attn_kernels {b.name}: {b.detail}" for b in attn_kernels.backends().values()]


def available(name: str) -> str:
    backend = attn_kernels.backends()[name]
    if not backend.available:
        pytest.skip(f"backend {name}: {backend.detail}")
    return name


@pytest.fixture(params=NAMES[::-1])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend."""
    return available(request.param)


@pytest.fixture(params=[name for name in reversed(NAMES) if name != "reference"])
def fused(request: pytest.FixtureRequest) -> str:
    """Every backend but the reference, which is plain PyTorch and keeps PyTorch's own promises."""
    return available(request.param)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Where the tensors of the test's backend live."""
    name = request.getfixturevalue("fused" if "fused" in request.fixturenames else "backend")
    return device_of(name)
