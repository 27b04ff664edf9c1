"""A reader of digits in an image, with Seq2Seq: ``python -m examples.strips --help``.

Handwritten digits are placed in a strip, at varying distances and heights, with noise. Convolutions and a
bidirectional GRU encode its columns as the memory. The decoder of Seq2Seq writes the digits and shows which columns it
attended to.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from attn_kernels import Memory
from attn_kernels.seq2seq import Encoder, Seq2Seq
from bench.cli import application
from bench.models.loop import EagerAttention

from . import common
from .common import FOLDER, OutputOption, QuickOption
from .glyphs import SIZE, Glyphs

app = application()

PADDING, BOS, EOS = 0, 1, 2
HEIGHT = 12
NOISE = 0.15


class Batch(NamedTuple):
    """images: (B, 12, W). widths: (B,). target: (B, T), digits + 3 and the end, padded."""

    images: Tensor
    widths: Tensor
    target: Tensor


def make_batch(glyphs: Glyphs, size: int, digits: tuple[int, int], seed: int) -> Batch:
    """digits: the smallest and the largest number of digits in a strip."""
    chance = torch.Generator().manual_seed(seed)

    def random(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=chance))

    images = torch.zeros(size, HEIGHT, digits[1] * (SIZE + 6))
    widths, targets = [], []
    for image in images:
        written = torch.randint(10, (random(*digits),), generator=chance)
        place = 0
        for glyph in glyphs.draw(written, chance):
            place += random(0, 5)
            top = random(0, HEIGHT - SIZE)
            image[top : top + SIZE, place : place + SIZE] = glyph
            place += SIZE
        widths.append(place + 1)
        targets.append(torch.cat((written + 3, torch.tensor([EOS]))))
    images += NOISE * torch.randn(images.shape, generator=chance)
    target = nn.utils.rnn.pad_sequence(targets, True, PADDING)
    return Batch(images[:, :, : max(widths)], torch.tensor(widths), target)


class ColumnEncoder(nn.Module):
    """(B, 12, W) -> the inputs of Seq2Seq's decoder: outputs (B, W / 2, 2 H), the last states of both directions."""

    def __init__(self, channels: int, hidden_size: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(),
            nn.MaxPool2d((2, 1)),
        )
        features = 2 * channels * (HEIGHT // 4)
        self.recurrent = Encoder(features, hidden_size, cell="gru", bidirectional=True)

    def forward(self, images: Tensor, columns: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        maps = self.convolutions(images.unsqueeze(1))  # (B, C, 3, W / 2)
        outputs, states = self.recurrent(maps.flatten(1, 2).transpose(1, 2), columns)
        return outputs, (torch.cat(tuple(states), dim=-1).unsqueeze(0),)


class Reader(Seq2Seq):
    """Seq2Seq with an image as source: only the encoder is replaced."""

    def __init__(self, size: int, decoder: str = "loop") -> None:
        super().__init__(1, 13, size, size, size, cell="gru", decoder=decoder)
        self.encoder = ColumnEncoder(16, size)

    def encode(self, source: Tensor, source_lengths: Tensor) -> tuple[Memory, Any]:
        columns = (source_lengths // 2).clamp(max=source.shape[2] // 2)
        outputs, states = self.encoder(source, columns)
        return self.decoder.begin(outputs, states, columns)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    logits, _ = model(*batch)
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch.target.flatten(), ignore_index=PADDING)


def strips_read(model: Reader, batch: Batch) -> float:
    """The fraction of strips that are read without an error."""
    found = model.generate(batch.images, batch.widths, max_length=batch.target.shape[1])
    expected = [[token for token in row if token > EOS] for row in batch.target.tolist()]
    return sum(best[0].tokens == row for best, row in zip(found, expected, strict=True)) / len(expected)


def draw(model: Reader, batch: Batch) -> Figure:
    found = model.generate(batch.images, batch.widths, max_length=batch.target.shape[1])
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(2, len(found), height_ratios=(1, 2))
    for (above, below), image, width, (best, *_) in zip(panels.T, batch.images, batch.widths, found, strict=True):
        width = int(width)
        above.imshow(image[:, :width].numpy(), cmap="gray_r", aspect="auto")
        above.set_axis_off()
        digits = [str(token - 3) for token in best.tokens]
        rows = best.alignments[: len(digits), : width // 2]
        common.heat_map(below, rows, rows=digits, extent=(0, width, len(digits) - 0.5, -0.5))
        below.set_xlim(0, width)
        below.set_xlabel("column", fontsize=8)
    return figure


@app.command()
def main(quick: QuickOption = False, output: OutputOption = FOLDER) -> None:
    """Trains a reader of strips of handwritten digits, and compares its loop with eager steps."""
    common.prepare()
    size, batch_size, digits, steps = (64, 32, (2, 3), 250) if quick else (96, 32, (3, 6), 500)
    glyphs, unseen = Glyphs(test=False), Glyphs(test=True)
    model = Reader(size)
    common.fit(model, loss_of, lambda step: make_batch(glyphs, batch_size, digits, step), steps, learning_rate=1e-2)
    learnt = {"strips read without an error": strips_read(model, make_batch(unseen, 300, digits, 1 << 30))}
    eager = Reader(size, decoder="steps")
    eager.decoder.attention = EagerAttention(eager.decoder.attention)
    eager.load_state_dict(model.state_dict())
    batch = make_batch(glyphs, batch_size, digits, 0)
    row = common.compare("training step", eager, model, lambda model: loss_of(model, batch), 1 if quick else 8)
    picture = draw(model, make_batch(unseen, 2, digits, (1 << 30) + 1))
    common.finish("strips", picture, learnt, [row], output)


if __name__ == "__main__":
    app()
