"""The class of watched modules: their calls are captured."""

from __future__ import annotations

import copy
import types
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook

from .state import STATE, is_tracing, kind_of, restore_class, state_of

_module_call = nn.Module._wrapped_call_impl  # nn.Module.__call__, unless a tracer has replaced it
_watched_classes: weakref.WeakKeyDictionary[type[nn.Module], type[Any]] = weakref.WeakKeyDictionary()


class Watched:
    """Mixed in before the class of a module. It has names that no module uses: they would hide attributes."""

    _attn_kernels_original: ClassVar[type[nn.Module]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Like PyTorch's, with a shortcut to the original if it was chosen and no hooks have to run. It keeps small
        calls, of which there may be thousands, from being slower than before.
        """
        if not (is_compiling() or is_tracing()) and _module_call is nn.Module.__call__:
            attributes = self.__dict__
            state = attributes.get(STATE)
            if (
                state is not None
                and (state.rest > 0 or state.is_left_alone(attributes, args))
                and not (
                    attributes["_forward_hooks"]
                    or attributes["_forward_pre_hooks"]
                    or attributes["_backward_hooks"]
                    or attributes["_backward_pre_hooks"]
                    or "forward" in attributes
                    or "_compiled_call_impl" in attributes
                    or _has_any_global_hook()
                )
            ):
                state.rest -= 1
                return self._attn_kernels_original.forward(self, *args, **kwargs)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # An outer torch.compile gets the original's operations, and may rewrite them itself; a trace gets them, too.
        if is_compiling() or is_tracing():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        state = self.__dict__.get(STATE)
        if state is None:
            state = state_of(self)
        kind = kind_of(self.__dict__, args)
        choice = state.choices.get(kind)
        if choice is False:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return state.run(self, args, kwargs, kind, choice)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles as the original class, to be fused again: the generated class cannot be imported."""
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        function, arguments, *rest = reduced
        if not arguments or arguments[0] is not type(self):
            raise TypeError(f"{type(self).__name__}: its class has a __reduce__ of its own; unfuse it to pickle it")
        if rest and isinstance(rest[0], dict):
            rest[0] = {name: value for name, value in rest[0].items() if name != STATE}
        return (rebuild, (self._attn_kernels_original, function, *arguments[1:]), *rest)

    def __prepare_scriptable__(self) -> nn.Module:
        """The original module, which torch.jit.script compiles and puts into the model in place of this module."""
        original = copy.copy(self)
        restore_class(original)
        return original  # type: ignore[return-value]


def watched_class(original: type[nn.Module]) -> type[Any]:
    cls = _watched_classes.get(original)
    if cls is None:
        names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
        names["_attn_kernels_original"] = original  # type: ignore[assignment]
        bases = (Watched, original)
        cls = types.new_class(original.__name__, bases, {}, lambda space: space.update(names))
        _watched_classes[original] = cls
    return cls


def rebuild(original: type[nn.Module], function: Callable[..., Any], *arguments: Any) -> Any:
    """An empty module of a watched class, for pickle and copy."""
    return function(watched_class(original), *arguments)
