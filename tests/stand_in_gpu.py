"""A pytest plugin (``-p stand_in_gpu``) for machines without a GPU: the cuda backend is tested on a device "standin".

A tensor on this device wraps a CPU tensor, on which every operation runs. The kernels run in the emulator, as in other
runs. The difference: an operation on tensors of two devices raises an error, as with a GPU. So a test fails here if it
creates some tensors on the CPU for every backend. The stand-in does not support torch.compile and opcheck, which look
inside a tensor, and PyTorch's own RNN cells.

``--of-each-value FILE`` runs the cases that ``of_each_value`` selects for every test function, and writes their names
to FILE.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

NAME = "standin"
MIXED = f"tensors on {NAME} and on cpu"
# Operations that may get tensors of both devices.
MOVES = ("aten::_to_copy", "aten::copy_")
READS_THE_HOST = ("aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::_pack_padded_sequence")


class OnStandIn(Tensor):
    """A tensor on the stand-in device; its elements are in ``inner``, a CPU tensor."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnStandIn:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=f"{NAME}:0"
        )
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:
        return f"OnStandIn({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(operation, args, kwargs or {})


class StandIn(TorchDispatchMode):
    """Also intercepts operations that create tensors on the device or move them there."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(operation, args, kwargs or {})


def run(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs an operation on the CPU. Results are on the device of the arguments or on the requested device."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, OnStandIn)]
    here = [x for x in tensors if not isinstance(x, OnStandIn) and x.dim() > 0]  # a 0-D tensor may be on either device
    name = operation.name().partition(".")[0]
    if there and here and name not in MOVES and not (name in READS_THE_HOST and isinstance(tensors[0], OnStandIn)):
        raise RuntimeError(f"{operation}: {MIXED}")
    device = kwargs.get("device")
    stays = bool(there) if device is None else torch.device(device).type == NAME
    if name == "aten::copy_":
        stays = isinstance(args[0], OnStandIn)
    args, kwargs = tree_map_only(OnStandIn, lambda x: x.inner, (args, kwargs))
    if device is not None:
        kwargs = kwargs | {"device": "cpu"}
    out = operation(*args, **kwargs)
    if not stays:
        return out
    known = {id(x.inner): x for x in there}  # an in-place operation returns its argument
    on_device = tree_map_only(Tensor, lambda x: known.get(id(x)) if id(x) in known else OnStandIn(x), out)
    return (on_device[0], *out[1:]) if name == "aten::_pack_padded_sequence" else on_device  # sizes stay on the host


@contextmanager
def in_place_of_a_gpu() -> Iterator[None]:
    """backend="cuda" runs only on the stand-in, every other backend on the CPU."""
    backends = importlib.import_module("attn_kernels.backends")

    def refusal(backend: str, device_type: str) -> str | None:
        wanted = NAME if backend == "cuda" else "cpu"
        return None if backend == "reference" or device_type == wanted else f"it runs on {wanted} tensors"

    with pytest.MonkeyPatch.context() as patch, StandIn():
        for module in list(sys.modules.values()):
            if "device_of" in vars(module):
                patch.setattr(module, "device_of", lambda backend: NAME if backend == "cuda" else "cpu")
        patch.setattr(backends, "_refusal", refusal)
        patch.setattr(backends, "_chosen", {})
        yield


def of_each_value(items: list[pytest.Item]) -> list[pytest.Item]:
    """Selects, for every test function, cases that contain each value of each parameter once.

    It selects from the cases that are not slow, or from all if all are slow. The device of a tensor depends on the
    features of a case, not on its size, and never on a combination of two parameters.
    """
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    chosen = []
    for cases in functions.values():
        seen: set[tuple[str, str]] = set()
        quick = [item for item in cases if item.get_closest_marker("slow") is None]
        for item in quick or cases:
            parameters = item.callspec.params if hasattr(item, "callspec") else {"of no parameters": True}
            values = {(name, repr(value)) for name, value in parameters.items()}
            if not values <= seen:
                seen |= values
                chosen.append(item)
    return chosen


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--of-each-value", metavar="FILE")


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if path := config.getoption("--of-each-value"):
        items[:] = of_each_value(items)
        Path(path).write_text("\n".join(item.nodeid for item in items))


def pytest_configure() -> None:
    registration = importlib.import_module("torch.utils.backend_registration")  # PyTorch 2.11 and later
    module = registration._DummyBackendModule()
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    registration._setup_privateuseone_for_python_backend(NAME, module)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    if "cuda" not in (item.callspec.params.values() if hasattr(item, "callspec") else ()):
        return (yield)
    with in_place_of_a_gpu():
        return (yield)
