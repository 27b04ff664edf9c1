"""bench/models/location.py: both implementations agree, and it measures what it claims to measure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

for package in ("typer", "rich", "matplotlib"):
    pytest.importorskip(package, reason="the benchmarks need the dependency group bench")

from typer.testing import CliRunner  # noqa: E402

from attn_kernels.mechanisms import LocationSensitiveAttention  # noqa: E402
from bench.models import location  # noqa: E402

SMALL = location.Sizes(3, 7, 8, memory=6, query=5)


def test_ways_agree() -> None:
    decoding = location.Decoding(SMALL, 4)
    contexts = decoding.by_ours()
    assert contexts.shape == (4, 3, 6)
    torch.testing.assert_close(contexts, decoding.by_eager())
    gradients = [call() for call in decoding.calls().values()]
    torch.testing.assert_close(gradients[0][:3], gradients[1][:3])
    names = list(decoding.leaves(decoding.ours))
    of_ours = dict(zip(names, gradients[1], strict=True))
    of_eager = dict(zip(decoding.leaves(decoding.eager), gradients[0], strict=True))
    torch.testing.assert_close(of_ours["location_convolution.weight"], of_eager["convolution.weight"])
    torch.testing.assert_close(of_ours["v"], of_eager["score.weight"][0])


def test_a_wrong_way_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LocationSensitiveAttention._step
    monkeypatch.setattr(LocationSensitiveAttention, "_step", lambda self, query, *rest: right(self, 1.1 * query, *rest))
    with pytest.raises(RuntimeError, match=r"location: contexts at \(3, 7, 8, 6, 5\) are off by"):
        location.measure(SMALL, 4, 0.0)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(location, "SIZES", (SMALL,))
    done = CliRunner().invoke(location.app, ["--quick", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "location-cpu.json").read_text())
    (row,) = result["rows"]
    assert row["batch"] == 3 and row["steps"] == 5 and row["rounds"] >= 3
    assert set(row["ms a step"]) == {location.EAGER, location.OURS} and row["times ours"]["median"] > 0
    assert result["settings"]["clock"] == "CPU time"
