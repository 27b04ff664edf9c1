"""On a machine with a GPU: builds, checks, tests and measures the GPU backends: ``make gpu``.

Device time may be scarce, so the most informative stages come first, and a failure does not stop the others. Each stage
runs in its own processes with a time limit, and writes its result at once. An interrupted run keeps its results, and
--resume continues it. It needs no network. It needs torch, triton, nvcc, pybind11, pytest and numpy, which PyTorch
images for CUDA contain. --rehearse runs all stages on the CPU, on small problems.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .. import results
from . import first as gpu_first
from . import stages as gpu_stages
from .stages import Machine

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
BUDGET = 840  # seconds, all stages together

# Required packages, and what to install if one is missing.
PACKAGES = {
    "torch": "a PyTorch built for CUDA (2.10 or later)",
    "numpy": "pip install numpy",
    "pytest": "pip install pytest",
    "setuptools": "pip install setuptools",
    "pybind11": "pip install pybind11",
}


class Stage(NamedTuple):
    name: str
    most: float  # seconds
    what: str


STAGES = (
    Stage("build", 140, "builds the compiled modules that do not work here yet"),
    Stage("first", 110, "first contact: every kernel once against the reference"),
    Stage("ceilings", 40, "bandwidth, arithmetic and launches of this device"),
    Stage("targets", 100, "the cells of the benchmark that have targets"),
    Stage("cuda-tests", 170, "the test matrix on the CUDA kernels"),
    Stage("triton-tests", 200, "the test matrix on the Triton kernels"),
    Stage("cells", 200, "the other cells of the benchmark"),
    Stage("sanitizer", 80, "compute-sanitizer, memcheck and racecheck, on the CUDA kernels"),
)
NAMES = tuple(stage.name for stage in STAGES)


class Budget:
    """The remaining time, and the share that a stage may take."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock, self.start = seconds, clock, clock()

    @property
    def spent(self) -> float:
        return self.clock() - self.start

    def limit(self, stage: Stage) -> float:
        return max(0.0, min(stage.most, self.seconds - self.spent))


# The run --------------------------------------------------------------------------------------------------------------


def missing() -> list[str]:
    return [f"{name}: {advice}" for name, advice in PACKAGES.items() if importlib.util.find_spec(name) is None]


def run_stage(stage: Stage, path: Path, state: dict[str, Any], machine: Machine, limit: float, seconds: float) -> None:
    """Adds the result of a stage to the state. If the stage raises an error, the error is the result."""
    folder = path.parent
    if stage.name in ("ceilings", "targets", "cells"):
        results.write_json(path, state)
        try:
            gpu_stages.measure(machine, path, limit, stage.name, seconds)
        finally:  # the processes of the stage have changed the file
            state.clear()
            state.update(json.loads(path.read_text()))
        return
    work: dict[str, Callable[[], dict[str, Any]]] = {
        "build": lambda: gpu_stages.build(machine, folder, limit),
        "first": lambda: gpu_stages.first_contact(machine, folder, limit),
        "cuda-tests": lambda: gpu_stages.run_tests(machine, folder, limit, "cuda"),
        "triton-tests": lambda: gpu_stages.run_tests(machine, folder, limit, "triton"),
        "sanitizer": lambda: gpu_stages.sanitizer(machine, folder, limit),
    }
    found = work[stage.name]()
    if stage.name.endswith("-tests"):  # each test stage reads the outcomes of both
        complete = (state.get("tests") or {}).get("complete") or {}
        complete = complete | {stage.name.removesuffix("-tests"): found["complete"]}
        state["tests"] = found | {"complete": complete}
    else:
        state[stage.name] = found


def go(
    path: Path, state: dict[str, Any], stages: Sequence[Stage], machine: Machine, options: argparse.Namespace
) -> int:
    """Runs the stages one after the other and continues after failures. Returns the exit status."""
    budget = Budget(options.budget)
    state["stages"] = state.get("stages") or {}
    for number, stage in enumerate(stages, 1):
        if options.resume is not None and (state["stages"].get(stage.name) or {}).get("done"):
            say(f"{number} of {len(stages)}: {stage.name}: done before")
            continue
        limit = min(budget.limit(stage), machine.most.get(stage.name, BUDGET))
        say(f"{number} of {len(stages)}: {stage.name}: {stage.what}; at most {limit:.0f} s, {budget.spent:.0f} s gone")
        begin, used = time.monotonic(), processor_seconds()
        note: dict[str, Any] = {"done": False}
        if limit < 1:
            note["why"] = "no time was left"
        else:
            try:
                run_stage(stage, path, state, machine, limit, options.seconds)
                note["done"] = True
            except Exception as error:  # the next stages still run
                note["why"] = f"{type(error).__name__}: {error}"[:500]
        note["seconds"] = round(time.monotonic() - begin, 1)
        note["processor seconds"] = round(processor_seconds() - used, 1)
        state["stages"] = (state.get("stages") or {}) | {stage.name: note}
        results.write_json(path, state)
        say(f"{stage.name}: {note['seconds']:.0f} s{': ' + note['why'] if 'why' in note else ''}{brief(stage, state)}")
    return finish(path, state, budget)


def processor_seconds() -> float:
    """CPU time of all child processes that have ended: the host's work for the device."""
    used = os.times()
    return used.children_user + used.children_system


def brief(stage: Stage, state: dict[str, Any]) -> str:
    """The result of a stage in a few lines, if there is a short form."""
    if stage.name == "build" and (state.get("build") or {}).get("status"):
        outputs = [text for name, text in state["build"].items() if name.startswith("output")]
        return ": FAILED; the backends that it leaves are measured\n" + "\n".join(outputs)
    if stage.name == "first" and state.get("first"):
        return "\n" + gpu_first.text(state["first"])
    if stage.name.endswith("-tests") and state.get("tests"):
        return f": {state['tests']['counts']}, red: {json.dumps(state['tests']['red'])}"
    return ""


def finish(path: Path, state: dict[str, Any], budget: Budget) -> int:
    from . import report as gpu_report
    from . import targets as gpu_targets

    if state.get("cells"):
        state["targets"] = [{**t._asdict(), "met": t.met} for t in gpu_targets.evaluate(state)]
        results.write_json(path, state)
    print(gpu_report.report(state))
    if state.get("cells"):
        draw(path.with_suffix(".png"), state)
    minutes, seconds = divmod(round(budget.spent), 60)
    say(f"{minutes} min {seconds} s. Written: {results.shown(path)}")
    bad = (state.get("tests") or {}).get("red") or (state.get("first") or {}).get("bad")
    failed = any(not note["done"] for note in state["stages"].values())
    return 1 if bad or failed else 0


def draw(path: Path, state: dict[str, Any]) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        say("no plot: matplotlib is not installed; python -m bench.gpu --only plot draws it later, from the file")
        return
    from .. import plots
    from . import report as gpu_report

    if plots.gpu(path, gpu_report.publishable(state), state["machine"]):
        say(f"Written: {results.shown(path)}")
    else:
        say("no plot: nothing of this run may be published")


def say(text: str) -> None:
    print(f"gpu: {text}", flush=True)


# Command line ---------------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n\n")[0], epilog=(
        "Stages: " + "; ".join(f"{s.name}: {s.what}" for s in STAGES) + ". With --only also: plot and publish, a plot "
        "and a table in Markdown from --file, of backends whose tests are green. Exits with 1 if anything is red or "
        "was cut off, with 2 if there is no GPU."
    ))  # fmt: skip
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything (%(default)s)")
    parser.add_argument("--only", type=names, help="run only these stages: build,first,ceilings,targets")
    parser.add_argument("--skip", type=names, default=[], help="skip these stages")
    parser.add_argument(
        "--resume", nargs="?", type=Path, const=Path(), metavar="FILE",
        help="continue FILE (default: the file of today); finished stages are kept",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=0.5, help="seconds for the rounds of one cell (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results (bench/results)")
    parser.add_argument("--file", type=Path, help="result file; default: gpu-<device>-<date>.json in the output folder")
    parser.add_argument(
        "--rehearse",
        nargs="?",
        const="clean",
        choices=("clean", "faults"),
        help="run on the CPU with emulated kernels, output in build/gpu. faults: inject a failure into each stage",
    )
    options = parser.parse_args(arguments)
    for name in [*(options.only or []), *options.skip]:
        if name not in (*NAMES, *(("plot", "publish") if options.only else ())):
            parser.error(f"no stage {name!r}: {', '.join(NAMES)}")
    return options


def from_file(options: argparse.Namespace) -> int:
    """Runs the commands that need no GPU, plot and publish."""
    if options.file is None or not options.file.exists():
        say(f"--only {options.only[0]} needs a stored result: --file bench/results/gpu-....json")
        return 2
    state = json.loads(options.file.read_text())
    if options.only == ["plot"]:
        draw(options.file.with_suffix(".png"), state)
    else:
        from . import report as gpu_report

        print(gpu_report.markdown(state))
    return 0


def main(arguments: Sequence[str] | None = None, machine: Machine | None = None) -> int:
    options = parse(arguments)
    if options.only in (["plot"], ["publish"]):
        return from_file(options)
    if lacking := missing():
        say("required packages are not installed:\n  " + "\n  ".join(lacking))
        return 2
    if options.rehearse and machine is None:
        from . import rehearsal as gpu_rehearsal

        # A build that hangs uses up its time limit, so that the other faults could not run.
        faults = [fault for fault in gpu_rehearsal.FAULTS if options.rehearse == "faults" and fault != "build hangs"]
        machine = gpu_rehearsal.Rehearsal(faults)
        options.output = gpu_rehearsal.FOLDER if options.output == RESULTS else options.output
    machine = machine or Machine()
    name = machine.name()
    if name is None:
        say("needs a CUDA device, but torch finds none; make cuda-check checks the kernels without a GPU")
        return 2
    from . import device as gpu_device

    date = datetime.date.today().isoformat()
    path = options.file or options.output / f"gpu-{gpu_device.slug(name)}-{date}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    state: dict[str, Any] = {"part": "gpu", "machine": {"device": name, "date": date}}
    if options.resume is not None:
        before = path if options.resume == Path() else options.resume
        if before.exists():
            state = json.loads(before.read_text())
            outcomes = before.with_name("tests.jsonl")
            if outcomes.exists() and before.parent.resolve() != path.parent.resolve():
                shutil.copy(outcomes, path.with_name(outcomes.name))
        else:
            say(f"cannot resume: {results.shown(before)} does not exist")
    else:
        if options.only and path.exists():  # run some stages of the stored result again
            state = json.loads(path.read_text())
        forget(path, state, options.only or NAMES)
    stages = [s for s in STAGES if (not options.only or s.name in options.only) and s.name not in options.skip]
    return go(path, state, stages, machine, options)


def forget(path: Path, state: dict[str, Any], stages: Sequence[str]) -> None:
    """Removes the results of these stages from the state, and the outcomes of their tests from the outcomes file."""
    keys = {"targets": "cells", "cuda-tests": "", "triton-tests": ""}
    for name in stages:
        (state.get("stages") or {}).pop(name, None)
        state.pop(keys.get(name, name), None)
    backends = [name.removesuffix("-tests") for name in stages if name.endswith("-tests")]
    outcomes = path.with_name("tests.jsonl")
    if backends and outcomes.exists():
        kept = [line for line in outcomes.read_text().splitlines() if json.loads(line).get("stage") not in backends]
        outcomes.write_text("".join(f"{line}\n" for line in kept))


if __name__ == "__main__":
    sys.exit(main())
