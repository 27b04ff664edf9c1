"""The cases that all benchmarks of the ops share: sizes, inputs, amount of work, and the check of results.

This module needs only torch, so it also runs where nothing else is installed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import eager, timing


class Op(str, Enum):
    additive_attention = "additive_attention"
    dot_attention = "dot_attention"


RELU = "activated_attention"  # additive attention with relu, as an op
WITH_VECTOR = (Op.additive_attention.value, RELU)  # ops with a score vector


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


class Activation(str, Enum):
    tanh = "tanh"
    relu = "relu"
    leaky_relu = "leaky_relu"
    sigmoid = "sigmoid"


class Lengths(str, Enum):
    """none: no mask. random: memory_lengths between Tk/2 and Tk."""

    none = "none"
    random = "random"


class Shape(NamedTuple):
    B: int
    Tq: int
    Tk: int
    A: int
    D: int

    def __str__(self) -> str:
        return ",".join(map(str, self[:4] if self.A == self.D else self))


# The standard shapes. The first list runs on every device, the second only on a GPU.
SHAPES = {
    Shape(64, 1, 50, 512, 512): "decode step",
    Shape(64, 1, 200, 1024, 1024): "decode step, longer and wider",
    Shape(1, 1, 1000, 512, 512): "decode step, one long sentence",
    Shape(8, 5, 200, 512, 512): "5 beams",
    Shape(64, 1, 180, 128, 128): "Tacotron 2's sizes, without its location features",
    Shape(32, 50, 50, 512, 512): "all target steps",
    Shape(16, 100, 100, 512, 512): "all target steps, longer",
    Shape(1280, 1, 66, 1024, 1024): "PyTorch's tensorexpr benchmark",
    Shape(128, 10, 128, 1024, 1024): "PyTorch's tensorexpr benchmark",
}
GPU_SHAPES = {Shape(256, 74, 75, 1024, 1024): "MLPerf GNMT"}

# The passes of a call. Only cpu/roofline.py times the backward alone.
FORWARD, BACKWARD, TRAINING = "forward", "backward", "forward+backward"
SHORT = {FORWARD: "fwd", BACKWARD: "bwd", TRAINING: "fwd+bwd"}

# Largest allowed difference from the eager formula (in float32 or wider), relative to the largest value of the tensor.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass
class Provider:
    """One way to compute a cell (one of our backends, eager, torch.compile, ...), and its results."""

    name: str
    function: Callable[..., Tensor] | None = None  # tensors -> context
    detail: str = ""
    failure: str | None = None  # why it was not timed
    memory_mb: float | None = None
    error: float | None = None  # largest difference from the eager formula, relative to the largest value
    milliseconds: timing.Spread | None = None
    times_ours: timing.Spread | None = None  # its time / our time, per round: above 1 if ours is faster


class Problem(NamedTuple):
    """The inputs of one shape."""

    inputs: dict[str, Tensor]
    grad_context: Tensor
    memory_lengths: Tensor | None


@dataclass(frozen=True)
class Settings:
    dtype: torch.dtype
    device: torch.device
    seconds: float
    rounds: int
    compile: bool
    need_weights: bool
    lengths: Lengths
    seed: int
    prepared: bool = False
    activation: str = "tanh"  # of additive attention


class Work(NamedTuple):
    """The least work of one call."""

    read: int  # bytes
    written: int  # bytes
    pairs: int  # one pair: one query, one key, one unit
    exponentials: int
    macs: int


def work_of(op: str, shape: Shape, passes: str, item_size: int) -> Work:
    """The work of the forward pass or of the backward pass.

    Forward: computes only the context, no alignments. Backward: starts from the alignments and the gradient of the
    context.
    """
    batch, queries, steps, units, width = shape
    pairs = batch * queries * steps
    query, context = batch * queries * units, batch * queries * width
    keys, values = batch * steps * units, batch * steps * width
    additive = op in WITH_VECTOR
    inputs = query + keys + values + (units if additive else 0)
    if passes == FORWARD:
        read, written, products = inputs, context, pairs * width
    else:
        # Two products: the gradient of the values and the gradient of the alignments.
        read, written, products = inputs + pairs + context, inputs, 2 * pairs * width
    if additive:
        exponentials = 0 if op == RELU else query + keys
        return Work(read * item_size, written * item_size, pairs * units, exponentials, products)
    products += pairs * units * (1 if passes == FORWARD else 2)
    return Work(read * item_size, written * item_size, 0, 0, products)


@dataclass
class Cell:
    """One line of a table: an op at one shape, forward or forward and backward, by several providers."""

    op: str
    shape: Shape
    passes: str
    label: str
    ours: str  # the name of our provider, which is the name of the backend
    providers: list[Provider] = field(default_factory=list)
    rounds: int = 0  # number of timed rounds; 0: the cell was left out, or nothing in it ran
    left_out: bool = False  # True if there was no time for it
    seconds_of_check: float = 0.0  # time before the rounds, mostly compilation
    seconds_a_round: float = 0.0

    @property
    def work(self) -> int:
        """Multiplications of one pass over all pairs of a query and a step."""
        return self.shape.B * self.shape.Tq * self.shape.Tk * (self.shape.A + self.shape.D)

    def provider(self, name: str) -> Provider | None:
        return next((provider for provider in self.providers if provider.name == name), None)


def make_problem(op: str, shape: Shape, settings: Settings) -> Problem:
    generator = torch.Generator().manual_seed(settings.seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator) * scale).to(settings.device, settings.dtype)

    batch, queries, steps, units, width = shape
    inputs = {
        "query": normal(batch, queries, units, scale=1.0 if op in WITH_VECTOR else units**-0.5),
        "keys": normal(batch, steps, units),
        "values": normal(batch, steps, width),
    }
    if op in WITH_VECTOR:
        inputs["v"] = normal(units, scale=units**-0.5)
    lengths = None
    if settings.lengths is Lengths.random:
        lengths = torch.randint(max(1, steps // 2), steps + 1, (batch,), generator=generator).to(settings.device)
    return Problem(inputs, normal(batch, queries, width), lengths)


def formula_of(op: str, activation: str = "tanh") -> Callable[..., Any]:
    """The eager formula of an op."""
    activation = "relu" if op == RELU else activation
    if activation != "tanh":
        return functools.partial(eager.additive_attention, activation=activation)
    return getattr(eager, op)


def expected_results(op: str, problem: Problem, *, training: bool, activation: str = "tanh") -> dict[str, Tensor]:
    """The result of the eager formula for a problem, in float32 or wider."""
    formula = functools.partial(formula_of(op, activation), memory_lengths=problem.memory_lengths, need_weights=False)
    wide = {name: x if x.dtype == torch.float64 else x.float() for name, x in problem.inputs.items()}
    return compute(lambda *tensors: formula(*tensors).context, wide, problem.grad_context, training=training)


def compute(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], grad_context: Tensor, *, training: bool
) -> dict[str, Tensor]:
    """The context and, for training, the gradient of every input, by name."""
    if not training:
        with torch.no_grad():
            return {"context": function(*inputs.values())}
    leaves = [x.detach().requires_grad_() for x in inputs.values()]
    context = function(*leaves)
    gradients = torch.autograd.grad(context, leaves, grad_context.to(context.dtype))
    return {"context": context.detach(), **{f"d{name}": g for name, g in zip(inputs, gradients, strict=True)}}


def largest_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference over all tensors, relative to the largest value of each, and the name of that tensor."""
    worst, where = 0.0, ""
    for name, wanted in expected.items():
        error = ((got[name].to(wanted.dtype) - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()
        if not error <= worst:  # also true for NaN
            worst, where = error, name
    return worst, where


def bind(provider: Provider, problem: Problem, *, training: bool) -> Callable[[], object]:
    """Returns the call to be timed."""
    assert provider.function is not None
    function, inputs = provider.function, list(problem.inputs.values())
    if not training:

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*inputs)

        return forward
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(function(*leaves), leaves, problem.grad_context)


def check(provider: Provider, problem: Problem, expected: dict[str, Tensor], *, training: bool) -> None:
    """Runs a provider once. If it fails or its results are wrong, sets ``failure``: the provider is not timed."""
    try:
        got = compute(provider.function, problem.inputs, problem.grad_context, training=training)
    except Exception as error:  # any error of a compiler or a kernel is stored in the cell
        lines = str(error).strip().splitlines()
        provider.failure = f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]
        return
    error, where = largest_error(got, expected)
    if not error <= TOLERANCES[problem.grad_context.dtype]:
        provider.failure = f"wrong: {where} differs by {error:.1e} of its largest value"
    provider.error = error if math.isfinite(error) else None  # JSON has neither NaN nor infinity
