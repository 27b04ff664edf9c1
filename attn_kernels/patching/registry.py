"""The registry of adapters: for known libraries (``libraries/``), by class name, and adapters of users."""

from __future__ import annotations

import functools
import importlib
import warnings
import weakref
from collections.abc import Callable
from inspect import getattr_static
from typing import Any, NamedTuple, TypeVar

from torch import nn

from ..sources import class_at, digest, replaced_method
from . import libraries
from .adapter import Fused, overridden_methods
from .report import class_name


class AdapterSpec(NamedTuple):
    """A class that can be patched.

    original: "module:Class". fused: its adapter. library, versions: for display. sources: digests of the source of the
    supported versions of the class, see :func:`digest`; empty to accept any.
    """

    original: str
    fused: type[Fused]
    library: str
    versions: str
    sources: tuple[str, ...]


F = TypeVar("F", bound=type[Fused])


def adapts(
    original: type[nn.Module] | str, *, library: str = "", versions: str = "", sources: tuple[str, ...] = ()
) -> Callable[[F], F]:
    """Class decorator that registers an adapter for modules of class ``original``.

    Args:
        original: the class, or "module:Class", which is looked up when a module is patched, without an import. A later
            adapter of a class replaces an earlier one. Subclasses are not patched, nor are other classes with the same
            name, such as a class that is defined again in a notebook or by another call of a function: they may compute
            something else.
        library, versions: shown by ``python -m attn_kernels patch-list``.
        sources: digests (:func:`digest`) of the class's source in those versions. If given, a class with another source
            is not patched: another version of a library may compute something else.
    """
    if isinstance(original, str):
        name = original
    elif isinstance(original, type) and issubclass(original, nn.Module):
        name = key_of(original)
    else:
        raise TypeError(f'adapts: original must be a class of modules or "module:Class", got {original!r}')

    def register(fused: F) -> F:
        if not (isinstance(fused, type) and issubclass(fused, Fused)):
            raise TypeError(f"adapts: the adapter of {name} must be a subclass of Fused, got {fused!r}")
        _rename_members(fused)
        adapter = AdapterSpec(name, fused, library, versions, tuple(sources))
        if isinstance(original, str):
            _adapters[name] = adapter
            there = class_at(*name.split(":", 1)) if ":" in name else None
            if isinstance(there, type) and _NOTES in vars(there):
                notes_of(there).adapter = None
        else:
            notes = notes_of(original)
            notes.adapter, notes.forward = adapter, original.forward
            _classes.add(original)
        return fused

    return register


def _rename_members(fused: type[Fused]) -> None:
    """Supports adapters that use the names of earlier versions."""
    for old, new in (("covers", "unsupported_reason"), ("least_elements", "min_products")):
        if hasattr(fused, old) and getattr_static(fused, new) is vars(Fused)[new]:
            message = f"{fused.__name__}.{old}: the name is {new} now; the old one goes with the next version"
            warnings.warn(message, DeprecationWarning, stacklevel=3)
            setattr(fused, new, getattr_static(fused, old))


def adapters() -> list[AdapterSpec]:
    """All registered adapters, sorted by library. It does not import the libraries themselves."""
    for file in libraries.FILES:
        _load(file)
    of_classes = [notes.adapter for cls in _classes if (notes := notes_of(cls)).adapter is not None]
    return sorted([*_adapters.values(), *of_classes], key=lambda adapter: (adapter.library.lower(), adapter.original))


def find_adapter(cls: type[nn.Module]) -> AdapterSpec | str | None:
    """The adapter of a class, the reason why its adapter does not fit, or None if it has none.

    Imports the file in ``libraries/`` for the class's library, which is itself loaded already.
    """
    file = cls.__module__.partition(".")[0]
    if file in libraries.FILES:
        _load(file)
    notes = vars(cls).get(_NOTES)
    adapter: AdapterSpec | None
    if isinstance(notes, _Notes) and notes.adapter is not None:
        adapter = notes.adapter
        if cls.forward is not notes.forward:
            return "the forward of its class was replaced after its adapter was given"
    else:
        adapter = _adapters.get(key_of(cls))
        if adapter is None:
            return None
        if "<locals>" in cls.__qualname__:
            return "its class was made by a function, which may make others of this name"
        if class_at(cls.__module__, cls.__qualname__) not in (cls, None):  # None: its module is not in sys.modules
            return f"it is not the class that {class_name(cls)} is now, but another of this name"
    if adapter.sources:
        if not _source_matches(cls, adapter):
            return f"its source is not that of {adapter.library} {adapter.versions}, which the adapter was written for"
        replaced = replaced_method(cls, overridden_methods(adapter.fused))
        if replaced is not None:
            return f"the method {replaced!r} of its class was replaced"
    return adapter


def _source_matches(cls: type[nn.Module], adapter: AdapterSpec) -> bool:
    return digest(cls) in adapter.sources


def namesake_has_adapter(cls: type) -> bool:
    """Whether :func:`adapts` was called with another class of this name."""
    return any(key_of(other) == key_of(cls) and notes_of(other).adapter is not None for other in _classes)


@functools.cache
def _load(file: str) -> None:
    importlib.import_module(f"{libraries.__name__}.{file}")


# Notes on a class -----------------------------------------------------------------------------------------------------

_NOTES = "_attn_kernels_notes"  # an attribute of classes
_adapters: dict[str, AdapterSpec] = {}  # adapters that were registered by name
_classes: weakref.WeakSet[type[nn.Module]] = weakref.WeakSet()  # classes that were passed to ``adapts``


class _Notes:
    """Notes on a class. As an attribute of the class they are freed with it, although they refer to it."""

    def __init__(self) -> None:
        self.adapter: AdapterSpec | None = None  # registered by ``adapts`` for this class itself
        self.forward: Any = None  # the forward of the class at that time
        self.fused: dict[type[Fused], type[Any]] = {}  # by adapter: the classes of patched modules

    def __reduce__(self) -> Any:
        return dict, ()  # a class that is pickled by value is pickled without its notes


def notes_of(cls: type) -> _Notes:
    notes = vars(cls).get(_NOTES)
    if not isinstance(notes, _Notes):
        notes = _Notes()
        setattr(cls, _NOTES, notes)
    return notes


def key_of(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"
