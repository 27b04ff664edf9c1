"""Whether a class is the one that an adapter was written for."""

from __future__ import annotations

import hashlib
import inspect
import operator
import sys
import types


def digest(cls: type) -> str | None:
    """Twelve digits that change with the source of a class, whatever its white space; None where there is no source."""
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        return None
    return hashlib.sha256("".join(source.split()).encode()).hexdigest()[:12]


def class_at(module: str, qualname: str) -> object:
    """What is found at ``module.qualname`` now; None where there is nothing, or the module is not imported."""
    try:
        return operator.attrgetter(qualname)(sys.modules[module])
    except (KeyError, AttributeError):
        return None


def replaced_method(cls: type, bypassed: frozenset[str]) -> str | None:
    """The name of a method of a class that is not the one in its source: replaced from outside, or wrapped.

    bypassed: names of methods that an adapter does not call. Others are called, with what wraps them: of these only
    the innermost function is looked at, so that decorators within the source do no harm.
    """
    lines, first = inspect.getsourcelines(cls)
    file = inspect.getsourcefile(cls)

    def is_in_source(function: types.FunctionType) -> bool:
        code = function.__code__
        return code.co_filename == file and first <= code.co_firstlineno < first + len(lines)

    for name, function in vars(cls).items():
        if isinstance(function, types.FunctionType) and not is_in_source(function):
            inner = function if name in bypassed else inspect.unwrap(function)
            if not (isinstance(inner, types.FunctionType) and is_in_source(inner)):
                return name
    return None


def own_methods(cls: type, base: type) -> frozenset[str]:
    """Names of the methods of a class that its base does not have, and of its ``forward``."""
    names = set(dir(cls)) - (set(dir(base)) - {"forward"})
    return frozenset(n for n in names if isinstance(inspect.getattr_static(cls, n), types.FunctionType))
