"""Evaluation of a model without changing its mode: a shallow copy in evaluation mode that shares everything else."""

from __future__ import annotations

import functools
import sys
import types
from typing import Any, TypeVar

import torch
from torch import nn

from .sharded import is_sharded, without_sharding

Module = TypeVar("Module", bound=nn.Module)


def in_evaluation(model: Module, always: bool = False) -> Module:
    """The model itself if no module is in training mode; otherwise a shallow copy in evaluation mode.
    always: a copy in any case, for a caller who sets attributes of it.

    Of a model that is sharded by ``fully_shard``, a copy that is not, for as long as the parameters are gathered.

    The copy is shallow: modules with the same parameters, buffers and hooks, of which nothing but the mode is another.
    So no thread that trains the model meanwhile loses its dropout. What a module notes in attributes of its own during
    a call is noted in the copy. TorchScript modules cannot be copied so, and keep the mode that they are in.
    """
    if not (always or any(module.training or is_sharded(module) for module in model.modules())):
        return model
    copy: Module = _copy(model, {})
    return copy


def _copy(module: Any, made: dict[int, Any]) -> Any:
    if id(module) in made:
        return made[id(module)]
    if isinstance(module, torch.jit.ScriptModule):
        return module
    compiled = sys.modules.get("torch._dynamo.eval_frame")
    if compiled is not None and isinstance(module, compiled.OptimizedModule):
        return _copy(module._orig_mod, made)  # what is compiled belongs to the original
    # The second base of a sharded module's class is the class that it had before.
    copy: Any = object.__new__(type(module).__mro__[2] if is_sharded(module) else type(module))
    made[id(module)] = copy
    attributes = {name: _rebind(value, module, copy) for name, value in vars(module).items()}
    children = {name: child if child is None else _copy(child, made) for name, child in module._modules.items()}
    vars(copy).update(attributes, training=False, _modules=children)
    if attributes.get("_compiled_call_impl") is not None:
        vars(copy)["_compiled_call_impl"] = None
    if is_sharded(module):
        hooks = ("_forward_pre_hooks", "_forward_hooks")
        vars(copy).update((name, without_sharding(attributes[name])) for name in hooks)
    return copy


def _rebind(value: Any, module: nn.Module, copy: nn.Module) -> Any:
    """A method of ``module`` as one of ``copy``, as where an instance has its own ``forward``."""
    if isinstance(value, types.MethodType) and value.__self__ is module:
        return types.MethodType(value.__func__, copy)
    if isinstance(value, functools.partial) and any(x is module for x in value.args):
        arguments = (copy if x is module else x for x in value.args)
        return functools.partial(value.func, *arguments, **value.keywords)
    return value
