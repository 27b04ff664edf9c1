"""``make gpu`` without a GPU: budget, steps, what is refused, cells on the CPU in place of the GPU, and the report."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import (
    cuda_rules,
    files,
    gpu,
    gpu_cells,
    gpu_device,
    gpu_measure,
    gpu_outcomes,
    gpu_smoke,
    gpu_targets,
    timing,
)
from bench.gpu_cells import COLD, GRAPH, LAUNCHED, OURS, SCORES, Row
from bench.problems import FORWARD, TRAINING, Shape
from bench.roofline import ADDITIVE, DOT

ROOT = Path(__file__).resolve().parents[1]
DECODE, MANY = Shape(2, 1, 5, 8, 8), Shape(2, 9, 5, 8, 8)


class Timer(timing.WallTimer):
    shortest_sample = 1e-5


class StandIn:
    """A CPU in the place of a GPU: a graph of calls is the calls."""

    device = torch.device("cpu")
    l2_bytes = 4000
    memory_bytes = 10**9

    def __init__(self) -> None:
        self.timer = Timer()

    def capture(self, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
        return lambda: [call() for call in calls]

    def release(self) -> None:
        pass


def way(cell: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in cell["ways"] if one["name"] == name)


# Cells ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [FORWARD, TRAINING])
@pytest.mark.parametrize(
    ("op", "others"),
    [(ADDITIVE, {"eager", gpu_cells.SCORES_THEN_EAGER}), (DOT, {"eager", "sdpa"}), (SCORES, {"eager"})],
)
def test_every_way_is_checked_and_timed(op: str, others: set[str], passes: str) -> None:
    cell = gpu_cells.measure(Row(op, MANY, passes, "float32"), StandIn(), {}, seconds=0)
    assert {one["name"] for one in cell["ways"]} == others | {OURS}
    for one in cell["ways"]:
        assert one["failure"] is None and one["error"] < 1e-4
        assert set(one["us"]) == {LAUNCHED, GRAPH}
        assert one["us"][GRAPH]["low"] <= one["us"][GRAPH]["median"] <= one["us"][GRAPH]["high"]
    assert way(cell, OURS)["times_ours"][GRAPH]["median"] == 1
    json.dumps(cell, allow_nan=False)


def test_decode_is_also_timed_with_inputs_from_memory() -> None:
    row = Row(ADDITIVE, DECODE, FORWARD, "float32", prepared=True)
    problem = gpu_cells.make_problem(row, torch.device("cpu"))
    size = sum(x.nbytes for x in problem.inputs.values())
    copies = gpu_cells._copies(row, problem, StandIn())
    assert len(copies) == -(-3 * StandIn.l2_bytes // size)
    assert copies[0].inputs["keys"].data_ptr() != copies[1].inputs["keys"].data_ptr()
    cell = gpu_cells.measure(row, StandIn(), {}, seconds=0)
    assert set(way(cell, OURS)["us"]) == {LAUNCHED, GRAPH, COLD}


def test_a_backend_with_red_tests_gets_no_time() -> None:
    row = Row(ADDITIVE, MANY, FORWARD, "float32")
    cell = gpu_cells.measure(row, StandIn(), {"cpu": "2 failed"}, seconds=0)
    assert way(cell, OURS)["failure"] == "its tests are red: 2 failed" and way(cell, OURS)["us"] == {}
    assert gpu_cells.SCORES_THEN_EAGER not in {one["name"] for one in cell["ways"]}  # it has our kernel too
    assert way(cell, "eager")["us"]
    beams = gpu_cells.measure_beams(row._replace(beams=True), StandIn(), {"cpu": "2 failed"}, seconds=0)
    assert "red" in beams["failure"] and beams["ways"] == []


def test_wrong_results_get_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        gpu_cells, "_scores_then_eager", lambda query, keys, values, v: 2 * values[:, :1].expand(query.shape)
    )
    cell = gpu_cells.measure(Row(ADDITIVE, MANY, FORWARD, "float32"), StandIn(), {}, seconds=0)
    assert "wrong: context differs" in way(cell, gpu_cells.SCORES_THEN_EAGER)["failure"]


def test_a_way_that_cannot_be_captured_keeps_its_launched_time() -> None:
    class Refusing(StandIn):
        def capture(self, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
            raise RuntimeError("operation not permitted when stream is capturing")

    cell = gpu_cells.measure(Row(DOT, MANY, FORWARD, "float32"), Refusing(), {}, seconds=0)
    assert set(way(cell, OURS)["us"]) == {LAUNCHED} and "not permitted" in way(cell, OURS)["detail"]


def test_beams_are_compared_with_one_query() -> None:
    cell = gpu_cells.measure_beams(Row(ADDITIVE, DECODE, FORWARD, "float32", beams=True), StandIn(), {}, seconds=0)
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

    late = gpu_cells.run(StandIn(), rows, {}, store, until=100, seconds=0, clock=lambda: next(ticks))
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


def a_state(**others: Any) -> dict[str, Any]:
    machine = {"device": "NVIDIA H100 80GB HBM3", "date": "2026-01-01", "multiprocessors": 132}
    return {"part": "gpu", "machine": machine, "tests": {"red": {}, "complete": True, "counts": {}}, **others}


def test_measuring_goes_on_after_a_process_that_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gpu.json"
    rows = [
        Row(ADDITIVE, DECODE, FORWARD, "float32"),
        Row(SCORES, MANY, FORWARD, "float32"),
        Row(DOT, MANY, TRAINING, "float32"),
    ]
    files.write_json(path, a_state(begun=rows[0].key, ceilings={"copy_bytes_per_s": 3e12, "ffma_per_s": 25e12}))
    monkeypatch.setattr(gpu_measure, "COUNTED", ())
    gpu_measure.measure(path, StandIn(), rows, seconds=0, left=60, ceilings=False)
    state = json.loads(path.read_text())
    ended, scores, dot = state["cells"]
    assert ended["failure"] == "the process that measured it ended"
    assert state["begun"] is None and state["no time for"] == []
    rates = way(scores, OURS)["rates"][GRAPH]
    pairs = 2 * 9 * 5 * 8
    assert rates["pairs_per_s"] == pytest.approx(pairs / way(scores, OURS)["us"][GRAPH]["median"] * 1e6)
    assert rates["bytes_per_s"] is None
    assert dot["floor_us"] > 0 and dot["predicted_us_h100"] is None
    assert way(dot, OURS)["rates"][GRAPH]["bytes_per_s"] > 0
    text = gpu_targets.report(state)
    assert "NVIDIA H100" in text and dot["key"] in text and "the process that measured it ended" in text


def test_counts_of_cuda_check_are_used_for_predictions(tmp_path: Path) -> None:
    found = cuda_rules.Finding(
        "many_queries_scores_kernel<float, 8, 4, true>", "x.cu", "sm_90a", cuda_rules.FORWARD, 168, 0, 0, 0, 384, 12,
        slots_per_pair=3.3, special_per_pair=1 / 3, thread_tile=(8, 4),
    )  # fmt: skip
    files.write_json(tmp_path / "cuda-check.json", {"kernels": [found.as_json()]})
    kernels = gpu_measure.counted_kernels((tmp_path / "missing.json", tmp_path / "cuda-check.json"))
    row = Row(ADDITIVE, gpu_cells.RATES, FORWARD, "float32")
    cell = gpu_measure.with_rates({"ways": [{"us": {}}]}, row, gpu_measure.model_of({}, {}), kernels)
    assert cell["predicted_us_h100"] > cell["floor_us"] > 0


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
    assert "MISSED" in gpu_targets.report(state)


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


# Steps and budget -----------------------------------------------------------------------------------------------------


def test_budget_leaves_later_steps_their_time() -> None:
    now = [0.0]
    budget = gpu.Budget(480, clock=lambda: now[0])
    steps = {step.name: step for step in gpu.STEPS}
    assert sum(step.share for step in gpu.STEPS[:-1]) <= 0.75  # a quarter is left for the cells at worst
    assert budget.limit(steps["build"]) == pytest.approx(120)
    now[0] = 400
    assert budget.limit(steps["tests"]) == 80 and budget.limit(steps["cells"]) == 80
    now[0] = 500
    assert budget.limit(steps["cells"]) == 0


def test_a_command_is_stopped_with_its_children_when_its_time_is_over() -> None:
    start = time.monotonic()
    outcome = gpu.run_limited([sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '60'])"], 0.5)
    assert outcome.status is None and time.monotonic() - start < 20
    assert gpu.run_limited([sys.executable, "-c", "print('x'); raise SystemExit(4)"], 60) == gpu.Outcome(4, "x\n")
    assert gpu.run_limited(["true"], 0).status is None


class Steps:
    """Stands in for what the steps do; notes what was called with which limit."""

    def __init__(self, red: dict[str, str] | None = None) -> None:
        self.called: list[str] = []
        self.red = red or {}

    def as_keywords(self) -> dict[str, Any]:
        return {"build": self.build, "tests": self.tests, "sanitizer": self.sanitizer, "measure": self.measure}

    def build(self, seconds: float) -> dict[str, Any]:
        self.called.append("build")
        return {"status": 0}

    def tests(self, seconds: float, path: Path) -> dict[str, Any]:
        self.called.append("tests")
        return {"red": self.red, "complete": True, "counts": {"passed": 3}}

    def sanitizer(self, seconds: float) -> dict[str, str]:
        self.called.append("sanitizer")
        return {"memcheck": "ERROR SUMMARY: 0 errors"}

    def measure(self, path: Path, seconds: float, *, ceilings: bool, cells: bool, cell_seconds: float) -> None:
        self.called.append("ceilings" if ceilings else "cells")
        state = json.loads(path.read_text())  # every step before has left its result there
        assert "sanitizer" in state or self.called[0] in ("ceilings", "cells")
        state["ceilings" if ceilings else "cells"] = (
            {"copy_bytes_per_s": 3e12} if ceilings else [cell(DOT, MANY, FORWARD, [timed(OURS, {GRAPH: 5.0})])]
        )
        files.write_json(path, state)


def device() -> str:
    return "NVIDIA H100 80GB HBM3"


def main(folder: Path, steps: Steps, *arguments: str) -> tuple[int, dict[str, Any]]:
    status = gpu.main(["--output", str(folder), *arguments], device, **steps.as_keywords())
    (path,) = folder.glob("gpu-h100-80gb-hbm3-*.json")
    return status, json.loads(path.read_text())


ALL = ["build", "tests", "sanitizer", "ceilings", "cells"]


def test_all_steps_in_order_and_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = Steps()
    status, state = main(tmp_path, steps)
    assert status == 0 and steps.called == ALL
    assert set(state) == {"schema", "part", "machine", "build", "tests", "sanitizer", "ceilings", "cells", "targets"}
    printed = capsys.readouterr().out
    assert "5 of 5: cells" in printed and "ERROR SUMMARY: 0 errors" in printed

    again = Steps()
    assert main(tmp_path, again, "--resume")[0] == 0 and again.called == ["cells"]
    one = Steps()
    assert main(tmp_path, one, "--only", "ceilings")[0] == 0 and one.called == ["ceilings"]


def test_a_run_that_is_cut_off_leaves_a_file(tmp_path: Path) -> None:
    steps = Steps()
    steps.sanitizer = lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        main(tmp_path, steps)
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["tests"]["counts"] == {"passed": 3}


def test_red_tests_are_recorded_and_strict_measures_nothing(tmp_path: Path) -> None:
    red = {"cuda": "1 failed, first tests/test_ops.py::test_x[cuda]"}
    status, state = main(tmp_path, Steps(red))
    assert status == 1 and state["tests"]["red"] == red and state["cells"]
    steps = Steps(red)
    status, _ = main(tmp_path, steps, "--strict")
    assert status == 1 and steps.called == ["build", "tests"]


def test_without_tests_no_backend_counts_as_green(tmp_path: Path) -> None:
    _, state = main(tmp_path, Steps(), "--only", "cells")
    assert state["tests"]["red"] == {"cuda": "not run", "triton": "not run"}


def test_sanitizer_output() -> None:
    good = "========= COMPUTE-SANITIZER\nhello\n========= ERROR SUMMARY: 0 errors\n"
    assert gpu.verdict(gpu.Outcome(0, good)) == "ERROR SUMMARY: 0 errors"
    assert gpu.verdict(gpu.Outcome(9, good.replace("0 e", "3 e"))) == "ERROR SUMMARY: 3 errors (exit status 9)"
    races = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    assert gpu.verdict(gpu.Outcome(0, races)).startswith("RACECHECK SUMMARY: 0 hazards")
    assert gpu.verdict(gpu.Outcome(None, "")) == "not finished: ran out of time"
    assert "was not found" in gpu.sanitizer(10, find=lambda name: None)["memcheck"]


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
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    environment |= {gpu_outcomes.VARIABLE: str(file), "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu_outcomes", "-p", "no:cacheprovider", *workers,
         "--rootdir", str(tmp_path), "--continue-on-collection-errors", str(tmp_path)],
        env=environment, cwd=tmp_path, capture_output=True,
    )  # fmt: skip
    found = {one["test"].split("/")[-1]: one for one in gpu_outcomes.read(file)}
    assert found["test_x.py::test_it[cuda]"]["outcome"] == "passed"
    assert found["test_x.py::test_it[triton]"]["outcome"] == "failed"
    assert found["test_broken.py"]["outcome"] == "failed"


# Command line ---------------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "bench.gpu"]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert process.returncode == 2 and "needs a CUDA device" in process.stdout, process.stderr


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(gpu.PACKAGES, "no_such_package", "pip install it")
    assert gpu.main([], device) == 2
    assert "no_such_package: pip install it" in capsys.readouterr().out


def test_the_runner_needs_neither_typer_nor_rich_nor_matplotlib() -> None:
    code = (
        "import sys\nfor name in ('typer', 'rich', 'matplotlib', 'hypothesis'): sys.modules[name] = None\n"
        "import bench.gpu, bench.gpu_cells, bench.gpu_measure, bench.gpu_targets, bench.gpu_outcomes, bench.gpu_smoke\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_options() -> None:
    options = gpu.parse(["--only", "tests", "--only", "cells", "--budget", "60"])
    assert isinstance(options, argparse.Namespace) and options.only == ["tests", "cells"] and options.budget == 60
