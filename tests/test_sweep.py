"""The sweep over tiny sizes with fake times: what it runs, stores, repeats, reports and rejects."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

for package in ("typer", "rich", "matplotlib"):
    pytest.importorskip(package, reason="the benchmarks need the dependency group bench")

from typer.testing import CliRunner  # noqa: E402

from bench import plots, timing  # noqa: E402
from bench.cases import FORWARD, TRAINING, Problem, Provider, Settings, Shape  # noqa: E402
from bench.cpu import grid, ops, sweep  # noqa: E402

pytestmark = pytest.mark.usefixtures("same_threads")

SIZES = [f"--{axis}={size}" for axis, size in (("batch", 1), ("batch", 2), ("queries", 1), ("steps", 3), ("units", 4))]
COMMAND = [*SIZES, "--units=8", "--allocator=default"]
Key = tuple[str, Shape, str]


class Times:
    """Takes the place of ``sweep.time_cell``: ratios by rule, and a record of what was asked for."""

    def __init__(self) -> None:
        self.first: Callable[[sweep.Cell], float] = lambda cell: 2.0
        self.again: Callable[[sweep.Cell], float] = lambda cell: 2.0
        self.timed: list[Key] = []
        self.repeated: list[Key] = []
        self.interrupt_after: int | None = None

    def __call__(
        self, cell: sweep.Cell, inputs: sweep.Inputs, settings: sweep.Settings, *, again: bool = False
    ) -> None:
        if self.interrupt_after is not None and len(self.timed) + len(self.repeated) == self.interrupt_after:
            raise KeyboardInterrupt
        (self.repeated if again else self.timed).append(cell.key)
        ratio = (self.again if again else self.first)(cell)
        measured = sweep.Measured(1.0, ratio, timing.Spread(ratio, ratio, ratio), 5)
        if again:
            cell.again = measured
        else:
            cell.first = measured


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Times:
    fake = Times()
    monkeypatch.setattr(sweep, "time_cell", fake)
    monkeypatch.setattr(plots, "sweep", lambda path, *_: path.touch())  # drawing takes longer than all the rest
    return fake


def invoke(*arguments: str, output: Path) -> tuple[int, str]:
    command = [*COMMAND, *arguments, "--output", str(output)]
    result = CliRunner().invoke(sweep.app, command)
    return result.exit_code, result.output


def stored(output: Path) -> dict:
    return json.loads((output / "sweep-cpu.json").read_text())


# The grid -------------------------------------------------------------------------------------------------------------


def test_the_grid_has_every_combination_once() -> None:
    cells = sweep.plan(sweep.Grid(), sweep.OPS, (FORWARD, TRAINING), sweep.Limits())
    assert len(cells) == len({cell.key for cell in cells}) == 2 * 2 * 5 * 6 * 6 * 4
    assert ("dot_attention", Shape(256, 1, 50, 1024, 1024), TRAINING) in {cell.key for cell in cells}
    sizes = [(cell.shape.B, cell.shape.Tk, cell.shape.A) for cell in cells]
    changes = sum(before != after for before, after in itertools.pairwise(sizes))
    assert changes == len(set(sizes)) - 1  # or keys and values would be made anew again and again


def test_the_quick_grid_is_a_part_of_the_whole() -> None:
    for some, every in zip(sweep.QUICK, sweep.Grid(), strict=True):
        assert set(some) < set(every)


def test_what_is_too_large_or_too_slow_is_left_out_with_the_reason() -> None:
    def reason(op: str, sizes: tuple[int, ...], passes: str, **limits: float) -> str | None:
        return grid.beyond(sweep.Cell(op, Shape(*sizes), passes), sweep.Limits(**limits))

    # Additive eager holds B * Tq * Tk * A numbers three times, five with backward: 2.4 GB and 4 GB here.
    sizes = (50, 40, 1000, 100, 100)
    assert reason("additive_attention", sizes, FORWARD) is None
    assert reason("additive_attention", sizes, TRAINING) == "more than 4 GB"
    assert reason("additive_attention", sizes, FORWARD, memory_gb=2) == "more than 2 GB"
    assert reason("additive_attention", sizes, FORWARD, item_size=8) == "more than 4 GB"
    assert reason("dot_attention", sizes, TRAINING, memory_gb=2) is None
    assert reason("dot_attention", (256, 1, 4000, 1024, 1024), FORWARD) == "more than 4 GB"
    assert reason("dot_attention", (64, 128, 1000, 256, 256), FORWARD, seconds=0.01) == "more than 0.01 s a call"


def test_inputs_do_not_depend_on_what_was_timed_before() -> None:
    shape = Shape(2, 3, 4, 8, 8)
    used = sweep.Inputs(torch.float32)
    for other in (Shape(2, 1, 4, 8, 8), Shape(1, 3, 4, 8, 8)):
        used.problem("dot_attention", other)
    for op in sweep.OPS:
        anew, again = sweep.Inputs(torch.float32).problem(op, shape), used.problem(op, shape)
        assert list(anew.inputs) == list(again.inputs)
        assert all(map(torch.equal, anew.inputs.values(), again.inputs.values()))
        assert torch.equal(anew.grad_context, again.grad_context)


# One cell -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [FORWARD, TRAINING])
@pytest.mark.parametrize("op", sweep.OPS)
def test_a_cell_is_timed_in_rounds_and_longer_the_second_time(
    op: str, passes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def interleave(calls: dict, timer: object, *, seconds: float, least_rounds: int) -> timing.Samples:
        for call in calls.values():
            call()
        asked.append((seconds, least_rounds))
        return {"ours": [1.0, 2.0, 4.0], "eager": [3.0, 4.0, 4.0]}

    monkeypatch.setattr(timing, "interleave", interleave)
    cell = sweep.Cell(op, Shape(2, 3, 4, 8, 8), passes)
    inputs, settings = sweep.Inputs(torch.float32), sweep.Settings(seconds=0.1, rounds=7)
    sweep.time_cell(cell, inputs, settings)
    assert cell.failure is None
    assert cell.first == sweep.Measured(2000, 4000, timing.Spread(2.0, 1.5, 2.5), 3)
    assert cell.again is None
    sweep.time_cell(cell, inputs, settings, again=True)
    assert cell.again == cell.first
    assert asked == [(0.1, 7), (sweep.AGAIN_SECONDS, sweep.AGAIN_ROUNDS)]


@pytest.mark.parametrize("passes", [FORWARD, TRAINING])
def test_ours_gets_no_time_for_another_result(passes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(op: str, problem: Problem, settings: Settings) -> tuple[str, list[Provider]]:
        name, providers = make_providers(op, problem, settings)
        right = providers[0].function
        providers[0].function = lambda *tensors: right(*tensors) * 1.01
        return name, providers

    make_providers = ops.make_providers
    monkeypatch.setattr(ops, "make_providers", wrong)
    cell = sweep.Cell("dot_attention", Shape(2, 3, 4, 8, 8), passes)
    sweep.time_cell(cell, sweep.Inputs(torch.float32), sweep.Settings())
    assert cell.failure.startswith("wrong: context differs")
    assert cell.ratio is None
    assert cell.done


# The whole sweep ------------------------------------------------------------------------------------------------------


def test_only_cells_below_the_bound_are_timed_again_and_the_second_time_counts(times: Times, tmp_path: Path) -> None:
    times.first = lambda cell: 0.9 if cell.shape.A == 8 else 0.97
    times.again = lambda cell: 0.95 if cell.shape.B == 2 and cell.passes == TRAINING else 1.02
    code, output = invoke("--op", "dot_attention", output=tmp_path)
    assert code == 1
    assert len(times.timed) == 8
    assert times.repeated == [key for key in times.timed if key[1].A == 8]
    assert "1 cells remain below 0.97x eager." in output
    assert "Timed again at more length: 4 cells" in output
    loser = next(line for line in output.splitlines() if "0.950x!" in line)
    assert "0.900x!" in loser and "2,1,3,8" in loser
    cells = stored(tmp_path)["cells"]
    again = [cell for cell in cells if cell["again"]]
    assert len(again) == 4
    assert {cell["first"]["ratio"]["median"] for cell in again} == {0.9}
    assert sorted(cell["again"]["ratio"]["median"] for cell in again) == [0.95, 1.02, 1.02, 1.02]


def test_exit_code_and_summary(times: Times, tmp_path: Path) -> None:
    times.first = lambda cell: 4.0 if cell.shape.A == 8 else 1.0
    code, output = invoke(output=tmp_path)
    assert (code, times.repeated) == (0, [])
    assert "No cell is below 0.97x eager." in output
    summary = stored(tmp_path)["summary"]
    assert summary["dot_attention, forward"] == {"cells": 4, "lowest": 1.0, "median": 2.5, "geometric mean": 2.0}
    assert len(summary) == 4
    code, output = invoke("--least", "1.5", output=tmp_path)
    assert code == 0  # the second time they are at 2
    assert len(times.repeated) == 8
    times.again = times.first
    assert invoke("--least", "1.5", output=tmp_path)[0] == 1


def test_a_failure_of_ours_is_an_error_and_one_of_eager_is_not(
    monkeypatch: pytest.MonkeyPatch, times: Times, tmp_path: Path
) -> None:
    def fail(cell: sweep.Cell, *arguments: object, **keywords: object) -> None:
        setattr(cell, field, "out of luck")

    monkeypatch.setattr(sweep, "time_cell", fail)
    field = "failure"
    code, output = invoke("--op", "dot_attention", output=tmp_path)
    assert code == 1
    assert "No time for ours: dot_attention (1,1,3,4) forward: out of luck" in output
    field = "not_run"
    code, output = invoke("--op", "dot_attention", output=tmp_path)
    assert code == 0
    assert "Not run: 8 of 8 cells (out of luck: 8)." in output


def test_what_is_left_out_is_counted(times: Times, tmp_path: Path) -> None:
    code, output = invoke("--most-memory", "0", output=tmp_path)
    assert code == 0
    assert times.timed == []
    assert "Not run: 16 of 16 cells (more than 0 GB: 16)." in output
    assert stored(tmp_path)["not run"] == {"more than 0 GB": 16}
    assert (tmp_path / "sweep-cpu.png").exists()


# Interrupts -----------------------------------------------------------------------------------------------------------


def test_a_resumed_sweep_takes_over_what_was_finished(times: Times, tmp_path: Path) -> None:
    times.first, times.again = lambda cell: 0.9, lambda cell: 0.8
    times.interrupt_after = 5
    code, output = invoke("--op", "dot_attention", output=tmp_path)
    assert code == 130
    assert "--resume goes on" in output
    assert [path.name for path in tmp_path.iterdir()] == ["sweep-cpu.partial.jsonl"]
    with next(tmp_path.iterdir()).open("a") as file:
        file.write('{"op": "dot_att')  # killed while it wrote

    times.interrupt_after = 8 + 3  # among those that are timed again
    code, output = invoke("--op", "dot_attention", "--resume", output=tmp_path)
    assert code == 130
    assert "Taken over: 5 cells" in output

    times.interrupt_after = None
    code, output = invoke("--op", "dot_attention", "--resume", output=tmp_path)
    assert code == 1
    assert "Taken over: 8 cells" in output
    for keys in (times.timed, times.repeated):  # nothing twice, nothing forgotten
        assert len(keys) == len(set(keys)) == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep-cpu.json", "sweep-cpu.png"]
    for cell in stored(tmp_path)["cells"]:
        assert (cell["first"]["ratio"]["median"], cell["again"]["ratio"]["median"]) == (0.9, 0.8)


def test_a_resumed_sweep_may_have_another_grid(times: Times, tmp_path: Path) -> None:
    times.interrupt_after = 6
    assert invoke("--op", "dot_attention", output=tmp_path)[0] == 130
    times.interrupt_after = None
    assert invoke("--resume", output=tmp_path)[0] == 0
    assert len(times.timed) == len(set(times.timed)) == 16


def test_a_sweep_goes_on_under_the_same_conditions_only(
    times: Times, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times.interrupt_after = 2
    assert invoke(output=tmp_path)[0] == 130
    times.interrupt_after = None
    code, output = invoke("--resume", "--seconds", "9", output=tmp_path)
    assert code == 2
    assert "seconds 0.15, not 9.0" in " ".join(output.replace("│", "").split())
    monkeypatch.setattr(sweep, "code_digest", lambda: "another")
    code, output = invoke("--resume", output=tmp_path)
    assert code == 2
    assert "package" in output and "not 'another'" in " ".join(output.replace("│", "").split())
    assert len(times.timed) == 2
    assert invoke(output=tmp_path)[0] == 0  # from the start
    assert len(times.timed) == 2 + 16


def test_resume_without_an_interrupted_sweep_starts_one(times: Times, tmp_path: Path) -> None:
    assert invoke("--resume", output=tmp_path)[0] == 0
    assert len(times.timed) == 16


# Picture and end to end -----------------------------------------------------------------------------------------------


def test_picture_of_every_kind_of_cell(tmp_path: Path) -> None:
    cells = sweep.plan(sweep.Grid((1, 2), (1, 3), (4,), (8,)), ["dot_attention"], [FORWARD], sweep.Limits())
    for cell, ratio in zip(cells, (0.9, 123.4), strict=False):
        cell.first = sweep.Measured(1.0, ratio, timing.Spread(ratio, ratio, ratio), 5)
    cells[2].not_run, cells[3].failure = "too large", "wrong"
    description = {"device": "a processor", "threads": 1, "torch": "2", "allocator": "malloc", "date": "today"}
    plots.sweep(tmp_path / "some.png", sweep.ratios_by_panel(cells), description, "float32", 0.97)
    plots.sweep(tmp_path / "none.png", sweep.ratios_by_panel(cells[2:3]), description, "float32", 0.97)
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_end_to_end(tmp_path: Path) -> None:
    options = ["--seconds", "0", "--rounds", "1", "--least", "0"]
    code, output = invoke(*options, "--pass", "forward", "--threads", "1", "--units", "5", output=tmp_path)
    assert code == 0, output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep-cpu.json", "sweep-cpu.png"]
    assert (tmp_path / "sweep-cpu.png").read_bytes().startswith(b"\x89PNG")
    result = stored(tmp_path)
    assert {"schema", "part", "machine", "settings", "summary", "not run", "cells"} == set(result)
    assert len(result["cells"]) == 2 * 2 * 3
    for cell in result["cells"]:
        assert cell["passes"] == FORWARD
        assert cell["failure"] is None and cell["not run"] is None and cell["again"] is None
        assert cell["first"]["ours ms"] > 0 and cell["first"]["ratio"]["median"] > 0


def test_low_precision_and_its_file(tmp_path: Path) -> None:
    options = ["--seconds", "0", "--rounds", "1", "--least", "0", "--op", "additive_attention"]
    code, output = invoke(*options, "--dtype", "bfloat16", output=tmp_path)
    assert code == 0, output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep-cpu-bfloat16.json", "sweep-cpu-bfloat16.png"]


def test_help() -> None:
    result = CliRunner().invoke(sweep.app, ["--help"])
    assert result.exit_code == 0, result.output
    for option in ("--resume", "--quick", "--pass", "--most-memory", "--least"):
        assert option in result.output
