"""The processes of a rehearsal of ``make gpu``: the modules that a stage runs, on the CPU, with injected faults.

python -m bench.gpu.rehearsed MODULE FAULTS ARGUMENTS       # FAULTS: separated by semicolons
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Nothing here may import the package before load_emulated: that function sets where the package finds CUDA kernels.
ROOT = Path(__file__).resolve().parents[2]
CASE_SECONDS = 12.0  # a case that hangs is stopped after this time


class StandIn:
    """A CPU in place of a GPU: a graph of calls makes the calls one after the other."""

    l2_bytes = 4000
    memory_bytes = 10**9

    def __init__(self) -> None:
        import torch

        from .. import timing

        self.device = torch.device("cpu")
        self.timer = timing.WallTimer()
        self.timer.shortest_sample = 1e-5

    def capture(self, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
        return lambda: [call() for call in calls]

    def release(self) -> None:
        pass


def load_emulated() -> None:
    """Loads the CUDA kernels in the emulator, as the tests do."""
    if not list((ROOT / "build" / "emulated").glob("_C_cuda.*.so")):
        raise FileNotFoundError("build/emulated has no module: make test builds it, or tests/cpp/build_emulated.py")
    sys.path.append(str(ROOT / "tests"))
    importlib.import_module("conftest")  # installs the finder for the emulated module


def happen(kind: str) -> None:
    if kind == "dies":
        os.abort()
    if kind == "hangs":
        import signal

        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})  # like C++ code that waits for a device
        time.sleep(600)
    if kind == "raises":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def kinds_of(stage: str, faults: Sequence[str]) -> list[str]:
    return [fault.removeprefix(f"{stage} ") for fault in faults if fault.startswith(f"{stage} ")]


def first(faults: Sequence[str], arguments: Sequence[str]) -> int:
    """Runs a few groups of first contact. In "dot cuda" each case has another fault."""
    from . import first as gpu_first

    if gpu_first.GROUP_VARIABLE in os.environ:
        load_emulated()
    gpu_first.GROUPS = {name: gpu_first.GROUPS[name] for name in ("prepare cuda", "dot cuda")}
    gpu_first.DOT = gpu_first.DOT[:1]
    compare, kinds = (
        gpu_first.compare,
        dict(zip(("float32", "bfloat16", "float16"), kinds_of("first", faults), strict=False)),
    )

    def compare_with_fault(op: str, sizes: Sequence[int], dtype: str, *args: Any, **options: Any) -> str:
        if kinds.get(dtype) == "wrong":
            raise gpu_first.Wrong("gradient 1 3.0e-01")
        happen(kinds.get(dtype, ""))
        return compare(op, sizes, dtype, *args, **options)

    gpu_first.compare = compare_with_fault
    command = (sys.executable, "-m", "bench.gpu.rehearsed", "bench.gpu.first", ";".join(faults))
    return gpu_first.main([*arguments, "--case-limit", str(CASE_SECONDS)], command)


def measure(faults: Sequence[str], arguments: Sequence[str]) -> int:
    load_emulated()
    from ..cases import FORWARD, Shape
    from . import cells as gpu_cells
    from . import device as gpu_device
    from . import measure as gpu_measure

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
    gpu_device.CEILINGS = {
        "copy_bytes_per_s": lambda gpu: 3e12,
        "ffma_per_s": lambda gpu: 25e12,
        "launch_us": lambda gpu: 5.0,
    }
    what = arguments[1]
    kinds = kinds_of(what, faults)
    if what == "ceilings":
        for name, kind in zip(gpu_device.CEILINGS, kinds, strict=False):
            gpu_device.CEILINGS[name] = lambda gpu, kind=kind: happen(kind)
    else:
        victims = dict(zip((row.key for row in (small[1:] if what == "targets" else [extra])), kinds, strict=False))
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
    for kind in kinds_of("sanitizer", faults):
        if kind == "fails":
            return 1
        happen(kind)
    load_emulated()
    from . import smoke as gpu_smoke

    gpu_smoke.SHAPES = gpu_smoke.SHAPES[-1:]
    print(f"{gpu_smoke.run('cpu', ['cuda'])} calls")
    return 0


def main(arguments: Sequence[str]) -> int:
    name, faults, *rest = arguments
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    if name == "bench.gpu.first":
        return first(faults.split(";"), rest)
    if name == "bench.gpu.measure":
        return measure(faults.split(";"), rest)
    return smoke(faults.split(";"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
