"""The plots: speed of the ops, loss curves, and the alignment of one word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
# After the choice of a backend that needs no display:
from matplotlib import pyplot as plt
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from . import files

if TYPE_CHECKING:
    from .ops import Cell, Settings

_COLOURS = {"eager": "#4878a8", "torch.compile": "#e08a3c", "sdpa": "#5a9e5a"}


def speed(path: Path, cells: Sequence[Cell], description: Mapping[str, object], settings: Settings) -> None:
    """One panel for each op and pass: how many times as long as ours the others take, with quartiles, log scale."""
    panels: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        panels.setdefault((cell.op, cell.passes), []).append(cell)
    rows = max(len(panel) for panel in panels.values())
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(7 * columns, lines * (1.3 + 0.55 * rows)), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, ((op, passes), panel) in zip(axes.flat, panels.items(), strict=False):
        names = [name for name in _COLOURS if any(cell.way(name) for cell in panel)]
        height = 0.8 / len(names)
        for offset, name in enumerate(names):
            for row, cell in enumerate(panel):
                way = cell.way(name)
                if way is None or way.times_ours is None:
                    continue
                median, low, high = way.times_ours
                place = row + (offset - (len(names) - 1) / 2) * height
                axis.barh(place, median - 1, height, left=1, color=_COLOURS[name])
                axis.plot([low, high], [place, place], color="black", linewidth=0.8)
                axis.annotate(
                    f"{median:.1f}" if median >= 1 else f"{median:.2f} loses",
                    (max(median, high, 1), place),
                    xytext=(3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7,
                    color="black" if median >= 1 else "red",
                )
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(x=0.15)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_yticks(range(len(panel)), [str(cell.shape) for cell in panel], fontsize=8)
        axis.invert_yaxis()
        axis.set_title(f"{op}, {passes}", fontsize=10)
        axis.set_xlabel("time / time of ours (right of 1: ours is faster)", fontsize=8)
    names = [name for name in _COLOURS if any(cell.way(name) for cell in cells)]
    handles = [Patch(color=_COLOURS[name], label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)
    dtype = str(settings.dtype).removeprefix("torch.")
    figure.suptitle(
        f"(B,Tq,Tk,A=D), {dtype}, {description['device']}, threads: {description['threads']}\n"
        f"torch {description['torch']}, {description['allocator']}, {description['date']}",
        fontsize=9,
    )
    _save(path, figure)


def losses(path: Path, curves: Mapping[str, Sequence[float]], title: str) -> None:
    """Loss by step; the curves lie on each other where the two ways of attention train alike."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for (name, curve), style in zip(curves.items(), ("-", "--"), strict=False):
        axis.plot(range(1, len(curve) + 1), curve, style, label=name, linewidth=1.2)
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("cross entropy a phoneme")
    axis.set_title(title, fontsize=10)
    axis.legend()
    _save(path, figure)


def alignment(
    path: Path, rows: Sequence[Sequence[float]], letters: Sequence[str], phonemes: Sequence[str], title: str
) -> None:
    """A heat map: one row for each phoneme that was written, one column for each letter that was read."""
    size = (2.2 + 0.45 * len(letters), 1.6 + 0.4 * len(phonemes))
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    image = axis.imshow(rows, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(len(letters)), letters)
    axis.set_yticks(range(len(phonemes)), phonemes)
    axis.set_title(title, fontsize=10)
    figure.colorbar(image, label="alignment")
    _save(path, figure)


def _save(path: Path, figure: plt.Figure) -> None:
    files.write_whole(path, lambda partial: figure.savefig(partial, dpi=150, metadata={"Software": None}))
    plt.close(figure)
