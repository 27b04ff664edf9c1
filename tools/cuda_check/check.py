"""Compiles every GPU kernel without a GPU and checks the machine code: ``make cuda-check``.

nvcc compiles CUDA C++. The cases of tests/test_triton_aot.py compile Triton kernels ahead of time. The requirements are
in ``rules.py``. ``roofline.py`` predicts the time of each standard shape on an H100 from the instruction counts of the
loops.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from bench import results
from bench.cli import application, console, progress_bars
from bench.report import table

from . import nvcc, roofline, sass
from .rules import OTHER, TARGETS, Facts, Finding, examine

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "cuda-check"
RESULT = results.LOCAL / "cuda-check.json"
AOT = ROOT / "tests" / "test_triton_aot.py"

app = application()


# CUDA C++ -------------------------------------------------------------------------------------------------------------


def sources(folder: Path = ROOT / "csrc" / "cuda") -> list[Path]:
    return sorted(folder.glob("*.cu"))


def examine_cuda(source: Path, target: str, compiler: Path, cache: Path, version: str) -> list[Finding]:
    """The findings for the kernels of a source file; raises RuntimeError if it does not compile."""
    compiled = nvcc.compile(source, target, compiler, cache, version)
    if compiled.cubin is None:
        raise RuntimeError(f"{source.name} for {target}: nvcc failed\n{compiled.failure}")
    findings = []
    for kernel in sass.read_cached(compiled.cubin, compiler):
        name = sass.demangle(kernel.name)
        plan = compiled.plans.get(kernel.name, nvcc.Plan())
        findings.append(
            examine(
                Facts(
                    name.replace("(anonymous namespace)::", "").replace("attn::cuda::", ""),
                    source.name,
                    target,
                    kernel.registers,
                    kernel.stack,
                    kernel.shared,
                    plan.threads,
                    plan.blocks,
                    kernel.inner_loops,
                    kernel.code,
                    sass.template_arguments(name),
                )
            )
        )
    return findings


# Triton ---------------------------------------------------------------------------------------------------------------


def triton_cases() -> list[str]:
    """The names of the cases of the ahead-of-time tests; empty without Triton."""
    if importlib.util.find_spec("triton") is None or not AOT.exists():
        return []
    if str(AOT.parent) not in sys.path:
        sys.path.append(str(AOT.parent))  # for the modules that it imports
    return list(importlib.import_module(AOT.stem).CASES)


def examine_triton(case: str, targets: Iterable[str], cache: Path) -> list[Finding]:
    """The findings for the kernels of one case. As in the tests, a separate process compiles it; the cache persists."""
    kept = cache / f"triton-{case}-{_triton_fingerprint()}.json"
    if not kept.exists():
        printed = _compile_triton(case, cache)
        for stale in cache.glob(f"triton-{case}-*.json"):
            stale.unlink()
        results.write_whole(kept, lambda partial: partial.write_text(printed))
    wanted = {int("".join(filter(str.isdigit, target))) for target in targets}
    return [examine(triton_facts(case, k)) for k in json.loads(kept.read_text()) if k["target"] in wanted]


def _triton_fingerprint() -> str:
    """A digest of everything that the machine code of the Triton kernels depends on."""
    digest = hashlib.sha256(importlib.metadata.version("triton").encode())
    for path in [AOT, *sorted((ROOT / "attn_kernels" / "triton").glob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


def _compile_triton(case: str, cache: Path) -> str:
    """Returns what compile_case of the tests returns for a case, as JSON."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache / "triton")
    paths = (str(ROOT), str(AOT.parent), environment.get("PYTHONPATH"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    program = f"import json, {AOT.stem} as aot; print(json.dumps(aot.compile_case({case!r})))"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    if process.returncode != 0:
        raise RuntimeError(f"Triton, case {case}: {''.join(process.stderr.strip().splitlines()[-1:]) or 'failed'}")
    return process.stdout.splitlines()[-1]


def triton_facts(case: str, kernel: dict[str, Any]) -> Facts:
    return Facts(
        kernel["name"],
        f"triton:{case}",
        f"sm_{kernel['target']}",
        kernel["registers"],
        kernel["stack"],
        kernel["shared"],
        32 * kernel["warps"],
        0,
        [sass.Loop(Counter(loop)) for loop in kernel["loops"]],
        sass.Code(Counter(kernel["all"])),
        constants=kernel["constants"],
    )


# All of it ------------------------------------------------------------------------------------------------------------


def run(
    work: dict[str, Callable[[], list[Finding]]], jobs: int, quiet: bool = False
) -> tuple[list[Finding], list[str]]:
    """The findings of all pieces of work, in order, and the compilations that failed."""
    findings, failures = [], []
    with progress_bars(transient=True, disable=quiet) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("compiling", total=len(work))

        def tracked(name: str, piece: Callable[[], list[Finding]]) -> list[Finding]:
            progress.update(task, description=name)
            try:
                return piece()
            finally:
                progress.advance(task)

        futures = [pool.submit(tracked, name, piece) for name, piece in work.items()]
        for future in futures:
            try:
                findings += future.result()
            except RuntimeError as error:
                failures.append(str(error))
    return findings, failures


def finding_table(findings: list[Finding]) -> Table:
    columns = (">registers", ">warps", ">local", ">slots/pair", ">special/pair", ">16-byte", "")
    result = table("Machine code, counted", "kernel", "target", "regime", *columns, wrap=True)
    result.columns[0].overflow = "fold"
    for found in findings:
        result.add_row(
            found.name.removesuffix("_kernel"),
            found.target,
            "" if found.regime == OTHER else found.regime,
            str(found.registers),
            str(found.warps),
            str(found.stack),
            "" if found.slots_per_pair is None else f"{found.slots_per_pair:.2f}",
            "" if found.special_per_pair is None else f"{found.special_per_pair:.3f}",
            "" if found.wide_share is None else f"{100 * found.wide_share:.0f}%",
            "[bold red]fails[/]" if found.problems else "ok",
        )
    return result


def problems_of(findings: list[Finding]) -> list[str]:
    return [f"{f.target} {f.name} ({f.origin}): {problem}" for f in findings for problem in f.problems]


@app.command()
def main(
    source: Annotated[list[Path] | None, typer.Argument(help="CUDA sources; default: csrc/cuda/*.cu.")] = None,
    target: Annotated[list[str] | None, typer.Option(help=f"May be repeated; {', '.join(TARGETS)}.")] = None,
    compiler: Annotated[
        Path | None, typer.Option("--nvcc", help="nvcc; default: from $NVCC, $CUDA_HOME, PATH or /usr/local/cuda.")
    ] = None,
    triton: Annotated[bool, typer.Option(help="Check the Triton kernels too.")] = True,
    predict: Annotated[bool, typer.Option("--roofline/--no-roofline", help="Print the static roofline.")] = True,
    jobs: Annotated[int, typer.Option(min=1, help="Parallel compilations.")] = 2,
    cache: Annotated[Path, typer.Option(help="Cache of compilations.", show_default="build/cuda-check")] = CACHE,
    output: Annotated[Path, typer.Option(help="Result file.", show_default=results.shown(RESULT))] = RESULT,
    as_json: Annotated[bool, typer.Option("--json", help="Print only the result, as JSON.")] = False,
) -> None:
    """Compiles every GPU kernel for sm_80, sm_90a and sm_100, and checks registers, local memory and the instructions
    of the hot loops. Then predicts times on an H100. Needs nvcc but no GPU. The exit code is 1 if a rule is broken, and
    2 if there is no nvcc.
    """
    try:
        found_nvcc = nvcc.find({**os.environ, "NVCC": str(compiler)} if compiler else os.environ)
        for tool in ("nvdisasm", "cuobjdump"):
            sass.find_tool(tool, found_nvcc)
    except (nvcc.NoCompiler, FileNotFoundError) as error:
        typer.echo(f"cuda-check: {error}", err=True)
        raise typer.Exit(2) from None
    version = nvcc.version(found_nvcc)
    targets = target or list(TARGETS)
    work: dict[str, Callable[[], list[Finding]]] = {}
    for path in source or sources():
        for one in targets:
            work[f"{path.name} {one}"] = lambda path=path, one=one: examine_cuda(path, one, found_nvcc, cache, version)
    cases = triton_cases() if triton and not source else []
    for case in cases:
        work[f"triton {case}"] = lambda case=case: examine_triton(case, targets, cache)
    if not as_json:
        console.print(
            f"nvcc {version}, {', '.join(targets)}: {len(work)} compilations, cached in {results.shown(cache)}"
        )
    findings, failures = run(work, jobs, quiet=as_json)
    # Several cases may contain the same Triton kernel.
    unique = list({json.dumps({**f.as_json(), "origin": ""}): f for f in reversed(findings)}.values())[::-1]
    problems = problems_of(unique) + failures
    predictions = roofline.predict_all(unique) if predict else []
    result = {
        "part": "cuda-check",
        "nvcc": version,
        "targets": targets,
        "kernels": [f.as_json() for f in unique],
        "roofline": [asdict(p) for p in predictions],
        "problems": problems,
    }
    results.write_json(output, result)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    else:
        console.print(finding_table(unique))
        if predictions:
            console.print(roofline.prediction_table(predictions))
        if triton and not source and not cases:
            console.print("Triton kernels were not checked: triton is not installed", style="yellow")
        if not unique and not failures:
            console.print("No kernels were found: csrc/cuda has no .cu files", style="yellow")
        for problem in problems:
            console.print(f"fails {problem}", style="bold red")
        console.print(f"{len(unique)} kernels, {len(problems)} problems. Written: {results.shown(output)}")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    app()
