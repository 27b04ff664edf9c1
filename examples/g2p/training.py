"""Training with validation, averaged weights and exact resumption.

After each validation one file is written with the state of the run and the best weights so far. It is written
atomically, so an interrupt loses only the steps since the last validation.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attn_kernels.seq2seq import Seq2Seq

from . import data, models
from .data import PADDING, Batch, Batches, Errors
from .files import write_whole
from .models import ModelConfig
from .tasks import Task, words_of

FORMAT = "attn_kernels bench.g2p checkpoint, 1"


@dataclass(frozen=True)
class Config(ModelConfig):
    """The configuration of a run. A checkpoint continues only a run with the same one, except for ``epochs``.

    average: decay of the averaged weights in each step; 0 for no averaging. They are validated and stored.
    patience: training ends after this many validations in a row without a new best one; 0: it never ends early.
    """

    embedding_size: int = 128
    dropout: float = 0.2
    batch_size: int = 128
    epochs: float = 10
    learning_rate: float = 2e-3
    warm_up: int = 500
    label_smoothing: float = 0.1
    clip: float = 1.0
    average: float = 0.999
    validation_words: int = 2000
    patience: int = 5


class Validation(NamedTuple):
    """``loss``: mean of the training loss since the previous validation. ``seconds``: time of the training so far."""

    step: int
    epoch: float
    seconds: float
    loss: float
    per: float
    wer: float


def loss_of(model: Seq2Seq, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy per phoneme, without padding."""
    logits, _ = model(batch.source, batch.source_lengths, batch.target)
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.target.flatten(), ignore_index=PADDING, label_smoothing=label_smoothing
    )


def train_step(
    model: Seq2Seq, optimizer: torch.optim.Optimizer, batch: Batch, label_smoothing: float = 0.0, clip: float = 1.0
) -> float:
    optimizer.zero_grad()
    loss = loss_of(model, batch, label_smoothing)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.item()


class Training:
    """A run and its state. Each step depends only on the configuration, the data and the state.

    ``changes``: other values for arguments of Seq2Seq that do not affect the results, such as the backend.
    """

    may_differ: tuple[str, ...] = ("epochs",)  # fields of the configuration that another run may have changed

    def __init__(self, config: Config, task: Task, device: torch.device, **changes: Any) -> None:
        self.config = config
        self.task = task
        self.device = device
        self.batches = Batches(task.parts.train, task.vocabulary, config.batch_size, config.seed)
        self.validation_words = words_of(task, "validation", config.validation_words)
        self.model = models.make_model(config, task.vocabulary, device, **changes)
        self.averaged = copy.deepcopy(self.model) if config.average else self.model
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate)
        self.step = 0
        self.seconds = 0.0
        self.losses: list[float] = []  # since the last validation
        self.history: list[Validation] = []
        self.best: dict[str, Any] | None = None  # contents of a model's file

    @property
    def steps(self) -> int:
        return max(1, round(self.config.epochs * len(self.batches)))

    @property
    def epoch(self) -> float:
        return self.step / len(self.batches)

    @property
    def finished(self) -> bool:
        return self.step >= self.steps or self.stopped_early

    @property
    def best_validation(self) -> Validation:
        """The one with the lowest WER; among equal ones the lowest PER, then the first."""
        return min(self.history, key=lambda validation: (validation.wer, validation.per))

    @property
    def stopped_early(self) -> bool:
        if not self.history or not self.config.patience:
            return False
        return len(self.history) - 1 - self.history.index(self.best_validation) >= self.config.patience

    def learning_rate(self) -> float:
        """Rises over ``warm_up`` steps, then falls to 0 as a half cosine."""
        rise = (self.step + 1) / max(1, min(self.config.warm_up, self.steps // 10))
        fall = 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        return self.config.learning_rate * min(rise, 1.0) * fall

    def next_batch(self) -> Batch:
        return self.batches[self.step].to(self.device)

    def run_step(self, batch: Batch | None = None) -> float:
        """Returns the loss. ``batch``: the next one, if it has been made already."""
        start = time.perf_counter()
        batch = batch or self.next_batch()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        torch.manual_seed(self.config.seed * 1_000_003 + self.step)  # for dropout
        loss = train_step(self.model, self.optimizer, batch, self.config.label_smoothing, self.config.clip)
        if not math.isfinite(loss):
            raise ArithmeticError(f"the loss is {loss} at step {self.step + 1}: try a smaller --learning-rate")
        self.losses.append(loss)
        self.step += 1
        self._average()
        self.seconds += time.perf_counter() - start
        return loss

    @torch.no_grad()
    def _average(self) -> None:
        """Exponential moving average. It decays faster in the first steps, whose weights are still bad."""
        if self.averaged is self.model:
            return
        keep = min(self.config.average, (1 + self.step) / (10 + self.step))
        for mean, weight in zip(self.averaged.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(weight, 1 - keep)

    def validate(self, advance: Callable[[int], object] = lambda words: None) -> Validation:
        """Errors of greedy search with the averaged weights on the validation words; keeps the weights if the best."""
        start = time.perf_counter()
        errors = self._errors(advance)
        self.seconds += time.perf_counter() - start
        loss = sum(self.losses) / max(1, len(self.losses))
        now = Validation(self.step, round(self.epoch, 3), round(self.seconds, 1), loss, errors.per, errors.wer)
        self.losses.clear()
        self.history.append(now)
        if self.best_validation is now:
            self.best = self._contents(now)
        return now

    def _errors(self, advance: Callable[[int], object]) -> Errors:
        words, vocabulary = list(self.validation_words), self.task.vocabulary
        found = models.generate(self.averaged, vocabulary, words, max_length=self.task.max_length, advance=advance)
        written = [vocabulary.read(hypothesis.tokens) for hypothesis in found]
        return data.count_errors(written, [self.validation_words[word] for word in words])

    def _contents(self, validation: Validation) -> dict[str, Any]:
        facts = {
            "training": asdict(self.config),
            "validation": validation._asdict(),
            "threads": torch.get_num_threads(),
        }
        weights = {name: weight.clone() for name, weight in self.averaged.state_dict().items()}
        return models.contents(self.config, self.task.vocabulary, self.task.name, facts, weights)

    def state(self) -> dict[str, Any]:
        """Everything that :meth:`restore` needs to continue."""
        return {
            "format": FORMAT,
            "config": asdict(self.config),
            "task": self.task.name,
            "data": self.task.fingerprint(),
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
            "history": [tuple(validation) for validation in self.history],
            "model": self.model.state_dict(),
            "averaged": None if self.averaged is self.model else self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
        }

    def save(self, path: Path) -> None:
        state = self.state()
        write_whole(path, lambda partial: torch.save(state, partial))

    def load(self, path: Path) -> None:
        """Continues where ``save`` was called. Raises ValueError if it is not a checkpoint, or of another run."""
        self.restore(models.read(path, self.device), str(path))

    def restore(self, state: dict[str, Any], name: str) -> None:
        """Continues from a state. Raises ValueError, which names ``name``, if it is not one, or of another run."""
        if state.get("format") != FORMAT:
            raise ValueError(f"{name}: expected a checkpoint of the format {FORMAT!r}, got {state.get('format')!r}")
        theirs = {"task": state["task"], **state["config"], "data": state["data"]}
        ours = {"task": self.task.name, **asdict(self.config), "data": self.task.fingerprint()}
        other = [
            f"{key} {theirs.get(key)!r}, not {value!r}"
            for key, value in ours.items()
            if key not in self.may_differ and theirs.get(key) != value
        ]
        if other:
            raise ValueError(f"{name} is of another run: {'; '.join(other)}")
        self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]
        self.history = [Validation(*validation) for validation in state["history"]]
        self.model.load_state_dict(state["model"])
        if state["averaged"] is not None:
            self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best = state["best"]


def train(
    training: Training,
    checkpoint: Path,
    *,
    validate_every: int | None = None,
    save_every: int = 500,
    on_step: Callable[[float], object] = lambda loss: None,
    on_validation: Callable[[Validation], object] = lambda validation: None,
) -> None:
    """Trains to the end or the early stop. ``validate_every``: steps; None: once an epoch. Validates the last step."""
    every = validate_every or len(training.batches)
    while not training.finished:
        on_step(training.run_step())
        last = training.step >= training.steps
        if training.step % every == 0 or last:
            on_validation(training.validate())
        if training.step % save_every == 0 or training.step % every == 0 or last:
            training.save(checkpoint)
    if not training.history:  # it was saved before the first validation, and the new run has fewer epochs
        on_validation(training.validate())
        training.save(checkpoint)
