"""bench/cpu/packed.py measures what it claims to measure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

for package in ("typer", "rich", "matplotlib"):
    pytest.importorskip(package, reason="the benchmarks need the dependency group bench")

from typer.testing import CliRunner  # noqa: E402

from bench.cpu import packed  # noqa: E402


@pytest.mark.parametrize("op", packed.OPS)
def test_ways_agree(op: str) -> None:
    ragged = packed.Ragged(op, 3, 2, 8)
    ragged.check()
    assert ragged.padded[0].shape == (3, int(ragged.lengths.max()), 8)
    assert ragged.padding == pytest.approx(1 - ragged.lengths.double().mean().item() / ragged.lengths.max().item())


def test_a_wrong_way_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = packed.dot_attention
    monkeypatch.setattr(packed, "dot_attention", lambda query, *rest, **named: right(1.1 * query, *rest, **named))
    with pytest.raises(RuntimeError, match=r"gradients of 'eager, padded' are off by .*: nothing is timed"):
        packed.measure("dot_attention", (3, 2, 8), 0.0)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "SHAPES", ((3, 2, 8),))
    done = CliRunner().invoke(packed.app, ["--quick", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "packed-cpu.json").read_text())["rows"]
    assert [row["op"] for row in rows] == list(packed.OPS)
    assert set(rows[0]["ms"]) == set(rows[0]["MB"]) == set(packed.WAYS)
    assert set(rows[0]["times packed"]) == {packed.PADDED, packed.EAGER}
