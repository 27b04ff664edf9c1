"""``make gpu`` rehearsed on the CPU: with a fault in every stage, the other stages still store their results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import first as gpu_first
from bench.gpu import outcomes as gpu_outcomes
from bench.gpu import run as gpu
from bench.gpu.rehearsal import FAULTS, Rehearsal
from conftest import available

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make gpu itself"),
    pytest.mark.usefixtures("outside_xdist"),
]
# Runs in which each fault has its turn; in the last one every stage but one has none.
TESTS = ("tests red", "tests dies", "tests hangs", "tests loses the context")
RUNS = {
    "ends": ("build fails", "first wrong", "first dies", "ceilings dies", "targets dies", *TESTS, "sanitizer fails"),
    "hangs": ("build hangs", "first hangs", "ceilings hangs", "targets hangs", "cells raises", "sanitizer hangs"),
    "wrong": ("targets wrong",),
}


def rehearse(folder: Path, *faults: str, only: str = ",".join(gpu.NAMES)) -> tuple[int, dict[str, Any]]:
    available("cuda")
    status = gpu.main(["--output", str(folder), "--seconds", "0", "--only", only], Rehearsal(faults, folder))
    (path,) = folder.glob("gpu-rehearsal-*.json")
    return status, json.loads(path.read_text())


def cells_of(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {cell["key"]: cell for cell in state["cells"]}


def check_first(state: dict[str, Any], faults: tuple[str, ...]) -> None:
    first = state["first"]
    assert first["counts"]["prepare cuda"] == {"ok": 2}
    bad = [f"{one['verdict']} {one['detail']}" for one in first["bad"]]
    expected = {"first wrong": "wrong gradient", "first dies": "its process ended", "first hangs": "no end after"}
    assert len(bad) == len([fault for fault in faults if fault in expected])
    for fault in set(faults) & set(expected):
        assert any(expected[fault] in one for one in bad), bad
    assert first["counts"]["dot cuda"]["ok"] == 4 - len(bad) and not first["not complete"]


def check_tests(state: dict[str, Any], faults: tuple[str, ...]) -> None:
    tests = state["tests"]
    names = {
        "tests red": "red",
        "tests dies": "dies",
        "tests hangs": "hangs",
        "tests loses the context": "loses the context",
    }
    failed = {one["test"].partition("[")[2] for one in tests["failed"]}
    assert failed == {f"cuda-{names[fault]}]" for fault in faults if fault in names}
    assert tests["counts"]["passed"] == 12 - len(failed), "a test was not run after one that took its process along"
    assert set(tests["red"]) == ({"cuda"} if failed else set()) and tests["complete"] == {"cuda": True, "triton": True}


def check_cells(state: dict[str, Any], faults: tuple[str, ...]) -> None:
    cells = cells_of(state)
    assert len(cells) == 5 and not state["no time for"]
    failures = [cell["failure"] for cell in cells.values() if cell.get("failure")]
    ends = [fault for fault in faults if fault in ("targets dies", "targets hangs", "cells raises")]
    assert len(failures) == len(ends)
    wrong = [one for cell in cells.values() for one in cell["ways"] if one.get("wrong")]
    assert bool(wrong) == ("targets wrong" in faults)
    assert all(one["us"] for cell in cells.values() for one in cell["ways"])
    ceilings = state["ceilings"]
    ended = [fault for fault in faults if fault.startswith("ceilings")]
    assert len([value for value in ceilings.values() if isinstance(value, float)]) == 3 - len(ended)


def check(state: dict[str, Any], faults: tuple[str, ...]) -> None:
    """Each stage has left what it can, whatever the others did."""
    assert all(note["done"] for note in state["stages"].values()), state["stages"]
    assert (state["build"]["status"] != 0) == any(fault.startswith("build") for fault in faults)
    check_first(state, faults)
    check_tests(state, faults)
    check_cells(state, faults)
    errors = [verdict for verdict in state["sanitizer"].values() if "0 errors" not in verdict]
    assert bool(errors) == any(fault.startswith("sanitizer") for fault in faults)


def test_every_fault_has_its_turn() -> None:
    assert set(FAULTS) == {fault for faults in RUNS.values() for fault in faults}


@pytest.mark.long(60)
@pytest.mark.slow
@pytest.mark.parametrize("faults", RUNS.values(), ids=RUNS)
def test_rehearsal(faults: tuple[str, ...], tmp_path: Path) -> None:
    status, state = rehearse(tmp_path, *faults)
    assert status == (1 if any(fault.startswith(("first", "tests")) for fault in faults) else 0)
    check(state, faults)
    # As they come, for whoever looks at a run that was cut off.
    verdicts = {"first wrong": gpu_first.WRONG, "first dies": gpu_first.ERROR, "first hangs": gpu_first.ERROR}
    expected = {gpu_first.OK, *(verdicts[fault] for fault in faults if fault in verdicts)}
    assert {line["verdict"] for line in gpu_first.read(tmp_path)} >= expected
    outcomes = {one["outcome"] for one in gpu_outcomes.read(tmp_path / "tests.jsonl")}
    assert outcomes == ({"passed", "failed"} if set(faults) & set(TESTS) else {"passed"})
