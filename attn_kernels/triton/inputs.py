"""A score, and the arguments of an attention that all scores have, as launchers take them together."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..scores import Score
from ..types import Masks, Options
from .options import NO_OPTIONS


class Inputs(NamedTuple):
    """query: (B, Tq, A). keys: (B, Tk, A). values: (B, Tk, D)."""

    score: Score
    query: Tensor
    keys: Tensor
    values: Tensor
    masks: Masks
    options: Options = NO_OPTIONS
