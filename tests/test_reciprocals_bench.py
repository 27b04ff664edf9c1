"""bench/cpu/reciprocals.py: the detection of loops in assembly, and the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

for package in ("typer", "rich", "matplotlib"):
    pytest.importorskip(package, reason="the benchmarks need the dependency group bench")

from typer.testing import CliRunner  # noqa: E402

from bench.cpu import ceilings, reciprocals  # noqa: E402
from conftest import SIMD_LEVELS  # noqa: E402

ASSEMBLY = """
	.globl	work
work:
	.cfi_startproc
.L2:
	vaddps	%zmm0, %zmm1, %zmm2
.L3:
	vmulps	%zmm0, %zmm1, %zmm2
	vdivps	%zmm2, %zmm1, %zmm3
	# a remark
	subq	$1, %rax
	jne	.L3
	jne	.L2
	ret
	.cfi_endproc
	.size	work, .-work
straight:
	ret
	.size	straight, .-straight
"""


@pytest.mark.parametrize("branch", ["jne\t.L3", "b.ne\t.L3", "cbnz\tx0, .L3", "bne\t.L3"])
def test_inner_loop(branch: str) -> None:
    """The one that holds no other, without its label and its branch."""
    found = reciprocals.inner_loops(ASSEMBLY.replace("jne\t.L3", branch))
    assert list(found) == ["work"]
    instructions = [line.split("\t")[0] for line in found["work"].splitlines()]
    assert instructions == ["vmulps", "vdivps", "subq"]


@pytest.mark.slow
def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_threads: None) -> None:
    """Both forms of every level that has them, and a model where the tools are."""
    try:
        ceilings.find_compiler()
        analyser = reciprocals.find_analyser()
    except (ceilings.CompilerError, reciprocals.CannotModel) as error:
        pytest.skip(str(error))
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    monkeypatch.setattr(reciprocals, "SHAPES", {"": reciprocals.cli.parse_shape("2,3,4,40")})
    arguments = ["--only", "haswell", "--seconds", "0", "--allocator", "default", "--output", str(tmp_path)]
    done = CliRunner().invoke(reciprocals.app, arguments)
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "reciprocals-cpu.json").read_text())
    levels = [level for level in SIMD_LEVELS if f"{level}-estimate" in SIMD_LEVELS]
    assert [row["level"] for row in written["kernels"]] == [level for level in levels for _ in ("forward", "backward")]
    for row in written["kernels"]:
        assert list(row["ms"]) == [row["level"], row["level"] + "-estimate"]
        assert row["estimate / division"]["median"] > 0
    here, haswell = (row["cycles"] for row in written["loops"])
    assert set(here) == set(haswell) == set(reciprocals.LOOPS)
    assert min(here.values()) > 0
    # Divisions by 256 bits every 14 cycles: a third of one for 8 pairs forward, and one for 8 pairs backward.
    assert haswell["forward_divided"] == pytest.approx(14 / 3 * 2, rel=0.02), analyser
    assert haswell["backward_single"] == pytest.approx(14 * 2, rel=0.02), analyser
    assert haswell["forward_estimated"] < haswell["forward_divided"] / 1.5


def test_models_alone_need_no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("nothing is to be measured")

    for name in ("measure_kernels", "measure_loops", "compile_loops"):
        monkeypatch.setattr(reciprocals, name, refused)
    cycles = dict.fromkeys(reciprocals.LOOPS, 2.5)
    monkeypatch.setattr(reciprocals, "cycles_of", lambda processor, analyser: cycles)
    monkeypatch.setattr(reciprocals, "find_analyser", lambda: "true")
    done = CliRunner().invoke(reciprocals.app, ["--models-only", "--only", "znver", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "reciprocals-models.json").read_text())["loops"]
    assert [(row["model"], row["cycles"]) for row in rows] == [(f"znver{n}", cycles) for n in (4, 2, 3)]
