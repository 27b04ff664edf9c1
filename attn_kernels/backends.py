"""What can compute the ops here, why the rest cannot, and how one is chosen."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType
from typing import NamedTuple

import torch

NAMES = ("cuda", "triton", "cpu", "reference")  # fastest first


class Backend(NamedTuple):
    """One line of ``backends()``.

    name: what ``backend=`` takes. available: whether it can run here. detail: what it runs on, or why it cannot run.
    """

    name: str
    available: bool
    detail: str


def backends() -> dict[str, Backend]:
    """Every backend by name, fastest first, with what it runs on or the reason why it cannot run here."""
    return {name: Backend(name, *_PROBES[name]()) for name in NAMES}


def choose(backend: str | None, device_type: str) -> str:
    """The backend that computes on tensors of ``device_type``: the named one, or the fastest that can.

    Raises ValueError, with the reason, where a named backend cannot: it is never replaced by another.
    """
    if backend is not None and not isinstance(backend, str):
        raise TypeError(_unknown(backend))
    chosen = _chosen.get((backend, device_type))
    if chosen is None:
        chosen = _chosen[backend, device_type] = _choose(backend, device_type)
    return chosen


# torch.compile is to call it and take the result for a constant. This is all that torch.compiler.assume_constant_result
# does, and that function imports the whole compiler: 2.5 seconds, for everyone who imports this package.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


_chosen: dict[tuple[str | None, str], str] = {}


def _choose(backend: str | None, device_type: str) -> str:
    if backend is None:
        for name in NAMES:
            if _refusal(name, device_type) is None and not (name == "triton" and device_type == "cpu"):
                return name
    if backend not in NAMES:
        raise ValueError(_unknown(backend))
    reason = _refusal(backend, device_type)
    if reason is not None:
        raise ValueError(f"attn_kernels: backend={backend!r} cannot be used on {device_type} tensors: {reason}")
    return backend


def _unknown(backend: object) -> str:
    return f"attn_kernels: backend must be one of {', '.join(map(repr, NAMES))} or None, got {backend!r}"


def _refusal(name: str, device_type: str) -> str | None:
    """Why a backend cannot compute on tensors of this device type; None if it can."""
    devices = {"cuda": ("cuda",), "triton": _triton_devices(), "cpu": ("cpu",)}
    if name != "reference" and device_type not in devices[name]:
        available, detail = _PROBES[name]()
        return detail if not available else f"it runs on {' and '.join(devices[name])} tensors"
    if name == "triton":
        return _load_triton()
    available, detail = _PROBES[name]()
    return None if available else detail


# cpu: the compiled module _C --------------------------------------------------------------------------------------


def _load_compiled() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("attn_kernels._C"), ""
    except ModuleNotFoundError as error:
        if error.name != "attn_kernels._C":
            return None, f"the compiled module failed to load: {error}"
        return None, "the compiled module attn_kernels._C was not built: pip install . needs a C++17 compiler"
    except ImportError as error:
        return None, f"the compiled module failed to load: {error}"


_compiled, _compiled_reason = _load_compiled()


def build_info() -> dict[str, str] | None:
    """How the compiled module was built and what it found at run time; None without one."""
    return None if _compiled is None else _compiled.build_info()


def _probe_cpu() -> tuple[bool, str]:
    if _compiled is None:
        return False, _compiled_reason
    info = _compiled.build_info()
    return True, f"C++ kernels, {info['simd']} in use, built with {info['compiler']}"


# triton -----------------------------------------------------------------------------------------------------------


def _triton_devices() -> tuple[str, ...]:
    """Where Triton kernels run: in the interpreter also on the CPU, slowly, for tests."""
    return ("cuda", "xpu", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda", "xpu")


def _load_triton() -> str | None:
    """Imports the Triton kernels, which registers them; the reason where that fails."""
    try:
        importlib.import_module("attn_kernels.triton")
    except ImportError as error:
        return f"triton cannot be imported ({error}): pip install 'attn_kernels[triton]'"
    return None


def _probe_triton() -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed: pip install 'attn_kernels[triton]'"
    if os.environ.get("TRITON_INTERPRET") == "1":
        reason = _load_triton()
        return reason is None, reason or "in the interpreter (TRITON_INTERPRET=1)"
    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        return False, "no GPU was found; TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, for tests"
    reason = _load_triton()
    return reason is None, reason or f"on {_gpu_name()}"


def _gpu_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else torch.xpu.get_device_name()


# cuda, reference --------------------------------------------------------------------------------------------------


def _probe_cuda() -> tuple[bool, str]:
    return False, "this version of attn_kernels has no CUDA C++ kernels yet; on a GPU, triton computes the ops"


def _probe_reference() -> tuple[bool, str]:
    return True, "plain PyTorch, on any device"


_PROBES = {"cuda": _probe_cuda, "triton": _probe_triton, "cpu": _probe_cpu, "reference": _probe_reference}
