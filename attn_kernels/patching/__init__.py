"""``patch(model)``: runs the attention modules of other libraries on this package's ops.

A patched module keeps its parameters, buffers, hooks and state. Only its class changes, to a generated subclass of the
original class and an adapter. An adapter is a mixin with a ``forward`` that computes the module's result by this
package. ``libraries/`` has the adapters of known libraries, one file each. One for your own class takes about ten
lines::

    from attn_kernels import additive_attention, patch
    from attn_kernels.patching import Fused, NotSupported, adapts

    @adapts(MyAttention)
    class FusedMyAttention(Fused):
        def attend(self, state, memory, mask=None):  # the arguments and the result of MyAttention.forward
            if self.training and self.dropout.p > 0:
                return NotSupported("dropout of the alignments")
            return additive_attention(self.W(state), self.U(memory), memory, self.v.weight[0], mask=mask)

    print(patch(model))
"""

from __future__ import annotations

import contextlib
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..deprecation import renamed
from ..errors import ArgumentError
from ..sources import digest, own_methods, replaced_on
from .adapter import Fused, NotSupported, forward_is_replaced, hidden_attribute, run
from .classes import adapter_of, change_class, fused_class, restore_class
from .classes import rebuild as _rebuild  # the name in pickles of earlier versions
from .registry import AdapterSpec, adapters, adapts, find_adapter, namesake_has_adapter
from .report import Fallback, Replaced, Report, Skipped, class_name, table

__all__ = [
    "AdapterSpec",
    "ArgumentError",
    "Fallback",
    "Fused",
    "NotSupported",
    "Replaced",
    "Report",
    "Skipped",
    "_rebuild",
    "adapters",
    "adapts",
    "digest",
    "patch",
    "patched",
    "run",
    "table",
    "unpatch",
]

# Names of classes that are likely to compute attention, so that a report mentions them.
_LOOKS_LIKE_ATTENTION = re.compile(r"attention|attn|^Att[A-Z]|GATv2", re.IGNORECASE)


def patch(model: nn.Module) -> Report:
    """Makes every known attention module of a model run on this package's ops: same parameters, same results.

    Modules are changed in place, by replacing their class: parameters, ``state_dict``, hooks and attributes stay as
    they are, and ``isinstance`` still holds. A call that the ops do not support runs the original forward and is
    counted in ``report.fallbacks``. Patching again changes nothing. Copies and pickles of a patched model are patched.
    ``torch.jit.trace`` and ``torch.jit.script`` use the original forward, so that their programs do not need the ops.

    Args:
        model: any module. ``python -m attn_kernels patch-list`` lists the known classes; for your own see
            :mod:`attn_kernels.patching`.

    Returns:
        :class:`Report`: ``replaced``, ``skipped`` and ``fallbacks``; it prints as a table.

    Raises:
        TypeError: model is not a module.
    """
    check_model("patch", model)
    report = Report()
    for name, module in named_modules(model):
        reason = _patch_module(module)
        if isinstance(module, Fused):
            report.replaced.append(Replaced(name, module._original))
            report._modules.append((name, weakref.ref(module)))
        elif reason is not None:
            report.skipped.append(Skipped(name, type(module), reason))
    return report


def unpatch(model: nn.Module) -> list[Replaced]:
    """Restores the original class of every patched module of a model, and returns these modules.

    Raises ValueError, and changes nothing, if other code changed the class of a patched module again
    (``torch.nn.utils.parametrize`` does): undo that change first.
    """
    check_model("unpatch", model)
    return unpatch_modules("unpatch", model, set())


@contextlib.contextmanager
def patched(model: nn.Module) -> Iterator[Report]:
    """``with patched(model) as report:`` patches the model for a block. Modules that were patched before stay patched.

    Raises ValueError at the end if :func:`unpatch` would.
    """
    check_model("patched", model)
    before = {id(module) for _, module in named_modules(model) if isinstance(module, Fused)}
    report = patch(model)
    try:
        yield report
    finally:
        unpatch_modules("patched", model, before)


def check_model(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Like ``model.named_modules()``, and also the unregistered layers that a Keras model holds in lists."""
    modules = {id(module): (name, module) for name, module in model.named_modules()}
    for name, module in list(modules.values()):
        for layer in module._flatten_layers() if hasattr(module, "_flatten_layers") else ():
            modules.setdefault(id(layer), (f"{name}.{layer.name}".lstrip("."), layer))
    return list(modules.values())


def _patch_module(module: nn.Module) -> str | None:
    """Patches a module if an adapter supports it. Otherwise returns the reason, if it is worth reporting."""
    cls = type(module)
    if isinstance(module, Fused):
        return None
    adapter = find_adapter(cls)
    if adapter is None:
        return _skip_reason(module)
    if isinstance(adapter, str):
        return adapter
    if forward_is_replaced(module):
        return "its forward was replaced"
    replaced = replaced_on(module, cls, own_methods(cls, nn.Module))
    if replaced:
        return f"its method {replaced[0]!r} was replaced"
    hidden = hidden_attribute(module)
    if hidden is not None:
        return f"its attribute {hidden!r} has the name of one of the adapter's"
    reason = adapter.fused.unsupported_reason(module)
    if reason is None:
        change_class(module, fused_class(cls, adapter.fused))
    return reason


def _skip_reason(module: nn.Module) -> str | None:
    """The reason why a module without an adapter is skipped, if it looks like attention."""
    cls = type(module)
    for base in cls.__mro__[1:]:
        if issubclass(base, nn.Module) and find_adapter(base) is not None:
            return f"a subclass of {class_name(base)} may compute something else"
    if isinstance(module, nn.MultiheadAttention):
        return "PyTorch fuses it"
    if isinstance(module, torch.jit.ScriptModule):
        looks = _LOOKS_LIKE_ATTENTION.search(module.original_name)
        return "it is a script: patch the model before torch.jit.script is called" if looks else None
    if cls.__module__.partition(".")[0] == __name__.partition(".")[0]:
        return None
    if namesake_has_adapter(cls):
        return "an adapter was given for another class of this name, defined at another time or place"
    return "no adapter for its class" if _LOOKS_LIKE_ATTENTION.search(cls.__name__) else None


def unpatch_modules(function: str, model: nn.Module, keep: set[int]) -> list[Replaced]:
    """Unpatches all modules except those whose ids are in ``keep``. function: name for error messages."""
    modules = [(name, m) for name, m in named_modules(model) if isinstance(m, Fused) and id(m) not in keep]
    for name, module in modules:
        if type(module) is not fused_class(module._original, adapter_of(type(module))):
            changed = type(module).__name__
            raise ValueError(f"{function}: {name or 'model'} was patched and then made a {changed}: undo that first")
    replaced = [Replaced(name, module._original) for name, module in modules]
    for _, module in modules:
        restore_class(module)
    return replaced


__getattr__: Callable[[str], Any] = renamed(__name__, {"Uncovered": NotSupported, "Adapter": AdapterSpec})
