"""Where a benchmark ran (processor, versions, threads, allocator) and how much memory a call takes there."""

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
    """The treatment of freed memory by malloc during the measurement.

    reuse: freed pages stay with the process and serve the next call. Fresh pages can cost more than the arithmetic, and
    eager PyTorch asks for the most of them, so this setting favours eager most. default: glibc's own, which gives large
    blocks back to the system and fetches them anew in each call.
    """

    reuse = "reuse"
    default = "default"


def set_allocator(allocator: Allocator) -> str:
    """Sets malloc for the timing of calls; returns what is in effect, for the record."""
    if allocator is Allocator.default:
        return "system malloc, its default settings"
    if not _mallopt({_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 64 << 20}):
        return "system malloc, its default settings (settings for page reuse need glibc)"
    return "glibc malloc, freed pages kept for reuse (mallopt M_MMAP_MAX=0, M_TRIM_THRESHOLD=-1)"


def set_allocator_for_memory(allocator: Allocator) -> None:
    """Large blocks go back to the system at once, so that peaks of resident memory show what a call holds."""
    if allocator is Allocator.reuse:
        _mallopt({_MMAP_MAX: 1 << 16, _MMAP_THRESHOLD: 128 << 10, _TRIM_THRESHOLD: 128 << 10, _TOP_PAD: 0})


def _mallopt(settings: dict[int, int]) -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(parameter, value) == 1 for parameter, value in settings.items()])


def peak_memory(call: Callable[[], object], device: torch.device) -> float | None:
    """Peak memory in MB (10^6 bytes) that one call takes beyond what is held before it; None where that is unknown.

    It counts everything alive at the peak: intermediates, what is saved for the backward, outputs and gradients. On the
    CPU it is the peak of resident memory, which sees every allocation, not only PyTorch's, to within half a MB. Things
    made once (code, thread pools) are not part of it: the call must have run before.
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
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
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
    """The description as lines to print under a table, none of them broken."""
    from rich.text import Text

    lines = "\n".join(f"{name}: {value}" for name, value in description.items())
    return Text(lines, style="dim", no_wrap=True, overflow="ignore")


def processor() -> str:
    """The name of the CPU, with family and model numbers: the name alone may not identify its generation."""
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
