"""Checks a built wheel as users get it, for ``make test-wheel``. ``make wheel`` puts it into dist/.

First it checks the file: its contents, and the Linux versions that it supports (auditwheel). Then it makes an
environment for each row of COMBINATIONS in tools/versions.py with the Python of the wheel. There it installs only the
wheel and runs tests, without a compiler, from a folder that contains only the tests. Each row is written at once to
docs/versions.md; rows of other runs are kept.
"""

from __future__ import annotations

import datetime
import json
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from .versions import COMBINATIONS, END, ROOT, TABLE, Combination, StepFailed, command_line, outcomes, run

FOLDER = ROOT / "build" / "wheel"
BEGIN = "<!-- begin: written by tools/wheel.py -->"
HEAD = (
    "| Python | torch | numpy | SIMD level | tests | passed / failed / skipped | wheel | built with | date |",
    "|---|---|---|---|---|---|---|---|---|",
)
# Ops and numerics in float32 on the best SIMD level, models and patches: less than a minute. tests.yml runs all tests.
TESTS = (
    *("-m", "not slow", "-k", "(cpu and float32 or seq2seq or patching) and not (avx or portable or triton)"),
    *(f"tests/test_{name}.py" for name in ("ops", "numerics", "modules", "seq2seq", "patching")),
)


def unexpected(names: list[str], cuda: bool) -> list[str]:
    """Problems in the list of files of a wheel. cuda: whether it was built with nvcc."""
    modules = {Path(name).name.partition(".")[0] for name in names if name.endswith(".so")}
    expected = {"_C", "_C_cuda"} if cuda else {"_C"}
    wrong = [] if modules == expected else [f"compiled modules must be {sorted(expected)}, got {sorted(modules)}"]
    for needed in ("attn_kernels/py.typed", "licenses/LICENSE"):
        if not any(name.endswith(needed) for name in names):
            wrong.append(f"{needed} is missing")
    for name in names:
        if not name.startswith("attn_kernels"):
            wrong.append(f"{name} is no part of the package")
    return wrong


def check_file(wheel: Path, cuda: bool) -> None:
    size = f"{wheel.stat().st_size / 1e6:.2f} MB"
    names = zipfile.ZipFile(wheel).namelist()
    if wrong := unexpected(names, cuda):
        sys.exit(f"{wheel.name}: " + "; ".join(wrong))
    print(f"{wheel.name}: {size}, {len(names)} files", flush=True)
    if sys.platform == "linux":
        subprocess.run([sys.executable, "-m", "auditwheel", "show", wheel], check=True)


def tags(python: str) -> str:
    """Tags in the name of a wheel: "-cp314-cp314-" for "3.14", "-cp314-cp314t-" for "3.14t" (without the GIL)."""
    abi = f"cp{python.replace('.', '')}"
    return f"-{abi.removesuffix('t')}-{abi}-"


def path_without_compilers(to: Path) -> str:
    """A PATH with the programs that a test may call, without any compiler."""
    to.mkdir(parents=True)
    for tool in ("env", "sh", "uname"):
        if found := shutil.which(tool):
            (to / tool).symlink_to(found)
    return str(to)


def examine(wheel: Path, combination: Combination, folder: Path, tests: list[str]) -> dict[str, Any]:
    """Installs and tests the wheel with one torch. Returns the values of the table row; raises StepFailed."""
    shutil.rmtree(folder, ignore_errors=True)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir(parents=True)
    for name in ("tests", "bench", "pyproject.toml"):  # bench: the formulas in eager PyTorch
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, elsewhere / name)
    bare = {"PATH": path_without_compilers(folder / "bin"), "CC": "false", "CXX": "false", "OMP_NUM_THREADS": "1"}
    uv, python = [sys.executable, "-m", "uv"], folder / "env" / "bin" / "python"

    def step(name: str, *command: Any, **environment: str) -> None:
        run(name, folder / f"{name}.log", list(command), elsewhere, environment)

    step("python", *uv, "venv", "--python", combination.python, folder / "env")
    install = [*uv, "pip", "install", "--python", python]
    step("packages", *install, f"torch=={combination.torch}", f"numpy{combination.numpy}", "--group", "test")
    step("wheel", *install, "--no-deps", "--no-index", wheel, **bare)
    step("report", python, "-m", "attn_kernels", "--json", **bare)
    found = json.loads("{" + (folder / "report.log").read_text().partition("{")[2])
    where = "import attn_kernels, numpy; print(attn_kernels.__file__, numpy.__version__)"
    file, numpy = subprocess.run([python, "-c", where], cwd=elsewhere, capture_output=True, text=True).stdout.split()
    if not found["build"] or not Path(file).is_relative_to(folder / "env"):
        raise StepFailed(f"not the wheel, or no compiled module: {file}, {found}")
    try:
        step("tests", python, "-m", "pytest", "-q", f"--junitxml={folder / 'tests.xml'}", *tests, **bare)
    except StepFailed as failure:
        if not (folder / "tests.xml").exists():
            raise
        print(failure)
    return {**found, "numpy": numpy, "tests": outcomes(folder / "tests.xml")}


def row(result: dict[str, Any], wheel: Path, arguments: list[str], date: str) -> str:
    python, tests, tag = result["python"].split()[-1], result["tests"], wheel.stem.split("-", 2)[2]
    chosen = "default" if arguments == list(TESTS) else f"`{shlex.join(arguments)}`"
    counts = f"{tests['passed']} / {len(tests['failed'])} / {tests['skipped']}"
    build = f"torch {result['build']['torch']}, {result['build']['compiler']}"
    cells = (python, result["torch"], result["numpy"], result["build"]["simd"], chosen, counts, f"`{tag}`", build, date)
    return f"| {' | '.join(cells)} |"


def write(line: str) -> None:
    """Puts a row into the table; it replaces a row with the same Python and torch."""
    before, _, rest = TABLE.read_text().partition(BEGIN)
    table, _, after = rest.partition(END)
    rows = {tuple(known.split("|")[1:3]): known for known in (*table.strip().splitlines()[len(HEAD) :], line)}
    TABLE.write_text("\n".join((before + BEGIN, *HEAD, *sorted(rows.values()), END)) + after)


def main() -> None:
    parser = command_line(__doc__, "build/wheel", shlex.join(TESTS))
    parser.add_argument("--file-only", action="store_true", help="only check what the wheel holds and links")
    parser.add_argument("--cuda", action="store_true", help="the wheel was built with nvcc")
    parser.add_argument("--wheel", type=Path, help="default: all wheels in dist/, one for each Python")
    given = parser.parse_args()
    wheels = [given.wheel.resolve()] if given.wheel else sorted((ROOT / "dist").glob("*.whl"))
    if not wheels:
        sys.exit("there is no wheel in dist/: make wheel")
    for wheel in wheels:
        check_file(wheel, given.cuda)
    failed, tried, today = [], 0, datetime.date.today().isoformat()
    for combination in () if given.file_only else COMBINATIONS:
        if given.only not in combination.name:
            continue
        tag = tags(combination.python)
        wheel = next((wheel for wheel in wheels if tag in wheel.name), None)
        if wheel is None:
            print(f"{combination.name}: left out, there is no wheel for its Python", flush=True)
            continue
        print(combination.name, flush=True)
        tried += 1
        try:
            result = examine(wheel, combination, FOLDER / combination.name, given.pytest or list(TESTS))
            write(row(result, wheel, given.pytest or list(TESTS), today))
            failed += [combination.name] if result["tests"]["failed"] else []
        except StepFailed as failure:
            print(failure)
            failed.append(combination.name)
        if not given.keep:
            shutil.rmtree(FOLDER / combination.name, ignore_errors=True)
    if not tried and not given.file_only:
        sys.exit("nothing was tested: no combination of this name has a wheel")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
