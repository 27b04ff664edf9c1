"""``make gpu`` without a GPU: its stages on the CPU, on small problems, with faults put into them.

    python -m bench.gpu --rehearse              # all stages, nothing fails
    python -m bench.gpu_rehearsal               # all stages, and in each of them something does

The stages are those of a GPU, with the same processes around them. In those processes the CUDA kernels run in the
emulator, a graph of calls is the calls, and the tests are a few that do nothing but pass, fail, hang or die.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import timing
from .gpu_stages import ROOT, Machine

FOLDER = ROOT / "build" / "gpu" / "rehearsal"
# A fault is "stage kind". "wrong" is a result that is not right, "dies" the end of a process, "hangs" a call into C++
# that no signal of Python's reaches.
FAULTS = (
    "build fails",
    "build hangs",
    "first wrong",
    "first dies",
    "first hangs",
    "ceilings dies",
    "ceilings hangs",
    "targets wrong",
    "targets dies",
    "targets hangs",
    "tests red",
    "tests dies",
    "tests hangs",
    "tests loses the context",
    "cells raises",
    "sanitizer fails",
    "sanitizer hangs",
)
CASE_SECONDS = 4.0  # what hangs is stopped after so long
TEST_FILE = """
import os, time, pytest

FAULTS = {faults!r}

@pytest.mark.parametrize("case", ["right", "red", "dies", "hangs", "loses the context", "after"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_it(backend, case):
    if backend != "cuda" or f"tests {{case}}" not in FAULTS:
        return
    if case == "dies":
        os._exit(11)
    if case == "hangs":
        time.sleep(600)
    assert False, "CUDA error: an illegal memory access" if case == "loses the context" else "for some reason"
"""
SANITIZER = """#!{python}
import subprocess, sys
if "--help" in sys.argv:
    print("--kernel-name arg  kernels that are checked")
else:
    command = sys.argv[sys.argv.index("--error-exitcode") + 2 :]
    status = subprocess.run(command).returncode
    print(f"========= ERROR SUMMARY: {{0 if status == 0 else 1}} errors")
    sys.exit(9 if status else 0)
"""


class Timer(timing.WallTimer):
    shortest_sample = 1e-5


class StandIn:
    """A CPU in the place of a GPU to measure on: a graph of calls is the calls."""

    l2_bytes = 4000
    memory_bytes = 10**9

    def __init__(self) -> None:
        import torch

        self.device = torch.device("cpu")
        self.timer = Timer()

    def capture(self, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
        return lambda: [call() for call in calls]

    def release(self) -> None:
        pass


class Rehearsal(Machine):
    """The CPU, with these faults."""

    device = "cpu"
    test_seconds = CASE_SECONDS

    def __init__(self, faults: Sequence[str] = (), folder: Path = FOLDER) -> None:
        if unknown := set(faults) - set(FAULTS):
            raise ValueError(f"no faults {sorted(unknown)}; there are {', '.join(FAULTS)}")
        self.faults, self.folder = tuple(faults), folder
        self.tests = folder / "stand-in" / "tests"
        self.tests.mkdir(parents=True, exist_ok=True)
        (self.tests / "test_ops.py").write_text(TEST_FILE.format(faults=self.faults))
        (self.tests / "conftest.py").write_text("")
        self.tool = self.tests.parent / "compute-sanitizer"
        self.tool.write_text(SANITIZER.format(python=sys.executable))
        self.tool.chmod(0o755)

    def name(self) -> str | None:
        return "rehearsal on the CPU"

    def module(self, name: str) -> list[str]:
        if name == "pytest":
            return super().module(name)
        return [*super().module("bench.gpu_rehearsal"), name, ";".join(self.faults)]

    def lacking(self) -> dict[str, str]:
        return {"_C_cuda": "it is built in this rehearsal"} if any("build" in f for f in self.faults) else {}

    def build(self, module: str) -> tuple[list[str], dict[str, str]]:
        work = "import time; time.sleep(600)" if "build hangs" in self.faults else "raise SystemExit('nvcc failed')"
        return [sys.executable, "-c", work], {}

    def find(self, tool: str) -> str | None:
        return str(self.tool)


# In the processes of the stages ---------------------------------------------------------------------------------------


def load_emulated() -> None:
    """The CUDA kernels in the emulator, as the tests have them."""
    if not list((ROOT / "build" / "emulated").glob("_C_cuda.*.so")):
        raise FileNotFoundError("build/emulated has no module: make test builds it, or tests/cpp/build_emulated.py")
    sys.path.append(str(ROOT / "tests"))
    importlib.import_module("conftest")  # which lets the package find it


def happen(kind: str) -> None:
    if kind == "dies":
        os.abort()
    if kind == "hangs":
        import signal

        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})  # as C++ does that waits for a device
        time.sleep(600)
    if kind == "raises":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def with_fault(work: Callable[..., Any], kinds: dict[int, str]) -> Callable[..., Any]:
    """The n-th call meets with kinds[n]."""
    calls = iter(range(10**9))

    def call(*args: Any, **keywords: Any) -> Any:
        happen(kinds.get(next(calls), ""))
        return work(*args, **keywords)

    return call


def kinds_of(stage: str, faults: Sequence[str]) -> list[str]:
    return [fault.removeprefix(f"{stage} ") for fault in faults if fault.startswith(f"{stage} ")]


def first(faults: Sequence[str], arguments: Sequence[str]) -> int:
    """A few groups of first contact. In "dot cuda" each case meets with another fault."""
    from . import gpu_first

    gpu_first.GROUPS = {name: gpu_first.GROUPS[name] for name in ("facts", "prepare cuda", "dot cuda", "graph cuda")}
    gpu_first.DOT = gpu_first.DOT[:1]
    compare, kinds = gpu_first.compare, dict(zip(("float32", "bfloat16", "float16"), kinds_of("first", faults)))

    def compare_with_fault(op: str, sizes: Sequence[int], dtype: str, *args: Any, **options: Any) -> str:
        if kinds.get(dtype) == "wrong":
            raise gpu_first.Wrong("gradient 1 3.0e-01")
        happen(kinds.get(dtype, ""))
        return compare(op, sizes, dtype, *args, **options)

    gpu_first.compare = compare_with_fault
    command = (sys.executable, "-m", "bench.gpu_rehearsal", "bench.gpu_first", ";".join(faults))
    return gpu_first.main([*arguments, "--case-limit", str(3 * CASE_SECONDS)], command)


def measure(faults: Sequence[str], arguments: Sequence[str]) -> int:
    from . import gpu_cells, gpu_device, gpu_measure
    from .problems import FORWARD, Shape

    gpu_measure.ROW_SECONDS = CASE_SECONDS
    decode, many = Shape(2, 1, 5, 8, 8), Shape(2, 9, 5, 8, 8)
    small = [
        gpu_cells.Row(op, shape, FORWARD, "float32")
        for op in (gpu_cells.ADDITIVE, gpu_cells.DOT)
        for shape in (decode, many)
    ]
    extra = gpu_cells.Row(gpu_cells.SCORES, many, FORWARD, "float32")
    gpu_cells.targets, gpu_cells.rows = lambda: small, lambda: [*small, extra]
    gpu_device.Gpu, gpu_device.describe = StandIn, lambda gpu: {"multiprocessors": 132}
    gpu_device.CEILINGS = {"copy_bytes_per_s": lambda gpu: 3e12, "ffma_per_s": lambda gpu: 25e12, "launch_us": lambda gpu: 5.0}
    what = arguments[1]
    kinds = kinds_of(what, faults)
    if what == "ceilings":
        for name, kind in zip(gpu_device.CEILINGS, kinds):
            gpu_device.CEILINGS[name] = lambda gpu, kind=kind: happen(kind)
    else:
        victims = dict(zip((row.key for row in (small[1:] if what == "targets" else [extra])), kinds))
        work = gpu_cells.measure

        def measure_with_fault(row: gpu_cells.Row, *args: Any, **options: Any) -> dict[str, Any]:
            kind = victims.get(row.key, "")
            happen(kind)
            cell = work(row, *args, **options)
            return cell if kind != "wrong" else {**cell, "ways": [one | {"wrong": "wrong"} for one in cell["ways"]]}

        gpu_cells.measure = measure_with_fault
    gpu_measure.main(arguments)
    return 0


def smoke(faults: Sequence[str]) -> int:
    from . import gpu_smoke

    for kind in kinds_of("sanitizer", faults):
        if kind == "fails":
            return 1
        happen(kind)
    gpu_smoke.SHAPES = gpu_smoke.SHAPES[-1:]
    print(f"{gpu_smoke.run('cpu', ['cuda'])} calls")
    return 0


def main(arguments: Sequence[str]) -> int:
    if not arguments:
        from . import gpu

        chosen = [fault for fault in FAULTS if not fault.endswith("hangs") or not fault.startswith(("build", "sanitizer"))]
        return gpu.main(["--output", str(FOLDER)], Rehearsal(chosen))
    name, faults, *rest = arguments
    os.environ["TRITON_INTERPRET"] = "1"
    load_emulated()
    if name == "bench.gpu_first":
        return first(faults.split(";"), rest)
    if name == "bench.gpu_measure":
        return measure(faults.split(";"), rest)
    return smoke(faults.split(";"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
