"""Tests of a GPU backend put all their tensors on its device: checked without a GPU, on a stand-in device."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import outcomes as gpu_outcomes
from conftest import available
from stand_in_gpu import MIXED, NAME

ROOT = Path(__file__).resolve().parents[1]
# How an operation, or this package, complains about tensors of two devices.
pytestmark = [pytest.mark.usefixtures("outside_xdist"), pytest.mark.slow]
COMPLAINTS = (MIXED, "must be on the device of", "cannot be used on cpu tensors", f"cannot be used on {NAME} tensors")


def outcomes(path: Path, *arguments: str) -> list[dict[str, str]]:
    """Of the tests of the cuda backend that are asked for, run in another process."""
    if torch.cuda.is_available():
        pytest.skip("the tests themselves run on the GPU here")
    if not hasattr(importlib.import_module("torch.utils.backend_registration"), "_DummyBackendModule"):
        pytest.skip("this PyTorch knows no device written in Python")
    available("cuda")
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), gpu_outcomes.VARIABLE: str(path)}
    done = subprocess.run(
        [*command, "-p", "stand_in_gpu", "-p", "bench.gpu.outcomes", *arguments],
        env=os.environ | environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-3000:]  # 1: some tests failed
    return gpu_outcomes.read(path)


def assert_on_one_device(found: list[dict[str, str]]) -> None:
    wrong = [f"{one['test']}: {one['reason']}" for one in found if any(text in one["reason"] for text in COMPLAINTS)]
    assert not wrong, "\n".join(wrong)


def test_the_stand_in_tells_two_devices_apart(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(
        "import pytest, torch\nfrom matrix import device_of\n"
        "@pytest.mark.parametrize('other', ['same', 'cpu'])\n@pytest.mark.parametrize('backend', ['cuda'])\n"
        "def test_it(backend, other):\n"
        "    x = torch.arange(3.0).to(device_of(backend)).requires_grad_()\n"
        "    weights = torch.ones(3, device=device_of(backend) if other == 'same' else 'cpu')\n"
        "    (x.square() * weights).sum().backward()\n"
        "    assert x.grad.device == x.device and x.grad.cpu().tolist() == [0, 2, 4]\n"
    )
    found = outcomes(tmp_path / "outcomes.jsonl", "--rootdir", str(tmp_path), str(tmp_path))
    assert {one["test"].partition("[")[2]: one["outcome"] for one in found} == {
        "cuda-same]": "passed",
        "cuda-cpu]": "failed",
    }
    with pytest.raises(AssertionError, match="on standin and on cpu"):
        assert_on_one_device(found)


@pytest.mark.long(80)
def test_inputs_lie_on_the_device_of_their_backend(tmp_path: Path) -> None:
    """Two tests that once did not; vmap is left out of the next test."""
    chosen = "cuda and not triton and (vmap or every_backend)"
    files = ["tests/test_autograd.py", "tests/test_memory_gradient.py"]
    found = outcomes(tmp_path / "outcomes.jsonl", "-k", chosen, *files)
    assert_on_one_device(found)
    assert sum(one["outcome"] == "passed" for one in found) >= 5


def test_inputs_of_all_tests_lie_on_the_device_of_their_backend(tmp_path: Path) -> None:
    # test_backends.py is about tensors on the wrong device.
    # Left out: tests named after CUDA that have no tensors, the many repeats of a call, and the transforms, where
    # PyTorch itself ends the process (jacfwd of a subclass of Tensor).
    left_out = ("triton", "test_cuda", "repeats_are_bit_equal", "transforms_are_those_of_the_reference")
    arguments = ("-k", " and not ".join(("cuda", *left_out)), "--ignore=tests/test_backends.py", "tests")
    found = outcomes(tmp_path / "outcomes.jsonl", "--of-each-value", str(tmp_path / "chosen"), *arguments)
    chosen = (tmp_path / "chosen").read_text().splitlines()
    assert_on_one_device(found)
    assert {one["test"] for one in found} == set(chosen)
    passed = [one["test"] for one in found if one["outcome"] == "passed"]
    assert len(chosen) > 410 and len(passed) > 240  # 420 and 251; the others need what the stand-in does not have
