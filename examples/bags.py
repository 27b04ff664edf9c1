"""Classifies a bag of images, and shows which of them decides: ``python -m examples.bags --help``.

Multiple instance learning: a bag of handwritten digits is positive if it contains a nine. The labels do not say which
image it is; gated attention pooling finds it. Ilse, Tomczak, Welling, "Attention-based deep multiple instance
learning", 2018.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from attn_kernels import Attention
from attn_kernels.mechanisms import AttentionPooling
from bench.cli import application

from . import common
from .common import FOLDER, OutputOption, QuickOption
from .glyphs import SIZE, Glyphs

app = application()

WITNESS = 9
NOISE = 0.2


class Bags(NamedTuple):
    """images: (B, N, 8, 8). lengths: (B,), images in a bag. labels: (B,). witnesses: (B, N), True for a nine."""

    images: Tensor
    lengths: Tensor
    labels: Tensor
    witnesses: Tensor


def make_bags(glyphs: Glyphs, count: int, largest: int, seed: int) -> Bags:
    """Half of the bags are positive, with one or two nines."""
    chance = torch.Generator().manual_seed(seed)
    lengths = torch.randint(largest // 2, largest + 1, (count,), generator=chance)
    digits = torch.randint(WITNESS, (count, largest), generator=chance)
    labels = torch.arange(count) % 2
    for row, length in zip(digits[1::2], lengths[1::2], strict=True):
        row[torch.randint(int(length), (2,), generator=chance)] = WITNESS
    images = glyphs.draw(digits.flatten(), chance).view(count, largest, SIZE, SIZE)
    images += NOISE * torch.randn(images.shape, generator=chance)
    return Bags(images, lengths, labels.float(), digits == WITNESS)


class BagClassifier(nn.Module):
    def __init__(self, size: int, units: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Flatten(2), nn.Linear(SIZE * SIZE, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU()
        )
        self.pooling: nn.Module = AttentionPooling(size, units, gated=True)
        self.output = nn.Linear(size, 1)

    def forward(self, images: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits, (B,), and alignments, (B, N): the weight of each image."""
        context, alignments = self.pooling(self.features(images), lengths)
        return self.output(context).squeeze(1), alignments


class EagerPooling(nn.Module):
    """The same formula in plain PyTorch, with the parameters of an AttentionPooling."""

    def __init__(self, fused: AttentionPooling) -> None:
        super().__init__()
        self.memory_projection, self.gate_projection, self.v = fused.memory_projection, fused.gate_projection, fused.v

    def forward(self, memory: Tensor, lengths: Tensor | None = None) -> Attention:
        hidden = torch.tanh(self.memory_projection(memory)) * torch.sigmoid(self.gate_projection(memory))
        scores = hidden @ self.v[0]
        if lengths is not None:
            scores = scores.masked_fill(torch.arange(memory.shape[1]) >= lengths[:, None], float("-inf"))
        alignments = torch.softmax(scores, dim=1)
        return Attention(torch.bmm(alignments[:, None], memory)[:, 0], alignments)


def loss_of(model: nn.Module, bags: Bags) -> Tensor:
    logits, _ = model(bags.images, bags.lengths)
    return nn.functional.binary_cross_entropy_with_logits(logits, bags.labels)


@torch.no_grad()
def evaluate(model: BagClassifier, bags: Bags) -> dict[str, float]:
    logits, alignments = model(bags.images, bags.lengths)
    positive = bags.labels == 1
    first = alignments[positive].argmax(1, keepdim=True)
    return {
        "accuracy": ((logits > 0) == positive).float().mean().item(),
        "area under the ROC curve": float(roc_auc_score(bags.labels, logits)),
        "positive bags whose highest weight is on a nine": bags.witnesses[positive]
        .gather(1, first)
        .float()
        .mean()
        .item(),
    }


@torch.no_grad()
def draw(model: BagClassifier, bags: Bags, across: int = 10) -> Figure:
    """The images of a bag, each in the colour of its weight."""
    logits, alignments = model(bags.images, bags.lengths)
    figure = Figure(figsize=(9, 2.0), layout="constrained")
    for axes, images, length, weights, logit in zip(
        figure.subplots(1, len(logits)), bags.images, bags.lengths, alignments, logits, strict=True
    ):
        down = -(-int(length) // across)
        canvas = torch.ones(down * (SIZE + 2), across * (SIZE + 2), 3)
        for i in range(int(length)):
            top, left = (place * (SIZE + 2) for place in divmod(i, across))
            colour = torch.tensor(colormaps["Reds"](float(weights[i]))[:3]).float()
            canvas[top : top + SIZE + 2, left : left + SIZE + 2] = colour
            ink = 1 - images[i, :, :, None].clamp(0, 1)
            canvas[top + 1 : top + SIZE + 1, left + 1 : left + SIZE + 1] = ink * colour
        axes.imshow(canvas.numpy())
        axes.set_axis_off()
        axes.set_title(f"p(a nine) = {torch.sigmoid(logit):.2f}, highest weight {weights.max():.2f}", fontsize=9)
    return figure


def compare_pooling(rows: int, size: int, units: int, seconds: float) -> dict[str, Any]:
    """Pooling alone, on the features of one large bag, such as a microscope slide. The features need no gradient."""
    features = torch.randn(1, rows, size)
    pooling = AttentionPooling(size, units, gated=True)
    eager = EagerPooling(copy.deepcopy(pooling))
    what = f"pooling of {rows} rows of {size}"
    return common.compare(what, eager, pooling, lambda model: model(features)[0].square().mean(), seconds)


@app.command()
def main(quick: QuickOption = False, output: OutputOption = FOLDER) -> None:
    """Trains a classifier of bags with gated attention pooling, and compares it with the eager formula."""
    common.prepare()
    size, units, batch_size, largest, steps = (64, 32, 32, 20, 300) if quick else (128, 128, 32, 60, 500)
    glyphs, unseen = Glyphs(test=False), Glyphs(test=True)
    model = BagClassifier(size, units)
    common.fit(model, loss_of, lambda step: make_bags(glyphs, batch_size, largest, step), steps)
    learnt = evaluate(model, make_bags(unseen, 400, largest, 1 << 30))
    eager = copy.deepcopy(model)
    eager.pooling = EagerPooling(eager.pooling)
    bags = make_bags(glyphs, batch_size, largest, 0)
    seconds = 1 if quick else 5
    rows = [common.compare("training step", eager, model, lambda model: loss_of(model, bags), seconds)]
    rows.append(compare_pooling(*((2000, 128, 64) if quick else (20_000, 512, 256)), seconds))
    common.finish("bags", draw(model, make_bags(unseen, 2, largest, (1 << 30) + 1)), learnt, rows, output)


if __name__ == "__main__":
    app()
