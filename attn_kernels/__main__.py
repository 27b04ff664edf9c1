"""``python -m attn_kernels``: what this installation runs on, for bug reports and beside benchmark figures.

``python -m attn_kernels patch-list``: the classes of other libraries that ``patch`` swaps.

``python -m attn_kernels tune``: the fastest tiles of the Triton kernels on the GPU at hand.

``python -m attn_kernels fuse-report``: what ``fuse`` does to a model of yours, and why it leaves what it leaves.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import patching
from .backends import backends, build_info, cuda_build_info
from .patching.report import class_name
from .version import __version__

# Environment variables that change speed or results, by their beginnings.
_SETTINGS = ("ATTN_KERNELS_", "OMP_", "MKL_", "KMP_", "GOMP_", "TRITON_INTERPRET", "MALLOC_", "GLIBC_TUNABLES", "CUDA_")


def report() -> dict[str, Any]:
    """Everything the report says, as plain values; without folders, host names or user names."""
    return {
        "attn_kernels": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "os": _os(),
        "cpu": {
            "name": _cpu_name(),
            "machine": platform.machine(),
            "cores": _cores(),
            "threads": torch.get_num_threads(),
            "simd": (build_info() or {}).get("simd"),
        },
        "allocator": _allocator(),
        "build": build_info(),
        "cuda build": cuda_build_info(),
        "gpus": _gpus(),
        "backends": {
            name: {"available": backend.available, "detail": _without_folders(backend.detail)}
            for name, backend in backends().items()
        },
        "settings": {
            name: _without_folders(value) for name, value in sorted(os.environ.items()) if name.startswith(_SETTINGS)
        },
    }


def render(report: dict[str, Any]) -> str:
    """The report as text, one fact a line."""
    cpu = report["cpu"]
    lines = [(name, report[name] or "none") for name in ("attn_kernels", "python", "torch", "triton")]
    lines += [(name, report[name]) for name in ("cuda", "hip") if report[name]]
    lines += [
        ("os", report["os"]),
        ("cpu", f"{cpu['name']} ({cpu['machine']}), cores: {cpu['cores']}, threads in use: {cpu['threads']}"),
        ("simd", cpu["simd"] or "none: no compiled module"),
        ("allocator", report["allocator"]),
    ]
    lines += [(f"build {name}", value) for name, value in (report["build"] or {}).items() if name != "simd"]
    lines += [(f"cuda build {name}", value) for name, value in (report["cuda build"] or {}).items()]
    lines += [
        (f"gpu {i}", f"{gpu['name']}, {gpu['architecture']}, {gpu['memory_gib']} GiB")
        for i, gpu in enumerate(report["gpus"])
    ] or [("gpu", "none")]
    for name, backend in report["backends"].items():
        lines.append((f"backend {name}", f"{'yes' if backend['available'] else 'no '}  {backend['detail']}"))
    lines += [(name, value) for name, value in report["settings"].items()]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines)


def _triton_version() -> str | None:
    try:
        version: str | None = importlib.import_module("triton").__version__
        return version
    except ImportError:
        return None


def _os() -> str:
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def _cpu_name() -> str:
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE))
    name = fields.get("model name") or platform.processor() or "unknown"
    if "cpu family" in fields and "model" in fields:  # tells the generation where the name does not
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _allocator() -> str:
    """The malloc implementation, which determines the cost of fresh output pages."""
    preloaded = re.search(r"/lib(jemalloc|tcmalloc|mimalloc)", _read("/proc/self/maps"))
    return preloaded[1] if preloaded else " ".join(platform.libc_ver()).strip() or "system"


def _gpus() -> list[dict[str, Any]]:
    gpus: list[tuple[Any, str]] = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            gpus.append((gpu, gpu.gcnArchName if torch.version.hip else f"compute capability {gpu.major}.{gpu.minor}"))
    elif torch.xpu.is_available():
        gpus = [(torch.xpu.get_device_properties(i), "Intel XPU") for i in range(torch.xpu.device_count())]
    return [
        {"name": gpu.name, "architecture": architecture, "memory_gib": round(gpu.total_memory / 2**30, 1)}
        for gpu, architecture in gpus
    ]


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _without_folders(text: str) -> str:
    """``/home/me/lib/_C.so: undefined symbol`` -> ``_C.so: undefined symbol``."""
    return re.sub(r"(?<![\w.])~?/(?:[^\s/:'\"]+/)*", "", text)


_FUSE_REPORT = """
TARGET is MODULE:CALLABLE, or FILE.py:CALLABLE. It is called without arguments and returns a model and the arguments of
its call:

  def example():
      return MyModel(), (torch.randn(8, 20, 64), torch.full((8,), 20))   # or a dict, for arguments by name

The model is fused and called in the mode that it is in, often enough that the original and the fused form of each
module are timed; then the report is printed: what runs fused, what stays as it was, and why. Exit status: 0, whatever
was found; 1, if the model cannot be made or called; 2, if the command is not understood.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m attn_kernels",
        description="What this installation runs on, and commands. Without a command: report.",
        epilog="More about a command: python -m attn_kernels COMMAND --help",
    )
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    help = "what this installation runs on: versions, processor, GPUs, backends, settings; for bug reports"
    reporting = commands.add_parser("report", help=help, description=help[0].upper() + help[1:] + ".")
    reporting.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="the same as JSON")
    help = "times the Triton kernels' tiles on this machine's GPU and keeps the fastest for later processes"
    tune = commands.add_parser("tune", help=help, description=help[0].upper() + help[1:] + ".")
    tune.add_argument("--output", type=Path, help="the file to write; default: where the kernels look for it")
    help = "the classes of other libraries that attn_kernels.patch(model) swaps"
    listing = commands.add_parser("patch-list", help=help, description=help[0].upper() + help[1:] + ".")
    listing.add_argument("--json", action="store_true", help="the same as JSON")
    help = "what attn_kernels.fuse(model) does to a model of yours, and why it leaves what it leaves"
    fusing = commands.add_parser(
        "fuse-report",
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=_FUSE_REPORT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    fusing.add_argument("target", metavar="TARGET", help="what makes the model: MODULE:CALLABLE or FILE.py:CALLABLE")
    fusing.add_argument("--calls", type=int, default=8, help="of the model; with 1 nothing is timed (default: 8)")
    fusing.add_argument("--json", action="store_true", help="the same as JSON")
    arguments = parser.parse_args()
    if arguments.command == "fuse-report":
        if arguments.calls < 1:
            fusing.error(f"argument --calls: must be at least 1, got {arguments.calls}")
        place, _, name = arguments.target.rpartition(":")
        if not (place and name):
            fusing.error(f"argument TARGET: must be MODULE:CALLABLE or FILE.py:CALLABLE, got {arguments.target!r}")
        if place.endswith(".py") and not Path(place).is_file():
            fusing.error(f"argument TARGET: there is no file {place}")
        _report_fusing(arguments.target, arguments.calls, arguments.json)
    elif arguments.command == "tune":
        _tune(arguments.output)
    elif arguments.command == "patch-list":
        _list_patches(arguments.json)
    else:
        print(json.dumps(report(), indent=2) if arguments.json else render(report()))


def _list_patches(as_json: bool) -> None:
    rows = [(a.library, a.versions, a.original.replace(":", ".")) for a in patching.adapters()]
    head = ("library", "versions", "class")
    if as_json:
        print(json.dumps([dict(zip(head, row, strict=True)) for row in rows], indent=2))
    else:
        print(patching.table(head, list(rows)))


def _report_fusing(target: str, calls: int, as_json: bool) -> None:
    from .fusing import fuse

    try:
        model, args, kwargs = _example(target)
        report = fuse(model)
        for _ in range(calls):
            model(*args, **kwargs)
    except Exception as error:  # of code that is the user's own: where it was raised is for the user to see
        traceback.print_exc()
        sys.exit(f"attn_kernels fuse-report: {target}: {type(error).__name__}: {error}")
    if as_json:
        rows = {
            "fused": [{"module": x.name, "class": class_name(x.cls), "what": x.what} for x in report.fused],
            "skipped": [{"module": x.name, "class": class_name(x.cls), "reason": x.reason} for x in report.skipped],
            "fallbacks": [
                {"module": x.name, "class": class_name(x.cls), "reason": x.reason, "calls": x.calls}
                for x in report.fallbacks
            ],
        }
        print(json.dumps(rows, indent=2))
    else:
        print(report)


def _example(target: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model that ``target`` makes, and the arguments of its call."""
    place, _, name = target.rpartition(":")
    if place.endswith(".py"):
        specification = importlib.util.spec_from_file_location(Path(place).stem, place)
        assert specification is not None and specification.loader is not None  # as of every file that ends in .py
        module = importlib.util.module_from_spec(specification)
        sys.path.insert(0, str(Path(place).resolve().parent))  # as Python does for a script
        sys.modules[specification.name] = module
        specification.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    made = getattr(module, name)()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise TypeError(f"{name}() must return a model and the arguments of its call, got {type(made).__name__}")
    model, given = made
    if isinstance(given, dict):
        return model, (), given
    return model, given if isinstance(given, tuple) else (given,), {}


def _tune(output: Path | None) -> None:
    kind = next((kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()), None)
    if kind is None:
        sys.exit("attn_kernels tune: it needs a GPU, and PyTorch sees none here")
    triton = backends()["triton"]
    if not triton.available:
        sys.exit(f"attn_kernels tune: {triton.detail}")
    importlib.import_module(".triton.tuning", __package__).tune(torch.device(kind, 0), output)


if __name__ == "__main__":
    main()
