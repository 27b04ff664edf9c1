"""Names of earlier versions, which keep working for one version."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Changed(NamedTuple):
    """A function with the earlier arguments, ``now``, of a new one that has others."""

    new: Any
    now: Callable[..., Any]


def renamed(module: str, names: Mapping[str, Any]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module whose earlier names are ``names``: what they stand for, with a warning."""

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new, found = names[name] if isinstance(names[name], Changed) else (names[name], names[name])
        warn(f"{module}.{name}", f"{new.__module__}.{new.__name__}")
        return found

    return get


def warn(old: str, new: str) -> None:
    """For the caller of what calls this."""
    message = f"{old} is {new} now; the old name goes with the next version"
    warnings.warn(message, DeprecationWarning, stacklevel=3)
