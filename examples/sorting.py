"""A pointer network that sorts: ``python -m examples.sorting --help``.

A bidirectional GRU reads N numbers; another GRU points at each once, from the smallest to the largest. Vinyals,
Fortunato, Jaitly, "Pointer networks", 2015; numbers as in Vinyals, Bengio, Kudlur, "Order matters", 2016, section 5.1.
"""

from __future__ import annotations

import copy

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from attn_kernels import Memory
from attn_kernels.mechanisms import PointerAttention
from bench.cli import application

from . import common
from .common import FOLDER, OutputOption, QuickOption

app = application()


def make_numbers(batch: int, count: int, seed: int) -> Tensor:
    """(B, N), uniform in 0..1."""
    return torch.rand(batch, count, generator=torch.Generator().manual_seed(seed))


class Sorter(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.encoder = nn.GRU(1, size, batch_first=True, bidirectional=True)
        self.first = nn.Parameter(torch.zeros(2 * size))  # what the decoder reads before it has pointed
        self.decoder = nn.GRU(2 * size, size, batch_first=True)
        self.pointer: nn.Module = PointerAttention(size, 2 * size, units=size)

    def forward(self, numbers: Tensor, order: Tensor) -> Tensor:
        """Log-probabilities of a given order. numbers, order: (B, N). Returns (B, N, N)."""
        outputs, state = self._encode(numbers)
        # All queries are one call: the mask excludes the numbers that earlier steps have taken.
        taken = nn.functional.one_hot(order, numbers.shape[1]).cumsum(1).roll(1, dims=1)
        taken[:, 0] = 0
        chosen = outputs.gather(1, order[:, :, None].expand_as(outputs))
        queries, _ = self.decoder(torch.cat((self._first(outputs), chosen[:, :-1]), dim=1), state)
        return self.pointer(queries, self.pointer.memory(outputs, mask=taken == 0))

    @torch.no_grad()
    def sort(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Points greedily. Returns the order, (B, N), and the probabilities, (B, N, N)."""
        outputs, state = self._encode(numbers)
        inputs, free = self._first(outputs), torch.ones(numbers.shape, dtype=torch.bool)
        memory = self.pointer.memory(outputs)  # projected once; the mask changes from step to step
        order, probabilities = [], []
        for _ in range(numbers.shape[1]):
            query, state = self.decoder(inputs, state)
            scores = self.pointer(query[:, 0], Memory(memory.keys, memory.values, mask=free))  # (B, N)
            order.append(scores.argmax(1))
            probabilities.append(scores.exp())
            free = free.scatter(1, order[-1][:, None], False)
            inputs = outputs.gather(1, order[-1][:, None, None].expand(-1, 1, outputs.shape[2]))
        return torch.stack(order, 1), torch.stack(probabilities, 1)

    def _encode(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        outputs, states = self.encoder(numbers[:, :, None])
        return outputs, states.sum(0, keepdim=True)

    def _first(self, outputs: Tensor) -> Tensor:
        return self.first.expand(len(outputs), 1, -1)


class EagerPointer(nn.Module):
    """The same formula in plain PyTorch, with the parameters of a PointerAttention."""

    def __init__(self, fused: PointerAttention) -> None:
        super().__init__()
        self.query_projection, self.memory_projection, self.v = fused.query_projection, fused.memory_projection, fused.v

    def memory(self, outputs: Tensor, mask: Tensor) -> Memory:
        return Memory(self.memory_projection(outputs), outputs, mask=mask)

    def forward(self, query: Tensor, memory: Memory) -> Tensor:
        scores = torch.tanh(self.query_projection(query)[:, :, None] + memory.keys[:, None]) @ self.v
        return torch.log_softmax(scores.masked_fill(~memory.mask, float("-inf")), dim=-1)


def loss_of(model: nn.Module, numbers: Tensor) -> Tensor:
    order = numbers.argsort(1)
    return nn.functional.nll_loss(model(numbers, order).flatten(0, 1), order.flatten())


def draw(model: Sorter, numbers: Tensor) -> Figure:
    order, probabilities = model.sort(numbers)
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for axes, row, places, rows in zip(figure.subplots(1, len(numbers)), numbers, order, probabilities, strict=True):
        labels = [f"{number:.3f}"[1:] for number in row]
        common.heat_map(axes, rows, labels, [labels[int(place)] for place in places])
        axes.tick_params("x", rotation=90)
        axes.set_xlabel("read", fontsize=8)
        axes.set_ylabel("pointed at", fontsize=8)
    return figure


@app.command()
def main(quick: QuickOption = False, output: OutputOption = FOLDER) -> None:
    """Trains a pointer network that sorts, and compares it with the eager formula."""
    common.prepare()
    size, batch_size, count, steps = (64, 64, 8, 250) if quick else (128, 64, 20, 600)
    model = Sorter(size)
    common.fit(model, loss_of, lambda step: make_numbers(batch_size, count, step), steps, learning_rate=5e-3)
    numbers = make_numbers(1000, count, 1 << 30)
    right = model.sort(numbers)[0] == numbers.argsort(1)
    learnt = {
        f"lists of {count} sorted": right.all(1).float().mean().item(),
        "places right": right.float().mean().item(),
    }
    eager = copy.deepcopy(model)
    eager.pointer = EagerPointer(eager.pointer)
    batch = make_numbers(batch_size, count, 0)
    row = common.compare("training step", eager, model, lambda model: loss_of(model, batch), 1 if quick else 8)
    common.finish("sorting", draw(model, make_numbers(2, count, (1 << 30) + 1)), learnt, [row], output)


if __name__ == "__main__":
    app()
