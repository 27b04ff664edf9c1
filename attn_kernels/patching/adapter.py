"""Adapters: they compute a module's result by this package, and decide when the original forward runs instead."""

from __future__ import annotations

import copy
import inspect
import types
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..errors import ArgumentError
from ..sources import own_methods, replaced_on
from ..stock import functions_are_replaced


class NotSupported(NamedTuple):
    """The result of ``attend`` for a call that the ops do not support: the original forward runs and is counted."""

    reason: str


class Fused:
    """Base of adapters: mixed in before the class of a module, so that ``self`` is the module.

    A subclass has :meth:`attend`, and :meth:`unsupported_reason` if not every module of the class can be patched. It
    may also override further methods of the original class; ``super()`` in them is that class.
    """

    # Calls with fewer products run the original; MIN_PRODUCTS in adapters whose originals are faster there.
    min_products: ClassVar[int] = 0

    # Set in the class of a patched module: see classes.py.
    _original: ClassVar[type[nn.Module]]
    _own_forward: ClassVar[Any]  # of the original class, when the class of the patched module was made
    _own_methods: ClassVar[frozenset[str]]  # names of the methods of the original class
    _rebuild: ClassVar[Callable[..., Any]]  # what pickle and copy call

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        """Why a module is not patched, such as an option that no call supports; None to patch it."""
        return None

    def attend(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the result of the original ``forward`` for these arguments, or ``NotSupported(reason)``.

        It updates the module's state as the original does, but must not change it if it returns NotSupported.
        """
        raise NotImplementedError(f"{type(self).__name__}: its adapter has no attend")

    def count_products(self, elements: int) -> float:
        """The number of products in a call, from the number of elements of its largest tensor, the memory.

        One query uses each element of the memory once for its score, and once for the context.
        """
        return elements

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, Fused):  # the module was unpatched, but it still holds a wrapper of this method
            return type(self).forward(self, *args, **kwargs)
        if is_small(self, args, kwargs):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return run(self, super().forward, args, kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles and copies as the original class, to be patched again: the generated class cannot be imported."""
        if not isinstance(self, Fused):  # unpatched since this method was looked up
            return type(self).__reduce_ex__(self, protocol)
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        function, arguments, *rest = reduced
        if not arguments or arguments[0] is not type(self):
            raise TypeError(f"{type(self).__name__}: its class has a __reduce__ of its own; unpatch it to pickle it")
        return (type(self)._rebuild, (self._original, function, *arguments[1:]), *rest)

    def __prepare_scriptable__(self) -> nn.Module:
        """The original module for torch.jit.script, which cannot call the ops.

        torch.jit.script also replaces this module in the model by it, as it does with any result of this method.
        """
        original = copy.copy(self)
        original.__class__ = self._original  # type: ignore[assignment]
        return original  # type: ignore[return-value]


# The rule for small calls: the faster op has to save more than the overhead of an adapter, 20 to 60 us of Python.
# Measured in November 2026 with the libraries themselves on one loaded core of an x86-64 server (AVX-512): CPU time of
# original / patched, for a step without gradients and a step in training, by the number of products (B T D).
#
#                               2^14         2^15         2^16         2^17         2^18
#   ESPnet AttAdd            0.66 0.86    0.77 0.92                 1.09 1.22
#   ESPnet AttLoc            0.68 0.84    0.85 0.95                 0.95 1.27
#   ESPnet AttDot            0.55 0.84    0.57 0.75                 0.87 1.09
#   SpeechBrain, additive    0.92 1.04    0.94 0.98    1.02 1.11    1.14 1.13    1.16 1.45
#   SpeechBrain, key-value   0.73 1.09    0.80 0.99    0.90 1.04    0.93 1.05    1.08 1.19
#   fairseq, general         0.75 0.84    0.75 0.85    0.86 0.97    1.13 1.35    1.50 1.79
#   Tacotron 2                            0.81 0.93    0.80 0.72    0.82 0.99    1.03 1.02
#
# Below 2^16 there is no gain; from 2^16 to 2^18 it depends on the class and on gradients. Other adapters have no such
# limit: they save a projection of the memory in each step, or have many queries per call.
MIN_PRODUCTS = 1 << 16


def is_small(module: Fused, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is so small that the original is faster. It does not count as a fallback."""
    least = min_products(module)
    if least == 0:
        return False
    elements = 0
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor):
            elements = max(elements, x.numel())
    return module.count_products(elements) < least


def min_products(module: Fused) -> int:
    return module.min_products


def hidden_attribute(module: nn.Module) -> str | None:
    """The name of a module attribute that an attribute of the adapter would hide, if there is one."""
    return next((name for name in vars(Fused) if name[0] != "_" and name != "forward" and hasattr(module, name)), None)


def overridden_methods(fused: type[Fused]) -> frozenset[str]:
    """Names of the methods of an original class that its adapter overrides."""
    return frozenset(n for n in own_methods(fused, object) if n == "forward" or n not in vars(Fused))


# A call ---------------------------------------------------------------------------------------------------------------

fallbacks: weakref.WeakKeyDictionary[Any, Counter[str]] = weakref.WeakKeyDictionary()  # of a module: reason -> calls


def run(module: Any, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of ``attend``; that of ``original`` if it is NotSupported, or if an op refuses an argument.

    Only ArgumentError is caught: any other error comes from the caller or is a bug in the adapter, and is raised.
    """
    reason = None if is_compiling() else _reason_against_call(module)
    if reason is None:
        try:
            result = module.attend(*args, **kwargs)
        except ArgumentError as error:
            if not is_compiling() and _is_from_a_module(error):
                raise  # hooks and submodules have run, and one of them failed: they must not run twice
            reason = f"{type(error).__name__}: {error}"
        except TypeError as error:
            if is_compiling() or not _is_of_call(error) or _takes(original, args, kwargs):
                raise
            return original(*args, **kwargs)  # it raises an error that names its own parameters
        else:
            if not isinstance(result, NotSupported):
                return result
            reason = result.reason
    if not is_compiling():  # a compiled graph would be recompiled for every count
        fallbacks.setdefault(module, Counter())[reason] += 1
    return original(*args, **kwargs)


def _reason_against_call(module: Any) -> str | None:
    """The reason why the original runs in the current mode, for any arguments."""
    if torch._C._are_functorch_transforms_active():
        return "transforms of torch.func"
    if torch._C._is_tracing():
        return "torch.jit.trace"  # if the ops have gradients, it would record a call into Python
    if module._original.forward is not type(module)._own_forward:
        return "the forward of its class was replaced"
    if functions_are_replaced():
        return "a function of PyTorch was replaced"
    if not module._own_methods.isdisjoint(module.__dict__):
        replaced = replaced_on(module, module._original, module._own_methods)  # except the forward that was called
        if replaced:
            return f"its method {replaced[0]!r} was replaced"
    return None


def _is_from_a_module(error: BaseException) -> bool:
    """Whether an error was raised inside the call of a module, not by the adapter itself."""
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code is nn.Module._call_impl.__code__:
            return True
        traceback = traceback.tb_next
    return False


def _is_of_call(error: TypeError) -> bool:
    """Whether the arguments did not fit the signature of the called function, so that none of its code has run."""
    return error.__traceback__ is None or error.__traceback__.tb_next is None


def _takes(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def forward_is_replaced(module: nn.Module) -> bool:
    """Whether the module has its own ``forward`` attribute. A removed wrapper may leave the patched forward there."""
    forward = vars(module).get("forward")
    if isinstance(forward, types.MethodType) and forward.__self__ is module and forward.__func__ is Fused.forward:
        return False
    return forward is not None
