"""bench/models/patched.py: the parts that need no other library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("typer", "rich", "matplotlib"):
    pytest.importorskip(package, reason="the benchmarks need the dependency group bench")

from typer.testing import CliRunner  # noqa: E402

from bench.models import patched as swap  # noqa: E402


def test_sentences_are_chosen_evenly() -> None:
    every = [str(n) * 30 for n in range(9)] * 100 + ["short", "long" * 100]
    chosen = swap.choose_sentences(every, 90)
    assert len(chosen) == 90 and all(20 <= len(sentence) <= 200 for sentence in chosen)
    assert len(swap.choose_sentences(every, 10_000)) == 900


def test_text_of_a_length() -> None:
    every = ["first", "second", "third", "fourth"]
    assert swap.text_of(every, 8) == "third fo"
    with pytest.raises(ValueError, match="fewer than 100 characters"):
        swap.text_of(every, 100)


def test_alike() -> None:
    assert swap.alike(torch.tensor([1000, 2]), torch.tensor([1000, 2]))
    assert not swap.alike(torch.tensor([1001, 2]), torch.tensor([1000, 2]))
    assert swap.alike(torch.tensor([1.00001, 2.0]), torch.tensor([1.0, 2.0]))
    assert not swap.alike(torch.tensor([1.1, 2.0]), torch.tensor([1.0, 2.0]))


def missing(*_: Any) -> Any:
    raise swap.Missing("it is not installed")


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap, "compare_diacritics", missing)
    monkeypatch.setattr(swap, "DECODERS", {"a decoder": missing})
    done = CliRunner().invoke(swap.app, ["--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "arabic-diacritizer: skipped: it is not installed" in done.output
    assert json.loads((tmp_path / "swap-cpu.json").read_text())["decoders"] == [
        {"what": "a decoder", "skipped": "it is not installed"}
    ]


def test_another_output_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap, "compare_diacritics", lambda count: {"sentences": 3, "characters": 90, "identical": 2})
    way = {"ms": 2.0, "calls": 3, "MB": 1.0}
    row = {"T": 64, "original": way, "patched": way, "times patched": 1.0, "identical": True}
    monkeypatch.setattr(swap, "measure_diacritizer", lambda length, *_: {**row, "T": length})
    monkeypatch.setattr(swap, "DECODERS", {})
    done = CliRunner().invoke(swap.app, ["--output", str(tmp_path)])
    assert done.exit_code == 1 and "another output" in done.output and (tmp_path / "swap-cpu.png").exists()


def test_a_wrong_decoder_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {swap.ORIGINAL: lambda: torch.tensor([1]), swap.PATCHED: lambda: torch.tensor([2])}
    monkeypatch.setattr(swap, "DECODERS", {"a decoder": lambda: calls})
    with pytest.raises(RuntimeError, match="a decoder gives another result when it is patched"):
        swap.measure_decoder("a decoder", 0.0)
    calls[swap.PATCHED] = calls[swap.ORIGINAL]
    assert swap.measure_decoder("a decoder", 0.0)["rounds"] >= 5
