"""Backends: which of them can run here, why the others cannot, and how one is chosen."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any, NamedTuple

import torch

from .errors import ArgumentTypeError, ArgumentValueError

NAMES = ("cuda", "triton", "cpu", "reference")  # fastest first


class Backend(NamedTuple):
    """A backend and its availability.

    name: the value for ``backend=``. available: whether it can run here. detail: what it runs on, or why it cannot run.
    """

    name: str
    available: bool
    detail: str


def backends() -> dict[str, Backend]:
    """All backends by name, fastest first, with what each runs on or why it cannot run here."""
    return {name: Backend(name, *_PROBES[name]()) for name in NAMES}


def choose(backend: str | None, device_type: str) -> str:
    """The backend for tensors of ``device_type``: the named one, or the fastest that can run.

    Raises ValueError with the reason if a named backend cannot run: it is never replaced by another.
    """
    if backend is not None and not isinstance(backend, str):
        raise ArgumentTypeError(_unknown(backend))
    chosen = _chosen.get((backend, device_type))
    if chosen is None:
        chosen = _chosen[backend, device_type] = _choose(backend, device_type)
    return chosen


# torch.compile calls it while tracing and treats the result as a constant. torch.compiler.assume_constant_result does
# just this, but imports the whole compiler: 2.5 seconds for everyone who imports this package.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose_among(able: tuple[str, ...], backend: str | None, device_type: str) -> str | None:
    """As ``choose``, for a call that only the backends ``able`` (and "reference") have; None if none of them fits."""
    chosen = choose(backend, device_type)
    if chosen in able or chosen == "reference":
        return chosen
    if backend is None:
        for name in able:
            if _can_run(name, device_type):
                return name
    return None


def _can_run(name: str, device_type: str) -> bool:
    able = _able.get((name, device_type))
    if able is None:
        able = _able[name, device_type] = _refusal(name, device_type) is None
    return able


_can_run._dynamo_marked_constant = True  # type: ignore[attr-defined]
_able: dict[tuple[str, str], bool] = {}
_chosen: dict[tuple[str | None, str], str] = {}


def _choose(backend: str | None, device_type: str) -> str:
    if backend is None:
        for name in NAMES:
            if _refusal(name, device_type) is None and not (name in ("cuda", "triton") and device_type == "cpu"):
                return name
    if backend not in NAMES:
        raise ArgumentValueError(_unknown(backend))
    reason = _refusal(backend, device_type)
    if reason is not None:
        raise ArgumentValueError(f"attn_kernels: backend={backend!r} cannot be used on {device_type} tensors: {reason}")
    return backend


def _unknown(backend: object) -> str:
    return f"attn_kernels: backend must be one of {', '.join(map(repr, NAMES))} or None, got {backend!r}"


def _refusal(name: str, device_type: str) -> str | None:
    """Why a backend cannot run on tensors of this device type; None if it can."""
    devices = {"cuda": ("cpu",) if emulated() else ("cuda",), "triton": _triton_devices(), "cpu": ("cpu",)}
    if name != "reference" and device_type not in devices[name]:
        available, detail = _PROBES[name]()
        return detail if not available else f"it runs on {' and '.join(devices[name])} tensors"
    if name == "triton":
        return _load_triton()
    available, detail = _PROBES[name]()
    return None if available else detail


# cpu: the compiled module _C --------------------------------------------------------------------------------------


def _load_compiled(name: str, missing: str) -> tuple[ModuleType | None, str]:
    """A compiled module of this package, or why it cannot be loaded. missing: the advice if it was not built."""
    try:
        return importlib.import_module(f".{name}", __package__), ""
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}.{name}":
            return None, f"the compiled module failed to load: {error}"
        return None, f"the compiled module attn_kernels.{name} was not built: {missing}"
    except ImportError as error:
        return None, f"the compiled module failed to load: {error}"


_compiled, _compiled_reason = _load_compiled("_C", "pip install . needs a C++17 compiler")


def build_info() -> dict[str, str] | None:
    """How the compiled module was built and what it found at run time; None without one."""
    info: dict[str, str] | None = None if _compiled is None else _compiled.build_info()
    return info


def checksums() -> Any:
    """``checksums(address, bytes, pieces)`` of the compiled module; None without one."""
    return None if _compiled is None else _compiled.checksums


def _probe_cpu() -> tuple[bool, str]:
    if _compiled is None:
        return False, _compiled_reason
    info = _compiled.build_info()
    return True, f"C++ kernels, {info['simd']} in use, built with {info['compiler']}"


# triton -----------------------------------------------------------------------------------------------------------


def _triton_devices() -> tuple[str, ...]:
    """The devices that Triton kernels run on; with the interpreter, which is slow and for tests, also the CPU."""
    return ("cuda", "xpu", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda", "xpu")


def _load_triton() -> str | None:
    """Imports the Triton kernels, which registers them. Returns the reason if that fails, else None."""
    try:
        importlib.import_module(".triton", __package__)
    except ImportError as error:
        return f"triton cannot be imported ({error}): pip install 'attn_kernels[triton]'"
    if os.environ.get("TRITON_INTERPRET") == "1":
        triton, numpy = (importlib.import_module(name).__version__ for name in ("triton", "numpy"))
        if _release(triton) < (3, 7) and _release(numpy) >= (2, 4):
            return f"the interpreter of Triton {triton} fails with NumPy {numpy}: pip install 'numpy<2.4'"
    return None


def _release(version: str) -> tuple[int, int]:
    """``3.6.0+git1234`` -> ``(3, 6)``"""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


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


# cuda: the compiled module _C_cuda --------------------------------------------------------------------------------

_cuda, _cuda_reason = _load_compiled(
    "_C_cuda", "it needs nvcc and a PyTorch with CUDA; ATTN_KERNELS_CUDA=1 insists on it"
)


def cuda_build_info() -> dict[str, Any] | None:
    """How the module of CUDA kernels was built; None without one."""
    info: dict[str, Any] | None = None if _cuda is None else _cuda.build_info()
    return info


def emulated() -> bool:
    """Whether the CUDA kernels run on the CPU, in the emulator of the tests."""
    return _cuda is not None and _cuda.build_info()["emulated"]


def _probe_cuda() -> tuple[bool, str]:
    if _cuda is None:
        return False, _cuda_reason
    if emulated():
        return True, "CUDA C++ kernels in an emulator on the CPU, for tests"
    if torch.version.cuda is None:
        return False, "this PyTorch was built without CUDA"
    if not torch.cuda.is_available():
        return False, "no NVIDIA GPU was found"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return False, f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, 8.0 is needed"
    info = _cuda.build_info()
    return True, f"CUDA C++ kernels for {info['architectures']} on {torch.cuda.get_device_name()}, nvcc {info['nvcc']}"


# reference --------------------------------------------------------------------------------------------------------


def _probe_reference() -> tuple[bool, str]:
    return True, "plain PyTorch, on any device"


_PROBES = {"cuda": _probe_cuda, "triton": _probe_triton, "cpu": _probe_cpu, "reference": _probe_reference}
