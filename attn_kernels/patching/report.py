"""The report of ``patch``, and its table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from .adapter import Fused, fallbacks


class Replaced(NamedTuple):
    """A module that was patched: its qualified name in the model, and its class."""

    name: str
    cls: type[nn.Module]


class Skipped(NamedTuple):
    """A module that looks like attention but was not patched, and why."""

    name: str
    cls: type[nn.Module]
    reason: str


class Fallback(NamedTuple):
    """Calls of a patched module that ran its original forward, and why."""

    name: str
    cls: type[nn.Module]
    reason: str
    calls: int


@dataclass
class Report:
    """The report of :func:`patch`; ``print(report)`` shows a table.

    replaced: the modules that are patched now. skipped: modules that look like attention but were not patched.
    """

    replaced: list[Replaced] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    _modules: list[tuple[str, Callable[[], Any]]] = field(default_factory=list, repr=False)

    @property
    def fallbacks(self) -> list[Fallback]:
        """Calls so far that ran the original forward; calls within torch.compile are not counted."""
        return [
            Fallback(name, module._original, reason, calls)
            for name, reference in self._modules
            if isinstance(module := reference(), Fused)
            for reason, calls in fallbacks.get(module, {}).items()
        ]

    def __str__(self) -> str:
        if not (self.replaced or self.skipped):
            return "attn_kernels.patch: nothing in this model looks like attention"
        rows = [module_row(name, cls, "replaced") for name, cls in self.replaced]
        rows += [module_row(name, cls, f"skipped: {reason}") for name, cls, reason in self.skipped]
        rows += [module_row(*fallback[:2], fallback_text(fallback)) for fallback in self.fallbacks]
        return table(MODULE_HEAD, rows)


MODULE_HEAD = ("module", "class", "what")


def module_row(name: str, cls: type, what: str) -> tuple[str, ...]:
    return name or "(model)", class_name(cls), what


def fallback_text(fallback: Fallback) -> str:
    return f"own forward, {fallback.calls} calls: {fallback.reason}"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table for a terminal, with columns as wide as their contents."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [head, tuple("-" * width for width in widths), *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in lines
    )


def class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
