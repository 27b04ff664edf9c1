"""The C++ kernels with other compilers, for another processor and under sanitizers, in a program without PyTorch.

tests/cpp/check_kernels.cpp compares them with plain loops. Tests that need a missing tool are skipped and reported.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import SIMD_LEVELS

ROOT = Path(__file__).parent.parent
CPU = ROOT / "csrc/cpu"
SOURCES = [ROOT / "tests/cpp/check_kernels.cpp", CPU / "kernels.cpp", *sorted(CPU.glob("level_*.cpp"))]


def flags_of_setup() -> list[str]:
    """What setup.py compiles with, but for what it computes."""
    calls = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.keyword)]
    (flags,) = (node.value.elts for node in calls if node.arg == "extra_compile_args")
    (standard,) = (node.value.value for node in calls if node.arg == "cxx_std")
    return [f"-std=c++{standard}", *(flag.value for flag in flags if isinstance(flag, ast.Constant))]


def tool(*names: str) -> str:
    for name in names:
        if path := shutil.which(name):
            return path
    pytest.skip(f"{' or '.join(names)} is not installed")


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=os.environ | environment)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def build(compiler: str, to: Path, *more: str, sources: list[Path] = SOURCES) -> Path:
    objects = []
    for source in sources:
        objects.append(to / f"{source.stem}.o")
        run(compiler, *flags_of_setup(), "-Werror", *more, f"-I{ROOT / 'csrc'}", "-c", source, "-o", objects[-1])
    run(compiler, *more, *objects, "-o", to / "check")
    return to / "check"


@pytest.fixture(autouse=True)
def sources() -> None:
    if not CPU.exists():
        pytest.skip("csrc is not here")


@pytest.mark.slow
def test_clang(tmp_path: Path) -> None:
    """Clang compiles without a warning, and every level of this CPU is right."""
    out = run(build(tool("clang++"), tmp_path))
    assert [line.partition(":")[0] for line in out.splitlines()][-1:] == ["portable"]


@pytest.mark.slow
def test_aarch64(tmp_path: Path) -> None:
    """Compiled for another architecture, without a warning; right in an emulator where there is one."""
    program = build(tool("aarch64-linux-gnu-g++"), tmp_path, "-static")
    out = run(tool("qemu-aarch64", "qemu-aarch64-static"), program)
    assert sorted(line.partition(":")[0] for line in out.splitlines()) == ["neon", "neon-estimate", "portable"]


# Refined estimates are the first choice on Intel's processors before Skylake and on Arm's own; AVX-512 is not emulated.
FIRST_CHOICES = {
    ("x86_64", "Haswell"): "avx2-estimate",
    ("x86_64", "Broadwell"): "avx2-estimate",
    ("x86_64", "Skylake-Client"): "avx2",
    ("x86_64", "EPYC-Rome"): "avx2",
    ("x86_64", "EPYC-Milan"): "avx2",
    ("x86_64", "Nehalem"): "portable",
    ("aarch64", "neoverse-n1"): "neon-estimate",
    ("aarch64", "cortex-a57"): "neon-estimate",
    ("aarch64", "a64fx"): "neon",
}


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_first_choices(machine: str, tmp_path: Path) -> None:
    """Of processors that are emulated."""
    compiler = tool(f"{machine}-linux-gnu-g++")
    emulator = tool(f"qemu-{machine}", f"qemu-{machine}-static")
    sources = [ROOT / "tests/cpp/print_levels.cpp", CPU / "kernels.cpp"]
    run(compiler, *flags_of_setup(), "-Werror", "-static", f"-I{ROOT / 'csrc'}", *sources, "-o", tmp_path / "levels")
    for (_, processor), first in (item for item in FIRST_CHOICES.items() if item[0][0] == machine):
        found = run(emulator, "-cpu", processor, tmp_path / "levels").split()
        assert (processor, found[0]) == (processor, first)
        other = {first.removesuffix("-estimate"), first.removesuffix("-estimate") + "-estimate"} - {first}
        assert first == "portable" or found[1] in other, "both forms can be had"


def only_called(level: Path, to: Path) -> Path:
    """The source of a level whose table has the kernels that check_kernels.cpp calls; the others are not compiled."""
    table = (CPU / "level.h").read_text()
    for others in (r"ATTN_SCORE\((?!AdditiveScores).*\)", r"ATTN_BY_DTYPE\(.*\)"):
        table, count = re.subn(rf"^    {others},$", "    {},", table, flags=re.MULTILINE)
        assert count
    (to / "level.h").write_text(table)  # found before the one that it replaces: it is in the folder of the source
    return Path(shutil.copy(level, to))


@pytest.mark.long(90)
@pytest.mark.slow
def test_sanitizers(tmp_path: Path) -> None:
    """Reads and writes out of bounds, undefined behaviour. In one level, the widest.

    Without optimization: that takes half of the time, and the program runs a second all the same.
    """
    watched = (SIMD_LEVELS or ("portable",))[0].partition("-")[0]  # one source for both forms of reciprocals
    sanitize = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    sanitize += ("-fno-sanitize=null,object-size",)  # what they would find is out of bounds for the first one
    # Of the other levels there are empty tables, which nothing calls: float64 is left out if one of them computes it.
    elsewhere = "#define ATTN_FLOAT64_LEVEL" in (CPU / f"level_{watched}.cpp").read_text()
    dtypes = ("float32", *(() if elsewhere else ("float64",)), "bfloat16", "float16")
    sources = []
    for source in SOURCES:
        if source.stem == f"level_{watched}":
            source = only_called(source, tmp_path)
        elif source.stem.startswith("level_"):
            name, source = source.stem.removeprefix("level_"), tmp_path / source.name
            table = "extern const Kernels kernels;\nconst Kernels kernels{};"
            source.write_text(f'#include "cpu/kernels.h"\nnamespace attn {{ namespace {name} {{\n{table}\n}} }}\n')
        sources.append(source)
    program = build(tool("g++"), tmp_path, *sanitize, f"-I{CPU}", sources=sources)
    # Leaks: the check needs ptrace, which containers may refuse.
    checked = run(program, watched, *dtypes, ASAN_OPTIONS="detect_leaks=0")
    assert f"{watched}: {27 * len(dtypes)} checks" in checked
