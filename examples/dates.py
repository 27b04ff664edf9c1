"""fuse(model) on a translation model in the form of PyTorch's tutorial: ``python -m examples.dates --help``.

The model does not use attn_kernels. A GRU reads a date as people write it, and another one writes it as ISO 8601, with
additive attention written out by hand. The original and the fused model are trained on the same batches.
"""

from __future__ import annotations

import copy
import datetime
import random
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from attn_kernels import fuse
from bench.cli import application, console

from . import common
from .common import FOLDER, OutputOption, QuickOption

app = application()

PADDING, BOS, EOS = 0, 1, 2
CHARACTERS = "".join(map(chr, range(32, 127)))
FORMS = ("%A, %d %B %Y", "%B %d, %Y", "%d.%m.%y", "%b %d %Y", "the %d. of %B, %Y", "%a %d %b %y", "%Y/%m/%d")


class BahdanauAttention(nn.Module):
    """Plain PyTorch: ``fuse`` recognises it by what it computes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.of_query, self.of_keys, self.score = nn.Linear(size, size), nn.Linear(size, size), nn.Linear(size, 1)

    def forward(self, query: Tensor, keys: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """query: (B, 1, H). keys: (B, S, H). padding: (B, S), True at padding."""
        scores = self.score(torch.tanh(self.of_query(query) + self.of_keys(keys))).squeeze(2)
        weights = torch.softmax(scores.masked_fill(padding, float("-inf")), dim=1).unsqueeze(1)
        return torch.bmm(weights, keys), weights


class Encoder(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(CHARACTERS) + 3, size, padding_idx=PADDING)
        self.gru = nn.GRU(size, size, batch_first=True)

    def forward(self, source: Tensor) -> tuple[Tensor, Tensor]:
        return self.gru(self.embedding(source))


class AttentionDecoder(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(CHARACTERS) + 3, size, padding_idx=PADDING)
        self.attention = BahdanauAttention(size)
        self.gru = nn.GRU(2 * size, size, batch_first=True)
        self.output = nn.Linear(size, len(CHARACTERS) + 3)

    def forward(
        self, outputs: Tensor, hidden: Tensor, padding: Tensor, target: Tensor | None, steps: int
    ) -> tuple[Tensor, Tensor]:
        """Reads the target, (B, T), in training, and its own output otherwise. Returns logits and weights."""
        token = torch.full((len(outputs), 1), BOS)
        logits, looked = [], []
        for step in range(steps):
            context, weights = self.attention(hidden.permute(1, 0, 2), outputs, padding)
            written, hidden = self.gru(torch.cat((self.embedding(token), context), dim=2), hidden)
            logits.append(self.output(written))
            looked.append(weights)
            token = logits[-1].argmax(2) if target is None else target[:, step : step + 1]
        return torch.cat(logits, 1), torch.cat(looked, 1)


class Translator(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(size), AttentionDecoder(size)

    def forward(self, source: Tensor, target: Tensor | None = None, steps: int = 11) -> tuple[Tensor, Tensor]:
        outputs, hidden = self.encoder(source)
        return self.decoder(outputs, hidden, source == PADDING, target, steps)


class Batch(NamedTuple):
    """source: (B, S) characters. target: (B, 11), ten characters and the end."""

    source: Tensor
    target: Tensor
    texts: list[str]


def make_batch(size: int, seed: int) -> Batch:
    chance = random.Random(seed)
    first, last = datetime.date(1950, 1, 1).toordinal(), datetime.date(2049, 12, 31).toordinal()
    days = [datetime.date.fromordinal(chance.randint(first, last)) for _ in range(size)]
    texts = [day.strftime(chance.choice(FORMS)) for day in days]
    source = [torch.tensor(encode(text)) for text in texts]
    target = [[*encode(day.isoformat()), EOS] for day in days]
    return Batch(nn.utils.rnn.pad_sequence(source, True, PADDING), torch.tensor(target), texts)


def encode(text: str) -> list[int]:
    return [CHARACTERS.index(character) + 3 for character in text]


def decode(tokens: Tensor) -> str:
    return "".join(CHARACTERS[token - 3] if token > EOS else "-" for token in tokens.tolist())


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    logits, _ = model(batch.source, batch.target, batch.target.shape[1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch.target.flatten())


def largest_difference(models: tuple[nn.Module, nn.Module], steps: int, batch_size: int) -> float:
    """The largest difference of the losses of two models that are trained on the same batches, over the first steps."""
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-3) for model in models]
    worst = 0.0
    for step in range(steps):
        batch = make_batch(batch_size, step)
        one, other = (
            common.train_step(model, optimizer, loss_of(model, batch))
            for model, optimizer in zip(models, optimizers, strict=True)
        )
        worst = max(worst, abs(one - other))
    return worst


def draw(model: nn.Module, batch: Batch) -> Figure:
    logits, looked = model(batch.source)
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, row in zip(figure.subplots(1, 2), (0, 1), strict=True):
        text, written = batch.texts[row], decode(logits[row].argmax(1))[:10]
        common.heat_map(axes, looked[row, :10, : len(text)], list(text), list(written))
        axes.set_title(f"{text}  →  {written}", fontsize=9)
    return figure


@app.command()
def main(quick: QuickOption = False, output: OutputOption = FOLDER) -> None:
    """Trains a translation model with attention written out, fused by ``fuse(model)``, and compares."""
    common.prepare()
    size, batch_size, steps = (64, 32, 300) if quick else (128, 64, 300)
    original = Translator(size)
    fused = copy.deepcopy(original)
    found = fuse(fused)
    difference = largest_difference((copy.deepcopy(original), copy.deepcopy(fused)), 5 if quick else 20, batch_size)
    common.fit(fused, loss_of, lambda step: make_batch(batch_size, step), steps, 1e-2 if quick else 5e-3)
    console.print(str(found))
    test = make_batch(500, -1)
    with torch.no_grad():
        written = fused(test.source)[0].argmax(2)
    learnt: dict[str, Any] = {
        "dates without an error": (written == test.target).all(1).float().mean().item(),
        "largest difference of the losses": difference,
    }
    original.load_state_dict(fused.state_dict())
    batch = make_batch(batch_size, 0)
    row = common.compare("training step", original, fused, lambda model: loss_of(model, batch), 1 if quick else 8)
    common.finish("dates", draw(fused, make_batch(2, -4)), learnt, [row], output)


if __name__ == "__main__":
    app()
