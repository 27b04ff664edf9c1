"""Attention as people write it: modules of our own for every formula, layout and mask that was met in public code.

Each is a :class:`Case`: how to build it, arguments for given sizes, and what ``fuse`` is to find in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

CONTEXT, ALIGNMENTS, SCORES = "context", "alignments", "scores"

H, M, A = 5, 6, 7  # sizes of the state, the memory and the units: different, so that none stands for another


def linears(**sizes: tuple[Any, ...]) -> type[nn.Module]:
    """A base class whose modules have a Linear of each name; sizes: its arguments."""

    class Linears(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, size in sizes.items():
                setattr(self, name, nn.Linear(*size))

    return Linears


class Sizes(NamedTuple):
    B: int = 3
    Tq: int = 4
    Tk: int = 5


class Draw:
    """Random arguments of one dtype."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype).requires_grad_()

    def constant(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def lengths(self, batch: int, longest: int) -> Tensor:
        """Each at least 1, the first as long as possible."""
        lengths = torch.randint(1, longest + 1, (batch,), generator=self.generator)
        lengths[0] = longest
        return lengths

    def padding(self, batch: int, steps: int) -> Tensor:
        """(B, T) bool, True where there is padding."""
        return torch.arange(steps) >= self.lengths(batch, steps)[:, None]


Arguments = Callable[[Sizes, Draw], tuple[Any, ...]]


class Case(NamedTuple):
    name: str
    build: Callable[[], nn.Module]
    arguments: Arguments
    expected: str | None  # None: must not be fused
    train_expected: str | None
    why: str  # for those that are not fused: words of the reason
    module: str  # where the class is


CASES: dict[str, Case] = {}


def case(
    expected: str | None, arguments: Arguments, *, train: str | None = "same", why: str = "", **options: dict[str, Any]
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Class decorator: one case, or one for each of several ``options`` of the constructor.

    expected: what fuse finds; ``train``: in training, where that is something else.
    """

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        for label, given in (options or {"": {}}).items():
            name = cls.__name__ + (f"-{label}" if label else "")
            CASES[name] = Case(
                name,
                lambda given=given: cls(**given),
                arguments,
                expected,
                expected if train == "same" else train,
                why,
                cls.__module__,
            )
        return cls

    return register


def step(s: Sizes, d: Draw) -> tuple[Any, ...]:
    """State (B, H), memory (B, T, M)."""
    return d(s.B, H), d(s.B, s.Tk, M)


def step_time_major(s: Sizes, d: Draw) -> tuple[Any, ...]:
    return d(s.B, H), d(s.Tk, s.B, M)


def step_padded(s: Sizes, d: Draw) -> tuple[Any, ...]:
    return d(s.B, H), d(s.B, s.Tk, M), d.padding(s.B, s.Tk)


def many(s: Sizes, d: Draw) -> tuple[Any, ...]:
    return d(s.B, s.Tq, H), d(s.B, s.Tk, M)


def many_padded(s: Sizes, d: Draw) -> tuple[Any, ...]:
    return d(s.B, s.Tq, H), d(s.B, s.Tk, M), d.padding(s.B, s.Tk)


from . import broken, decoders, others, pointers, pooling, products, speech, spellings, translation, vision  # noqa: E402, F401
