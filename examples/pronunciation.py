"""Letters to phonemes in a minute, down to the alignments: ``python -m examples.pronunciation --help``.

It uses the parts of the complete project, examples/g2p, on short words only: dictionary (CMUdict), split, batches,
model, loss, search and count of errors.
"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from attn_kernels.seq2seq import Hypothesis, Seq2Seq
from bench.cli import application
from bench.models.loop import EagerAttention

from . import common
from .common import FOLDER, OutputOption, QuickOption
from .g2p import data, models, tasks, training
from .g2p.data import Vocabulary, Words
from .g2p.models import ModelConfig

app = application()

SHOWN = ("attention", "kernels", "physique", "knight")


def words_to_learn(words: Words, longest: int) -> Words:
    return {word: pronunciations for word, pronunciations in words.items() if 2 < len(word) <= longest}


def errors_of(found: list[Hypothesis], words: Words, vocabulary: Vocabulary) -> data.Errors:
    return data.count_errors([vocabulary.read(best.tokens) for best in found], list(words.values()))


def draw(model: Seq2Seq, vocabulary: Vocabulary, words: tuple[str, ...]) -> Figure:
    figure = Figure(figsize=(9, 6), layout="constrained")
    found = models.generate(model, vocabulary, words)
    for axes, word, best in zip(figure.subplots(2, 2).flat, words, found, strict=True):
        phonemes = [vocabulary.label(token) for token in best.tokens]
        common.heat_map(axes, best.alignments[: len(phonemes)], list(word), phonemes)
    return figure


@app.command()
def main(quick: QuickOption = False, output: OutputOption = FOLDER) -> None:
    """Trains a small model that writes the phonemes of English words, and compares its loop with eager steps."""
    common.prepare()
    longest, size, batch_size, steps = (5, 64, 64, 300) if quick else (9, 128, 64, 1000)
    task = tasks.load(tasks.CMUDICT)
    vocabulary = task.vocabulary
    batches = data.Batches(words_to_learn(task.parts.train, longest), vocabulary, batch_size, seed=0)
    config = ModelConfig(embedding_size=size // 2, hidden_size=size, units=size)
    model = models.make_model(config, vocabulary, common.CPU)
    common.fit(model, training.loss_of, batches.__getitem__, steps, learning_rate=1e-2)

    words = words_to_learn(tasks.words_of(task, "test", None), longest)
    words = {word: words[word] for word in data.subset(words, 500)}
    errors = errors_of(models.generate(model, vocabulary, list(words)), words, vocabulary)
    learnt: dict[str, Any] = {"phonemes wrong": errors.per, "words wrong": errors.wer}

    eager = models.make_model(config, vocabulary, common.CPU, decoder="steps")
    eager.decoder.attention = EagerAttention(eager.decoder.attention)
    eager.load_state_dict(model.state_dict())
    batch = batches[0]
    row = common.compare("training step", eager, model, lambda model: training.loss_of(model, batch), 1 if quick else 8)
    common.finish("pronunciation", draw(model, vocabulary, SHOWN), learnt, [row], output)


if __name__ == "__main__":
    app()
