"""Decides from the code of modules which of them may compute attention."""

from __future__ import annotations

import dis
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

NO_TANH_OR_SOFTMAX = "its code has neither a tanh nor a softmax, and so no attention"


def contains(module: nn.Module, other: nn.Module) -> bool:
    return any(part is other for part in module.modules())


_NAMES = frozenset(("tanh", "tanh_", "Tanh", "softmax", "Softmax"))  # the code of attention has one of these names


def may_attend(module: nn.Module) -> bool:
    """Whether a module computes a tanh or a softmax, in its code or with a layer."""
    cls = type(module)
    if not is_foreign(module):
        return False
    if any(isinstance(part, (nn.Tanh, nn.Softmax)) for part in layers_of(module)):
        return True
    if any(getattr(value, "__name__", "") in _NAMES for value in module.__dict__.values()):
        return True
    seen: set[Any] = set()
    return any(
        _mentions(function, seen)
        for base in cls.__mro__
        if base.__module__.partition(".")[0] != "torch" and base is not object
        for function in vars(base).values()
    )


def layers_of(module: nn.Module) -> Iterator[nn.Module]:
    """The children of a module, including those inside PyTorch's containers."""
    for child in module.children():
        if isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            yield from layers_of(child)
        yield child


def _mentions(function: Any, seen: set[Any], depth: int = 3) -> bool:
    function = getattr(function, "__func__", function)
    if isinstance(function, property):
        function = function.fget
    if not isinstance(function, types.FunctionType) or function in seen:
        return False
    seen.add(function)
    codes, names = [function.__code__], set()
    while codes:
        code = codes.pop()
        names |= {*code.co_names, *code.co_freevars, *(x for x in code.co_consts if isinstance(x, str))}
        codes += [x for x in code.co_consts if isinstance(x, types.CodeType)]
    if not names.isdisjoint(_NAMES):
        return True
    helpers = (function.__globals__.get(name) for name in names)
    return depth > 0 and any(
        _mentions(helper, seen, depth - 1)
        for helper in helpers
        if isinstance(helper, types.FunctionType) and not helper.__module__.startswith("torch")
    )


def has_loops(module: Any) -> bool:
    """Whether a module's forward has loops: a loop over steps gives another graph for every number of steps."""
    code = getattr(getattr(module, "_attn_kernels_original", type(module)).forward, "__code__", None)
    return code is not None and any(instruction.opname == "FOR_ITER" for instruction in dis.get_instructions(code))


def is_foreign(module: nn.Module) -> bool:
    """Whether a module's class is neither PyTorch's nor this package's, and the module is not a script."""
    own = type(module).__module__.partition(".")[0] in ("torch", __name__.partition(".")[0])
    return not own and not isinstance(module, torch.jit.ScriptModule)
