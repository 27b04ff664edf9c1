"""The effect of bfloat16 weights on the results of searches: ``python -m bench.models.rounding --help``.

A small model is trained on letters and phonemes, as in examples/pronunciation.py. It then searches unseen words with
float32 weights and with rounded weights.
"""

from __future__ import annotations

import statistics
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from attn_kernels.seq2seq import Hypothesis, Seq2Seq
from attn_kernels.seq2seq.fused.one_call import MAX_ROWS
from examples import common
from examples.g2p import data, models, tasks, training
from examples.pronunciation import errors_of, words_to_learn

from .. import report, results
from ..cli import OutputOption, Run, application, console
from ..machine import Allocator

app = application()

LONGEST = 9  # maximum number of letters in a word


def train(task: tasks.Task, size: int, steps: int) -> Seq2Seq:
    batches = data.Batches(words_to_learn(task.parts.train, LONGEST), task.vocabulary, 64, seed=0)
    config = models.ModelConfig(embedding_size=size // 2, hidden_size=size, units=size)
    model = models.make_model(config, task.vocabulary, common.CPU)
    common.fit(model, training.loss_of, batches.__getitem__, steps, learning_rate=1e-2)
    return model.eval()


def search(
    model: Seq2Seq, words: list[str], vocabulary: data.Vocabulary, beam_size: int, dtype: torch.dtype | None
) -> list[Hypothesis]:
    """Returns the best hypothesis of each word."""
    found = []
    count = MAX_ROWS // beam_size
    for begin in range(0, len(words), count):
        batch = vocabulary.batch([(word, ()) for word in words[begin : begin + count]])
        options: dict[str, Any] = {"beam_size": beam_size, "max_length": 40, "weight_dtype": dtype}
        found += [best[0] for best in model.generate(batch.source, batch.source_lengths, **options)]
    return found


def compare(model: Seq2Seq, words: data.Words, vocabulary: data.Vocabulary, beam_size: int) -> dict[str, Any]:
    exact, rounded = (search(model, list(words), vocabulary, beam_size, dtype) for dtype in (None, torch.bfloat16))
    pairs = list(zip(exact, rounded, strict=True))
    differences = sorted(abs(a.score - b.score) for a, b in pairs if a.tokens == b.tokens)
    return {
        "beam_size": beam_size,
        "words": len(words),
        "equal": sum(a.tokens == b.tokens for a, b in pairs) / len(pairs),
        "score": statistics.fmean(a.score for a in exact),
        "difference of scores": {
            "median": statistics.median(differences),
            "99 of 100": differences[int(0.99 * (len(differences) - 1))],
            "largest": differences[-1],
        },
        "words wrong": {
            name: errors_of(found, words, vocabulary).wer for name, found in (("float32", exact), ("bfloat16", rounded))
        },
    }


def table(rows: list[dict[str, Any]]) -> Table:
    shown = report.table(
        "Searches with weights in bfloat16, beside float32", "beam", "words", "same output", "words wrong",
        "difference of scores: median", "99 of 100", "largest", "mean score",
    )  # fmt: skip
    for row in rows:
        wrong = " -> ".join(f"{share:.1%}" for share in row["words wrong"].values())
        differences = (f"{value:.4f}" for value in row["difference of scores"].values())
        shown.add_row(
            str(row["beam_size"]), str(row["words"]), f"{row['equal']:.1%}", wrong, *differences, f"{row['score']:.3f}"
        )
    return shown


@app.command()
def main(
    size: Annotated[int, typer.Option(min=2, help="Size of states and attention.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of 64 words each.")] = 1000,
    words: Annotated[int, typer.Option(min=1, help="That are searched.")] = 2000,
    output: OutputOption = results.LOCAL,
) -> None:
    """Compares the hypotheses of a trained model with float32 weights and with bfloat16 weights."""
    run = Run(1, Allocator.default)
    torch.manual_seed(0)
    task = tasks.load(tasks.CMUDICT)
    unseen = words_to_learn(tasks.words_of(task, "test", None), LONGEST)
    unseen = {word: unseen[word] for word in data.subset(unseen, words)}
    model = train(task, size, steps)
    with console.status("searching"):
        rows = [compare(model, unseen, task.vocabulary, beam_size) for beam_size in (1, 5)]
    settings: dict[str, Any] = {"size": size, "steps": steps}
    run.finish("rounding", rows, table(rows), output, **settings)


if __name__ == "__main__":
    app()
