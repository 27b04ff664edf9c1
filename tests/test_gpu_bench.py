"""``make gpu`` without a GPU: budget, stages, unpublishable results, cells measured on the CPU, and the report."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import results
from bench.cases import FORWARD, TRAINING, Shape
from bench.gpu import cells as gpu_cells
from bench.gpu import device as gpu_device
from bench.gpu import first as gpu_first
from bench.gpu import measure as gpu_measure
from bench.gpu import outcomes as gpu_outcomes
from bench.gpu import predictions as gpu_predictions
from bench.gpu import report as gpu_report
from bench.gpu import run as gpu
from bench.gpu import smoke as gpu_smoke
from bench.gpu import stages as gpu_stages
from bench.gpu import targets as gpu_targets
from bench.gpu.cells import COLD, GRAPH, LAUNCHED, OURS, SCORES, Row
from bench.gpu.rehearsed import StandIn
from matrix import slow_if
from tools.cuda_check import roofline
from tools.cuda_check.roofline import ADDITIVE, DOT

ROOT = Path(__file__).resolve().parents[1]
DECODE, MANY = Shape(2, 1, 5, 8, 8), Shape(2, 9, 5, 8, 8)


def way(cell: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in cell["ways"] if one["name"] == name)


# Cells ----------------------------------------------------------------------------------------------------------------


@slow_if(lambda op, passes, **_: (op, passes) not in ((ADDITIVE, FORWARD), (DOT, TRAINING)))
@pytest.mark.parametrize("passes", [FORWARD, TRAINING])
@pytest.mark.parametrize(
    ("op", "others"),
    [(ADDITIVE, {"eager", gpu_cells.SCORES_THEN_EAGER}), (DOT, {"eager", "sdpa"}), (SCORES, {"eager"})],
)
def test_every_way_is_checked_and_timed(op: str, others: set[str], passes: str) -> None:
    cell = gpu_cells.measure(Row(op, MANY, passes, "float32"), StandIn(), seconds=0)
    assert {one["name"] for one in cell["ways"]} == others | {OURS}
    for one in cell["ways"]:
        assert one["failure"] is None and one["error"] < 1e-4
        assert set(one["us"]) == {LAUNCHED, GRAPH}
        assert one["us"][GRAPH]["low"] <= one["us"][GRAPH]["median"] <= one["us"][GRAPH]["high"]
    assert way(cell, OURS)["times_ours"][GRAPH]["median"] == 1
    json.dumps(cell, allow_nan=False)


@pytest.mark.slow
def test_decode_is_also_timed_with_inputs_from_memory() -> None:
    row = Row(ADDITIVE, DECODE, FORWARD, "float32", prepared=True)
    problem = gpu_cells.make_problem(row, torch.device("cpu"))
    size = sum(x.nbytes for x in problem.inputs.values())
    copies = gpu_cells._copies(row, problem, StandIn())
    assert len(copies) == -(-3 * StandIn.l2_bytes // size)
    assert copies[0].inputs["keys"].data_ptr() != copies[1].inputs["keys"].data_ptr()
    cell = gpu_cells.measure(row, StandIn(), seconds=0)
    assert set(way(cell, OURS)["us"]) == {LAUNCHED, GRAPH, COLD}


def test_wrong_results_are_timed_and_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        gpu_cells, "_scores_then_eager", lambda query, keys, values, v: 2 * values[:, :1].expand(query.shape)
    )
    cell = gpu_cells.measure(Row(ADDITIVE, MANY, FORWARD, "float32"), StandIn(), seconds=0)
    wrong = way(cell, gpu_cells.SCORES_THEN_EAGER)
    assert "wrong: context differs" in wrong["wrong"] and wrong["failure"] is None and wrong["us"]
    assert way(cell, OURS)["wrong"] is None


def test_a_way_that_cannot_be_captured_keeps_its_launched_time() -> None:
    class Refusing(StandIn):
        def capture(self, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
            raise RuntimeError("operation not permitted when stream is capturing")

    cell = gpu_cells.measure(Row(DOT, MANY, FORWARD, "float32"), Refusing(), seconds=0)
    assert set(way(cell, OURS)["us"]) == {LAUNCHED} and "not permitted" in way(cell, OURS)["detail"]


def test_beams_are_compared_with_one_query() -> None:
    cell = gpu_cells.measure_beams(Row(ADDITIVE, DECODE, FORWARD, "float32", beams=True), StandIn(), seconds=0)
    assert [one["name"] for one in cell["ways"]] == [str(count) for count in range(1, 11)]
    assert cell["ways"][0]["times_one"]["median"] == 1


def test_rows_are_unique_and_hold_what_the_targets_are_about() -> None:
    rows = gpu_cells.rows()
    assert len({row.key for row in rows}) == len(rows)
    assert any(row.op == SCORES and row.shape == gpu_cells.RATES and row.passes == TRAINING for row in rows)
    assert {row.dtype for row in rows if row.shape == gpu_cells.GNMT and row.compile} == {"bfloat16", "float16"}
    assert sum(row.compile for row in rows) <= 10  # each takes the compiler's time


def test_rows_stop_when_the_time_is_over_and_failures_are_stored() -> None:
    rows = [
        Row(ADDITIVE, MANY, FORWARD, "float32"),
        Row("no_such_op", MANY, FORWARD, "float32"),
        Row(DOT, MANY, FORWARD, "float32"),
    ]
    stored: dict[str, Any] = {}
    ticks = iter([0.0, 5.0, 99.5])

    def store(row: Row, cell: dict[str, Any] | None) -> None:
        stored[row.key] = cell

    late = gpu_cells.run(StandIn(), rows, store, until=100, seconds=0, clock=lambda: next(ticks))
    assert late == [rows[2].key] and set(stored) == {rows[0].key, rows[1].key}
    assert "no_such_op" in stored[rows[1].key]["failure"]


def test_time_limit() -> None:
    with pytest.raises(gpu_cells.TooLong, match="longer than"), gpu_cells.time_limit(0.05):
        time.sleep(2)

    def one_in_another() -> None:
        with gpu_cells.time_limit(5):
            pass
        time.sleep(2)

    # The limit around the one that is over still holds.
    with pytest.raises(gpu_cells.TooLong, match="longer than 0 s"), gpu_cells.time_limit(0.3):
        one_in_another()


# The file of a run ----------------------------------------------------------------------------------------------------


GREEN = {"red": {}, "complete": {"cuda": True, "triton": True}, "counts": {}, "failed": []}


def a_state(**others: Any) -> dict[str, Any]:
    machine = {"device": "NVIDIA H100 80GB HBM3", "date": "2026-01-01", "multiprocessors": 132}
    return {"part": "gpu", "machine": machine, "tests": GREEN, **others}


@pytest.mark.slow
def test_measuring_goes_on_after_a_process_that_ended(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    rows = [
        Row(ADDITIVE, DECODE, FORWARD, "float32"),
        Row(SCORES, MANY, FORWARD, "float32"),
        Row(DOT, MANY, TRAINING, "float32"),
    ]
    state = a_state(ceilings={"copy_bytes_per_s": 3e12, "ffma_per_s": 25e12})
    gpu_measure.begin(path, state, rows[0].key)
    gpu_measure.measure(path, StandIn(), rows, seconds=0, left=60)
    state = json.loads(path.read_text())
    ended, scores, dot = state["cells"]
    assert ended["failure"] == "the process that measured it ended"
    assert state["begun"] is None and state["no time for"] == []
    rates = way(scores, OURS)["rates"][GRAPH]
    pairs = 2 * 9 * 5 * 8
    assert rates["pairs_per_s"] == pytest.approx(pairs / way(scores, OURS)["us"][GRAPH]["median"] * 1e6)
    assert rates["bytes_per_s"] is None
    assert dot["floor_us"] > 0
    assert way(dot, OURS)["rates"][GRAPH]["bytes_per_s"] > 0
    text = gpu_report.report(state)
    assert "NVIDIA H100" in text and dot["key"] in text and "the process that measured it ended" in text


def test_ceilings_go_on_after_one_that_fails_or_hung(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    gpu_measure.begin(path, a_state(), "launch_us")

    def failing(gpu: Any) -> float:
        raise RuntimeError("no such instruction")

    ceilings = {"copy_bytes_per_s": lambda gpu: 3e12, "launch_us": lambda gpu: 5.0, "ffma_per_s": failing}
    gpu_measure.measure_ceilings(path, StandIn(), ceilings)
    found = json.loads(path.read_text())["ceilings"]
    assert found["copy_bytes_per_s"] == 3e12
    assert found["launch_us"] is None and "ended" in found["launch_us failed"]
    assert found["ffma_per_s"] is None and "no such instruction" in found["ffma_per_s failed"]


def test_only_what_this_process_has_begun_is_stuck(tmp_path: Path) -> None:
    """What a process before it left as begun is no reason to end the one that is starting."""
    path = tmp_path / "gpu.json"
    assert gpu_measure.stuck(path, 0) is None
    gpu_measure.begin(path, a_state(), "a row", limit=1e-9)
    begun = json.loads(path.read_text())["begun"]["at"]
    assert "a row took longer" in gpu_measure.stuck(path, begun)
    assert gpu_measure.stuck(path, begun + 1) is None
    gpu_measure.begin(path, a_state(), "a row")
    assert gpu_measure.stuck(path, 0) is None


def timed(name: str, us: dict[str, float], times_ours: float = 1.0, **others: Any) -> dict[str, Any]:
    spread = {mode: {"median": value, "low": value, "high": value} for mode, value in us.items()}
    ratio = {mode: {"median": times_ours} for mode in us}
    return {"name": name, "failure": None, "us": spread, "times_ours": ratio, **others}


def cell(op: str, shape: Shape, passes: str, ways: list[dict[str, Any]], dtype: str = "float32", **others: Any) -> dict:
    key = Row(op, shape, passes, dtype).key
    return {
        "key": key,
        "op": op,
        "shape": list(shape),
        "passes": passes,
        "dtype": dtype,
        "prepared": False,
        "ways": ways,
        **others,
    }


def test_targets_are_judged_by_what_was_measured() -> None:
    large, small = gpu_cells.DECODE[2], gpu_cells.DECODE[4]
    pairs = 64 * 100 * 100 * 512
    ours = timed(OURS, {LAUNCHED: 40, GRAPH: 20, COLD: 36}, rates={COLD: {"bytes_per_s": 2.7e12}})
    state = a_state(
        ceilings={"copy_bytes_per_s": 3e12},
        cells=[
            cell(ADDITIVE, large, FORWARD, [ours], prepared=True),
            cell(ADDITIVE, small, FORWARD, [timed(OURS, {GRAPH: 6.0})], prepared=True),
            cell(SCORES, gpu_cells.RATES, FORWARD, [timed(OURS, {GRAPH: pairs / 7.5e12 * 1e6})]),
            cell(SCORES, gpu_cells.RATES, TRAINING, [timed(OURS, {GRAPH: (pairs / 7.5e12 + pairs / 2.5e12) * 1e6})]),
            cell(DOT, gpu_cells.RATES, FORWARD, [timed(OURS, {GRAPH: 50}), timed("sdpa", {GRAPH: 60}, 1.2)]),
            cell(
                ADDITIVE, gpu_cells.GNMT, TRAINING,
                [timed(OURS, {LAUNCHED: 900}, memory_mb=400), timed("eager", {LAUNCHED: 1}, 12.0)], "bfloat16",
                inputs_mb=200,
            ),
            cell(
                ADDITIVE, large, FORWARD,
                [timed(str(n), {GRAPH: 30 + n}, times_one={"median": 1 + n / 100}) for n in range(1, 11)], beams=True,
            ),
            {"key": "failed", "failure": "RuntimeError", "ways": []},
        ],
    )  # fmt: skip
    met = {target.what: target.met for target in gpu_targets.evaluate(state)}
    assert met == {
        "decode from memory: share of copy bandwidth": True,
        "small decode in a CUDA graph": False,
        f"forward, many queries ({gpu_targets.ON_AN_H100})": True,
        f"backward, many queries ({gpu_targets.ON_AN_H100})": False,
        "dot, forward: time of SDPA / ours": True,
        "training: time of eager / ours": True,
        "training: time of torch.compile / ours": None,
        "training: peak memory / inputs": True,
        "1 to 10 beams: slowest / one query": True,
    }
    assert "MISSED" in gpu_report.report(state)


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench import plots

    cells = [cell(DOT, MANY, FORWARD, [timed(OURS, {GRAPH: 5})])]
    assert not plots.gpu(tmp_path / "gpu.png", cells, a_state()["machine"])
    for one in cells:
        one["ways"].append(
            {**timed("sdpa", {GRAPH: 6}), "times_ours": {GRAPH: {"median": 1.2, "low": 1.1, "high": 1.3}}}
        )
    assert plots.gpu(tmp_path / "gpu.png", cells, a_state()["machine"])
    assert (tmp_path / "gpu.png").stat().st_size > 1000


# Predictions, and what may be published -------------------------------------------------------------------------------


def test_every_row_has_a_prediction() -> None:
    stored = gpu_predictions.load()
    assert set(stored["rows"]) == {row.key for row in gpu_cells.rows()}
    assert set(stored["ceilings"]) == set(gpu_device.CEILINGS)
    for row in gpu_cells.rows():
        one = stored["rows"][row.key]
        assert one["kind"] in gpu_predictions.KINDS
        assert len(one["beams_us"]) == 10 if row.beams else one["us"][LAUNCHED] >= one["us"][GRAPH] > 0
        assert (COLD in one["us"]) == (row.shape.Tq == 1 and row.passes == FORWARD and not row.beams)
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert gpu_predictions.put_into(page, gpu_predictions.markdown(stored)) == page


def test_predictions_name_code_that_there_is() -> None:
    sources = "\n".join(
        path.read_text() for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".cu", ".cuh", ".h")
    )
    names = {path.name for path in (ROOT / "csrc/cuda").iterdir()}
    for kind in gpu_predictions.KINDS.values():
        for name in re.findall(r"\b(?:k[A-Z]\w+|[A-Z]\w+[a-z][A-Z]\w+|\w+_\w+|\w+\.cuh?)\b", kind.first):
            assert name in names or re.search(rf"\b{name}\b", sources), name


def test_targets_are_predicted() -> None:
    found = gpu_predictions.predicted_targets(gpu_predictions.load())
    assert len({target.what for target in found}) >= 9
    assert all(target.measured is not None or "memory" in target.what for target in found)


def test_predictions_respect_the_floor() -> None:
    kernels = gpu_predictions.counted_kernels()
    assert {gpu_predictions.MANY_FORWARD, gpu_predictions.MANY_BACKWARD} <= set(kernels)
    for row in gpu_cells.rows():
        if row.beams or row.op == SCORES:
            continue
        floor = roofline.floor(row.op, row.shape, row.passes, row.dtype)
        us = gpu_predictions.predict(row, kernels)["us"]
        assert us.get(COLD, us[LAUNCHED]) > 0.99 * floor.pairs_us, row.key
        if COLD in us:
            assert us[COLD] > floor.bytes_us, row.key


def test_measured_times_stand_beside_predicted_ones() -> None:
    row = Row(ADDITIVE, gpu_cells.DECODE[4], FORWARD, "float32", prepared=True)
    one = {
        **cell(ADDITIVE, row.shape, FORWARD, [timed(OURS, {GRAPH: 8.0}), timed("eager", {LAUNCHED: 60.0})]),
        "key": row.key,
    }
    expected = {"kind": "decode, small", "factor": 1.5, "us": {GRAPH: 4.0}, "others": {"eager": {LAUNCHED: 30.0}}}
    text = gpu_report.report(a_state(cells=[one]), {"rows": {row.key: expected}})
    assert (
        "8 [2.00]" in text and "60 [2.00]" in text and "far from the prediction" in text and "cluster barrier" in text
    )


def test_only_green_figures_may_be_published() -> None:
    ways = [
        timed(OURS, {GRAPH: 5, LAUNCHED: 6}, detail="is cuda"),
        timed("cuda", {GRAPH: 5}),
        timed("triton", {GRAPH: 7}, 1.4),
    ]
    ways.append(timed("eager", {GRAPH: 50}, 10.0))

    def published(tests: dict[str, Any], **others: Any) -> tuple[list[str], str]:
        cells = [cell(DOT, MANY, FORWARD, [{**one} for one in ways])]
        state = a_state(cells=cells, **others) | {"tests": tests}
        return [one["name"] for kept in gpu_report.publishable(state) for one in kept["ways"]], gpu_report.markdown(
            state
        )

    names, table = published(GREEN)
    assert names == [OURS, "cuda", "triton", "eager"] and "triton 1.40" in table and "not published" not in table
    names, table = published({**GREEN, "red": {"triton": "2 failed"}})
    assert names == [OURS, "cuda", "eager"] and "triton: its tests are red: 2 failed" in table and "1.40" not in table
    names, table = published({**GREEN, "red": {"cuda": "2 failed"}})
    assert names == [] and "Nothing of this run may be published" in table
    assert published({**GREEN, "complete": {"triton": True}})[0] == []
    bad = {
        "counts": {},
        "not complete": [],
        "bad": [{"group": "dot cuda", "case": "x", "verdict": "wrong", "detail": ""}],
    }
    assert published(GREEN, first=bad)[0] == []
    ways[0]["wrong"] = "wrong: context"
    assert published(GREEN)[0] == []


# Stages and budget ----------------------------------------------------------------------------------------------------


def test_budget() -> None:
    now = [0.0]
    budget = gpu.Budget(480, clock=lambda: now[0])
    stages = {stage.name: stage for stage in gpu.STAGES}
    assert budget.limit(stages["build"]) == 140
    now[0] = 400
    assert budget.limit(stages["cuda-tests"]) == 80
    now[0] = 500
    assert budget.limit(stages["cells"]) == 0
    # A device of fifteen minutes: what tells most, then the rest, with two starts of a machine.
    assert sum(stages[name].most for name in ("first", "ceilings", "targets")) <= 250


def test_a_command_is_stopped_with_its_children_when_its_time_is_over() -> None:
    start = time.monotonic()
    sleeping = [sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '60'])"]
    assert gpu_stages.run_limited(sleeping, 0.5) == gpu_stages.Outcome(None, "stopped after 0 s")
    outcome = gpu_stages.run_limited(
        sleeping, 60, stuck=lambda: "a kernel hangs" if time.monotonic() > start + 1 else None
    )
    assert outcome == gpu_stages.Outcome(None, "a kernel hangs") and time.monotonic() - start < 30
    ended = gpu_stages.run_limited([sys.executable, "-c", "print('x'); raise SystemExit(4)"], 60)
    assert ended == gpu_stages.Outcome(4, "x\n")
    assert gpu_stages.run_limited(["true"], 0).status is None


class Recorder(gpu_stages.Machine):
    """No stage does anything; what was called is noted."""

    def name(self) -> str | None:
        return "NVIDIA H100 80GB HBM3"


ALL = list(gpu.NAMES)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the stages that run."""
    called: list[str] = []

    def run_stage(stage: gpu.Stage, path: Path, state: dict[str, Any], *_: Any) -> None:
        called.append(stage.name)
        if stage.name == "sanitizer" and "raise" in called:
            raise ValueError("no such option")
        key = "cells" if stage.name in ("targets", "cells") else "tests" if "tests" in stage.name else stage.name
        found: dict[str, Any] = {
            "cells": [cell(DOT, MANY, FORWARD, [timed(OURS, {GRAPH: 5.0})])],
            "tests": GREEN,
            "ceilings": {"copy_bytes_per_s": 3e12},
            "first": {"counts": {"dot cuda": {"ok": 3}}, "not complete": [], "bad": []},
            "sanitizer": {"memcheck": "ERROR SUMMARY: 0 errors"},
        }
        state[key] = found.get(key, {"status": 0})

    monkeypatch.setattr(gpu, "run_stage", run_stage)
    return called


def main(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    status = gpu.main(["--output", str(folder), *arguments], Recorder())
    (path,) = folder.glob("gpu-h100-80gb-hbm3-*.json")
    return status, json.loads(path.read_text())


def test_all_stages_in_order_and_the_file(
    tmp_path: Path, stages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, state = main(tmp_path)
    assert status == 0 and stages == ALL
    assert {"stages", "machine", "build", "first", "tests", "sanitizer", "ceilings", "cells", "targets"} <= set(state)
    assert "ERROR SUMMARY: 0 errors" in capsys.readouterr().out
    stages.clear()
    assert main(tmp_path, "--resume")[0] == 0 and stages == []
    assert main(tmp_path, "--only", "ceilings,cells")[0] == 0 and stages == ["ceilings", "cells"]
    stages.clear()
    main(tmp_path, "--skip", "build,cuda-tests,triton-tests,sanitizer")
    assert stages == ["first", "ceilings", "targets", "cells"]


def test_another_machine_goes_on_with_a_file_that_was_brought_back(tmp_path: Path, stages: list[str]) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    main(before, "--only", "build,first,ceilings,targets")
    (before / "tests.jsonl").write_text('{"test": "t", "outcome": "passed", "reason": "", "stage": "cuda"}\n')
    (path,) = before.glob("*.json")
    stages.clear()
    status, state = main(after, "--resume", str(path))
    assert status == 0 and stages == ["cuda-tests", "triton-tests", "cells", "sanitizer"]
    assert state["first"]["counts"] and (after / "tests.jsonl").read_text() == (before / "tests.jsonl").read_text()


def test_a_stage_that_raises_does_not_stop_the_next(tmp_path: Path, stages: list[str]) -> None:
    stages.append("raise")
    status, state = main(tmp_path)
    assert status == 1 and stages[1:] == ALL
    note = state["stages"]["sanitizer"]
    assert note["done"] is False and note["why"] == "ValueError: no such option" and note["seconds"] < 5
    stages.clear()
    main(tmp_path, "--resume")
    assert stages == ["sanitizer"]


def test_no_time_is_a_result(tmp_path: Path, stages: list[str]) -> None:
    status, state = main(tmp_path, "--budget", "0")
    assert status == 1 and stages == []
    assert all(note["why"] == "no time was left" for note in state["stages"].values())


def test_what_is_done_anew_is_forgotten_first(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    lines = [{"test": name, "outcome": "passed", "reason": "", "stage": name} for name in ("cuda", "triton")]
    path.with_name("tests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    state = {"stages": {"targets": {}, "cuda-tests": {}, "first": {}}, "cells": [1], "first": {}, "tests": GREEN}
    gpu.forget(path, state, ["targets", "cuda-tests"])
    assert state == {"stages": {"first": {}}, "first": {}, "tests": GREEN}
    assert [one["test"] for one in gpu_outcomes.read(path.with_name("tests.jsonl"))] == ["triton"]


def test_sanitizer_output(tmp_path: Path) -> None:
    good = "========= COMPUTE-SANITIZER\nhello\n========= ERROR SUMMARY: 0 errors\n"
    assert gpu_stages.verdict(gpu_stages.Outcome(0, good)) == "ERROR SUMMARY: 0 errors"
    bad = gpu_stages.Outcome(9, good.replace("0 e", "3 e"))
    assert gpu_stages.verdict(bad) == "ERROR SUMMARY: 3 errors (exit status 9)"
    races = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    assert gpu_stages.verdict(gpu_stages.Outcome(0, races)).startswith("RACECHECK SUMMARY: 0 hazards")
    assert gpu_stages.verdict(gpu_stages.Outcome(None, "")) == "not finished: ran out of time"

    class Bare(gpu_stages.Machine):
        def find(self, tool: str) -> str | None:
            return None

    assert "was not found" in gpu_stages.sanitizer(Bare(), tmp_path, 10)["memcheck"]


@pytest.mark.parametrize("known", [True, False])
def test_the_sanitizer_watches_our_kernels_alone_where_it_can(tmp_path: Path, known: bool) -> None:
    script = tmp_path / "sanitizer"
    script.write_text(
        f"#!/bin/sh\n[ $1 = --help ] && echo '{'--kernel-name' if known else '--filter'}' || echo called \"$@\"\n"
    )
    script.chmod(0o755)

    class Found(gpu_stages.Machine):
        def find(self, tool: str) -> str | None:
            return str(script)

    gpu_stages.sanitizer(Found(), tmp_path, 20)
    for check in ("memcheck", "racecheck"):
        called = (tmp_path / f"{check}.log").read_text()
        assert f"--tool {check}" in called and called.rstrip().endswith("bench.gpu.smoke cuda")
        assert ("--kernel-name kernel_substring=attn4cuda" in called) == known


def test_every_kernel_is_in_the_namespace_that_the_sanitizer_is_told() -> None:
    """attn4cuda is how the name of every kernel is mangled that lies in attn::cuda."""
    for source in (ROOT / "csrc" / "cuda").glob("*.cu"):
        text = source.read_text()
        first = min(text.find("__global__"), text.find("launch("), key=lambda at: at if at >= 0 else len(text))
        assert "namespace attn {\nnamespace cuda {" in text[:first], source.name


@pytest.mark.slow
def test_modules_that_serve_are_not_built_again(tmp_path: Path) -> None:
    class Having(gpu_stages.Machine):
        def __init__(self, **reasons: str) -> None:
            self.reasons = reasons

        def lacking(self) -> dict[str, str]:
            return self.reasons

        def build(self, module: str) -> tuple[list[str], dict[str, str]]:
            work = f"import time; open({str(tmp_path / module)!r}, 'w'); time.sleep(20 if {module!r} == '_C' else 0)"
            return [sys.executable, "-c", work], {}

    assert gpu_stages.build(Having(), tmp_path, 60)["built"] == []
    both = Having(_C="it was not built", _C_cuda="an undefined symbol")
    found = gpu_stages.build(both, tmp_path, 3)  # both at once: the second is there though the first takes too long
    assert found["status"] == "stopped when the time was over" and found["why"] == both.reasons
    assert (tmp_path / "_C_cuda").exists()


def test_first_contact_says_which_modules_are_lacking() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    outcome = gpu_stages.run_limited([sys.executable, "-c", gpu_stages.LACKING], 120, environment)
    assert "_C_cuda" in json.loads(outcome.text.splitlines()[-1])


def test_every_op_runs_under_the_sanitizer() -> None:
    assert gpu_smoke.run("cpu", ["reference", "cpu"] if gpu_cells.choose(None, "cpu") == "cpu" else ["reference"]) >= 24


def test_names_of_devices() -> None:
    assert gpu_device.slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert gpu_device.slug("NVIDIA GeForce RTX 4090") == "rtx-4090"


# Outcomes of tests ----------------------------------------------------------------------------------------------------


def outcome(test: str, how: str) -> dict[str, str]:
    return {"test": test, "outcome": how, "reason": ""}


def test_which_backends_are_red() -> None:
    passed = [outcome("t.py::test_a[cuda-x]", "passed"), outcome("t.py::test_a[triton-x]", "passed")]
    assert gpu_outcomes.summary(passed)["red"] == {}
    one = gpu_outcomes.summary([*passed, outcome("t.py::test_b[triton]", "failed")])
    assert set(one["red"]) == {"triton"} and one["failed"][0]["test"] == "t.py::test_b[triton]"
    # A failure that names no backend, in a file whose name has one, counts for both.
    assert set(gpu_outcomes.summary([*passed, outcome("test_cuda.py::test_c", "failed")])["red"]) == {"cuda", "triton"}
    assert gpu_outcomes.summary(passed[:1])["red"] == {"triton": "none passed"}
    # Where it is known which backend the run was about, it counts for that one.
    staged = {**outcome("test_x.py::test_c", "failed"), "stage": "triton"}
    assert set(gpu_outcomes.summary([*passed, staged])["red"]) == {"triton"}


def test_what_tells_most_runs_first() -> None:
    tests = ["test_compile.py::test_compile[cuda]", "test_fuzz.py::test_fuzz[cuda]", "test_z.py::test_z[cuda]"]
    tests += [
        "test_loop_graph.py::test_captured_on_cuda[lstm]",
        "test_ops.py::test_op[cuda]",
        "test_numerics.py::t[cuda]",
    ]
    ordered = [test.partition(".")[0] for test in sorted(tests, key=gpu_outcomes.rank)]
    assert ordered == ["test_loop_graph", "test_ops", "test_numerics", "test_z", "test_fuzz", "test_compile"]


@slow_if(lambda workers: bool(workers))
@pytest.mark.usefixtures("outside_xdist")
@pytest.mark.parametrize("workers", [(), ("-n", "2")])
def test_outcomes_are_written_as_they_come(tmp_path: Path, workers: tuple[str, ...]) -> None:
    if workers:
        pytest.importorskip("xdist")
    (tmp_path / "test_x.py").write_text(
        "import pytest\n@pytest.mark.parametrize('b', ['cuda', 'triton'])\n"
        "def test_it(b):\n    assert b == 'cuda', 'for some reason'\n"
    )
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    file = tmp_path / "outcomes.jsonl"
    environment = {gpu_outcomes.VARIABLE: str(file), "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu.outcomes", "-p", "no:cacheprovider", *workers,
         "--rootdir", str(tmp_path), "--continue-on-collection-errors", str(tmp_path)],
        env=os.environ | environment, cwd=tmp_path, capture_output=True,
    )  # fmt: skip
    found = {one["test"].split("/")[-1]: one for one in gpu_outcomes.read(file)}
    assert found["test_x.py::test_it[cuda]"]["outcome"] == "passed"
    assert found["test_x.py::test_it[triton]"]["outcome"] == "failed"
    assert found["test_x.py::test_it[triton]"]["reason"].startswith("AssertionError: for some reason")
    assert found["test_broken.py"]["outcome"] == "failed" and "no_such_module" in found["test_broken.py"]["reason"]


# Command line ---------------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "bench.gpu"]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert process.returncode == 2 and "needs a CUDA device" in process.stdout, process.stderr


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(gpu.PACKAGES, "no_such_package", "pip install it")
    assert gpu.main([], Recorder()) == 2
    assert "no_such_package: pip install it" in capsys.readouterr().out


def test_the_runner_needs_neither_typer_nor_rich_nor_matplotlib() -> None:
    modules = sorted(
        f"bench.gpu.{path.stem}" for path in (ROOT / "bench/gpu").glob("[a-z]*.py") if path.stem != "kernels"
    )
    code = (
        "import sys\nfor name in ('typer', 'rich', 'matplotlib', 'hypothesis'): sys.modules[name] = None\n"
        f"import {', '.join(modules)}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = gpu.parse(["--only", "cuda-tests,cells", "--budget", "60"])
    assert options.only == ["cuda-tests", "cells"] and options.budget == 60 and options.resume is None
    with pytest.raises(SystemExit):
        gpu.parse(["--only", "no_such_stage"])
    assert "no stage 'no_such_stage': build, first" in capsys.readouterr().err
    file = tmp_path / "gpu.json"
    results.write_json(file, a_state(cells=[]))
    assert gpu.main(["--only", "publish", "--file", str(file)]) == 0
    assert "Nothing of this run may be published" in capsys.readouterr().out
    assert gpu.main(["--only", "plot"]) == 2


# First contact --------------------------------------------------------------------------------------------------------


def test_first_contact_notes_what_is_wrong(tmp_path: Path) -> None:
    contact = gpu_first.Contact(tmp_path, "dot cuda", "cpu")

    def wrong() -> None:
        raise gpu_first.Wrong("output 0 3.0e-01")

    def failing() -> None:
        raise ValueError("no such shape")

    for name, work in (("a", lambda: "1.0e-07"), ("b", wrong), ("c", failing)):
        contact.attempt(name, work)
    contact.say("d", gpu_first.BEGUN)  # where its process ended
    again = gpu_first.Contact(tmp_path, "dot cuda", "cpu")
    assert again.done == {"a", "b", "c"}
    again.attempt("a", failing)
    again.say("(group)", gpu_first.PLANNED)
    found = gpu_first.summary(gpu_first.read(tmp_path))
    assert found["counts"] == {"dot cuda": {"ok": 1, "wrong": 1, "error": 1}} and found["not complete"] == ["dot cuda"]
    assert "ValueError: no such shape" in found["bad"][1]["detail"]
    assert "wrong: dot cuda: b: output 0 3.0e-01" in gpu_first.text(found)


@pytest.mark.parametrize(
    ("op", "options"),
    [
        (ADDITIVE, {}),
        (ADDITIVE, {"activation": "relu"}),
        (ADDITIVE, {"gated": True, "vectors": 3}),
        (DOT, {}),
        (SCORES, {}),
        (SCORES, {"gated": True}),
    ],
)
def test_first_contact_compares_with_float64(op: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    options = options | ({} if op == SCORES else {"lengths": True, "mask": "pairs"})
    assert float(gpu_first.compare(op, (2, 3, 5, 8, 4), "float32", "cpu", "cpu", **options)) < 2e-5
    monkeypatch.setitem(gpu_first.LIMITS, "float32", 1e-12)
    with pytest.raises(gpu_first.Wrong, match="gradient"):
        gpu_first.compare(op, (2, 3, 5, 8, 4), "float32", "cpu", "cpu", **options)


def test_the_groups_of_first_contact_name_their_backend() -> None:
    assert all(group == "facts" or group.split()[1] in gpu_outcomes.BACKENDS for group in gpu_first.GROUPS)
    contact = gpu_first.Contact(Path("/nonexistent"), f"masks triton {DOT}", "cpu")
    assert contact.backend == "triton" and gpu_first.ops_of(contact, ADDITIVE, DOT) == [DOT]
