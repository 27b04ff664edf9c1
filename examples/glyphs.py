"""Handwritten digits that come with scikit-learn: 1797 images of 8 x 8, split into training and test images."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor

SIZE = 8


class Glyphs:
    """images: (N, 8, 8) in 0..1. digits: (N,). Every fourth one is for tests."""

    def __init__(self, test: bool) -> None:
        data = load_digits()
        images = torch.from_numpy(data.images).float() / 16
        digits = torch.from_numpy(data.target).long()
        chosen = (torch.arange(len(digits)) % 4 == 3) == test
        self.images, self.digits = images[chosen], digits[chosen]
        self._places = [(self.digits == digit).nonzero().squeeze(1) for digit in range(10)]

    def draw(self, digits: Tensor, chance: torch.Generator) -> Tensor:
        """A random image of each of the given digits: (n,) -> (n, 8, 8)."""
        places = [self._places[int(digit)] for digit in digits]
        return self.images[[int(rows[torch.randint(len(rows), (), generator=chance)]) for rows in places]]
