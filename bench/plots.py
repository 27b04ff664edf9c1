"""The plots: speed of the ops, the sweep over sizes, GPU cells, loss curves, patched and fused models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
# Imported after the choice of a backend that needs no display:
from matplotlib import pyplot as plt
from matplotlib.axis import Axis
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from . import results

if TYPE_CHECKING:
    from .cases import Cell, Settings, Shape

_COLOURS = {"eager": "#4878a8", "torch.compile": "#e08a3c", "sdpa": "#5a9e5a"}


def speed(path: Path, cells: Sequence[Cell], description: Mapping[str, object], settings: Settings) -> None:
    """One panel for each op and pass: time of the others / time of ours, with quartiles, on a log scale."""
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
        names = [name for name in _COLOURS if any(cell.provider(name) for cell in panel)]
        height = 0.8 / len(names)
        for offset, name in enumerate(names):
            for row, cell in enumerate(panel):
                way = cell.provider(name)
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
    names = [name for name in _COLOURS if any(cell.provider(name) for cell in cells)]
    handles = [Patch(color=_COLOURS[name], label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)
    dtype = str(settings.dtype).removeprefix("torch.")
    figure.suptitle(
        f"(B,Tq,Tk,A=D), {dtype}, {description['device']}, threads: {description['threads']}\n"
        f"torch {description['torch']}, {description['allocator']}, {description['date']}",
        fontsize=9,
    )
    _save(path, figure)


def sweep(
    path: Path,
    panels: Mapping[tuple[str, str], Mapping[Shape, float | None]],
    description: Mapping[str, object],
    dtype: str,
    least: float,
) -> None:
    """One panel for each op and pass: eager / ours as colour and number; rows are (B, Tq), columns (Tk, A).

    None: ours failed. NaN: the cell was not run; it is grey.
    """
    shapes = [shape for panel in panels.values() for shape in panel]
    rows = sorted({(shape.B, shape.Tq) for shape in shapes})
    columns = sorted({(shape.Tk, shape.A) for shape in shapes})
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    size = (max(10.0, across * (1.0 + 0.36 * len(columns)) + 1.0), 1.5 + down * (1.2 + 0.2 * len(rows)))
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    colours = plt.get_cmap("RdBu").with_extremes(bad="#c8c8c8")
    most = 2.0  # log2: the colours cover a quarter to four times; larger ratios have the same colour
    image = None
    for axis, ((op, passes), panel) in zip(axes.flat, panels.items(), strict=False):
        heat = [[math.nan] * len(columns) for _ in rows]
        for shape, ratio in panel.items():
            row, column = rows.index((shape.B, shape.Tq)), columns.index((shape.Tk, shape.A))
            if ratio is None:
                axis.text(column, row, "fails", ha="center", va="center", fontsize=6, color="red")
                continue
            if math.isnan(ratio):
                continue
            heat[row][column] = place = math.log2(ratio)
            ink = "white" if abs(place) > 0.75 * most else "black"
            axis.text(column, row, _short(ratio), ha="center", va="center", fontsize=6, color=ink)
            if ratio < least:
                frame = Rectangle(
                    (column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.6, zorder=3
                )
                axis.add_patch(frame)
        image = axis.imshow(heat, cmap=colours, vmin=-most, vmax=most, aspect="auto")
        _label_pairs(axis.yaxis, rows)
        _label_pairs(axis.xaxis, columns)
        axis.tick_params(axis="x", rotation=90)
        for i in range(1, len(rows)):
            if rows[i][0] != rows[i - 1][0]:
                axis.axhline(i - 0.5, color="black", linewidth=0.5)
        for i in range(1, len(columns)):
            if columns[i][0] != columns[i - 1][0]:
                axis.axvline(i - 0.5, color="black", linewidth=0.5)
        axis.set_xlabel("Tk, A=D", fontsize=8)
        axis.set_ylabel("B, Tq", fontsize=8)
        axis.set_title(f"{op}, {passes}", fontsize=10)
    if image is not None:
        bar = figure.colorbar(image, ax=axes, ticks=[-2, -1, 0, 1, 2], extend="both", shrink=0.6, pad=0.01)
        bar.ax.set_yticklabels(["0.25", "0.5", "1", "2", "4"], fontsize=8)
        bar.set_label("time of eager / time of ours (blue: ours is faster)", fontsize=8)
    figure.suptitle(
        f"Sweep, {dtype}; grey: not run, framed: below {least:g}; {description['device']}, "
        f"threads: {description['threads']}\n"
        f"torch {description['torch']}, {description['allocator']}, {description['date']}",
        fontsize=9,
    )
    _save(path, figure)


def gpu(path: Path, cells: Sequence[Mapping], description: Mapping[str, object]) -> bool:
    """One panel for each pass: time of the others / time of ours on a GPU, in CUDA graphs if possible, else launched by
    the host. Returns whether there was anything to draw.
    """
    colours = {**_COLOURS, "scores, eager softmax": "#9a6fb0"}
    panels: dict[str, list[tuple[str, dict[str, Mapping[str, float]]]]] = {}
    for cell in cells:
        ratios = {}
        for way in cell.get("ways", ()):
            found = way.get("times_ours", {})
            if way["name"] in colours and (found.get("graph") or found.get("launched")):
                ratios[way["name"]] = found.get("graph") or found["launched"]
        if ratios:
            panels.setdefault(cell["passes"], []).append((cell["key"].replace(cell["passes"], "").strip(), ratios))
    if not panels:
        return False
    rows = max(map(len, panels.values()))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(9 * len(panels), 1.5 + 0.5 * rows), squeeze=False, layout="constrained"
    )
    for axis, (passes, panel) in zip(axes.flat, panels.items(), strict=True):
        names = [name for name in colours if any(name in ratios for _, ratios in panel)]
        height = 0.8 / len(names)
        for row, (_, ratios) in enumerate(panel):
            for offset, name in enumerate(names):
                if name in ratios:
                    place = row + (offset - (len(names) - 1) / 2) * height
                    median, low, high = (ratios[name][key] for key in ("median", "low", "high"))
                    axis.barh(place, median - 1, height, left=1, color=colours[name])
                    axis.plot([low, high], [place, place], color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.axvline(1, color="black", linewidth=1)
        axis.set_yticks(range(len(panel)), [key for key, _ in panel], fontsize=7)
        axis.invert_yaxis()
        axis.set_title(passes, fontsize=10)
        axis.set_xlabel("time / time of ours (right of 1: ours is faster)", fontsize=8)
        axis.legend(handles=[Patch(color=colours[name], label=name) for name in names], fontsize=7)
    figure.suptitle(f"{description['device']}, torch {description.get('torch')}, {description['date']}", fontsize=9)
    _save(path, figure)
    return True


def _short(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:.1f}" if ratio < 99.95 else f"{ratio:.0f}"


def _label_pairs(axis: Axis, pairs: Sequence[tuple[int, int]]) -> None:
    axis.set_ticks(range(len(pairs)), [f"{first}, {second}" for first, second in pairs], fontsize=6)


def losses(path: Path, curves: Mapping[str, Sequence[float]], title: str) -> None:
    """Loss by step; the curves coincide if both attentions train alike."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for (name, curve), style in zip(curves.items(), ("-", "--"), strict=False):
        axis.plot(range(1, len(curve) + 1), curve, style, label=name, linewidth=1.2)
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("cross entropy a phoneme")
    axis.set_title(title, fontsize=10)
    axis.legend()
    _save(path, figure)


def swap(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Time and memory of the original and the patched model by length, both axes logarithmic."""
    lengths = [row["T"] for row in rows]
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axis, unit, title in zip(panels, ("ms", "MB"), ("time, ms", "peak memory, MB"), strict=True):
        for way, colour in (("original", _COLOURS["eager"]), ("patched", _COLOURS["sdpa"])):
            axis.plot(lengths, [row[way][unit] for row in rows], "o-", label=way, color=colour)
        if unit == "ms":
            for row in rows:
                label = f"{row['times patched']:.1f}x"
                axis.annotate(
                    label,
                    (row["T"], row["patched"]["ms"]),
                    xytext=(-8, 6),
                    textcoords="offset points",
                    ha="right",
                    fontsize=8,
                )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.set_xlabel("characters")
        axis.set_title(title, fontsize=10)
        axis.legend()
    figure.suptitle("arabic-diacritizer, whole model, one thread", fontsize=10)
    _save(path, figure)


def fuse(path: Path, rows: Sequence[Mapping[str, Any]], description: Mapping[str, object]) -> None:
    """One panel for each pass: time of the others / time of the fused module, with quartiles."""
    colours = {"original": _COLOURS["eager"], "torch.compile": _COLOURS["torch.compile"]}
    passes = list(dict.fromkeys(row["passes"] for row in rows))
    figure, axes = plt.subplots(1, len(passes), figsize=(6.5 * len(passes), 4), squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, passes, strict=True):
        panel = [row for row in rows if row["passes"] == name]
        for place, row in enumerate(panel):
            for offset, (way, ratio) in zip((-0.2, 0.2), row["times fused"].items(), strict=False):
                median, low, high = (ratio[key] for key in ("median", "low", "high"))
                axis.barh(place + offset, median - 1, 0.4, left=1, color=colours[way])
                axis.plot([low, high], [place + offset] * 2, color="black", linewidth=0.8)
                axis.annotate(
                    _short(median),
                    (max(median, high, 1), place + offset),
                    xytext=(3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7,
                )
        axis.set_xscale("log")
        axis.margins(x=0.15)
        axis.axvline(1, color="black", linewidth=1)
        labels = [f"{row['case']} {','.join(map(str, row['B,Tq,Tk,A,M']))}" for row in panel]
        axis.set_yticks(range(len(panel)), labels, fontsize=8)
        axis.invert_yaxis()
        axis.set_title(
            name if name == "forward" else f"{name}, {max(row['steps'] for row in panel)} steps", fontsize=10
        )
        axis.set_xlabel("time / time of the fused module (right of 1: fused is faster)", fontsize=8)
    handles = [Patch(color=colour, label=way) for way, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9)
    figure.suptitle(f"fuse(model), one thread, {description['device']}, {description['date']}", fontsize=9)
    _save(path, figure)


def magnitudes(path: Path, rows: Sequence[Mapping[str, Any]], description: Mapping[str, object]) -> None:
    """One panel for each pass and shape: time / fastest time, by the norm of v and the deviation of the inputs."""
    size = 3.9
    down = -(-len(rows) // 2)
    figure, axes = plt.subplots(down, 2, figsize=(2.6 * size, down * size), squeeze=False, layout="constrained")
    for axis in axes.flat[len(rows) :]:
        axis.set_visible(False)
    image = None
    for axis, row in zip(axes.flat, rows, strict=False):
        norms = sorted({cell["norm"] for cell in row["cells"]})
        deviations = sorted({cell["deviation"] for cell in row["cells"]})
        fastest = min(cell["ms"] for cell in row["cells"])
        heat = [[math.nan] * len(deviations) for _ in norms]
        for cell in row["cells"]:
            down_at, across_at = norms.index(cell["norm"]), deviations.index(cell["deviation"])
            heat[down_at][across_at] = ratio = cell["ms"] / fastest
            ink = "white" if ratio > 2 else "black"
            axis.text(across_at, down_at, f"{ratio:.2f}", ha="center", va="center", fontsize=6.5, color=ink)
        image = axis.imshow(heat, cmap="YlOrRd", vmin=1, vmax=2.5, aspect="auto", origin="lower")
        axis.set_xticks(range(len(deviations)), [f"{x:g}" for x in deviations], fontsize=8)
        axis.set_yticks(range(len(norms)), [f"{x:g}" for x in norms], fontsize=8)
        axis.set_xlabel("standard deviation of queries and keys", fontsize=8)
        axis.set_ylabel("norm of v", fontsize=8)
        sizes = ", ".join(map(str, row["shape"].values()))
        axis.set_title(f"{row['pass']}, ({sizes}): {fastest:.3g} ms, at most {row['ratio']:.2f}x", fontsize=9)
    if image is not None:
        figure.colorbar(image, ax=axes, extend="max", shrink=0.6, pad=0.01).set_label(
            "time / that of the fastest cell", fontsize=8
        )
    figure.suptitle(
        f"Additive attention; {description['device']}, threads: {description['threads']}\n"
        f"torch {description['torch']}, {description['allocator']}, {description['date']}",
        fontsize=9,
    )
    _save(path, figure)


def _save(path: Path, figure: plt.Figure) -> None:
    results.write_whole(path, lambda partial: figure.savefig(partial, dpi=150, metadata={"Software": None}))
    plt.close(figure)
