"""The benchmark of fuse(model) compares before it times, and its table shows where we lose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("typer")
pytest.importorskip("rich")

from rich.console import Console

from bench.models import fuse as bench


def test_a_row() -> None:
    problem = bench.Problem(("captions", bench.CaptionStep, 2, 0, 5, 16, 8, False))
    rows = [bench.measure(problem, passes, 0.0, compiled=False) for passes in ("forward", "training")]
    assert [row["steps"] for row in rows] == [1, bench.STEPS]
    assert rows[0]["found"] == ["(model): context in v"]
    console = Console(width=200, record=True)
    console.print(bench.table(rows))
    assert "training, 30 steps" in console.export_text()


def test_documents_have_the_figures_of_the_file() -> None:
    root = Path(__file__).parent.parent
    rows = json.loads((root / "bench/results/fuse-cpu.json").read_text(encoding="utf-8"))["rows"]
    assert {row["case"] for row in rows} == {case[0] for case in bench.CASES} == set(bench.TITLES)
    assert bench.markdown(rows) in (root / "docs/fuse.md").read_text(encoding="utf-8")


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench import plots

    root = Path(__file__).parent.parent
    result = json.loads((root / "bench/results/fuse-cpu.json").read_text(encoding="utf-8"))
    plots.fuse(tmp_path / "fuse.png", result["rows"], result["machine"])
    assert (tmp_path / "fuse.png").stat().st_size > 10_000


def test_nothing_is_timed_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(nn.Module):
        def forward(self, state: Tensor, memory: Tensor) -> Tensor:
            return 2 * self.model(state, memory)

    problem = bench.Problem(("bag", bench.Bag, 2, 0, 5, 16, 8, False))
    wrong = Wrong()
    wrong.model = problem.models[bench.FUSED]
    problem.models[bench.FUSED] = wrong
    with pytest.raises(RuntimeError, match="is off by"):
        bench.measure(problem, "forward", 0.0, compiled=False)
    assert torch.is_grad_enabled()
