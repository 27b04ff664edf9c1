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
import importlib
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

from .derived import forget
from .errors import ArgumentError
from .sources import class_at, digest, own_methods, replaced_method, replaced_on
from .stock import functions_are_replaced

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
    _own_forward: ClassVar[Any]  # of the original class, when the class of the patched module was made
    _own_methods: ClassVar[frozenset[str]]  # names of the methods of the original class

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
        if not isinstance(self, Fused):  # a wrapper of this method was put into the module, which was unpatched since
            return type(self).forward(self, *args, **kwargs)
        least = _least_elements(self)
        if least > 0 and not any(isinstance(x, Tensor) and x.numel() >= least for x in (*args, *kwargs.values())):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return run(self, super().forward, args, kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled and copied as its original class and the wish to be patched: the class of its own has no name."""
        if not isinstance(self, Fused):  # unpatched since this method was looked up
            return type(self).__reduce_ex__(self, protocol)
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
    classes known to compute what the mixin does, see :func:`digest`; empty if any will do.
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
        original: the class, or "module:Class", which imports nothing: the class that is there when a module is patched.
            A later adapter of a class replaces an earlier. Modules of other classes are left alone, since they may
            compute something else: of its subclasses, and of classes of the same name, such as one that is defined
            anew in a notebook or made by another call of the same function.
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
        adapter = Adapter(name, fused, library, versions, tuple(sources))
        if isinstance(original, str):
            _adapters[name] = adapter
            there = class_at(*name.split(":", 1)) if ":" in name else None
            if isinstance(there, type) and _NOTES in vars(there):
                _notes(there).adapter = None
        else:
            notes = _notes(original)
            notes.adapter, notes.forward = adapter, original.forward
            _classes.add(original)
        return fused

    return register


def adapters() -> list[Adapter]:
    """Every class that can be swapped, by library; for those in ``patches/`` no library is imported."""
    for file in _files():
        importlib.import_module(f"{__package__}.patches.{file}")
    of_classes = [notes.adapter for cls in _classes if (notes := _notes(cls)).adapter is not None]
    return sorted([*_adapters.values(), *of_classes], key=lambda adapter: (adapter.library.lower(), adapter.original))


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
            for reason, calls in _fallbacks.get(module, {}).items()
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
    """The result of ``attend``; that of ``original`` where it is Uncovered, or where this package refuses an argument.

    Other errors are the caller's, or mistakes in the adapter: they are raised.
    """
    reason = None if is_compiling() else _hindrance(module)
    if reason is None:
        try:
            result = module.attend(*args, **kwargs)
        except ArgumentError as error:
            if not is_compiling() and _is_from_a_module(error):
                raise  # hooks and submodules have run, and one of them has failed: they are not run once more
            reason = f"{type(error).__name__}: {error}"
        except TypeError as error:
            if is_compiling() or not _is_of_call(error) or _takes(original, args, kwargs):
                raise
            return original(*args, **kwargs)  # which raises an error in terms of its own signature
        else:
            if not isinstance(result, Uncovered):
                return result
            reason = result.reason
    if not is_compiling():  # a graph would be compiled anew for every count
        _fallbacks.setdefault(module, Counter())[reason] += 1
    return original(*args, **kwargs)


def _hindrance(module: Any) -> str | None:
    """Why this call is for the original, whatever its arguments."""
    if torch._C._are_functorch_transforms_active():
        return "transforms of torch.func"
    if torch._C._is_tracing():
        return "torch.jit.trace"  # where the ops have gradients it would record a call of Python
    if module._original.forward is not type(module)._own_forward:
        return "the forward of its class was replaced"
    if functions_are_replaced():
        return "a function of PyTorch was replaced"
    if not module._own_methods.isdisjoint(module.__dict__):
        replaced = replaced_on(module, module._original, module._own_methods)  # without the forward that has led here
        if replaced:
            return f"its method {replaced[0]!r} was replaced"
    return None


def _is_from_a_module(error: BaseException) -> bool:
    """Whether an error was raised within the call of a module, and not by the adapter that called it."""
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code is nn.Module._call_impl.__code__:
            return True
        traceback = traceback.tb_next
    return False


def _is_of_call(error: TypeError) -> bool:
    """Whether arguments do not fit the signature of the function that was called: nothing of it has run."""
    return error.__traceback__ is None or error.__traceback__.tb_next is None


def _takes(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Columns as wide as they need, for a terminal."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [head, tuple("-" * width for width in widths), *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in lines
    )


# ----------------------------------------------------------------------------------------------------------------------

_NOTES = "_attn_kernels_notes"  # an attribute of classes
_adapters: dict[str, Adapter] = {}  # those that are given by name
_classes: weakref.WeakSet[type[nn.Module]] = weakref.WeakSet()  # those that were given to ``adapts``
_fallbacks: weakref.WeakKeyDictionary[Any, Counter[str]] = weakref.WeakKeyDictionary()  # of a module: reason -> calls


class _Notes:
    """What is known of a class, kept in the class itself: so it ends with the class, although it refers to it."""

    def __init__(self) -> None:
        self.adapter: Adapter | None = None  # given to ``adapts`` for this very class
        self.forward: Any = None  # that of the class then
        self.fused: dict[type[Fused], type[Any]] = {}  # by mixin: the classes of patched modules

    def __reduce__(self) -> Any:
        return dict, ()  # a class that is pickled by value goes without


def _notes(cls: type) -> _Notes:
    notes = vars(cls).get(_NOTES)
    if not isinstance(notes, _Notes):
        notes = _Notes()
        setattr(cls, _NOTES, notes)
    return notes


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
    if isinstance(adapter, str):
        return adapter
    if _forward_is_replaced(module):
        return "its forward was replaced"
    replaced = replaced_on(module, cls, own_methods(cls, nn.Module))
    reason = f"its method {replaced[0]!r} was replaced" if replaced else adapter.fused.covers(module)
    if reason is None:
        _change_class(module, _fused_class(cls, adapter.fused))
    return reason


def _forward_is_replaced(module: nn.Module) -> bool:
    """Whether the module has a ``forward`` of its own; wrappers that are taken off may leave the patched one there."""
    forward = vars(module).get("forward")
    if isinstance(forward, types.MethodType) and forward.__self__ is module and forward.__func__ is Fused.forward:
        return False
    return forward is not None


def _change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Seen by what torch.compile has made before, too: in torch 2.10 and 2.11 its guards look at ``__dict__`` alone."""
    module.__class__ = cls
    module.__dict__["_attn_kernels"] = None
    del module.__dict__["_attn_kernels"]


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
    if any(_key(other) == _key(cls) and _notes(other).adapter is not None for other in _classes):
        return "an adapter was given for another class of this name, defined at another time or place"
    return "no adapter for its class" if _LOOKS_LIKE_ATTENTION.search(cls.__name__) else None


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
    _change_class(module, module._original)
    _fallbacks.pop(module, None)
    forget(module)


def _find(cls: type[nn.Module]) -> Adapter | str | None:
    """The adapter of a class; why the one that there is does not fit; None where there is none.

    The file of its library is imported, if there is one: the library itself is loaded.
    """
    file = cls.__module__.partition(".")[0]
    if file in _files():
        importlib.import_module(f"{__package__}.patches.{file}")
    notes = vars(cls).get(_NOTES)
    adapter = notes.adapter if isinstance(notes, _Notes) else None
    if adapter is not None:
        if cls.forward is not notes.forward:
            return "the forward of its class was replaced after its adapter was given"
    else:
        adapter = _adapters.get(_key(cls))
        if adapter is None:
            return None
        if "<locals>" in cls.__qualname__:
            return "its class was made by a function, which may make others of this name"
        if class_at(cls.__module__, cls.__qualname__) not in (cls, None):  # None: its module was not imported as such
            return f"it is not the class that {_class_name(cls)} is now, but another of this name"
    if adapter.sources:
        if digest(cls) not in adapter.sources:
            return f"its source is not that of {adapter.library} {adapter.versions}, which the adapter was written for"
        replaced = replaced_method(cls, _bypassed(adapter.fused))
        if replaced is not None:
            return f"the method {replaced!r} of its class was replaced"
    return adapter


@functools.cache
def _files() -> tuple[str, ...]:
    """The files of ``patches/``: each has the name of the top-level package that it serves."""
    from . import patches

    return patches.FILES


def _fused_class(original: type[nn.Module], fused: type[Fused]) -> type[Any]:
    made = _notes(original).fused
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
    }
    for name in _bypassed(fused):
        method = getattr(fused, name)
        if method is not Fused.forward and hasattr(original, name):
            names[name] = _while_patched(fused, name, method)
    return types.new_class(original.__name__, (fused, original), {}, lambda space: space.update(names))


def _bypassed(fused: type[Fused]) -> frozenset[str]:
    """Names of the methods of an original class that its mixin replaces."""
    return frozenset(n for n in own_methods(fused, object) if n == "forward" or n not in vars(Fused))


def _while_patched(fused: type[Fused], name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a mixin that stays right where it was stored, or wrapped, and its module is unpatched."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, fused):
            return method(self, *args, **kwargs)
        return getattr(type(self), name)(self, *args, **kwargs)

    return call


def _mixin(cls: type) -> type[Fused]:
    """The adapter within a class that _fused_class made, or one derived from it."""
    return next(base for base in cls.__mro__ if issubclass(base, Fused) and not issubclass(base, nn.Module))


def _rebuild(original: type[nn.Module], function: Callable[..., Any], *arguments: Any) -> Any:
    """An empty module of a patched class, for pickle and copy; where no adapter knows it, a plain one."""
    adapter = _find(original)
    if not isinstance(adapter, Adapter):
        return function(original, *arguments)
    return function(_fused_class(original, adapter.fused), *arguments)


def _key(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
