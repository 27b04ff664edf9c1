"""The classes of patched modules, generated from the original class and an adapter; they replace the class in place."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from ..sources import own_methods
from .adapter import Fused, fallbacks, overridden_methods
from .cache import clear
from .registry import AdapterSpec, find_adapter, notes_of


def fused_class(original: type[nn.Module], fused: type[Fused]) -> type[Any]:
    """The class of patched modules. It is created once, so that torch.compile does not recompile for a second class."""
    made = notes_of(original).fused
    if fused not in made:
        made[fused] = _make_fused_class(original, fused)
    return made[fused]


def _make_fused_class(original: type[nn.Module], fused: type[Fused]) -> type[Any]:
    names: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_original": original,
        "_own_forward": original.forward,
        "_own_methods": own_methods(original, nn.Module),
        "_rebuild": staticmethod(rebuild),
    }
    for name in overridden_methods(fused):
        method = getattr(fused, name)
        if method is not Fused.forward and hasattr(original, name):
            names[name] = _while_patched(fused, name, method)
    return types.new_class(original.__name__, (fused, original), {}, lambda space: space.update(names))


def _while_patched(fused: type[Fused], name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of an adapter that calls the original method once its module is unpatched: it may still be stored."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, fused):
            return method(self, *args, **kwargs)
        return getattr(type(self), name)(self, *args, **kwargs)

    return call


def adapter_of(cls: type) -> type[Fused]:
    """The adapter in the bases of a class that fused_class made."""
    return next(base for base in cls.__mro__ if issubclass(base, Fused) and not issubclass(base, nn.Module))


def change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Changes the class. Also modifies ``__dict__``: torch.compile's guards in torch 2.10 and 2.11 check only that."""
    module.__class__ = cls
    module.__dict__["_attn_kernels"] = None
    del module.__dict__["_attn_kernels"]


def restore_class(module: Any) -> None:
    change_class(module, module._original)
    fallbacks.pop(module, None)
    clear(module)


def rebuild(original: type[nn.Module], function: Callable[..., Any], *arguments: Any) -> Any:
    """An empty module of a patched class, for pickle and copy; of the original class if it has no adapter."""
    adapter = find_adapter(original)
    if not isinstance(adapter, AdapterSpec):
        return function(original, *arguments)
    return function(fused_class(original, adapter.fused), *arguments)
