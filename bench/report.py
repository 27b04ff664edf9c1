"""Tables for the terminal, and the format of their numbers."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from .timing import Spread

FEW_ROUNDS = 5  # a median of fewer rounds is shown with its quartiles


def table(title: str, *columns: str, wrap: bool = False, **options: Any) -> Table:
    """A plain table. A column whose name begins with ">" is aligned to the right.

    wrap: cells may have several lines, for tables wider than a terminal. ``options``: keywords of rich's Table.
    """
    result = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, **{"padding": (0, 1, 0, 0), **options}
    )  # fmt: skip
    for column in columns:
        right = column.startswith(">")
        result.add_column(
            column.removeprefix(">"), justify="right" if right else "left", no_wrap=not wrap, overflow="fold"
        )
    return result


def figure(value: float | None) -> str:
    """Three significant digits, or all digits before the decimal point."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"


def megabytes(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value < 99.5 else f"{value:.0f}"


def times(ratio: float, digits: int = 2, lost: bool | None = None) -> str:
    """Time of another / time of ours. A ratio with ours slower is marked, in colour and in plain text.

    lost: whether it is marked; default: if the rounded ratio is below 1.
    """
    if lost is None:
        lost = round(ratio, 2) < 1
    return f"[bold red]{ratio:.{max(2, digits)}f}x![/]" if lost else f"{ratio:.{digits}f}x"


def quartiles(values: Spread, rounds: int) -> str:
    """The quartiles, printed beside an uncertain median of few rounds."""
    if rounds >= FEW_ROUNDS:
        return ""
    return " (1 round)" if rounds == 1 else f" ({values.low:.2f}-{values.high:.2f})"


def compared(row: dict[str, Any]) -> str:
    """A row of ``results.comparison`` as a cell: the ms of each, and the ratio to the time of ours."""
    ratios = next(value for key, value in row.items() if key.startswith("times "))
    return "; ".join(
        f"{name} {figure(spread['median'])}" + (f" ({ratios[name]['median']:.2f}x)" if name in ratios else "")
        for name, spread in row["ms"].items()
    )
