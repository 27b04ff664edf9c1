"""Seq2Seq with ``torch.distributed.fsdp.fully_shard`` applied to encoder and decoder.

Parameters that are sharded exist while a ``forward`` runs. What else reads them is made a forward method, or runs while
they are gathered.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to the module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # who has applied it has imported it
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def as_forward(module: nn.Module, method: str) -> Callable[..., Any]:
    """A method of the module; of a sharded one, such that it gathers and shards parameters as ``forward`` does."""
    if not is_sharded(module):
        own_method: Callable[..., Any] = getattr(module, method)
        return own_method
    attributes = vars(module)
    own = {method: attributes[method]} if method in attributes else {}
    sys.modules["torch.distributed.fsdp"].register_fsdp_forward_method(module, method)
    registered: Callable[..., Any] = attributes.pop(method)
    attributes.update(own)
    return registered


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """The parameters of sharded modules are gathered: once for a search, whose number of steps differs by process."""
    modules: list[Any] = [module for module in model.modules() if is_sharded(module)]
    for module in modules:
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()


def without_sharding(hooks: Any) -> Any:
    """A copy of the hooks of a sharded module, without those that gather and shard its parameters."""
    places = ("torch.distributed.fsdp.", "torch.distributed._composable.")
    return type(hooks)((key, hook) for key, hook in hooks.items() if not hook.__module__.startswith(places))
