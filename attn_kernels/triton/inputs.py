"""A score and the other arguments of an attention, as one argument of launchers."""

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
