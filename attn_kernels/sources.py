"""Checks that classes and their methods are still those that an adapter was written for, or that were captured."""

from __future__ import annotations

import hashlib
import inspect
import operator
import os
import sys
import types
from typing import Any

from torch import nn

Forwards = tuple[tuple[type[nn.Module], Any], ...]


def digest(cls: type) -> str | None:
    """Twelve hex digits that change with the source of a class, except its white space; None if there is no source."""
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        return None
    return hashlib.sha256("".join(source.split()).encode()).hexdigest()[:12]


def class_at(module: str, qualname: str) -> object:
    """The object at ``module.qualname`` now; None if there is none, or the module is not imported."""
    try:
        return operator.attrgetter(qualname)(sys.modules[module])
    except (KeyError, AttributeError):
        return None


def replaced_method(cls: type, bypassed: frozenset[str]) -> str | None:
    """The name of a method of a class that is not the one in its source, because it was replaced or wrapped.

    bypassed: names of methods that an adapter does not call. Other methods are called with their wrappers: for these
    only the innermost function is checked, so that decorators in the source are allowed.
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


def replaced_on(instance: object, cls: type, methods: frozenset[str]) -> list[str]:
    """Names of the methods of a class that an instance replaces, except by functions of the class's own library.

    Keras, for example, wraps some methods in its constructor. ``forward`` is left out.
    """
    names = methods & vars(instance).keys() - {"forward"}
    return sorted(name for name in names if not _is_of_library(vars(instance)[name], cls))


def _is_of_library(function: object, cls: type) -> bool:
    """Whether the code of a function is in the top-level package of a class. Functions that it wraps do not count."""
    code = getattr(function, "__code__", None)
    top = getattr(sys.modules.get(cls.__module__.partition(".")[0]), "__file__", None)
    if code is None or top is None or os.path.basename(top) != "__init__.py":
        return False
    is_below: bool = code.co_filename.startswith(os.path.dirname(top) + os.sep)
    return is_below


def own_methods(cls: type, base: type) -> frozenset[str]:
    """Names of the methods of a class that its base does not have, and ``forward``."""
    names = set(dir(cls)) - (set(dir(base)) - {"forward"})
    return frozenset(n for n in names if isinstance(inspect.getattr_static(cls, n), types.FunctionType))


def forwards_of(module: nn.Module) -> Forwards:
    """The classes of a module and of its submodules, each with its current ``forward``."""
    classes = {getattr(type(part), "_attn_kernels_original", type(part)) for part in module.modules()}
    return tuple((cls, cls.forward) for cls in classes)


def are_current(forwards: Forwards) -> bool:
    """Whether the classes still have these functions: TorchDynamo's guards check modules, not their classes."""
    for cls, forward in forwards:  # noqa: SIM110 - all() of a generator takes four times as long
        if cls.forward is not forward:
            return False
    return True
