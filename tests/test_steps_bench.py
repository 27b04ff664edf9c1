"""bench/models/memory_gradient.py measures what it claims to measure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

for package in ("typer", "rich", "matplotlib"):
    pytest.importorskip(package, reason="the benchmarks need the dependency group bench")

from typer.testing import CliRunner  # noqa: E402

from bench.models import memory_gradient as steps  # noqa: E402


def test_ways_agree() -> None:
    problem = steps.Steps(3, 5, 8, 4)
    contexts = [problem.forward(way) for way in (steps.EAGER, steps.DENSE, steps.DEFERRED)]
    assert contexts[0].shape == (4, 3, 8)
    for other in contexts[1:]:
        torch.testing.assert_close(other, contexts[0])


def test_a_wrong_way_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = steps.attend
    monkeypatch.setattr(steps, "attend", lambda score, *rest: right(score._replace(v=1.1 * score.v), *rest))
    with pytest.raises(RuntimeError, match=r"gradients of 'gathered' at .* are off by"):
        steps.measure_backward((2, 3, 4), 0.0)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "BACKWARD_SHAPES", ((2, 3, 4),))
    monkeypatch.setattr(steps, "BEAM_SHAPES", ((2, 3, 4),))
    done = CliRunner().invoke(steps.app, ["--quick", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "steps-cpu.json").read_text())["rows"]
    assert [row["kind"].split(",")[0] for row in rows] == ["backward", "forward + backward", "a step"]
    assert set(rows[0]["times gathered"]) == {steps.EAGER, steps.DENSE} and set(rows[2]["ms"]) == {
        "1 queries",
        "5 queries",
    }
