"""bench/cpu/pooling.py measures what it claims to measure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

for package in ("typer", "rich", "matplotlib"):
    pytest.importorskip(package, reason="the benchmarks need the dependency group bench")

from typer.testing import CliRunner  # noqa: E402

from bench.cases import Shape  # noqa: E402
from bench.cpu import pooling  # noqa: E402

SMALL = (pooling.Case(Shape(1, 1, 9, 8, 4), None, True), pooling.Case(Shape(2, 3, 5, 8, 4), 3, False))


@pytest.mark.parametrize("case", SMALL)
def test_ways_agree(case: pooling.Case) -> None:
    problem = pooling.Problem(case)
    contexts = [problem.compute(way) for way in problem.ways()]
    assert contexts[0].shape == ((1, 1, 4) if case.vectors is None else (2, 3, 3, 4))
    for other in contexts[1:]:
        torch.testing.assert_close(other, contexts[0])


def test_a_wrong_way_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = pooling.additive_attention
    monkeypatch.setattr(pooling, "additive_attention", lambda **given: right(**given | {"v": 1.1 * given["v"]}))
    with pytest.raises(RuntimeError, match=r"forward of 'a call for each vector' at .* is off by"):
        pooling.measure(SMALL[1], 0.0)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "CASES", SMALL)
    done = CliRunner().invoke(pooling.app, ["--seconds", "0", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "pooling-cpu.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == ["forward", "forward + backward"] * 2
    assert set(rows[0]["times one call"]) == {pooling.EAGER}
    assert set(rows[2]["ms"]) == {pooling.EAGER, pooling.CALLS, pooling.ONE}
