"""bench/cpu/magnitudes.py measures what it claims to measure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

for package in ("typer", "rich", "matplotlib"):
    pytest.importorskip(package, reason="the benchmarks need the dependency group bench")

from typer.testing import CliRunner  # noqa: E402

from bench.cpu import magnitudes  # noqa: E402


def test_arguments_have_the_sizes_asked_for() -> None:
    query, keys, _, v = magnitudes.Problem(magnitudes.cases.Shape(2, 30, 40, 16, 4)).arguments(7.0, 0.25)
    assert v.norm().item() == pytest.approx(7.0, rel=1e-5)
    assert query.std().item() == pytest.approx(0.25, rel=0.1)
    assert keys.std().item() == pytest.approx(0.25, rel=0.1)


def test_what_is_off_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = magnitudes.additive_attention
    monkeypatch.setattr(magnitudes, "additive_attention", lambda q, *rest, **more: right(1.1 * q, *rest, **more))
    with pytest.raises(RuntimeError, match=r"\|v\| = 2, deviation 1: off by"):
        magnitudes.measure(magnitudes.cases.Shape(2, 3, 5, 8, 4), [(2.0, 1.0)], 0.0)


def test_command(tmp_path: Path) -> None:
    command = ["--quick", "--shape", "1,2,3,8", "--seconds", "0", "--output", str(tmp_path)]
    done = CliRunner().invoke(magnitudes.app, command)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "magnitudes-cpu.png").stat().st_size > 1000
    rows = json.loads((tmp_path / "magnitudes-cpu.json").read_text())["rows"]
    assert [row["pass"] for row in rows] == ["forward", "forward+backward"]
    for row in rows:
        times = {(cell["norm"], cell["deviation"]): cell["ms"] for cell in row["cells"]}
        assert set(times) == {(n, d) for n in magnitudes.QUICK_NORMS for d in magnitudes.QUICK_DEVIATIONS}
        assert row["ratio"] == pytest.approx(max(times.values()) / min(times.values()), rel=1e-3)
        assert times[tuple(row["slowest"].values())] == max(times.values())
