"""bench/cpu/options.py measures what it claims to measure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

for package in ("typer", "rich", "matplotlib"):
    pytest.importorskip(package, reason="the benchmarks need the dependency group bench")

from typer.testing import CliRunner  # noqa: E402

from bench.cases import FORWARD, TRAINING, Shape  # noqa: E402
from bench.cpu import options  # noqa: E402

SMALL = Shape(3, 4, 9, 16, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", options.NAMES)
def test_ways_agree(name: str, dtype: torch.dtype) -> None:
    for training in (False, True):
        calls = options.calls_of(name, SMALL, dtype, training=training)
        assert list(calls) == [options.OURS, options.EAGER]
        for call in calls.values():
            call()


@pytest.mark.parametrize("name", [name for name in options.OPTIONS if name != "dropout"])
def test_each_option_does_something(name: str) -> None:
    option = options.OPTIONS[name]
    problem = options.make_problem(option, SMALL, torch.float32)
    with_option, eager = (way.function for way in options.make_providers(option, problem).values())
    inputs = problem.inputs
    torch.testing.assert_close(with_option(*inputs.values()), eager(*inputs.values()))
    plain = options.additive_attention(inputs["query"], inputs["keys"], inputs["values"], inputs["v"]).context
    assert option.vectors == 3 or (with_option(*inputs.values()) - plain).abs().max() > 1e-3


def test_eager_drops_weights() -> None:
    option = options.OPTIONS["dropout"]
    problem = options.make_problem(option, SMALL, torch.float32)
    eager = options.make_providers(option, problem)[options.EAGER].function
    assert not torch.equal(eager(*problem.inputs.values()), eager(*problem.inputs.values()))


@pytest.mark.parametrize("name", ["clip", "dropout"])
def test_a_wrong_way_is_not_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = options.additive_attention

    def wrong(**given: object) -> object:
        return right(**given if "backend" in given else given | {"v": 1.1 * given["v"]})

    monkeypatch.setattr(options, "additive_attention", wrong)
    with pytest.raises(RuntimeError, match=rf"options: wrong: .*: {name} \(3,4,9,16\) fwd"):
        options.measure(name, SMALL, torch.float32, FORWARD, 0.0)


def test_what_is_below_is_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def interleave(calls: dict[str, object], *_: object, seconds: float, **__: object) -> dict[str, list[float]]:
        given.append(seconds)
        return {options.OURS: [1.0], options.EAGER: [0.9 if len(given) == 1 else 1.2]}

    monkeypatch.setattr(options.timing, "interleave", interleave)
    row = options.measure("relu", SMALL, torch.float32, TRAINING, 0.5)
    assert given == [0.5, 2.0]
    assert row["first"][options.EAGER]["median"] == pytest.approx(0.9) and options.ratio_of(row) == pytest.approx(1.2)


def test_command(tmp_path: Path, same_threads: None) -> None:
    arguments = ["--shape", "2,1,5,8", "--option", "gate", "--option", "packed", "--dtype", "bfloat16"]
    arguments += ["--seconds", "0", "--allocator", "default", "--output", str(tmp_path)]
    done = CliRunner().invoke(options.app, arguments)
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "options-cpu-bfloat16.json").read_text())
    rows = [(row["option"], row["passes"]) for row in result["rows"]]
    assert rows == [(name, passes) for name in ("gate", "packed") for passes in (FORWARD, TRAINING)]
    assert result["settings"]["least"] == min(map(options.ratio_of, result["rows"])) > 0
    assert "Least: " in done.output


@pytest.mark.parametrize("arguments", [["--option", "none"], ["--shape", "2,1,5,8,4"]])
def test_errors_of_the_command_line(arguments: list[str]) -> None:
    assert CliRunner().invoke(options.app, arguments).exit_code == 2
