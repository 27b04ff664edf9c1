"""On a machine with a GPU: builds, tests, checks and measures the GPU backends: ``make gpu``.

One command and at most eight minutes, without network: it needs what an image of PyTorch for CUDA has (torch, triton,
nvcc, pybind11, pytest, numpy); matplotlib draws the plot if it is there. Each step runs in a process of its own with a
limit of its own, and its result is written at once: a run that is cut off leaves a file, and --resume goes on with it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import files, gpu_outcomes

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
BUDGET = 480  # seconds, all steps together

# Needed, and what to do where one is missing.
PACKAGES = {
    "torch": "a PyTorch that was built for CUDA (2.10 or later)",
    "numpy": "pip install numpy",
    "pytest": "pip install pytest",
    "setuptools": "pip install setuptools",
    "pybind11": "pip install pybind11",
}
# The numerical tests that say most come first: those that time cuts off are at the end. What compiles for other
# devices, or is about the tools themselves, tells nothing of this GPU.
FIRST_TESTS = ("test_ops.py", "test_numerics.py", "test_functional.py", "test_padding.py", "test_autograd.py")
NOT_ON_GPU = (
    "test_triton_aot.py",
    "test_cuda_check.py",
    "test_gpu_bench.py",
    "test_cpp.py",
    "test_bench.py",
    "test_sweep.py",
)


class Step(NamedTuple):
    name: str
    share: float  # of the budget, at most
    what: str


STEPS = (
    Step("build", 0.25, "the compiled modules, in place"),
    Step("tests", 0.25, "the test matrix on the GPU backends"),
    Step("sanitizer", 0.16, "compute-sanitizer, memcheck and racecheck, on small shapes"),
    Step("ceilings", 0.08, "bandwidth, arithmetic and launches of this device"),
    Step("cells", 1.0, "the benchmark, with all the time that is left"),
)


class Budget:
    """What is left of the time, and how much of it a step may take."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock, self.start = seconds, clock, clock()

    @property
    def spent(self) -> float:
        return self.clock() - self.start

    def limit(self, step: Step) -> float:
        return max(0.0, min(step.share * self.seconds, self.seconds - self.spent))


class Outcome(NamedTuple):
    status: int | None  # None: it ran out of time
    text: str


def run_limited(command: Sequence[str], seconds: float, environment: dict[str, str] | None = None) -> Outcome:
    """Runs a command with all that it starts; when the time is over, all of that is stopped."""
    if seconds <= 0:
        return Outcome(None, "no time was left")
    process = subprocess.Popen(
        list(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}, start_new_session=True,
    )  # fmt: skip
    try:
        text = process.communicate(timeout=seconds)[0]
        return Outcome(process.returncode, text)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return Outcome(None, process.communicate()[0] or "")
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise


# Steps ----------------------------------------------------------------------------------------------------------------


def build(seconds: float) -> dict[str, Any]:
    """Both modules, in place, for this device alone."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    # One source with many kernels takes minutes; nvcc can divide it among the processors.
    environment = {
        "ATTN_KERNELS_CUDA_ARCHITECTURES": f"{major}{minor}",
        "NVCC_APPEND_FLAGS": f"{os.environ.get('NVCC_APPEND_FLAGS', '')} --split-compile=0".strip(),
    }
    start = time.monotonic()
    outcome = run_limited([sys.executable, "setup.py", "build_ext", "--inplace"], seconds, environment)
    found: dict[str, Any] = {"status": outcome.status, "seconds": round(time.monotonic() - start, 1)}
    if outcome.status != 0:
        found["output"] = outcome.text[-4000:]
    return found


def run_tests(seconds: float, path: Path) -> dict[str, Any]:
    """Outcomes by name, and which backends are red."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    every = sorted(file.name for file in (ROOT / "tests").glob("test_*.py") if file.name not in NOT_ON_GPU)
    if importlib.util.find_spec("hypothesis") is None and "test_fuzz.py" in every:
        every.remove("test_fuzz.py")  # it cannot even be read without
    ordered = sorted(every, key=lambda name: FIRST_TESTS.index(name) if name in FIRST_TESTS else len(FIRST_TESTS))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu_outcomes", "-k", "triton or cuda", "--tb=line"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    command += [f"tests/{name}" for name in ordered]
    outcome = run_limited(command, seconds, {gpu_outcomes.VARIABLE: str(path), "TRITON_INTERPRET": "0"})
    found = gpu_outcomes.summary(gpu_outcomes.read(path))
    found["complete"] = outcome.status in (0, 1)
    if outcome.status not in (0, 1):
        found["output"] = outcome.text[-2000:]
    return found


def sanitizer(seconds: float, find: Callable[[str], str | None] = shutil.which) -> dict[str, str]:
    """The last lines of memcheck and racecheck; why not, where the tool is missing."""
    tool = find("compute-sanitizer") or find("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        return {"memcheck": "not run: compute-sanitizer was not found", "racecheck": "not run"}
    found = {}
    for check in ("memcheck", "racecheck"):
        # Without PyTorch's cache every tensor is an allocation of its own, whose ends are watched.
        outcome = run_limited(
            [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m", "bench.gpu_smoke"],
            seconds / 2,
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_INTERPRET": "0"},
        )
        found[check] = verdict(outcome)
    return found


def verdict(outcome: Outcome) -> str:
    summary = re.findall(r"={3,}\s*((?:ERROR|RACECHECK) SUMMARY:.*)", outcome.text)
    if summary and outcome.status is not None:
        return summary[-1].strip() + ("" if outcome.status == 0 else f" (exit status {outcome.status})")
    lines = outcome.text.strip().splitlines()
    why = "ran out of time" if outcome.status is None else f"exit status {outcome.status}"
    return f"not finished: {why}" + (f": {lines[-1][:200]}" if lines else "")


def measure(path: Path, seconds: float, *, ceilings: bool, cells: bool, cell_seconds: float) -> None:
    """In processes of their own: a kernel that fails in earnest takes its process with it, and the next one goes on."""
    until = time.monotonic() + seconds
    for _ in range(5):
        left = until - time.monotonic()
        if left < 5:
            return
        command = [sys.executable, "-m", "bench.gpu_measure", str(path), "--left", f"{left - 3:.0f}"]
        command += ["--seconds", str(cell_seconds)]
        command += [] if ceilings else ["--no-ceilings"]
        command += [] if cells else ["--no-cells"]
        outcome = run_limited(command, left, {"TRITON_INTERPRET": "0"})
        if outcome.status == 0:
            return
        state = json.loads(path.read_text())
        state.setdefault("processes that ended", []).append(f"{outcome.status}: {outcome.text[-1000:]}")
        files.write_json(path, state)
        if outcome.status is None or (not state.get("begun") and outcome.status != 3):
            return


# The run --------------------------------------------------------------------------------------------------------------


def missing() -> list[str]:
    return [f"{name}: {advice}" for name, advice in PACKAGES.items() if importlib.util.find_spec(name) is None]


def device_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def go(path: Path, options: argparse.Namespace, name: str, steps: dict[str, Callable[..., Any]] | None = None) -> int:
    """All steps, or those asked for. Returns the exit status: 1 where tests fail and --strict wants none of that."""
    do = {"build": build, "tests": run_tests, "sanitizer": sanitizer, "measure": measure} | (steps or {})
    state: dict[str, Any] = {"part": "gpu", "machine": {"device": name, "date": datetime.date.today().isoformat()}}
    if options.resume and path.exists():
        state = json.loads(path.read_text())
    budget = Budget(options.budget)
    wanted = [step for step in STEPS if not options.only or step.name in options.only]
    for number, step in enumerate(wanted, 1):
        if options.resume and step.name != "cells" and state.get(step.name):
            say(f"{number} of {len(wanted)}: {step.name}: taken from {files.shown(path)}")
            continue
        limit = budget.limit(step)
        say(f"{number} of {len(wanted)}: {step.name}: {step.what}; at most {limit:.0f} s, {budget.spent:.0f} s gone")
        if step.name in ("ceilings", "cells"):
            # Speed is published for backends whose tests were seen to pass, in this run or the one it goes on with.
            state.setdefault("tests", {"red": dict.fromkeys(gpu_outcomes.BACKENDS, "not run"), "complete": False})
            files.write_json(path, state)
            of_cells = step.name == "cells"
            do["measure"](path, limit, ceilings=not of_cells, cells=of_cells, cell_seconds=options.seconds)
            state = json.loads(path.read_text())
        else:
            outcomes = ROOT / "build" / "gpu" / "outcomes.jsonl"
            state[step.name] = do[step.name](limit, outcomes) if step.name == "tests" else do[step.name](limit)
            files.write_json(path, state)
        if step.name == "build" and state["build"]["status"] != 0:
            say(f"the build failed; the backends that it leaves are measured\n{state['build'].get('output', '')}")
        if step.name == "tests" and state["tests"]["red"] and options.strict:
            say("--strict: tests are red, nothing is measured: " + json.dumps(state["tests"]["red"]))
            return 1
    return finish(path, state, budget)


def finish(path: Path, state: dict[str, Any], budget: Budget) -> int:
    if state.get("cells"):
        from . import gpu_targets

        state["targets"] = [{**t._asdict(), "met": t.met} for t in gpu_targets.evaluate(state)]
        files.write_json(path, state)
        print(gpu_targets.report(state))
        draw(path.with_suffix(".png"), state)
    minutes, seconds = divmod(round(budget.spent), 60)
    say(f"{minutes} min {seconds} s. Written: {files.shown(path)}")
    red = (state.get("tests") or {}).get("red")
    return 1 if red else 0


def draw(path: Path, state: dict[str, Any]) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        say("no plot: matplotlib is not installed; python -m bench.gpu --only plot draws it later, from the file")
        return
    from . import plots

    if plots.gpu(path, state["cells"], state["machine"]):
        say(f"Written: {files.shown(path)}")


def say(text: str) -> None:
    print(f"gpu: {text}", flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n\n")[0], epilog=(
        "Steps: " + "; ".join(f"{step.name}: {step.what}" for step in STEPS) + "; plot: draws a stored result again. "
        "Exits with 1 if a GPU backend has failing tests (it gets no times), with 2 if there is no GPU."
    ))  # fmt: skip
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything (%(default)s)")
    parser.add_argument("--only", action="append", choices=[*names, "plot"], help="this step; may be repeated")
    parser.add_argument("--resume", action="store_true", help="go on with the file of today: what it has stays")
    parser.add_argument("--strict", action="store_true", help="measure nothing if any backend is red")
    parser.add_argument("--seconds", type=float, default=0.7, help="for the rounds of one cell (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the result (bench/results)")
    parser.add_argument(
        "--file", type=Path, help="the file of the result; else gpu-<device>-<date>.json in that folder"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, device: Callable[[], str | None] = device_name, **steps: Any) -> int:
    options = parse(arguments)
    if options.only == ["plot"]:
        if options.file is None or not options.file.exists():
            say("--only plot draws a result that is stored: --file bench/results/gpu-....json")
            return 2
        draw(options.file.with_suffix(".png"), json.loads(options.file.read_text()))
        return 0
    if lacking := missing():
        say("needs packages that are not installed:\n  " + "\n  ".join(lacking))
        return 2
    name = device()
    if name is None:
        say("needs a CUDA device, and torch finds none here; make cuda-check checks the kernels without one")
        return 2
    from . import gpu_device

    date = datetime.date.today().isoformat()
    path = options.file or options.output / f"gpu-{gpu_device.slug(name)}-{date}.json"
    if options.only and path.exists() and not options.resume:
        options.resume = True  # a step of what is stored, anew
        state = json.loads(path.read_text())
        for step in options.only:
            state.pop(step, None)
        files.write_json(path, state)
    return go(path, options, name, steps or None)


if __name__ == "__main__":
    sys.exit(main())
