"""Compiles CUDA sources with only nvcc: no torch, no GPU. Earlier results are cached in a folder."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# The options that affect the machine code, the same as in the build. Division and square root stay IEEE: a kernel that
# needs less accuracy uses approximate instructions explicitly.
OPTIONS = ("-O3", "-std=c++17")
PLACES = (Path("/usr/local/cuda/bin/nvcc"), Path("/opt/cuda/bin/nvcc"))


class Plan(NamedTuple):
    """The ``__launch_bounds__`` of a kernel; 0 for a missing value."""

    threads: int = 0
    blocks: int = 0  # minimum blocks per multiprocessor


@dataclass
class Compiled:
    source: Path
    target: str
    cubin: Path | None  # None if it failed, or if the source has no kernel
    plans: dict[str, Plan]  # by mangled name of the kernel
    failure: str = ""
    cached: bool = False


class NoCompiler(RuntimeError):
    pass


def find(environment: Mapping[str, str] = os.environ, places: Sequence[Path] = PLACES) -> Path:
    """Finds nvcc: from NVCC, CUDA_HOME, PATH, or the usual places, in this order."""
    if named := environment.get("NVCC"):
        found = shutil.which(named, path=environment.get("PATH"))
        if found is None:
            raise NoCompiler(f"NVCC={named} is not a program that can be run")
        return Path(found)
    homes = [Path(environment[name]) / "bin" / "nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if environment.get(name)]
    on_path = shutil.which("nvcc", path=environment.get("PATH", ""))
    for place in [*homes, *([Path(on_path)] if on_path else []), *places]:
        if place.is_file() and os.access(place, os.X_OK):
            return place
    raise NoCompiler(
        "nvcc was not found. It needs no GPU: install the CUDA toolkit (13.0; on Debian and Ubuntu cuda-nvcc-13-0 is "
        "enough) or name one that is elsewhere: make cuda-check NVCC=/path/to/bin/nvcc"
    )


def version(nvcc: Path) -> str:
    text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", text)
    return found[1] if found else text.strip().splitlines()[-1]


def fingerprint(source: Path, target: str, nvcc_version: str) -> str:
    """A digest of everything that the machine code depends on: the source, headers near it, options and compiler."""
    root = next((folder for folder in source.resolve().parents if folder.name == "csrc"), source.resolve().parent)
    headers = sorted(path for path in root.rglob("*") if path.suffix in (".h", ".cuh"))
    digest = hashlib.sha256(repr((OPTIONS, target, nvcc_version, source.name)).encode())
    for path in [source, *headers]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


def compile(source: Path, target: str, nvcc: Path, cache: Path, nvcc_version: str) -> Compiled:
    """Compiles one source for one target such as "sm_90a"."""
    folder = cache / f"{source.stem}-{target}-{fingerprint(source, target, nvcc_version)}"
    cubin, ptx = folder / f"{source.stem}.cubin", folder / f"{source.stem}.ptx"
    if cubin.exists():
        return Compiled(source, target, cubin, plans(ptx.read_text()), cached=True)
    cache.mkdir(parents=True, exist_ok=True)
    for stale in cache.glob(f"{source.stem}-{target}-*"):
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        there = Path(scratch)
        made_ptx = there / ptx.name
        for command in (
            [nvcc, *OPTIONS, "-ptx", f"-arch={target.replace('sm_', 'compute_')}", "-o", made_ptx, source],
            [nvcc, "-cubin", f"-arch={target}", "-o", there / cubin.name, made_ptx],
        ):
            process = subprocess.run([str(part) for part in command], capture_output=True, text=True)
            if process.returncode != 0:
                return Compiled(source, target, None, {}, (process.stderr or process.stdout).strip())
        os.replace(shutil.copytree(there, cache / f".{folder.name}.{os.getpid()}"), folder)
    return Compiled(source, target, cubin, plans(ptx.read_text()))


def plans(ptx: str) -> dict[str, Plan]:
    """The launch bounds of each kernel, from the PTX: the cubin contains only half of them."""
    found = {}
    for entry in re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", ptx, re.DOTALL):
        threads = re.search(r"\.(?:max|req)ntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", entry[3])
        blocks = re.search(r"\.minnctapersm\s+(\d+)", entry[3])
        size = 0
        if threads:
            size = int(threads[1]) * int(threads[2] or 1) * int(threads[3] or 1)
        found[entry[1]] = Plan(size, int(blocks[1]) if blocks else 0)
    return found
