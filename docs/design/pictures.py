"""The pictures of docs/design.md: ``python docs/design/pictures.py`` writes them beside this file.

The limits are read from csrc/additive_math.h, so that the pictures show those of the kernels.
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
HEADER = HERE.parents[1] / "csrc/additive_math.h"
THREE, COMPENSATED, TANH, DIVISION = "#6b9bd1", "#72b7b2", "#e0b872", "#9d8ec7"


def limits() -> dict[str, float]:
    """The constants of the header by name."""
    declared = re.findall(r"\b(k[A-Z]\w*) = ([0-9][0-9a-fpx.e+-]*?)f?[,;]", HEADER.read_text(encoding="utf-8"))
    return {name: float.fromhex(text) if text.startswith("0x") else float(text) for name, text in declared}


def draw_ranges(limit: dict[str, float]) -> plt.Figure:
    """How large the numbers of each form become, over the bound of |q + k|."""
    figure, (axes, bars) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(4, 1.1))
    bound = np.linspace(0, 50, 501)
    pair = np.logaddexp2(0, 2 * bound / np.log(2))  # log2 of 1 + E
    unit = np.log2(limit["kDenominatorScale"])
    lines = [
        (THREE, "largest product of three d", 3 * (unit - np.log2(limit["kMinRelativeV"]) + pair), "kMaxBoundThree"),
        (COMPENSATED, "largest $E$ of a unit, 16 bits", 2 * bound / np.log(2), "kMaxBoundOne"),
    ]
    for colour, label, values, name in lines:
        used = bound <= limit[name]
        axes.plot(bound, values, color=colour, linestyle=":", linewidth=1)
        axes.plot(bound[used], values[used], color=colour, linewidth=2.5, label=f"{label}, used up to {limit[name]:g}")
        axes.axvline(limit[name], color=colour, linewidth=0.8)
    product = np.minimum(2 * pair, 2 * np.log2(limit["kMaxNumerator"]))
    axes.plot(bound, product, color=COMPENSATED, linewidth=2.5, linestyle="--", label="largest product of two, clamped")
    smallest = -48 - np.minimum(pair, np.log2(limit["kMaxExponentialBackward"]))
    axes.plot(bound, smallest, color=DIVISION, linewidth=2.5, label="smallest g of the backward, clamped")
    axes.plot(bound, np.full_like(bound, 3 * unit), color=THREE, linewidth=1, linestyle="--")
    axes.text(49.5, 3 * unit + 3, "smallest product of three d", color=THREE, ha="right", va="bottom", fontsize=9)
    for edge, text, va in ((128, "infinity in float32", "bottom"), (-126, "denormal in float32", "top")):
        axes.axhline(edge, color="black", linewidth=1)
        axes.text(0.4, edge + (3 if va == "bottom" else -4), text, va=va, fontsize=9)
    axes.axhspan(-126, 128, color="black", alpha=0.04)
    axes.set(ylim=(-150, 150), xlim=(0, 50), ylabel="$\\log_2$ of the number")
    axes.legend(loc="center right", fontsize=9)
    three = limit["kMaxBoundThree"]
    rows = {
        "forward": [(three, THREE, "three units share a division"), (50, COMPENSATED, "compensated, two share one")],
        "backward, many queries": [(50, DIVISION, "a division for each pair")],
    }
    for row, parts in enumerate(rows.values()):
        left = 0.0
        for right, colour, text in parts:
            bars.barh(row, right - left, left=left, color=colour, edgecolor="white")
            bars.text((left + right) / 2, row, text, ha="center", va="center", fontsize=9)
            left = right
    bars.set(xlabel="largest |q + bias| + largest |k| of a pair of query and step")
    bars.set_yticks(range(len(rows)), list(rows), fontsize=9)
    bars.invert_yaxis()
    bars.spines[["top", "right", "left"]].set_visible(False)
    return figure


def draw_rounding() -> plt.Figure:
    """The error of a unit in float32, by either form, over |q + k|."""
    random = np.random.default_rng(0)
    size = 10.0 ** random.uniform(-5, 1, 400_000)
    share = random.uniform(0, 1, size.size)
    query, key = (size * share).astype(np.float32), (size * (1 - share)).astype(np.float32)
    exact = np.tanh(query.astype(np.float64) + key.astype(np.float64))
    pair = np.exp(2 * query) * np.exp(2 * key)
    forms = {
        "1 - 2 / (1 + E), the factored form": (1 - 2 / (1 + pair), THREE),
        "tanh(q + k)": (np.tanh(query + key), TANH),
    }
    edges = np.logspace(-5, 1, 61)
    place = np.digitize(size, edges) - 1
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True, sharey=True)
    for axes, divisor, title in zip(panels, (1.0, np.abs(exact)), ("absolute error", "relative error"), strict=True):
        for label, (values, colour) in forms.items():
            error = np.abs(values.astype(np.float64) - exact) / divisor
            worst = [error[place == i].max() for i in range(60)]
            axes.plot(np.sqrt(edges[1:] * edges[:-1]), worst, color=colour, label=label)
        axes.axhline(2.0**-24, color="black", linewidth=0.8, linestyle=":")
        axes.text(1e-5, 2.0**-24 * 0.75, "half an ulp of 1", fontsize=8, va="top")
        axes.set(xscale="log", yscale="log", xlabel="|q + k|", title=f"largest {title}, float32")
    panels[1].legend(fontsize=9)
    return figure


def draw_guards(limit: dict[str, float], units: int = 512) -> plt.Figure:
    """Which form the forward takes, over the bound and the norm of v."""
    bound, norm = np.logspace(-1, 2, 601), np.logspace(-1, 3, 601)
    smallest = np.full_like(norm, limit["kLargeBound"] if units >= limit["kMinUnitsOfLargeBound"] else np.inf)
    smallest[norm**2 <= limit["kNorm2PerUnitOfMediumBound"] * units] = limit["kMediumBound"]
    smallest[norm**2 <= limit["kNorm2OfSmallBound"]] = limit["kSmallBound"]
    smallest[norm**2 <= limit["kNorm2OfAnyBound"]] = 0
    allowed = bound[None, :] >= smallest[:, None]
    form = np.where(bound <= limit["kMaxBoundThree"], 0, np.where(bound <= 2 * limit["kMaxAbsExponential"], 1, 2))
    form = np.where(allowed, form[None, :], np.maximum(form, 1)[None, :])
    figure, axes = plt.subplots(figsize=(8, 4.2))
    colours = matplotlib.colors.ListedColormap([THREE, COMPENSATED, TANH])
    axes.pcolormesh(bound, norm, form, cmap=colours, vmin=0, vmax=2, shading="nearest", rasterized=True)
    axes.axhline(np.sqrt(units), color="black", linewidth=0.8, linestyle=":")
    axes.text(0.11, np.sqrt(units) * 0.92, "of a standard normal v", fontsize=9, va="top")
    for x, y, text in (
        (1.2, 0.5, "three units share a division"),
        (40, 0.5, "compensated"),
        (93, 0.5, "tanh"),
        (0.7, 200, "compensated: the rounding of 1 would show"),
        (14, 200, "three"),
    ):
        axes.text(x, y, text, ha="center", va="center", fontsize=9)
    axes.set(xscale="log", yscale="log", xlabel="largest |q + bias| + largest |k|", ylabel=f"norm of v, {units} units")
    return figure


def main() -> None:
    plt.rcParams.update({"svg.hashsalt": "attn_kernels", "font.size": 10, "savefig.bbox": "tight"})
    limit = limits()
    pictures = {"ranges": draw_ranges(limit), "rounding": draw_rounding(), "guards": draw_guards(limit)}
    for name, figure in pictures.items():
        figure.tight_layout()
        figure.savefig(HERE / f"{name}.svg", metadata={"Date": None}, facecolor="white", dpi=120)


if __name__ == "__main__":
    main()
