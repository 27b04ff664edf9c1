"""Stock modules: unmodified modules without hooks, whose call computes just what their class and parameters define.

A fast path that reads the parameters of a module without calling it is correct for stock modules only. Modifications by
users and libraries show in one of these places: the class of the module (subclasses, LoRA layers, parametrizations,
quantized and sharded modules), the functions of that class, instance attributes that override them (a replaced
``forward``, offloading), hooks of the module or of all modules, and the names and classes of its parameters (weight
norm, pruning, quantized and distributed tensors). A module that is not known to be stock is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as hooks_of_all
from torch.utils._device import DeviceContext

_CALL = ("forward", "__call__", "_call_impl", "_wrapped_call_impl", "_slow_forward", "__getattr__", "__getattribute__")


class _Class(NamedTuple):
    """A class as it was when it was registered."""

    functions: Callable[[type], tuple[Any, ...]]  # of the class, those that a call may reach
    originals: tuple[Any, ...]
    methods: frozenset[str]  # which an instance must not have as attributes
    parameters: frozenset[str]  # those that a call reads
    children: frozenset[str]
    buffers: frozenset[str]


_classes: dict[type[nn.Module], _Class] = {}
# Functions that the layers' forwards call; libraries replace these, too.
_functionals = attrgetter("linear", "embedding", "dropout")
_original_functionals = _functionals(nn.functional)
# Functions that attention is usually written with.
_of_torch = attrgetter("tanh", "softmax", "bmm", "matmul", "einsum", "cat", "sum")
_of_functional = attrgetter("linear", "softmax", "tanh", "conv1d", "conv2d", "dropout")
_original_of_torch, _original_of_functional = _of_torch(torch), _of_functional(nn.functional)


def register(
    cls: type[nn.Module],
    parameters: Iterable[str] = (),
    children: Iterable[str] = (),
    buffers: Iterable[str] = (),
) -> None:
    """Registers a class: its direct instances are stock as long as they and the class are unmodified.

    parameters, children, buffers: the names of all parameters, submodules and buffers that instances may have.
    """
    bases = [base for base in cls.__mro__ if issubclass(base, nn.Module) and base is not nn.Module]
    own = {name for base in bases for name, x in vars(base).items() if isinstance(x, FunctionType)}
    functions = attrgetter(*sorted(own | set(_CALL)))
    # Do not register a class whose call another module had replaced before this one was imported.
    modules = {base.__module__ for base in cls.__mro__}
    for name in ("forward", "__call__", "_call_impl"):
        if getattr(getattr(cls, name), "__globals__", {}).get("__name__") not in modules:
            return
    methods = frozenset(name for name in dir(cls) if callable(getattr(cls, name)) and name != "__class__")
    names = map(frozenset, (parameters, children, buffers))
    _classes[cls] = _Class(functions, functions(cls), methods, *names)


register(nn.Linear, ["weight", "bias"])
register(nn.Conv1d, ["weight", "bias"])
register(nn.Embedding, ["weight"])
register(nn.Dropout)
register(nn.LSTM)
register(nn.GRU)


def is_stock(module: object) -> bool:
    """Whether the module is unmodified, has no hooks, and is of a registered class.

    The caller has to check attributes such as sizes, ``bias=False`` or ``max_norm``, and submodules.
    """
    as_registered = _classes.get(type(module))  # type: ignore[arg-type]
    if as_registered is None or not isinstance(module, nn.Module):
        return False
    attributes = vars(module)
    parameters = module._parameters
    names = as_registered.parameters
    if isinstance(module, nn.RNNBase):
        names = frozenset(module._flat_weights_names)
        if not names <= parameters.keys():
            return False
    return (
        as_registered.functions(type(module)) == as_registered.originals
        and as_registered.methods.isdisjoint(attributes)
        and attributes.get("_compiled_call_impl") is None
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not has_global_hooks()
        and _functionals(nn.functional) == _original_functionals
        and parameters.keys() <= names
        and module._modules.keys() <= as_registered.children
        and module._buffers.keys() <= as_registered.buffers
        and all(x is None or is_plain(x) for x in module._buffers.values())
        and all(x is None or is_plain(x) for x in map(attributes.get, names))
        and all(x is None or is_plain(x) for x in parameters.values())
    )


def is_stock_linear(layer: Any) -> bool:
    """Whether a module is an unmodified ``nn.Linear`` without hooks."""
    if type(layer) is not nn.Linear:
        return False
    if not torch.compiler.is_compiling():
        return is_stock(layer)
    return type(layer.weight) is nn.Parameter and not is_watched(layer)


def is_watched(module: nn.Module) -> bool:
    """Whether an instance has hooks or its own ``forward``. torch.compile and torch.export can trace this check."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


def is_plain(x: object) -> bool:
    """Whether this is a plain strided tensor or parameter: not quantized, distributed, fake or uninitialised.

    A tensor counts, too, because ``torch.func.functional_call`` replaces parameters by tensors.
    """
    return type(x) in (nn.Parameter, Tensor) and x.layout is torch.strided and not x.is_meta  # type: ignore[attr-defined]


def functions_are_replaced() -> bool:
    """Whether one of the functions that attention is written with has been monkey-patched."""
    return _of_torch(torch) != _original_of_torch or _of_functional(nn.functional) != _original_of_functional


def has_global_hooks() -> bool:
    """Whether hooks are registered that the calls of all modules run."""
    return bool(
        hooks_of_all._global_forward_hooks
        or hooks_of_all._global_forward_pre_hooks
        or hooks_of_all._global_backward_hooks
        or hooks_of_all._global_backward_pre_hooks
    )


def runs_eagerly(device_type: str) -> bool:
    """Whether operators run eagerly on plain tensors, and nothing observes or changes single calls.

    False under torch.compile, torch.export, torch.jit.trace, autocast, transforms of torch.func, forward-mode AD, and
    torch function or dispatch modes (``torch.device`` as a context does not count).
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch.is_autocast_enabled(device_type)
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or _function_modes()
    )


def _function_modes() -> bool:
    count = torch._C._len_torch_function_stack()
    return any(type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(count))
