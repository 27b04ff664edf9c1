"""Tables for the terminal, and the format of the numbers in them."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from .timing import Spread

FEW_ROUNDS = 5  # a median of fewer is shown with its quartiles


def table(title: str, *columns: str, wrap: bool = False, **options: Any) -> Table:
    """A plain table. A column whose name begins with ">" is aligned to the right.

    wrap: cells may have several lines, for tables that are wider than a terminal. ``options``: as of rich's Table.
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
    """Three significant digits, or all digits before the point."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"


def megabytes(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value < 99.5 else f"{value:.0f}"


def times(ratio: float, digits: int = 2, lost: bool | None = None) -> str:
    """How many times as long another takes. Where ours is slower it stands out, in colour and in plain text.

    lost: whether it stands out; without it, where the ratio is below 1 when it is rounded.
    """
    if lost is None:
        lost = round(ratio, 2) < 1
    return f"[bold red]{ratio:.{max(2, digits)}f}x![/]" if lost else f"{ratio:.{digits}f}x"


def quartiles(values: Spread, rounds: int) -> str:
    """Printed beside a median of few rounds, which is uncertain."""
    if rounds >= FEW_ROUNDS:
        return ""
    return " (1 round)" if rounds == 1 else f" ({values.low:.2f}-{values.high:.2f})"


def compared(row: dict[str, Any]) -> str:
    """A row of ``results.comparison`` in a cell: the ms of each, and how many times as long as ours the others took."""
    ratios = next(value for key, value in row.items() if key.startswith("times "))
    return "; ".join(
        f"{name} {figure(spread['median'])}" + (f" ({ratios[name]['median']:.2f}x)" if name in ratios else "")
        for name, spread in row["ms"].items()
    )
