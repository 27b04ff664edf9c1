"""The recipe of examples/g2p at test size: training, resuming, evaluation, prediction, files, command lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

for package in ("typer", "rich", "matplotlib", "rapidfuzz"):
    pytest.importorskip(package, reason="the recipe needs the dependency group bench")

from typer.testing import CliRunner, Result  # noqa: E402

from examples.g2p import data, models, tasks, training  # noqa: E402
from examples.g2p.__main__ import app  # noqa: E402
from examples.g2p.training import Config, Training  # noqa: E402

pytestmark = pytest.mark.usefixtures("same_threads")

LETTERS = "abcdefghij"
CPU = torch.device("cpu")
SIZES = {"embedding_size": 8, "hidden_size": 8, "units": 8, "batch_size": 16, "warm_up": 2, "validation_words": 10}
TINY = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]


@pytest.fixture
def dictionary(tmp_path: Path) -> Path:
    """300 words of three letters, the first two of which are spoken."""
    entries = [f"{a}{b}{c} {a.upper()} {b.upper()}1" for a in LETTERS for b in LETTERS for c in LETTERS[:3]]
    path = tmp_path / "small.dict"
    path.write_text("\n".join(entries))
    return path


@pytest.fixture
def run(tmp_path: Path, dictionary: Path) -> Callable[..., Result]:
    """A command, with the small dictionary and in a folder of its own."""

    def call(command: str, *arguments: object, input: str | None = None, status: int = 0) -> Result:
        options = ["--dictionary", str(dictionary)] if command in ("train", "evaluate") else []
        threads = [] if command == "export" else ["--threads", "1"]
        result = CliRunner().invoke(app, [command, *map(str, arguments), *options, *threads], input)
        assert result.exit_code == status, result.output
        return result

    return call


@pytest.fixture
def trained(tmp_path: Path, run: Callable[..., Result]) -> Path:
    """The checkpoint of a short run: one epoch of 17 batches."""
    path = tmp_path / "run.pt"
    run("train", *TINY, "--epochs", 1, "--checkpoint", path)
    return path


def _training(dictionary: Path, **changes: Any) -> Training:
    return Training(Config(**{**SIZES, "epochs": 2, **changes}), tasks.load("cmudict", dictionary), CPU)


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_resumed_training_is_the_uninterrupted_one(dictionary: Path, tmp_path: Path, average: float) -> None:
    whole, first, second = (_training(dictionary, average=average) for _ in range(3))
    there, here = tmp_path / "whole.pt", tmp_path / "parts.pt"
    training.train(whole, there, validate_every=7)

    def interrupt(loss: float) -> None:
        if first.step == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(first, here, validate_every=7, save_every=5, on_step=interrupt)
    second.load(here)
    assert second.step == 10
    training.train(second, here, validate_every=7, save_every=5)
    assert [v._replace(seconds=0) for v in second.history] == [v._replace(seconds=0) for v in whole.history]
    assert second.seconds > 0
    a, b = (torch.load(path, weights_only=True) for path in (there, here))
    for part in ("model", "averaged"):
        assert (a[part] is None) == (b[part] is None)
        for name in a[part] or ():
            assert torch.equal(a[part][name], b[part][name]), name
    for name, weight in a["best"]["weights"].items():
        assert torch.equal(weight, b["best"]["weights"][name]), name
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_training_learns(dictionary: Path, tmp_path: Path) -> None:
    learner = _training(
        dictionary, epochs=25, hidden_size=32, learning_rate=0.02, dropout=0.0, label_smoothing=0.0, average=0.9
    )
    training.train(learner, tmp_path / "run.pt", validate_every=85)
    first, last = learner.history[0], learner.history[-1]
    assert last.loss < 0.1 < first.loss
    assert learner.best_validation.per < 0.1
    assert models.load_model(tmp_path / "run.pt", CPU).facts["validation"]["wer"] == learner.best_validation.wer


def test_rate_rises_and_falls(dictionary: Path) -> None:
    run = _training(dictionary, warm_up=3, learning_rate=1.0)
    rates = []
    for step in range(run.steps + 1):
        run.step = step
        rates.append(run.learning_rate())
    assert rates.index(max(rates)) in (2, 3)
    assert rates[0] == pytest.approx(1 / 3)
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] == 0


def test_weights_are_averaged_over_steps(dictionary: Path) -> None:
    run = _training(dictionary, average=0.4)
    mean = {name: weight.clone() for name, weight in run.averaged.named_parameters()}
    for step in range(1, 4):
        run.run_step()
        keep = min(0.4, (1 + step) / (10 + step))
        for name, weight in run.model.named_parameters():
            mean[name] = keep * mean[name] + (1 - keep) * weight.detach()
    for name, weight in run.averaged.named_parameters():
        torch.testing.assert_close(weight, mean[name])
        assert not weight.requires_grad or weight.grad is None


def test_label_smoothing_and_dropout_change_the_training(dictionary: Path) -> None:
    plain, smooth, dropped = (
        _training(dictionary, **{"dropout": 0.0, "label_smoothing": 0.0, **change})
        for change in ({}, {"label_smoothing": 0.3}, {"dropout": 0.3})
    )
    losses = [run.run_step() for run in (plain, smooth, dropped)]
    assert len(set(losses)) == 3
    batch = plain.batches[0]
    torch.manual_seed(0)
    logits = smooth.model.eval()(batch.source, batch.source_lengths, batch.target)[0].flatten(0, 1).log_softmax(1)
    target = batch.target.flatten()
    kept = target != data.PADDING
    right = -logits[kept].gather(1, target[kept, None]).mean()
    expected = 0.7 * right - 0.3 * logits[kept].mean()
    torch.testing.assert_close(training.loss_of(smooth.model, batch, 0.3), expected)


def test_training_ends_early_where_it_gets_no_better(dictionary: Path, tmp_path: Path) -> None:
    run = _training(dictionary, learning_rate=0.0, patience=2, epochs=50)
    training.train(run, tmp_path / "run.pt", validate_every=1)
    assert run.stopped_early
    assert [v.step for v in run.history] == [1, 2, 3]
    endless = _training(dictionary, learning_rate=0.0, patience=0, epochs=1)
    training.train(endless, tmp_path / "other.pt", validate_every=1)
    assert endless.step == endless.steps


def test_fewer_epochs_than_were_trained_end_with_a_validation(dictionary: Path, tmp_path: Path) -> None:
    longer, shorter = _training(dictionary, epochs=2), _training(dictionary, epochs=0.1)
    for _ in range(5):
        longer.run_step()
    longer.save(tmp_path / "run.pt")
    shorter.load(tmp_path / "run.pt")
    training.train(shorter, tmp_path / "run.pt")
    assert [validation.step for validation in shorter.history] == [5]
    assert models.load_model(tmp_path / "run.pt", CPU).facts["validation"]["step"] == 5


def test_of_equal_word_errors_the_fewer_phoneme_errors_are_better(dictionary: Path) -> None:
    run = _training(dictionary, patience=2)
    run.history = [training.Validation(i, 0, 0, 0, per, 1.0) for i, per in enumerate((0.9, 0.8, 0.7, 0.8))]
    assert run.best_validation.per == 0.7
    assert not run.stopped_early


def test_a_loss_that_is_not_finite_ends_the_run_with_its_reason(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "train_step", lambda *arguments: float("nan"))
    path = tmp_path / "run.pt"
    assert "the loss is nan at step 1" in run("train", *TINY, "--checkpoint", path, status=1).stderr
    assert not path.exists()


# Files ----------------------------------------------------------------------------------------------------------------


def test_an_interrupted_write_leaves_the_old_checkpoint(
    trained: Path, dictionary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = trained.read_bytes()
    run = _training(dictionary, epochs=2)
    run.load(trained)
    save = torch.save

    def interrupted(state: object, path: Path) -> None:
        save(state, path)
        path.write_bytes(path.read_bytes()[:1000])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.train(run, trained, save_every=1)
    assert trained.read_bytes() == before
    assert not list(trained.parent.glob(".*"))


def test_a_checkpoint_of_another_run_is_refused_and_kept(trained: Path, run: Callable[..., Result]) -> None:
    before = trained.read_bytes()
    output = run("train", *TINY, "--units", 16, "--checkpoint", trained, status=2).output
    assert "is of another run: units 8, not 16" in output
    assert "--restart" in output
    assert trained.read_bytes() == before
    run("train", *TINY, "--units", 16, "--epochs", 0.2, "--checkpoint", trained, "--restart")
    assert models.load_model(trained, CPU).config.units == 16


def test_a_checkpoint_of_other_data_is_refused(trained: Path, dictionary: Path) -> None:
    dictionary.write_text(dictionary.read_text().replace("aaa A A1", "aaa A B1"))
    with pytest.raises(ValueError, match=r"of another run: data '\w+', not '\w+'$"):
        _training(dictionary, epochs=1).load(trained)


@pytest.mark.parametrize("content", [b"", b"no model", b"PK\x03\x04 and nothing more"])
def test_a_damaged_file_is_named(tmp_path: Path, run: Callable[..., Result], content: bytes) -> None:
    path = tmp_path / "broken.pt"
    path.write_bytes(content)
    for command in ("evaluate", "predict", "export"):
        arguments = {"predict": ["aab"], "export": [tmp_path / "out.pt"]}.get(command, [])
        assert "broken.pt is not a file of examples.g2p" in run(command, *arguments, "--model", path, status=2).output
    assert not (tmp_path / "out.pt").exists()


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save({"weights": {}}, path)
    with pytest.raises(ValueError, match=r"other\.pt: expected a checkpoint or an export .* got None"):
        models.load_model(path, CPU)


def test_a_file_that_would_execute_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "code.pt"
    torch.save({"best": print}, path)
    with pytest.raises(ValueError, match=r"code\.pt is not a file of examples\.g2p"):
        models.load_model(path, CPU)


def test_a_checkpoint_without_a_validation_has_no_model_yet(dictionary: Path, tmp_path: Path) -> None:
    _training(dictionary).save(tmp_path / "run.pt")
    with pytest.raises(ValueError, match="not reached its first validation"):
        models.load_model(tmp_path / "run.pt", CPU)


# Commands -------------------------------------------------------------------------------------------------------------


def test_train_continues_and_knows_when_it_is_done(trained: Path, run: Callable[..., Result]) -> None:
    before = trained.read_bytes()
    result = run("train", *TINY, "--epochs", 1, "--checkpoint", trained)
    assert "at step 17" in result.output
    assert trained.read_bytes() == before
    run("train", *TINY, "--epochs", 2, "--checkpoint", trained)
    state = models.read(trained)
    assert (state["step"], state["config"]["epochs"], len(state["history"])) == (34, 2, 2)


def test_evaluate_and_its_files(trained: Path, tmp_path: Path, run: Callable[..., Result]) -> None:
    output = run(
        "evaluate", "--model", trained, "--word", "aab", "--word", "bbc", "--output", tmp_path / "results"
    ).output
    for shown in ("greedy", "Phonetisaurus", "33.89%", "as published"):
        assert shown in output
    names = ["g2p-cmudict-alignment-1.png", "g2p-cmudict-alignment-2.png", "g2p-cmudict-evaluation.json"]
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == names
    result = json.loads((tmp_path / "results" / names[-1]).read_text())
    assert [row["beam"] for row in result["evaluation"]["rows"]] == [1, 5]
    for row in result["evaluation"]["rows"]:
        assert row["words"] == result["task"]["words"]["test"] > 0
        assert row["WER"] == pytest.approx(row["wrong_words"] / row["words"], abs=1e-5)
        assert row["PER"] == pytest.approx(row["edits"] / row["phonemes"], abs=1e-5)
    assert [drawn["word"] for drawn in result["alignments"]] == ["aab", "bbc"]
    assert result["model"]["validation"]["step"] == 17


def test_evaluate_counts_what_predict_writes(
    trained: Path, dictionary: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    words = tasks.load("cmudict", dictionary).parts.test
    lines = run("predict", "--model", trained, *words).stdout.splitlines()
    written = [tuple(line.split("\t")[1].split()) for line in lines]
    expected = data.count_errors(written, list(words.values()))
    run("evaluate", "--model", trained, "--beam", 5, "--output", tmp_path)
    row = json.loads((tmp_path / "g2p-cmudict-evaluation.json").read_text())["evaluation"]["rows"][0]
    assert tuple(row[name] for name in expected._fields) == expected


def test_evaluate_refuses_a_dictionary_with_other_phonemes(
    trained: Path, dictionary: Path, run: Callable[..., Result]
) -> None:
    dictionary.write_text(dictionary.read_text() + "\nzzz Z Z\n")
    assert "other phonemes" in run("evaluate", "--model", trained, "--beam", 1, status=2).output


def test_predict_from_arguments_and_from_standard_input(trained: Path, run: Callable[..., Result]) -> None:
    options = ("--model", trained)
    result = run("predict", *options, "aab", "JIA", "cccc")
    assert [line.split("\t")[0] for line in result.stdout.splitlines()] == ["aab", "JIA", "cccc"]
    assert run("predict", *options, input="aab\n\n  JIA \ncccc").stdout == result.stdout
    assert run("predict", *options, input="").stdout == ""


def test_predict_names_each_word_that_cannot_be_read(trained: Path, run: Callable[..., Result]) -> None:
    options = ("--model", trained)
    result = run("predict", *options, "aab", "zürich", "3x3", "bba", status=1)
    assert [line.split("\t")[0] for line in result.stdout.splitlines()] == ["aab", "bba"]
    first, second = result.stderr.splitlines()
    assert first.startswith("predict: 'zürich': no 'ü' among the letters")
    assert second.startswith("predict: '3x3': no '3' among the letters")


def test_an_export_predicts_as_its_checkpoint(trained: Path, tmp_path: Path, run: Callable[..., Result]) -> None:
    words = ("aab", "jia", "cab", "hat")
    expected = run("predict", "--model", trained, *words).stdout
    run("export", tmp_path / "small.pt", "--model", trained)
    assert (tmp_path / "small.pt").stat().st_size < trained.stat().st_size / 2
    trained.unlink()
    assert run("predict", "--model", tmp_path / "small.pt", *words).stdout == expected
    run("export", tmp_path / "again.pt", "--model", tmp_path / "small.pt")
    assert run("predict", "--model", tmp_path / "again.pt", *words).stdout == expected


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "export"])
def test_help(command: str) -> None:
    assert command in CliRunner().invoke(app, ["--help"]).output
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0, result.output
    assert {"train": "--checkpoint"}.get(command, "--model") in result.output


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("train", ["--decoder", "spiral"], "decoder must be"),
        ("train", ["--attention", "none"], "attention must be"),
        ("train", ["--task", "nothing"], "reverse-words"),
        ("train", ["--device", "nowhere"], "nowhere"),
        ("evaluate", ["--model", "missing.pt"], "missing.pt"),
        ("predict", ["word", "--model", "missing.pt"], "missing.pt"),
        ("predict", ["word", "--beam", "0"], "--beam"),
    ],
)
def test_errors_of_the_command_line(
    run: Callable[..., Result], tmp_path: Path, command: str, arguments: list[str], message: str
) -> None:
    checkpoint = ["--checkpoint", tmp_path / "run.pt"] if command == "train" else []
    assert message in run(command, *arguments, *checkpoint, status=2).output
    assert not (tmp_path / "run.pt").exists()


def test_tensorboard_is_optional(run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*TINY, "--epochs", 0.2, "--checkpoint", tmp_path / "run.pt", "--tensorboard", tmp_path / "board"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "pip install tensorboard" in run("train", *arguments, status=2).output
    noted: list[tuple[str, int]] = []

    class Writer:
        def __init__(self, folder: Path) -> None:
            assert folder == tmp_path / "board"

        def add_scalar(self, name: str, value: float, step: int) -> None:
            noted.append((name, step))

        def flush(self) -> None:
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    run("train", *arguments)
    assert {("training/loss", 1), ("training/loss", 3), ("validation/WER", 3)} <= set(noted)


# The generated task ---------------------------------------------------------------------------------------------------


def test_reverse_words_are_the_same_everywhere_and_apart() -> None:
    task = tasks.load("reverse-words", sentences=data.Split(20, 5, 5))
    assert task.parts == tasks.load("reverse-words", sentences=data.Split(20, 5, 5)).parts
    assert [len(part) for part in task.parts] == [20, 5, 5]
    assert len({sentence for part in task.parts for sentence in part}) == 30
    for part in task.parts:
        for sentence, [expected] in part.items():
            assert 78 <= len(sentence) <= 200
            assert [word[::-1] for word in "".join(expected).split()] == sentence.split()
            task.vocabulary.check(sentence)


def test_reverse_words_train_evaluate_and_predict(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks.load, "__defaults__", (None, data.Split(20, 5, 5)))
    path = tmp_path / "run.pt"
    sizes = [*TINY, "--batch-size", 4, "--epochs", 1]
    run("train", "--task", "reverse-words", *sizes, "--checkpoint", path)
    sentence = next(iter(tasks.load("reverse-words").parts.test))
    output = run("evaluate", "--model", path, "--word", sentence, "--output", tmp_path / "out").output
    assert "Phonetisaurus" not in output
    result = json.loads((tmp_path / "out" / "g2p-reverse-words-evaluation.json").read_text())
    assert result["evaluation"]["rows"][0]["words"] == 5
    assert result["published"] == []
    stored = models.load_model(path, CPU)
    assert (stored.task, stored.config.hidden_size, stored.vocabulary.separator) == ("reverse-words", 8, "")
    assert run("predict", "--model", path, input=f"{sentence}\n").stdout.startswith(f"{sentence}\t")
