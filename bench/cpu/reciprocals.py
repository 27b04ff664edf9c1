"""Reciprocals by divisions and by refined estimates: ``python -m bench.cpu.reciprocals --help``.

Measured on this processor: the kernels in both forms, in turns, on each SIMD level that has both, and the bare loops
of loops.c. Modelled for other processors: the same loops, compiled for each of them. llvm-mca predicts the cycles of an
iteration with all data in L1.

The model ignores caches and branches, and is only as good as LLVM's scheduling table of the processor. The tables of
Golden Cove (Alder Lake, Sapphire Rapids) make a division much cheaper than it is; these processors are left out. "Xeon"
is the Skylake table: later Xeons have the same vector units.

The models need GCC, for Arm aarch64-linux-gnu-gcc, and llvm-mca. Old versions of llvm-mca do not know Zen 4 and
Neoverse. Releases differ: 14 and 19 disagree on Ice Lake client, Zen 2, Zen 3 and Neoverse. ``--models-only`` measures
nothing: its figures are the same on any machine.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.table import Table

from .. import cases, cli, machine, results, timing
from ..cli import application, console
from ..machine import Allocator
from ..report import figure, table, times
from .ceilings import SOURCE, CompilerError, Loops, ThreadTeam, compile_loops, measure_backward, measure_forward
from .roofline import CPU, calls_of

ROUNDS = 8
ESTIMATE = "-estimate"  # suffix of the name of a SIMD level that refines estimates
SHAPES = {name: cli.parse_shape(name) for name in ("64,1,50,512", "8,5,200,512", "32,50,50,512", "16,100,100,512")}

GCC, ARM_GCC = "gcc", "aarch64-linux-gnu-gcc"
# Functions of loops.c, and how many vectors of units share a reciprocal in each.
LOOPS = {"forward_divided": 3, "forward_estimated": 3, "backward_single": 1, "backward_estimated": 1}


class Processor(NamedTuple):
    name: str
    model: str  # the name that llvm-mca uses (-mcpu)
    compiler: str
    flags: tuple[str, ...]
    lanes: int
    reciprocal: str  # pattern of the instructions that start one


AVX2 = (GCC, ("-mavx2", "-mfma", "-mbmi2"), 8, r"vdivps|vrcpps")
AVX512 = (GCC, ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mbmi2"), 16, r"vdivps|vrcp14ps")
NEON = (ARM_GCC, (), 4, r"fdiv|frecpe")
MODELS = {  # processor names, and the names that llvm-mca uses
    AVX512: {
        "Xeon, AVX-512": "skylake-avx512",
        "Ice Lake client, AVX-512": "icelake-client",
        "Zen 4, AVX-512": "znver4",
    },
    AVX2: {
        "Haswell, AVX2": "haswell",
        "Broadwell, AVX2": "broadwell",
        "Skylake client, AVX2": "skylake",
        "Zen 2, AVX2": "znver2",
        "Zen 3, AVX2": "znver3",
    },
    NEON: {
        "Neoverse N1": "neoverse-n1",
        "Neoverse V1": "neoverse-v1",
        "Neoverse V2": "neoverse-v2",
        "Ampere One": "ampere1",
        "Apple M1": "apple-m1",
    },
}
PROCESSORS = tuple(Processor(name, model, *isa) for isa, models in MODELS.items() for name, model in models.items())


class CannotModel(Exception):
    """A tool is missing, or does not know the processor."""


def inner_loops(assembly: str) -> dict[str, str]:
    """The code of each function's inner loop: among loops without another label, the one with most instructions."""
    found = {}
    for function in re.finditer(r"^(\w+):\n(.*?)^\s+\.size\s+\1,", assembly, re.MULTILINE | re.DOTALL):
        lines = [line.strip() for line in function[2].splitlines()]
        lines = [line for line in lines if line and (line.startswith(".L") or not line.startswith((".", "#", "//")))]
        at = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
        loops = []
        for i, line in enumerate(lines):
            target = re.search(r"^(?:j|b|cb|tb)\w*(?:\.\w+)?\s.*?(\.L\w+)$", line)
            if target and at.get(target[1], i) < i:
                code = lines[at[target[1]] + 1 : i]
                if not any(inner.endswith(":") for inner in code):
                    loops.append(code)
        if loops:
            found[function[1]] = "\n".join(max(loops, key=len))
    return found


def cycles_of(processor: Processor, analyser: str) -> dict[str, float]:
    """Cycles per 16 pairs, by loop."""
    compiler = shutil.which(processor.compiler)
    if compiler is None:
        raise CannotModel(f"no {processor.compiler}")
    options = ["-O3", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-S", "-o", "-", *processor.flags]
    assembly = subprocess.run([compiler, *options, str(SOURCE)], capture_output=True, text=True, check=True).stdout
    loops = inner_loops(assembly)
    triple = "aarch64-linux-gnu" if processor.compiler == ARM_GCC else "x86_64-linux-gnu"
    rounds, result = 300, {}
    for name, vectors in LOOPS.items():
        command = [analyser, f"-mtriple={triple}", f"-mcpu={processor.model}", f"-iterations={rounds}"]
        done = subprocess.run(command, input=loops[name], capture_output=True, text=True)
        total = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
        if total is None or "not a recognized processor" in done.stderr:
            raise CannotModel(f"{Path(analyser).name} does not know {processor.model}")
        pairs = vectors * processor.lanes * len(re.findall(processor.reciprocal, loops[name]))
        result[name] = int(total[1]) / rounds * 16 / pairs
    return result


def find_analyser() -> str:
    """Finds the newest llvm-mca: newer versions know more processors."""
    names = ["llvm-mca", *(f"llvm-mca-{version}" for version in range(14, 40))]
    for name in reversed(names):
        if path := shutil.which(name):
            return path
    raise CannotModel("no llvm-mca")


# Here ----------------------------------------------------------------------------------------------------------------


def levels_with_both() -> list[str]:
    """The SIMD levels that have both forms on this CPU; empty without the compiled module."""
    compiled = sys.modules.get("attn_kernels._C")
    levels = [] if compiled is None else compiled.simd_levels()
    return [level for level in levels if level + ESTIMATE in levels]


def measure_kernels(shape: cases.Shape, level: str, seconds: float) -> Iterator[dict[str, Any]]:
    settings = cases.Settings(torch.float32, CPU, seconds, 5, False, False, cases.Lengths.none, 0)
    calls = calls_of(cases.Op.additive_attention.value, cases.make_problem("additive_attention", shape, settings))
    use_simd = sys.modules["attn_kernels._C"].use_simd
    for passes, call in calls.items():

        def on(name: str, call: timing.Call = call) -> timing.Call:
            def run() -> None:
                before = use_simd(name)
                try:
                    call()
                finally:
                    use_simd(before)

            return run

        ways = {name: on(name) for name in (level, level + ESTIMATE)}
        # Process CPU time: on one thread it excludes the time of other programs.
        timer = timing.WallTimer(time.process_time)
        samples = timing.interleave(ways, timer, seconds=seconds, most_rounds=1000)
        ratios = [estimate / division for division, estimate in zip(*samples.values(), strict=True)]
        yield {
            "shape": shape._asdict(),
            "level": level,
            "passes": passes,
            "ms": {
                name: timing.spread([1e3 * sample for sample in taken])._asdict() for name, taken in samples.items()
            },
            "estimate / division": timing.spread(ratios)._asdict(),
        }


def measure_loops(loops: Loops, seconds: float) -> dict[str, float]:
    """Cycles per 16 pairs on one thread, by loop: the best of several rounds; the loops take turns in a round."""
    team = ThreadTeam(1, seconds / ROUNDS)

    def rate(_: str, amount: float, call: Any) -> float:
        return team.rate(amount, call)

    ways = {"clock": lambda: rate("clock", 16, lambda i, repeats: loops.add_integers(3, repeats))}
    for name in LOOPS:
        passes, _, form = name.partition("_")
        if passes == "forward":
            ways[name] = functools.partial(measure_forward, loops, getattr(loops, name), 1, rate)
        else:
            ways[name] = functools.partial(measure_backward, loops, form, 1, rate)
    best = dict.fromkeys(ways, 0.0)
    for _ in range(ROUNDS):
        for name, way in ways.items():
            best[name] = max(best[name], way())
    return {name: best["clock"] * 16 / best[name] for name in LOOPS}


# Command line ---------------------------------------------------------------------------------------------------------

app = application()


@app.command()
def main(
    only: Annotated[str | None, typer.Option(help="Only llvm-mca models whose names contain this.")] = None,
    allocator: cli.AllocatorOption = Allocator.reuse,
    seconds: Annotated[float, typer.Option(min=0, help="Seconds for each measured figure.")] = 0.5,
    models_only: Annotated[
        bool, typer.Option("--models-only", help="Measure nothing; write reciprocals-models.json.")
    ] = False,
    output: cli.OutputOption = results.LOCAL,
) -> None:
    """Measures both forms on this processor, and models them for processors that llvm-mca knows."""
    loops = _cycles_table()
    if models_only:
        path = output / "reciprocals-models.json"
        results.write_json(path, results.rounded({"part": "reciprocals", "loops": list(add_models(loops, only))}))
        console.print(loops)
        console.print(f"Written: {results.shown(path)}")
        return
    start, in_effect = time.perf_counter(), cli.prepare(1, allocator)
    kernels = [
        row
        for level in levels_with_both()
        for shape in SHAPES.values()
        for row in measure_kernels(shape, level, seconds)
    ]
    rows: list[dict[str, Any]] = []
    try:
        compiled = compile_loops()
        rows.append({"processor": "measured here", "by": compiled.compiler, "cycles": measure_loops(compiled, seconds)})
        loops.add_row(rows[0]["processor"], *_figures(rows[0]["cycles"]))
    except CompilerError as error:
        loops.add_row(f"here: {error}", *("" for _ in LOOPS))
    rows += add_models(loops, only)
    path = output / "reciprocals-cpu.json"
    description = machine.describe(CPU, in_effect)
    results.write_json(
        path, results.rounded({"part": "reciprocals", "machine": description, "kernels": kernels, "loops": rows})
    )
    cli.finish((_kernels_table(kernels), loops), description, start, path)


def add_models(loops: Table, only: str | None) -> Iterator[dict[str, Any]]:
    try:
        analyser = find_analyser()
    except CannotModel as error:
        console.print(f"Nothing is modelled: {error}", style="bold red")
        return
    version = subprocess.run([analyser, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"LLVM version (\S+)", version)
    by = f"llvm-mca {release[1] if release else 'of unknown version'}"
    for processor in PROCESSORS:
        if only is not None and only not in processor.model:
            continue
        try:
            cycles = cycles_of(processor, analyser)
        except CannotModel as error:
            loops.add_row(f"{processor.name}: {error}", *("" for _ in LOOPS))
            continue
        loops.add_row(f"modelled: {processor.name}", *_figures(cycles))
        compiler = subprocess.run([processor.compiler, "--version"], capture_output=True, text=True).stdout
        of_code = {"compiler": (compiler.splitlines() or [processor.compiler])[0], "flags": " ".join(processor.flags)}
        yield {"processor": processor.name, "model": processor.model, "by": by, **of_code, "cycles": cycles}


def _figures(cycles: dict[str, float]) -> list[str]:
    return [f"{cycles[name]:.1f}" for name in LOOPS]


def _cycles_table() -> Table:
    columns = [f">{name.split('_')[0]},\n{'estimate' if name.endswith('estimated') else 'division'}" for name in LOOPS]
    return table("bare loops, float32: cycles for 16 pairs", "processor", *columns, show_edge=False)


def _kernels_table(rows: list[dict[str, Any]]) -> Table:
    result = table(
        "additive_attention, float32, measured here: ms",
        "B,Tq,Tk,A",
        "",
        "SIMD",
        ">division",
        ">estimate",
        ">",
        show_edge=False,
    )
    for row in rows:
        ms = [figure(spread["median"]) for spread in row["ms"].values()]
        ratio = times(row["estimate / division"]["median"], lost=False)
        result.add_row(str(cases.Shape(**row["shape"])), row["passes"], row["level"], *ms, ratio)
    return result


if __name__ == "__main__":
    app()
