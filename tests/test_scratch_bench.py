"""bench/cpu/scratch.py: the kernels of scratch.c against the eager formula, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

for package in ("typer", "rich", "matplotlib"):
    pytest.importorskip(package, reason="the benchmarks need the dependency group bench")

from typer.testing import CliRunner  # noqa: E402

import attn_kernels  # noqa: E402
from bench.cases import Shape  # noqa: E402
from bench.cpu import ceilings, scratch  # noqa: E402

pytestmark = pytest.mark.usefixtures("same_threads")


@pytest.fixture(scope="module")
def kernels() -> scratch.Kernels:
    if not attn_kernels.backends()["cpu"].available:
        pytest.skip(attn_kernels.backends()["cpu"].detail)
    try:
        return scratch.Kernels()
    except ceilings.CompilerError as error:
        pytest.skip(str(error))


# 3 is no divisor of the vectors of A here; sums over keys end within a vector.
@pytest.mark.parametrize("shape", [Shape(2, 10, 30, 128, 64), Shape(3, 1, 7, 64, 128)], ids=str)
def test_every_form_is_right(kernels: scratch.Kernels, shape: Shape) -> None:
    assert kernels.fits(shape)
    ways = scratch.Ways(kernels, shape)  # raises where a result is wrong
    assert len(ways.forwards) == 5
    assert len(ways.backwards) >= 2


def test_a_wrong_result_is_told() -> None:
    expected = {"context": scratch.torch.ones(3)}
    with pytest.raises(RuntimeError, match=r"four: context differs by 1.0e-03"):
        scratch.check("four", {"context": expected["context"] * 1.001}, expected)


@pytest.mark.parametrize("shape", [Shape(1, 5, 10, 64, 64), Shape(1, 10, 5, 64, 64), Shape(1, 1, 5, 72, 64)], ids=str)
def test_sizes_that_do_not_fit(kernels: scratch.Kernels, shape: Shape) -> None:
    if shape.A % kernels.units == 0 or kernels.units > 8:
        assert not kernels.fits(shape)


def test_command(kernels: scratch.Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "Kernels", lambda: kernels)  # compiled once
    arguments = ["--seconds", "0", "--allocator", "default", "--output", str(tmp_path)]
    done = CliRunner().invoke(scratch.app, ["--shape", "1,10,10,64", "--shape", "1,1,3,64", *arguments])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "scratch-cpu.json").read_text())
    assert [row["pass"] for row in result["rows"]] == ["forward", "forward+backward"] * 2
    for row in result["rows"]:
        for ratio in row["times ours"].values():
            assert ratio["median"] > 0
        assert set(row["forms"]) == {"forward"} | ({"backward"} if row["pass"] != "forward" else set())
    assert ("scratch, streamed" in result["rows"][-1]["ms"]) == kernels.can_stream

    done = CliRunner().invoke(scratch.app, ["--shape", "1,3,10,64", *arguments])
    assert done.exit_code == 2
    assert "Tq and Tk of 10" in done.output
