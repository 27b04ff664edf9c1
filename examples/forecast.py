"""A forecast with attention over inputs and over time: ``python -m examples.forecast --help``.

DA-RNN on a generated series, the sum of a season and of some drivers with a lag. Qin, Song, Chen, Cheng, Jiang,
Cottrell, "A dual-stage attention-based recurrent neural network for time series prediction", 2017.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from attn_kernels import BahdanauAttention, additive_attention
from bench.cli import application
from bench.models.loop import EagerAttention

from . import common
from .common import FOLDER, OutputOption, QuickOption

app = application()

LAGS = {0: 3, 1: 6}  # driver: by how many steps the target lags behind it; the other drivers are noise
SEASON = 24
NOISE = 0.1


class Series(NamedTuple):
    """drivers: (steps, n). target: (steps,), of mean 0 and deviation 1."""

    drivers: Tensor
    target: Tensor

    def windows(self, starts: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Drivers (B, T, n), the target until the step before the last, (B, T - 1), and its last step, (B,)."""
        steps = starts[:, None] + torch.arange(length)
        target = self.target[steps]
        return self.drivers[steps], target[:, :-1], target[:, -1]


def make_series(steps: int, drivers: int, seed: int) -> Series:
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(steps, drivers, generator=chance)
    for step in range(1, steps):
        x[step, : len(LAGS)] = 0.6 * x[step - 1, : len(LAGS)] + 0.8 * x[step, : len(LAGS)]
    y = 0.5 * torch.sin(2 * math.pi * torch.arange(steps) / SEASON) + NOISE * torch.randn(steps, generator=chance)
    for driver, lag in LAGS.items():
        y += x[:, driver].roll(lag)
    x, y = x[max(LAGS.values()) :], y[max(LAGS.values()) :]  # without the steps that roll() filled from the end
    return Series(x / x.std(0), (y - y.mean()) / y.std())


class InputAttention(nn.Module):
    """Weights of the drivers in a step: additive attention over the windows of the drivers as memory."""

    def __init__(self, hidden: int, length: int, units: int) -> None:
        super().__init__()
        self.query_projection = nn.Linear(2 * hidden, units)
        self.memory_projection = nn.Linear(length, units, bias=False)
        self.v = nn.Parameter(torch.randn(units) / units**0.5)

    def forward(self, state: Tensor, keys: Tensor) -> Tensor:
        """state: (B, 2 H), hidden and cell. keys: (B, n, units), projected windows. Returns (B, n)."""
        return additive_attention(self.query_projection(state), keys, None, self.v).alignments


class EagerInputAttention(nn.Module):
    """The same formula in plain PyTorch, with the parameters of an InputAttention."""

    def __init__(self, fused: InputAttention) -> None:
        super().__init__()
        self.query_projection, self.memory_projection, self.v = fused.query_projection, fused.memory_projection, fused.v

    def forward(self, state: Tensor, keys: Tensor) -> Tensor:
        return torch.softmax(torch.tanh(self.query_projection(state)[:, None] + keys) @ self.v, dim=1)


class DualStage(nn.Module):
    def __init__(self, drivers: int, length: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.input_attention: nn.Module = InputAttention(size, length, size)
        self.encoder = nn.LSTMCell(drivers, size)
        self.temporal_attention: nn.Module = BahdanauAttention(2 * size, size, units=size)
        self.mix = nn.Linear(size + 1, 1)
        self.decoder = nn.LSTMCell(1, size)
        self.output = nn.Sequential(nn.Linear(2 * size, size), nn.Linear(size, 1))

    def forward(self, drivers: Tensor, past: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """drivers: (B, T, n). past: (B, T - 1), the target.

        Returns the forecast (B,), the weights of the drivers in each step, (B, T, n), and those of the steps, (B, T).
        """
        nothing = drivers.new_zeros(len(drivers), self.size)
        keys = self.input_attention.memory_projection(drivers.transpose(1, 2))  # once for all steps
        state, weights, outputs = (nothing, nothing), [], []
        for inputs in drivers.unbind(1):
            weights.append(self.input_attention(torch.cat(state, dim=1), keys))
            state = self.encoder(weights[-1] * inputs, state)
            outputs.append(state[0])
        memory = self.temporal_attention.memory(torch.stack(outputs, 1), None)
        state = (nothing, nothing)
        context = memory.values.mean(1)
        for value in past.unbind(1):
            state = self.decoder(self.mix(torch.cat((context, value[:, None]), dim=1)), state)
            context, alignments = self.temporal_attention(torch.cat(state, dim=1), memory)
        return self.output(torch.cat((state[0], context), dim=1)).squeeze(1), torch.stack(weights, 1), alignments


class PlainLSTM(nn.Module):
    """The baseline: an LSTM over drivers and target, without attention."""

    def __init__(self, drivers: int, length: int, size: int) -> None:
        super().__init__()
        self.lstm, self.output = nn.LSTM(drivers + 1, size, batch_first=True), nn.Linear(size, 1)

    def forward(self, drivers: Tensor, past: Tensor) -> tuple[Tensor, None, None]:
        before = nn.functional.pad(past, (1, 0))  # the target is delayed by a step
        states, _ = self.lstm(torch.cat((drivers, before[:, :, None]), dim=2))
        return self.output(states[:, -1]).squeeze(1), None, None


Windows = tuple[Tensor, Tensor, Tensor]


def loss_of(model: nn.Module, windows: Windows) -> Tensor:
    return nn.functional.mse_loss(model(*windows[:2])[0], windows[2])


@torch.no_grad()
def rmse(model: nn.Module, windows: Windows) -> float:
    return loss_of(model, windows).sqrt().item()


@torch.no_grad()
def draw(model: DualStage, windows: Windows) -> Figure:
    """The forecast of the first steps of the test, and the average weights of both attentions."""
    forecast, weights, alignments = model(*windows[:2])
    figure = Figure(figsize=(9, 5), layout="constrained")
    panels = figure.subplot_mosaic([["series", "series"], ["inputs", "time"]])
    panels["series"].plot(windows[2][:120].numpy(), "k", linewidth=1, label="series")
    panels["series"].plot(forecast[:120].numpy(), "r--", linewidth=1, label="forecast, one step ahead")
    panels["series"].legend(fontsize=8)
    length = alignments.shape[1]
    mean = weights.mean((0, 1)).tolist()
    panels["inputs"].bar(
        range(len(mean)), mean, color=["#4878a8" if i in LAGS else "#c8c8c8" for i in range(len(mean))]
    )
    panels["inputs"].set_title("weight of each driver (blue: those that matter)", fontsize=9)
    panels["inputs"].set_xlabel("driver", fontsize=8)
    common.heat_map(panels["time"], alignments[:40], cmap="magma_r", vmax=None, extent=(-length + 0.5, 0.5, 40, 0))
    panels["time"].set_title("attention over time, a row for each forecast", fontsize=9)
    panels["time"].set_xlabel("step, relative to the forecast", fontsize=8)
    panels["time"].set_ylabel("forecast", fontsize=8)
    return figure


@app.command()
def main(quick: QuickOption = False, output: OutputOption = FOLDER) -> None:
    """Trains a forecaster with attention over inputs and over time, and compares it with eager attention."""
    common.prepare()
    drivers, length, size, batch_size, steps = (6, 10, 32, 64, 250) if quick else (6, 10, 32, 64, 600)
    series = make_series(4000, drivers, 0)
    last = len(series.target) - length
    cut = last * 4 // 5

    def batch_of(step: int) -> Windows:
        return series.windows(torch.randint(cut, (batch_size,), generator=torch.Generator().manual_seed(step)), length)

    test = series.windows(torch.arange(cut + length, last), length)
    learnt: dict[str, Any] = {}
    model, plain = DualStage(drivers, length, size), PlainLSTM(drivers, length, size)
    for name, one in (("RMSE, DA-RNN", model), ("RMSE, LSTM", plain)):
        common.fit(one, loss_of, batch_of, steps, learning_rate=2e-2)
        learnt[name] = rmse(one, test)
    learnt["RMSE, last value"] = nn.functional.mse_loss(test[1][:, -1], test[2]).sqrt().item()
    eager = copy.deepcopy(model)
    eager.input_attention = EagerInputAttention(eager.input_attention)
    eager.temporal_attention = EagerAttention(eager.temporal_attention)
    batch = batch_of(0)
    row = common.compare("training step", eager, model, lambda model: loss_of(model, batch), 1 if quick else 8)
    common.finish("forecast", draw(model, test), learnt, [row], output)


if __name__ == "__main__":
    app()
