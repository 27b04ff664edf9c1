"""The check of a size that a module is given."""

from __future__ import annotations

from numbers import Integral

from ..errors import ArgumentValueError


def check_size(name: str, argument: str, size: object, least: int = 1) -> int:
    """A size as an int of Python; numpy has its own."""
    if not isinstance(size, Integral) or size < least:
        expected = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ArgumentValueError(f"{name}: {argument} must be {expected}, got {size!r}")
    return int(size)
