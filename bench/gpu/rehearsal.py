"""``make gpu`` without a GPU: its stages run on the CPU, on small problems, with injected faults.

    python -m bench.gpu --rehearse              # all stages, nothing fails
    python -m bench.gpu --rehearse faults       # all stages, with failures in each of them

The stages and their processes are the same as on a GPU. In these processes the CUDA kernels run in the emulator, a
graph of calls runs the calls one after the other, and the tests are a few dummies that pass, fail, hang or die.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

from .rehearsed import CASE_SECONDS
from .stages import ROOT, Machine

FOLDER = ROOT / "build" / "gpu" / "rehearsal"
# A fault is "stage kind". "wrong" is a wrong result. "dies" ends the process. "hangs" is a call into C++ that Python
# signals cannot interrupt.
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


class Rehearsal(Machine):
    """The CPU in place of a GPU, with these faults."""

    device = "cpu"
    test_seconds = CASE_SECONDS

    def __init__(self, faults: Sequence[str] = (), folder: Path = FOLDER) -> None:
        if unknown := set(faults) - set(FAULTS):
            raise ValueError(f"no faults {sorted(unknown)}; there are {', '.join(FAULTS)}")
        self.faults, self.folder = tuple(faults), folder
        # A stage that hangs uses all of its time, and nothing else in these two needs it.
        hang = [stage for stage in ("build", "sanitizer") if f"{stage} hangs" in faults]
        self.most = MappingProxyType({"build": 20.0, "sanitizer": 40.0} | dict.fromkeys(hang, 5.0))
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
        return [*super().module("bench.gpu.rehearsed"), name, ";".join(self.faults)]

    def lacking(self) -> dict[str, str]:
        return {"_C_cuda": "it is built in this rehearsal"} if any("build" in f for f in self.faults) else {}

    def build(self, module: str) -> tuple[list[str], dict[str, str]]:
        work = "import time; time.sleep(600)" if "build hangs" in self.faults else "raise SystemExit('nvcc failed')"
        return [sys.executable, "-c", work], {}

    def find(self, tool: str) -> str | None:
        return str(self.tool)
