"""Energies: additive or dot scores that a mechanism turns into probabilities, with the parameters they need."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import as_number
from ..errors import ArgumentValueError
from ..memory import Memory
from ..modules import _reset_score_vector
from .reading import Source, additive_energies, dot_energies
from .steps import AlignmentsAttention, AlignmentsState

SCORES = ("additive", "dot")


class EnergyAttention(AlignmentsAttention):
    """The base of mechanisms with one or more energies: their parameters and their formula.

    One projection computes the keys of all energies: those of energy ``i`` are the i-th block of ``units`` columns of
    the memory's keys.
    """

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        units: int | None,
        energies: int = 1,
        *,
        score: str,
        normalize: bool,
        activation: str,
        negative_slope: float,
        backend: str | None,
        factory: dict[str, Any],
    ) -> None:
        name = type(self).__name__
        check_choice(name, "score", score, SCORES)
        additive = score == "additive"
        if additive and units is None:
            raise ArgumentValueError(f"{name}: units must be a size with score='additive', got None")
        if not additive and units not in (None, query_size):
            expected = f"None or query_size = {query_size} with score='dot'"
            raise ArgumentValueError(f"{name}: units must be {expected}, got {units!r}")
        units = query_size if units is None else units
        super().__init__(
            query_size,
            memory_size,
            units * energies if isinstance(units, Integral) else units,
            project_query=additive,
            project_memory=True,
            backend=backend,
            factory=factory,
        )
        self._set_activation(activation, negative_slope, additive)
        self.units: int = self.key_size // energies
        self.score = score
        self.normalize = normalize
        self.v: nn.Parameter | None = self._parameter(self.units) if additive else None
        self.g: nn.Parameter | None = self._parameter() if normalize else None
        self.bias: nn.Parameter | None = self._parameter(self.units) if normalize and additive else None

    def _reset_scores(self) -> None:
        if self.v is not None:
            _reset_score_vector(self.v)
        if self.g is not None:
            nn.init.constant_(self.g, 1.0 if self.v is None else math.sqrt(1 / self.units))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def score_vector(self) -> Tensor:
        """(units,), of additive energies: ``v``, or with ``normalize`` g v / |v|."""
        v = self.v
        assert v is not None  # of additive energies
        return v if self.g is None else v * (self.g / torch.linalg.vector_norm(v))

    def _energy(self, query: Tensor, source: Source) -> Tensor:
        """(B, K, Tk), in float32 or wider. query: (B, K, units), projected. source: with keys (B, Tk, units)."""
        if self.v is not None:
            return additive_energies(query, source, self._additive_score(self.score_vector(), self.bias))
        return dot_energies(query if self.g is None else self.g * query, source)

    def _score_settings(self) -> dict[str, Any]:
        return {"units": self.units, "score": self.score, "normalize": self.normalize}


class ChoosingAttention(EnergyAttention):
    """The base of mechanisms that choose or keep each step with a probability sigmoid(energy + r + noise).

    Raffel et al. 2017, section 2: ``r`` is learned, since a sigmoid is not invariant to a shift as softmax is. Noise in
    training drives the probabilities towards 0 or 1, the values of hard decoding.
    """

    modes: ClassVar[tuple[str, ...]]
    starts_attended: ClassVar[bool] = False  # True: begins at the first step that may be attended, not at step 0

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        units: int | None,
        mode: str,
        noise: float,
        score_bias_init: float,
        energies: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(query_size, memory_size, units, energies, **options)
        check_choice(self._name, "mode", mode, self.modes)
        self.noise: float = check_number(self._name, "noise", noise, 0.0)
        self.score_bias_init: float = check_number(self._name, "score_bias_init", score_bias_init)
        self.mode = mode
        self.score_bias: nn.Parameter = self._parameter()

    def _reset_scores(self) -> None:
        super()._reset_scores()
        nn.init.constant_(self.score_bias, self.score_bias_init)

    def initial_state(self, memory: Memory, hypotheses: int = 1) -> AlignmentsState:
        return self._first_step(memory, hypotheses, self.starts_attended)

    def _choices(self, query: Tensor, source: Source) -> Tensor:
        """(B, K, Tk): probabilities in float32 or wider, 0 in padding. With mode="hard" each is 0 or 1."""
        check_choice(self._name, "mode", self.mode, self.modes)  # it may be set between steps
        energy = self._energy(query, source)
        energy = energy + self.score_bias.to(energy.dtype)
        if self.training and self.noise > 0:
            energy = energy + self.noise * torch.randn_like(energy)
        if source.allowed is not None:
            energy = energy.masked_fill(~source.allowed, float("-inf"))
        return (energy > 0).to(energy.dtype) if self.mode == "hard" else torch.sigmoid(energy)

    def _choice_settings(self) -> dict[str, Any]:
        return {**self._score_settings(), "mode": self.mode, "noise": self.noise}

    def extra_repr(self) -> str:
        return self._repr(**self._choice_settings())


def check_choice(name: str, argument: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        expected = " or ".join(repr(choice) for choice in choices)
        raise ArgumentValueError(f"{name}: {argument} must be {expected}, got {value!r}")


def check_number(name: str, argument: str, value: object, least: float = -math.inf) -> float:
    """A finite number, at least ``least``."""
    number = as_number(name, value, argument)
    if number < least:
        raise ArgumentValueError(f"{name}: {argument} must be a finite number >= {least}, got {value}")
    return number
