"""The heat map of an alignment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from .files import write_whole


def alignment(
    path: Path, rows: Sequence[Sequence[float]], letters: Sequence[str], phonemes: Sequence[str], title: str
) -> None:
    """One row for each phoneme that was written, one column for each letter that was read."""
    shrink = min(1.0, 50 / max(1, len(letters), len(phonemes)))  # a long sequence fits on one page
    size = (2.2 + 0.45 * shrink * len(letters), 1.6 + 0.4 * shrink * len(phonemes))
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    nothing = [[math.nan] * len(letters)]  # the output of a model may be empty
    image = axis.imshow(rows or nothing, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(len(letters)), letters, fontsize=max(4, 10 * shrink))
    axis.set_yticks(range(len(phonemes)), phonemes, fontsize=max(4, 10 * shrink))
    axis.set_title(title, fontsize=10)
    figure.colorbar(image, label="alignment")
    write_whole(path, lambda partial: figure.savefig(partial, dpi=150, metadata={"Software": None}))
