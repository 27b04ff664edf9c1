"""Swapping the ops into existing models: ``patch(model)``.

A patched module keeps its parameters, buffers, hooks and state; only its class changes, to a subclass of its own with
another ``forward``, made here from the original class and an adapter. An adapter is a mixin that says how the module's
result is computed by this package. Those of known libraries are in ``patches/``, one file each; for a class of your own
it is about ten lines::

    from attn_kernels import additive_attention, patch
    from attn_kernels.patching import Fused, Uncovered, adapts

    @adapts(MyAttention)
    class FusedMyAttention(Fused):
        def attend(self, state, memory, mask=None):  # the arguments and the result of MyAttention.forward
            if self.training and self.dropout.p > 0:
                return Uncovered("dropout of the alignments")
            return additive_attention(self.W(state), self.U(memory), memory, self.v.weight[0], mask=mask)

    print(patch(model))
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib
import importlib.util
import inspect
import re
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .sentence import forget

# Names of classes that are likely to compute attention, so that a report mentions them.
_LOOKS_LIKE_ATTENTION = re.compile(r"attention|attn|^Att[A-Z]|GATv2", re.IGNORECASE)


class Uncovered(NamedTuple):
    """What ``attend`` returns where the ops cannot give the module's own result; its forward runs, and is counted."""

    reason: str


class Fused:
    """Base of adapters: mixed in before the class of a module, so that ``self`` is the module.

    A subclass has :meth:`attend`, and :meth:`covers` if not every module of the class can be swapped. It may also
    replace further methods of the original class; ``super()`` in them is that class.
    """

    # Where no tensor of a call has as many elements, the original is faster: our op is faster there, too, but some ten
    # to thirty microseconds of Python around it are not. Such calls are not counted: nothing is missing in them.
    least_elements: ClassVar[int] = 0

    _original: ClassVar[type[nn.Module]]

    @classmethod
    def covers(cls, module: Any) -> str | None:
        """None, or the reason why this module is to be left alone: an option that no call of it could serve."""
        return None

    def attend(self, *args: Any, **kwargs: Any) -> Any:
        """Computes what the original ``forward`` would return for these arguments, or returns ``Uncovered(reason)``.

        It writes the state of the module that the original would write, and nothing before it returns Uncovered.
        """
        raise NotImplementedError(f"{type(self).__name__}: its adapter has no attend")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        least = _least_elements(self)
        if least > 0 and not any(isinstance(x, Tensor) and x.numel() >= least for x in (*args, *kwargs.values())):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return run(self, super().forward, args, kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled and copied as its original class and the wish to be patched: the class of its own has no name."""
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        function, arguments, *rest = reduced
        if not arguments or arguments[0] is not type(self):
            raise TypeError(f"{type(self).__name__}: its class has a __reduce__ of its own; unpatch it to pickle it")
        return (_rebuild, (self._original, function, *arguments[1:]), *rest)

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script compiles the original: a script cannot call the ops.

        It also puts it into the model in this module's place, as it does with all that this method returns.
        """
        original = copy.copy(self)
        original.__class__ = self._original  # type: ignore[assignment]
        return original  # type: ignore[return-value]


class Adapter(NamedTuple):
    """A class that can be swapped.

    original: "module:Class". fused: its mixin. library, versions: for people. sources: digests of the source of the
    classes known to compute what the mixin does, see :func:`digest`; empty for a class given as an object.
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
    """Class decorator: the adapter with which modules of class ``original`` are patched.

    Args:
        original: the class, or "module:Class", which imports nothing. A later adapter of a class replaces an earlier.
            Modules of its subclasses are left alone: they may compute something else.
        library, versions: what ``python -m attn_kernels patch-list`` prints.
        sources: digests (:func:`digest`) of the class's source in those versions. Where they are given, a class with
            another source is left alone: another version of a library may compute something else.
    """
    if isinstance(original, str):
        name = original
    elif isinstance(original, type) and issubclass(original, nn.Module):
        name = _key(original)
    else:
        raise TypeError(f'adapts: original must be a class of modules or "module:Class", got {original!r}')

    def register(fused: F) -> F:
        if not (isinstance(fused, type) and issubclass(fused, Fused)):
            raise TypeError(f"adapts: the adapter of {name} must be a subclass of Fused, got {fused!r}")
        _adapters[name] = Adapter(name, fused, library, versions, tuple(sources))
        return fused

    return register


def digest(cls: type) -> str | None:
    """Twelve digits that change with the source of a class, whatever its white space; None where there is no source."""
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        return None
    return hashlib.sha256("".join(source.split()).encode()).hexdigest()[:12]


def adapters() -> list[Adapter]:
    """Every class that can be swapped, by library; for those in ``patches/`` no library is imported."""
    for file in _files():
        importlib.import_module(f"{__package__}.patches.{file}")
    return sorted(_adapters.values(), key=lambda adapter: (adapter.library.lower(), adapter.original))


class Replaced(NamedTuple):
    """A module that was swapped: its qualified name in the model, and its class."""

    name: str
    cls: type[nn.Module]


class Skipped(NamedTuple):
    """A module that looks like attention and was left alone, and why."""

    name: str
    cls: type[nn.Module]
    reason: str


class Fallback(NamedTuple):
    """Calls of a patched module that its own forward served, and why."""

    name: str
    cls: type[nn.Module]
    reason: str
    calls: int


@dataclass
class Report:
    """What :func:`patch` did; ``print(report)`` shows it as a table.

    replaced: the modules that are patched now. skipped: those that look like attention and were left alone.
    """

    replaced: list[Replaced] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    _modules: list[tuple[str, Callable[[], Any]]] = field(default_factory=list, repr=False)

    @property
    def fallbacks(self) -> list[Fallback]:
        """Calls so far that fell through to the original forward; calls within torch.compile are not counted."""
        return [
            Fallback(name, module._original, reason, calls)
            for name, reference in self._modules
            if isinstance(module := reference(), Fused)
            for reason, calls in module.__dict__.get(_COUNTER, {}).items()
        ]

    def __str__(self) -> str:
        if not (self.replaced or self.skipped):
            return "attn_kernels.patch: nothing in this model looks like attention"
        rows: list[tuple[str, ...]] = [(name or "(model)", _class_name(cls), "replaced") for name, cls in self.replaced]
        rows += [(name or "(model)", _class_name(cls), f"skipped: {reason}") for name, cls, reason in self.skipped]
        rows += [
            (name or "(model)", _class_name(cls), f"own forward, {calls} calls: {reason}")
            for name, cls, reason, calls in self.fallbacks
        ]
        return table(("module", "class", "what"), rows)


def patch(model: nn.Module) -> Report:
    """Swaps the ops into every attention module of a model that this package knows: same parameters, same results.

    Modules are changed in place, by their class: parameters, ``state_dict``, hooks and attributes stay as they are, and
    ``isinstance`` still holds. What a call needs beyond the ops falls through to the module's own forward and is
    counted in ``report.fallbacks``. Patching again changes nothing. Copies and pickles of a patched model are patched.
    ``torch.jit.trace`` and ``torch.jit.script`` take the modules' own forward, so that what they make needs no ops.

    Args:
        model: any module; known classes: ``python -m attn_kernels patch-list``, your own: :mod:`attn_kernels.patching`.

    Returns:
        :class:`Report`: ``replaced``, ``skipped`` and ``fallbacks``; it prints as a table.

    Raises:
        TypeError: model is no module.
    """
    _check_model("patch", model)
    report = Report()
    for name, module in _named_modules(model):
        reason = _patch_module(module)
        if isinstance(module, Fused):
            report.replaced.append(Replaced(name, module._original))
            report._modules.append((name, weakref.ref(module)))
        elif reason is not None:
            report.skipped.append(Skipped(name, type(module), reason))
    return report


def unpatch(model: nn.Module) -> list[Replaced]:
    """Gives every patched module of a model its own class again, and returns which they were.

    Raises ValueError, and changes nothing, where the class of a patched module was changed once more by another hand
    (``torch.nn.utils.parametrize`` does): what was done last has to be undone first.
    """
    _check_model("unpatch", model)
    return _unpatch("unpatch", model, set())


@contextlib.contextmanager
def patched(model: nn.Module) -> Iterator[Report]:
    """``with patched(model) as report:`` the model is patched within; modules patched before stay patched after.

    At the end it raises ValueError where :func:`unpatch` would.
    """
    _check_model("patched", model)
    before = {id(module) for _, module in _named_modules(model) if isinstance(module, Fused)}
    report = patch(model)
    try:
        yield report
    finally:
        _unpatch("patched", model, before)


def _least_elements(module: Fused) -> int:
    return module.least_elements


def run(module: Any, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of ``attend``, or where it is Uncovered, or its ops refuse the arguments, that of ``original``."""
    result: Any
    if not is_compiling() and torch._C._are_functorch_transforms_active():
        result = Uncovered("transforms of torch.func")
    elif not is_compiling() and torch._C._is_tracing():
        result = Uncovered("torch.jit.trace")  # where the ops have gradients it would record a call of Python
    else:
        try:
            result = module.attend(*args, **kwargs)
        except (TypeError, ValueError) as error:
            result = Uncovered(f"{type(error).__name__}: {error}")  # the original may take them, or has its own words
    if isinstance(result, Uncovered):
        if not is_compiling():  # a graph would be compiled anew for every count
            module.__dict__.setdefault(_COUNTER, Counter())[result.reason] += 1
        return original(*args, **kwargs)
    return result


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Columns as wide as they need, for a terminal."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [head, tuple("-" * width for width in widths), *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in lines
    )


# ----------------------------------------------------------------------------------------------------------------------

_COUNTER = "_attn_kernels_fallbacks"  # in a module's __dict__: reason -> calls
_adapters: dict[str, Adapter] = {}
_fused_classes: dict[tuple[type[nn.Module], type[Fused]], type[Any]] = {}


def _check_model(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def _named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """As ``model.named_modules()``, with the layers that a Keras model keeps in lists of its own."""
    modules = {id(module): (name, module) for name, module in model.named_modules()}
    for name, module in list(modules.values()):
        for layer in module._flatten_layers() if hasattr(module, "_flatten_layers") else ():
            modules.setdefault(id(layer), (f"{name}.{layer.name}".lstrip("."), layer))
    return list(modules.values())


def _patch_module(module: nn.Module) -> str | None:
    """Patches a module if its class has an adapter that covers it. Returns why not, where that is worth mention."""
    cls = type(module)
    if isinstance(module, Fused):
        return None
    adapter = _find(cls)
    if adapter is None:
        return _unknown(module)
    if not _knows(adapter, cls):
        return f"its source is not that of {adapter.library} {adapter.versions}, which the adapter was written for"
    if "forward" in module.__dict__:
        return "its forward was replaced by another hand"
    reason = adapter.fused.covers(module)
    if reason is None:
        module.__class__ = _fused_class(cls, adapter.fused)
    return reason


def _unknown(module: nn.Module) -> str | None:
    cls = type(module)
    for base in cls.__mro__[1:]:
        if issubclass(base, nn.Module) and _find(base) is not None:
            return f"a subclass of {_class_name(base)} may compute something else"
    if isinstance(module, nn.MultiheadAttention):
        return "PyTorch fuses it"
    if isinstance(module, torch.jit.ScriptModule):
        looks = _LOOKS_LIKE_ATTENTION.search(module.original_name)
        return "it is a script: patch the model before torch.jit.script is called" if looks else None
    if cls.__module__.startswith(f"{__package__}."):
        return None
    return "no adapter for its class" if _LOOKS_LIKE_ATTENTION.search(cls.__name__) else None


def _knows(adapter: Adapter, cls: type) -> bool:
    return not adapter.sources or digest(cls) in adapter.sources


def _unpatch(function: str, model: nn.Module, keep: set[int]) -> list[Replaced]:
    """Of all patched modules but those whose ids are in ``keep``."""
    modules = [(name, m) for name, m in _named_modules(model) if isinstance(m, Fused) and id(m) not in keep]
    for name, module in modules:
        if type(module) is not _fused_class(module._original, _mixin(type(module))):
            changed = type(module).__name__
            raise ValueError(f"{function}: {name or 'model'} was patched and then made a {changed}: undo that first")
    replaced = [Replaced(name, module._original) for name, module in modules]
    for _, module in modules:
        _restore(module)
    return replaced


def _restore(module: Any) -> None:
    module.__class__ = module._original
    module.__dict__.pop(_COUNTER, None)
    forget(module)


def _find(cls: type) -> Adapter | None:
    """The adapter of a class. The file of its library is imported, if there is one: the library itself is loaded."""
    file = cls.__module__.partition(".")[0]
    if file in _files():
        importlib.import_module(f"{__package__}.patches.{file}")
    return _adapters.get(_key(cls))


@functools.cache
def _files() -> tuple[str, ...]:
    """The files of ``patches/``: each has the name of the top-level package that it serves."""
    from . import patches

    return patches.FILES


def _fused_class(original: type[nn.Module], fused: type[Fused]) -> type[Any]:
    cls = _fused_classes.get((original, fused))
    if cls is None:
        cls = _fused_classes[original, fused] = _make_fused_class(original, fused)
    return cls


def _make_fused_class(original: type[nn.Module], fused: type[Fused]) -> type[Any]:
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return types.new_class(
        original.__name__, (fused, original), {}, lambda space: space.update(names, _original=original)
    )


def _mixin(cls: type) -> type[Fused]:
    """The adapter within a class that _fused_class made, or one derived from it."""
    return next(base for base in cls.__mro__ if issubclass(base, Fused) and not issubclass(base, nn.Module))


def _rebuild(original: type[nn.Module], function: Callable[..., Any], *arguments: Any) -> Any:
    """An empty module of a patched class, for pickle and copy; where no adapter knows it, a plain one."""
    adapter = _find(original)
    if adapter is None or not _knows(adapter, original):
        return function(original, *arguments)
    return function(_fused_class(original, adapter.fused), *arguments)


def _key(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
