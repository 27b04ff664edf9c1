"""The machine of a benchmark (processor, versions, threads, allocator) and the peak memory of a call."""

from __future__ import annotations

import ctypes
import datetime
import gc
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import attn_kernels
from attn_kernels.version import __version__

if TYPE_CHECKING:
    from rich.text import Text

# Parameters of glibc's mallopt.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4


class Allocator(str, Enum):
    """How malloc treats freed memory during the measurement.

    reuse: freed pages stay in the process and are reused by the next call. Fresh pages can cost more than the
    arithmetic, and eager PyTorch needs the most of them, so this setting helps eager most. default: glibc's default,
    which returns large blocks to the system and requests them again in each call.
    """

    reuse = "reuse"
    default = "default"


def set_allocator(allocator: Allocator) -> str:
    """Sets malloc for the timing of calls; returns a description of the setting for the result file."""
    if allocator is Allocator.default:
        return "system malloc, its default settings"
    if not _mallopt({_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 64 << 20}):
        return "system malloc, its default settings (settings for page reuse need glibc)"
    return "glibc malloc, freed pages kept for reuse (mallopt M_MMAP_MAX=0, M_TRIM_THRESHOLD=-1)"


def set_allocator_for_memory(allocator: Allocator) -> None:
    """Makes malloc return large blocks to the system at once, so that peak resident memory shows what a call holds."""
    if allocator is Allocator.reuse:
        _mallopt({_MMAP_MAX: 1 << 16, _MMAP_THRESHOLD: 128 << 10, _TRIM_THRESHOLD: 128 << 10, _TOP_PAD: 0})


def _mallopt(settings: dict[int, int]) -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(parameter, value) == 1 for parameter, value in settings.items()])


def peak_memory(call: Callable[[], object], device: torch.device) -> float | None:
    """Peak memory in MB (10^6 bytes) of one call, minus the memory held before it; None if it cannot be measured.

    It counts everything alive at the peak: intermediates, tensors saved for the backward, outputs and gradients. On the
    CPU it is the peak resident memory. That includes every allocation, not only PyTorch's, to within half a MB. The
    call must have run before, so that one-time allocations (code, thread pools) are not counted.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _resident("VmRSS")
        call()
        return max(0.0, (_resident("VmHWM") - before) * 1024 / 1e6)
    except OSError:  # not Linux, or not permitted
        return None


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def describe(device: torch.device, allocator: str) -> dict[str, str | int]:
    """The conditions of a measurement: printed with every table and stored in every result."""
    description: dict[str, str | int] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "allocator": allocator,
        "attn_kernels": __version__,
        "commit": commit(),
        "backends": "; ".join(
            f"{backend.name}: {backend.detail}" for backend in attn_kernels.backends().values() if backend.available
        ),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler of torch.compile": _compiler(device),
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}".strip(),
        "date": datetime.date.today().isoformat(),
    }
    if device.type == "cuda":
        description["host processor"] = processor()
        description["cuda"] = str(torch.version.cuda)
    return description


def commit() -> str:
    """``git describe`` of this folder; in a copy without .git, the value of ATTN_KERNELS_COMMIT."""
    described = _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    return described or os.environ.get("ATTN_KERNELS_COMMIT") or "unknown"


def as_text(description: dict[str, str | int]) -> Text:
    """The description as lines to print under a table, without line breaks."""
    from rich.text import Text

    lines = "\n".join(f"{name}: {value}" for name, value in description.items())
    return Text(lines, style="dim", no_wrap=True, overflow="ignore")


def processor() -> str:
    """The name of the CPU with family and model numbers, as the name alone may not identify its generation."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields and "model" in fields:
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return f"{name}, {os.cpu_count()} cores"


def _compiler(device: torch.device) -> str:
    if device.type == "cuda":
        try:
            import triton
        except ImportError:
            return "none: triton is not installed"
        return f"triton {triton.__version__}"
    compiler = os.environ.get("CXX") or "g++"
    version = _output(compiler, "--version") if shutil.which(compiler) else ""
    return version.splitlines()[0] if version else "none: g++ was not found"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
