"""bench/cpu/gat.py measures what it claims to measure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

for package in ("typer", "rich", "matplotlib"):
    pytest.importorskip(package, reason="the benchmarks need the dependency group bench")

from typer.testing import CliRunner  # noqa: E402

from bench import cases  # noqa: E402
from bench.cases import FORWARD, TRAINING  # noqa: E402
from bench.cpu import gat  # noqa: E402

SMALL = gat.Graph(11, 30)


def test_the_graph_has_as_many_edges_as_asked_for() -> None:
    for graph in (SMALL, gat.Graph(5, 20), gat.CORA):
        adjacency = gat.random_adjacency(graph, torch.Generator().manual_seed(0))
        assert adjacency.shape == (graph.nodes, graph.nodes)
        assert adjacency.sum() == graph.edges and not adjacency.diagonal().any()


def test_ways_agree() -> None:
    problem, providers = gat.make_problem(SMALL)
    found = [cases.compute(way.function, *problem[:2], training=True) for way in providers.values()]
    assert list(found[0]) == ["context", *(f"d{name}" for name in problem.inputs)]
    for name, ours in found[0].items():
        torch.testing.assert_close(ours, found[1][name], msg=name)
        assert ours.abs().max() > 0


def test_a_wrong_way_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gat.broadcast_layer
    monkeypatch.setattr(gat, "broadcast_layer", lambda layer, x, adjacency: right(layer, 1.1 * x, adjacency))
    with pytest.raises(RuntimeError, match=r"gat: forward of \(11, 30\): wrong: .*nothing is timed"):
        gat.measure(SMALL, FORWARD, 0.0)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_threads: None) -> None:
    monkeypatch.setattr(gat, "CORA", SMALL)
    done = CliRunner().invoke(gat.app, ["--seconds", "0", "--allocator", "default", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "gat-cpu.json").read_text())["rows"]
    assert [(row["passes"], row["graph"]["edges"]) for row in rows] == [(FORWARD, 30), (TRAINING, 30)]
    for row in rows:
        assert set(row["ms"]) == set(row["MB"]) == {gat.OURS, gat.EAGER}
