"""Builds and tests the package with other versions of Python, PyTorch, Triton and NumPy: ``make test-versions``.

Each row of COMBINATIONS gets an environment and a copy of the sources. Both modules are built there (the CUDA module if
there are nvcc and a PyTorch with CUDA; no GPU is needed), then the tests run. After a failure, which is recorded, the
next row runs. Each result is written at once to docs/versions.json and to the table in docs/versions.md. A second call
runs the rows that are not done yet at this commit. uv makes the environments: it finds or downloads each Python, and
stores wheels of several GB only once.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "versions"
RESULTS, TABLE = ROOT / "docs" / "versions.json", ROOT / "docs" / "versions.md"
BEGIN, END = "<!-- begin: written by tools/versions.py -->", "<!-- end -->"


class Combination(NamedTuple):
    python: str
    torch: str
    triton: str = ""  # empty: the version that torch requires
    numpy: str = ""  # a version specifier; empty: the newest

    @property
    def name(self) -> str:
        return f"python{self.python}-torch{self.torch}"

    @property
    def requirements(self) -> list[str]:
        return [f"torch=={self.torch}", f"triton=={self.triton}" if self.triton else "triton", f"numpy{self.numpy}"]


# Triton 3.6's interpreter fails with NumPy 2.4 and later; GPUs are not affected.
COMBINATIONS = (
    Combination("3.10", "2.10.0", "3.6.0", "<2.4"),
    Combination("3.12", "2.11.0", "3.6.0", "<2.4"),
    Combination("3.12", "2.12.1"),
    Combination("3.11", "2.13.0"),
    Combination("3.11", "2.14.1"),
    Combination("3.13", "2.15.0"),
    Combination("3.14", "2.15.0"),
)


class StepFailed(Exception):
    pass


def run(name: str, log: Path, command: list[Any], where: Path, environment: dict[str, str] | None = None) -> None:
    """Runs a step with its output in the log. StepFailed contains the last lines."""
    print(f"  {name}: {' '.join(map(str, command))}", flush=True)
    with log.open("w") as file:
        done = subprocess.run(
            list(map(str, command)),
            cwd=where,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
    if done.returncode:
        raise StepFailed("\n".join(log.read_text(errors="replace").splitlines()[-15:]))


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def state_of_sources() -> str:
    """The commit, marked if there are changes. Files that this program writes do not count as changes."""
    changed = git("status", "--porcelain", "--", ".", f":!{RESULTS.relative_to(ROOT)}", f":!{TABLE.relative_to(ROOT)}")
    return git("rev-parse", "--short", "HEAD").strip() + ("-dirty" if changed.strip() else "")


def copy_sources(to: Path) -> None:
    """Copies tracked files, and untracked ones that git does not ignore, from the working tree."""
    names = git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def outcomes(report: Path) -> dict[str, Any]:
    """Counts and names of failed tests, from a report in JUnit format."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    kinds = [{child.tag for child in case} for case in cases]
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case, kind in zip(cases, kinds, strict=True)
        if kind & {"failure", "error"}
    ]
    skipped = sum("skipped" in kind for kind in kinds)  # includes expected failures
    return {"passed": len(cases) - len(failed) - skipped, "failed": failed, "skipped": skipped}


def examine(
    combination: Combination, folder: Path, emulator: bool, arguments: list[str], result: dict[str, Any]
) -> None:
    """Runs all steps of one combination. Each step that finishes adds to ``result``."""
    python, sources = folder / "env" / "bin" / "python", folder / "src"
    shutil.rmtree(folder, ignore_errors=True)
    sources.mkdir(parents=True)

    def step(name: str, command: list[Any], **environment: str) -> None:
        start = time.monotonic()
        try:
            run(name, folder / f"{name}.log", command, sources, environment)
            result["steps"][name] = round(time.monotonic() - start)
        except StepFailed as failure:
            result["steps"][name] = str(failure)
            raise

    uv = [sys.executable, "-m", "uv"]
    step("python", [*uv, "venv", "--seed", "--python", combination.python, folder / "env"])
    copy_sources(sources)
    groups = ["--group", "build", "--group", "test"]
    step("packages", [*uv, "pip", "install", "--python", python, *combination.requirements, *groups])
    # Without dependencies, which are installed already: a constraint of the machine's pip could replace torch.
    install = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--editable", "."]
    architectures = os.environ.get("ATTN_KERNELS_CUDA_ARCHITECTURES", "90")
    step("build", install, ATTN_KERNELS_CUDA_ARCHITECTURES=architectures)
    found = subprocess.run([python, "-m", "attn_kernels", "--json"], cwd=sources, capture_output=True, text=True)
    if found.returncode:
        result["steps"]["import"] = found.stderr[-2000:]
        raise StepFailed(found.stderr)
    report = json.loads(found.stdout)
    result["found"] = {name: report[name] for name in ("python", "torch", "triton", "cuda", "build", "cuda build")}
    version = "import importlib.metadata as m; print(m.version('numpy'))"
    result["found"]["numpy"] = subprocess.run([python, "-c", version], capture_output=True, text=True).stdout.strip()
    if emulator:
        step("emulator", [python, "tests/cpp/build_emulated.py", "build/emulated"])
    tests = [python, "-m", "pytest", "-q", f"--junitxml={folder / 'tests.xml'}", *arguments]
    try:
        step("tests", tests, OMP_NUM_THREADS="1")
    finally:
        if (folder / "tests.xml").exists():
            result["tests"] = outcomes(folder / "tests.xml")


def row(result: dict[str, Any]) -> str:
    """One row of the table."""
    wanted, found, steps = result["combination"], result.get("found"), result["steps"]
    versions = [wanted["python"], wanted["torch"], wanted["triton"] or "-", wanted["numpy"] or "-"]
    if found is None:
        step = next((name for name, outcome in steps.items() if isinstance(outcome, str)), "not run")
        cells = [f"failed: {step}" if step in steps else step, "", "", ""]
    else:
        versions = [found["python"].split()[-1], found["torch"], found["triton"] or "-", found["numpy"]]
        tests = result.get("tests")
        cells = ["yes" if found["build"] else "no", "-"]
        if found["cuda build"] and not found["cuda build"]["emulated"]:
            cells[1] = f"yes, nvcc {found['cuda build']['nvcc']}"
        arguments = shlex.join(result["arguments"])
        cells.append(f"`{arguments}`" if arguments else "all")
        cells.append("none" if tests is None else f"{tests['passed']} / {len(tests['failed'])} / {tests['skipped']}")
        if tests is not None and isinstance(steps["tests"], str) and not tests["failed"]:
            cells[-1] += ", not finished"
    return f"| {' | '.join([*versions, *cells, result.get('commit', '')])} |"


def failed(result: dict[str, Any]) -> bool:
    return any(isinstance(outcome, str) for outcome in result["steps"].values())  # seconds, or an error message


def is_done(result: dict[str, Any], commit: str, arguments: list[str]) -> bool:
    return (result.get("commit"), result.get("arguments")) == (commit, arguments) and not failed(result)


def read() -> dict[str, dict[str, Any]]:
    return {result["name"]: result for result in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}


def write(results: dict[str, dict[str, Any]]) -> None:
    """Writes results in the order of COMBINATIONS, without rows that no longer exist."""
    known = [results.get(c.name, {"name": c.name, "combination": c._asdict(), "steps": {}}) for c in COMBINATIONS]
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    head = (
        "| Python | torch | triton | numpy | `_C` | `_C_cuda` | tests | passed / failed / skipped | commit |",
        "|---|---|---|---|---|---|---|---|---|",
    )
    before, _, rest = TABLE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    TABLE.write_text("\n".join((before + BEGIN, *head, *map(row, known), END)) + after)


def command_line(purpose: str, folder: str, tests: str) -> argparse.ArgumentParser:
    """The arguments of a command that tests COMBINATIONS. folder: its files. tests: default pytest arguments."""
    parser = argparse.ArgumentParser(description=purpose.partition("\n")[0])
    parser.add_argument("--only", default="", help='combinations whose name contains this: "torch2.11", "python3.12"')
    parser.add_argument("--keep", action="store_true", help=f"keep environments, copies and logs in {folder}")
    parser.add_argument("pytest", nargs="*", help=f'arguments for pytest after "--"; default: {tests}')
    return parser


def main() -> None:
    parser = command_line(__doc__, "build/versions", "all tests")
    parser.add_argument("--again", action="store_true", help="run combinations that passed at this commit again")
    parser.add_argument("--no-emulator", action="store_true", help="do not test the CUDA kernels in the emulator")
    given = parser.parse_args()
    commit = state_of_sources()
    for combination in COMBINATIONS:
        if given.only not in combination.name:
            continue
        if not given.again and is_done(read().get(combination.name, {}), commit, given.pytest):
            print(f"{combination.name}: done")
            continue
        print(combination.name, flush=True)
        result: dict[str, Any] = {
            "name": combination.name,
            "combination": combination._asdict(),
            "commit": commit,
            "date": datetime.date.today().isoformat(),
            "arguments": given.pytest,
            "steps": {},
        }
        try:
            examine(combination, FOLDER / combination.name, not given.no_emulator, given.pytest, result)
        except StepFailed as failure:
            print(failure)
        write({**read(), combination.name: result})
        if not given.keep:
            shutil.rmtree(FOLDER / combination.name, ignore_errors=True)
    if any(map(failed, read().values())):
        sys.exit("some combinations have failed steps: docs/versions.json has their last lines")


if __name__ == "__main__":
    main()
