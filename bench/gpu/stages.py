"""The stages of ``make gpu``. Each runs its own processes under a time limit and stores a result in every case."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from .. import results
from . import first as gpu_first
from . import measure as gpu_measure
from . import outcomes as gpu_outcomes

ROOT = Path(__file__).resolve().parents[2]
# Tests that compile for other devices, or that test the tools themselves, say nothing about this GPU.
NOT_ON_GPU = ("triton_aot", "triton_hip", "cuda_check", "cuda_kernels", "gpu_bench", "gpu_rehearsal", "devices", "cpp")
NOT_ON_GPU += ("bench", "sweep", "limits", "g2p", "backends", "readme", "environment_report")
TEST_SECONDS = 60  # time limit of one test
TEST_WORKERS = 14  # they share the device; compilation and comparison run on the host
TEST_ROUNDS = 5  # maximum starts of pytest: a test that kills its process leaves other tests that did not run
MEASURING_ROUNDS = 8
KERNELS = "attn4cuda"  # in the mangled name of every kernel in namespace attn::cuda


class Outcome(NamedTuple):
    status: int | None  # None: it was stopped
    text: str


def run_limited(
    command: Sequence[str],
    seconds: float,
    environment: dict[str, str] | None = None,
    stuck: Callable[[], str | None] = lambda: None,
) -> Outcome:
    """Runs a command. It and its child processes are stopped when the time is over or when it is stuck."""
    if seconds <= 0:
        return Outcome(None, "no time was left")
    end = time.monotonic() + seconds
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryFile("w+", errors="replace") as output:  # a pipe could fill up before it is read
        process = subprocess.Popen(
            list(command), stdout=output, stderr=subprocess.STDOUT, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, **(environment or {})}, start_new_session=True,
        )  # fmt: skip
        why = ""
        try:
            while process.poll() is None and not why:
                why = f"stopped after {seconds:.0f} s" if time.monotonic() > end else stuck() or ""
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        text = output.read()
    return Outcome(None, f"{text}\n{why}".strip()) if why else Outcome(process.returncode, text)


class Machine:
    """The programs that the stages run, and their device. A rehearsal replaces it (bench/gpu/rehearsal.py)."""

    device = "cuda"
    tests = ROOT / "tests"
    test_seconds: float = TEST_SECONDS
    most: Mapping[str, float] = MappingProxyType({})  # reduced time limits in seconds, by stage

    def name(self) -> str | None:
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else None

    def module(self, name: str) -> list[str]:
        return [sys.executable, "-m", name]

    def lacking(self) -> dict[str, str]:
        """The compiled modules that do not work here, with the reason; found in a separate process."""
        outcome = run_limited([sys.executable, "-c", LACKING], 60)
        try:
            return json.loads(outcome.text.splitlines()[-1])
        except (IndexError, ValueError):
            return dict.fromkeys(("_C", "_C_cuda"), outcome.text.strip()[-300:])

    def build(self, module: str) -> tuple[list[str], dict[str, str]]:
        """The command that builds a module in place, and its environment: only for this device, on all processors."""
        import torch

        major, minor = torch.cuda.get_device_capability()
        environment = {
            "ATTN_KERNELS_CPU": "0" if module == "_C_cuda" else "1",
            "ATTN_KERNELS_CUDA": "1" if module == "_C_cuda" else "0",
            "ATTN_KERNELS_CUDA_ARCHITECTURES": f"{major}{minor}",
            # A source with many kernels takes minutes; nvcc can split its compilation over the processors.
            "NVCC_APPEND_FLAGS": f"{os.environ.get('NVCC_APPEND_FLAGS', '')} --split-compile=0".strip(),
        }
        folder = ROOT / "build" / "gpu" / module
        return [sys.executable, "setup.py", "build_ext", "--inplace", "--build-temp", str(folder)], environment

    def find(self, tool: str) -> str | None:
        return shutil.which(tool) or shutil.which(tool, path="/usr/local/cuda/bin")


LACKING = """
import json, torch, attn_kernels
from attn_kernels.backends import cuda_build_info
found = attn_kernels.backends()
reasons = {m: found[b].detail for m, b in (("_C", "cpu"), ("_C_cuda", "cuda")) if not found[b].available}
if "_C_cuda" not in reasons:
    major, minor = torch.cuda.get_device_capability()
    text = cuda_build_info()["architectures"]
    codes = [int(code) for code in "".join(c if c.isdigit() else " " for c in text).split()]
    if not any(code // 10 == major and code % 10 <= minor for code in codes):
        reasons["_C_cuda"] = f"it is for {codes}, the device has {major}{minor}"
print(json.dumps(reasons))
"""


# Stages: (machine, folder for files, seconds) -> result ---------------------------------------------------------------


def build(machine: Machine, folder: Path, seconds: float) -> dict[str, Any]:
    """Keeps the compiled modules that work and builds the others, in parallel."""
    start = time.monotonic()
    lacking = machine.lacking()
    if not lacking:
        return {"status": 0, "built": [], "seconds": round(time.monotonic() - start, 1)}
    with ThreadPoolExecutor() as pool:
        commands = {module: machine.build(module) for module in lacking}
        running = {m: pool.submit(run_limited, command, seconds, more) for m, (command, more) in commands.items()}
    found: dict[str, Any] = {"status": 0, "built": list(lacking), "why": lacking}
    for module, outcome in ((module, future.result()) for module, future in running.items()):
        (folder / f"build-{module}.log").write_text(outcome.text)
        if outcome.status != 0:
            found["status"] = outcome.status or "stopped when the time was over"
            found[f"output of {module}"] = outcome.text[-3000:]
    found["seconds"] = round(time.monotonic() - start, 1)
    return found


def first_contact(machine: Machine, folder: Path, seconds: float) -> dict[str, Any]:
    command = [*machine.module("bench.gpu.first"), str(folder), "--device", machine.device]
    outcome = run_limited([*command, "--limit", f"{seconds - 5:.0f}"], seconds, {"TRITON_INTERPRET": "0"})
    found = gpu_first.summary(gpu_first.read(folder))
    if outcome.status not in (0, 1):
        found["output"] = outcome.text[-2000:]
    return found


def run_tests(machine: Machine, folder: Path, seconds: float, backend: str) -> dict[str, Any]:
    """Runs the tests of one backend, and reads the outcomes of all tests so far."""
    end = time.monotonic() + seconds
    path = folder / "tests.jsonl"
    chosen = {"cuda": "cuda and not triton", "triton": "triton"}[backend]
    names = sorted(machine.tests.glob("test_*.py"))
    if importlib.util.find_spec("hypothesis") is None:
        names = [name for name in names if name.name != "test_fuzz.py"]  # its import fails without hypothesis
    tests = [str(name) for name in names if name.stem.removeprefix("test_") not in NOT_ON_GPU]
    command = [*machine.module("pytest"), "-q", "-p", "bench.gpu.outcomes", "-k", chosen, "-m", "not slow"]
    command += ["--tb=short", "-p", "no:cacheprovider", f"--rootdir={machine.tests.parent}"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(TEST_WORKERS, os.cpu_count() or 1))]
    complete, text = False, ""
    for _ in range(TEST_ROUNDS):
        done = folder / "tests-done.txt"
        # A test that began and did not end killed its process: it is not run again.
        done.write_text("".join(f"{one['test']}\n" for one in gpu_outcomes.read(path) if not gpu_outcomes.lost(one)))
        environment = {
            gpu_outcomes.VARIABLE: str(path),
            gpu_outcomes.STAGE: backend,
            gpu_outcomes.DONE: str(done),
            gpu_outcomes.SECONDS: str(machine.test_seconds),
            "TRITON_INTERPRET": "0",
        }
        outcome = run_limited([*command, *tests], end - time.monotonic(), environment)
        text = outcome.text
        with open(folder / f"tests-{backend}.log", "a") as log:
            log.write(text)
        left_over = any(gpu_outcomes.lost(one) for one in gpu_outcomes.read(path))
        if outcome.status in (0, 1, 5) and not left_over:  # 5: no test was left to run
            complete = True
            break
        if outcome.status is None and time.monotonic() >= end - 1:
            break
    found = gpu_outcomes.summary(gpu_outcomes.read(path))
    if not complete:
        found["output"] = text[-2000:]
    return found | {"complete": complete}


def measure(machine: Machine, path: Path, seconds: float, what: str, cell_seconds: float) -> None:
    """Measures in child processes: after one that dies or hangs in a kernel, the next one continues."""
    until = time.monotonic() + seconds
    for _ in range(MEASURING_ROUNDS):
        left = until - time.monotonic()
        if left < 2:
            return
        command = [*machine.module("bench.gpu.measure"), str(path), what]
        command += ["--left", f"{max(1, left - 3):.0f}", "--seconds", str(cell_seconds)]
        start = time.time()
        environment = {"TRITON_INTERPRET": "0"}
        outcome = run_limited(command, left, environment, lambda start=start: gpu_measure.stuck(path, start))
        if outcome.status == 0:
            return
        state = json.loads(path.read_text())
        state.setdefault("processes that ended", []).append(f"{what}: {outcome.status}: {outcome.text[-1000:]}")
        results.write_json(path, state)
        if not state.get("begun") and outcome.status != gpu_first.CONTEXT_LOST:
            return  # it would end in the same way again


def sanitizer(machine: Machine, folder: Path, seconds: float) -> dict[str, str]:
    """The last lines of memcheck and racecheck on our CUDA kernels, or the reason if the tool is missing."""
    tool = machine.find("compute-sanitizer")
    if tool is None:
        return {"memcheck": "not run: compute-sanitizer was not found", "racecheck": "not run"}
    # PyTorch's own kernels, which make the inputs, are excluded if the tool supports this.
    known = run_limited([tool, "--help"], 20).text
    only = ["--kernel-name", f"kernel_substring={KERNELS}"] if "--kernel-name" in known else []
    found, end = {}, time.monotonic() + seconds
    for check, share in (("memcheck", 0.5), ("racecheck", 1.0)):
        # Without PyTorch's cache every tensor is a separate allocation, whose bounds the tool checks.
        outcome = run_limited(
            [tool, "--tool", check, *only, "--error-exitcode", "9", *machine.module("bench.gpu.smoke"), "cuda"],
            share * (end - time.monotonic()),
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_INTERPRET": "0"},
        )
        (folder / f"{check}.log").write_text(outcome.text)
        found[check] = verdict(outcome)
    return found


def verdict(outcome: Outcome) -> str:
    summary = re.findall(r"={3,}\s*((?:ERROR|RACECHECK) SUMMARY:.*)", outcome.text)
    if summary and outcome.status is not None:
        return summary[-1].strip() + ("" if outcome.status == 0 else f" (exit status {outcome.status})")
    lines = outcome.text.strip().splitlines()
    why = "ran out of time" if outcome.status is None else f"exit status {outcome.status}"
    return f"not finished: {why}" + (f": {lines[-1][:200]}" if lines else "")
