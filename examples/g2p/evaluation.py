"""Errors of a trained model on held-out words, beside what others have published."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from attn_kernels.seq2seq import Hypothesis

from . import data, models, plots
from .models import Model
from .tasks import Task, words_of


class Published(NamedTuple):
    """Errors in per cent, as their authors state them; None: not stated."""

    system: str
    per: float | None
    wer: float
    source: str


# Measured on the CMUdict of their time, without stress, each on its own split, so the comparison with our figures is
# only rough. On the dictionary of 2007 that papers use (PRONALSYL), the same systems are about ten points better.
PUBLISHED = (
    Published("WFST (Phonetisaurus)", None, 33.89, "cmusphinx/g2p-seq2seq, README of 2019-10-09: CMUdict latest"),
    Published("LSTM, 2 layers of 512", None, 31.14, "cmusphinx/g2p-seq2seq, README of 2017-03-07: CMUdict latest"),
    Published(
        "Transformer, 3 layers of 256", None, 30.2, "cmusphinx/g2p-seq2seq, README of 2019-10-09: CMUdict latest"
    ),
)


def search(model: Model, words: Sequence[str], beam_size: int, max_length: int, **options: Any) -> list[Hypothesis]:
    """The best hypothesis for each word. ``options``: those of ``models.generate``."""
    return models.generate(model.network, model.vocabulary, words, beam_size, max_length, **options)


def evaluate(
    model: Model,
    task: Task,
    beams: Sequence[int],
    *,
    part: str = "test",
    count: int | None = None,
    advance: Callable[[int], object] = lambda words: None,
) -> dict[str, Any]:
    """Errors with each size of beam, and the first words as the last of them writes them."""
    references = words_of(task, part, count)
    words = list(references)
    rows, written = [], []
    for beam_size in beams:
        start = time.perf_counter()
        found = search(model, words, beam_size, task.max_length, advance=advance)
        seconds = time.perf_counter() - start
        written = [model.vocabulary.read(hypothesis.tokens) for hypothesis in found]
        errors = data.count_errors(written, list(references.values()))
        rates = {"PER": round(errors.per, 5), "WER": round(errors.wer, 5)}
        rows.append({"beam": beam_size, **rates, **errors._asdict(), "words a second": round(len(words) / seconds, 1)})
    return {
        "part": part,
        "rule": task.rule,
        "rows": rows,
        "examples": [
            {
                "word": word,
                "written": model.vocabulary.text(phonemes),
                "references": [model.vocabulary.text(reference) for reference in references[word]],
                "correct": phonemes in references[word],
            }
            for word, phonemes in zip(words[:10], written[:10], strict=True)
        ],
    }


def draw(model: Model, word: str, beam_size: int, max_length: int, path: Path) -> dict[str, Any]:
    """Writes the heat map of a word's alignment; returns what it shows."""
    hypothesis = search(model, [word], beam_size, max_length)[0]
    rows = hypothesis.alignments.tolist()
    phonemes = [model.vocabulary.label(token) for token in hypothesis.tokens]
    plots.alignment(path, rows, list(word), phonemes, word if len(word) <= 40 else f"{word[:40]}...")
    return {
        "word": word,
        "written": model.vocabulary.text(model.vocabulary.read(hypothesis.tokens)),
        "rows": [[round(value, 4) for value in row] for row in rows],
        "file": str(path),
    }
