"""Names of earlier versions, which keep working for one version."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any


def renamed(module: str, names: dict[str, Any]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module whose earlier names are ``names``: what they stand for, with a warning."""

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new = names[name]
        message = f"{module}.{name} is {new.__module__}.{new.__name__} now; the old name goes with the next version"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return new

    return get
