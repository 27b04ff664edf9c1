"""bench/models/encoder.py measures what it claims to measure."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

for package in ("typer", "rich", "matplotlib"):
    pytest.importorskip(package, reason="the benchmarks need the dependency group bench")

from typer.testing import CliRunner  # noqa: E402

from attn_kernels.seq2seq import recurrent  # noqa: E402
from bench.models import encoder, loop  # noqa: E402

CPU = torch.device("cpu")
SHAPE = loop.Shape(4, 5, 3)


def test_a_wrong_way_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = encoder.encodings
    monkeypatch.setattr(encoder, "encodings", lambda *given: {**made(*given), encoder.OURS: made(*given)["padded"]})
    with pytest.raises(RuntimeError, match=r"lstm \(4, 5, 3\): outputs is off by .*nothing is timed"):
        encoder.measure_alone("lstm", SHAPE, 0.0, 8, CPU, 0.0)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_ways_are_what_their_names_say(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    run = recurrent.run_layer
    monkeypatch.setattr(recurrent, "run_layer", lambda *given: called.append(1) or run(*given))
    monkeypatch.setattr(encoder, "timed", lambda calls, *_: calls)
    monkeypatch.setattr(encoder, "row", lambda kind, cell, shape, least, calls: calls)
    for measure, names in (
        (encoder.measure_alone, [encoder.PACKED, encoder.PADDED, encoder.OURS]),
        (encoder.measure_training, [encoder.PACKED, encoder.OURS]),
    ):
        calls = measure(cell, SHAPE, 0.0, 8, CPU, 0.0)
        assert list(calls) == names
        for name, call in calls.items():
            called.clear()
            call()
            assert bool(called) == (name == encoder.OURS)


def test_command(tmp_path: Path, same_threads: None) -> None:
    arguments = ["--quick", "--size", "8", "--seconds", "0", "--allocator", "default", "--output", str(tmp_path)]
    run = CliRunner().invoke(encoder.app, arguments)
    assert run.exit_code == 0, run.output
    result = json.loads((tmp_path / "encoder-cpu.json").read_text())
    found = [(row["kind"], row["cell"], row["lengths"]) for row in result["rows"]]
    assert found == list(itertools.product(("encoder", "training step"), ("lstm", "gru"), ("1..S", "S/2..S")))
    assert all(spread["median"] > 0 for row in result["rows"] for spread in row["ms"].values())
    assert "Ragged sentences" in run.output
