"""The options of a search, with their checks and defaults."""

from __future__ import annotations

import math
import numbers
from functools import partial
from typing import Any, NamedTuple

import torch

from ..checks import check_size


class SearchOptions(NamedTuple):
    """The options of ``Seq2Seq.generate``, and the bos and eos tokens."""

    bos: int
    eos: int
    max_length: int
    beam_size: int = 1
    num_hypotheses: int | None = None
    length_penalty: float = 0.0
    coverage_penalty: float = 0.0
    early_stopping: bool = False
    weight_dtype: torch.dtype | None = None
    sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    generator: torch.Generator | None = None

    @property
    def hypotheses(self) -> int:
        """The number of hypotheses per sentence."""
        return self.beam_size if self.num_hypotheses is None else self.num_hypotheses

    def checked(self) -> SearchOptions:
        """The options as Python's own numbers, with ``num_hypotheses``. Raises ValueError or TypeError."""
        beam_size, max_length = _count("beam_size", self.beam_size), _count("max_length", self.max_length)
        num_hypotheses = beam_size if self.num_hypotheses is None else _count("num_hypotheses", self.num_hypotheses)
        top_k = None if self.top_k is None else _count("top_k", self.top_k)
        length_penalty = _number("length_penalty", self.length_penalty)
        coverage_penalty = _number("coverage_penalty", self.coverage_penalty)
        temperature = _number("temperature", self.temperature, above_zero=True)
        if length_penalty * math.log((5 + max_length) / 6) > 200:  # of the factor; beyond 709 it is no float64
            raise ValueError(f"Seq2Seq.generate: length_penalty is too large for {max_length} tokens: {length_penalty}")
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            got = type(self.generator).__name__
            raise TypeError(f"Seq2Seq.generate: generator must be a torch.Generator or None, got {got}")
        if self.weight_dtype is not None and self.weight_dtype is not torch.bfloat16:
            expected = "torch.bfloat16 or None"
            raise ValueError(f"Seq2Seq.generate: weight_dtype must be {expected}, got {self.weight_dtype!r}")
        if self.sample:
            changed = {"beam_size": beam_size != 1, "length_penalty": length_penalty != 0}
            changed |= {"coverage_penalty": coverage_penalty != 0, "early_stopping": self.early_stopping}
            changed |= {"weight_dtype": self.weight_dtype is not None}
        else:
            changed = {"temperature": temperature != 1, "top_k": top_k is not None}
            changed |= {"generator": self.generator is not None}
        if any(changed.values()):
            unused = ", ".join(name for name, given in changed.items() if given)
            raise ValueError(f"Seq2Seq.generate: with sample={self.sample} there is no use for {unused}")
        if not self.sample and num_hypotheses > beam_size:
            expected = f"at most beam_size = {beam_size}"
            raise ValueError(f"Seq2Seq.generate: num_hypotheses must be {expected}, got {num_hypotheses}")
        return self._replace(
            max_length=max_length,
            beam_size=beam_size,
            num_hypotheses=num_hypotheses,
            length_penalty=length_penalty,
            coverage_penalty=coverage_penalty,
            temperature=temperature,
            top_k=top_k,
        )


_count = partial(check_size, "Seq2Seq.generate")


def _number(argument: str, number: Any, above_zero: bool = False) -> float:
    """A finite number as a float."""
    if not isinstance(number, numbers.Real) or not 0 <= float(number) < math.inf or (above_zero and number == 0):
        expected = "above 0" if above_zero else "of at least 0"
        raise ValueError(f"Seq2Seq.generate: {argument} must be a number {expected}, got {number!r}")
    return float(number)
