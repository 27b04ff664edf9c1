"""Makes a kernel repository for the Hugging Face Hub from this checkout: ``python -m tools.hub_kernel FOLDER``.

The kernel has no architecture (``torch-noarch``): it contains Python and Triton. So the variants that clients load need
no compiler and are made here: ``build/torch-BACKEND``, with the package and its metadata. kernel-builder can build the
same from ``build.toml``, ``flake.nix`` and ``torch-ext``, for a signed upload; it needs nix. The C++ kernels are not
included: kernel-builder requires Python's limited API, and pybind11 uses more than that.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "attn_kernels"
NAME = "attn-kernels"
MAJOR = 1  # major version of the kernel; clients request it
BACKENDS = ("cpu", "cuda", "rocm", "xpu")

BUILD_TOML = f"""\
[general]
name = "{NAME}"
version = {MAJOR}
edition = 5
license = "Apache-2.0"
backends = [{", ".join(f'"{backend}"' for backend in BACKENDS)}]

[torch-noarch]
"""
FLAKE_NIX = """\
{
  description = "Fused attention for RNN sequence-to-sequence models";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder }: kernel-builder.lib.genKernelFlakeOutputs { inherit self; path = ./.; };
}
"""
CARD_MD = """\
---
library_name: kernels
license: apache-2.0
---

Fused attention for RNN sequence-to-sequence models, without its C++ kernels: Triton on GPUs, plain PyTorch on CPUs.
"""


def write(folder: Path) -> None:
    """Writes the repository to ``folder``, which must not exist."""
    folder.mkdir(parents=True)
    for name, text in (("build.toml", BUILD_TOML), ("flake.nix", FLAKE_NIX), ("CARD.md", CARD_MD)):
        (folder / name).write_text(text, encoding="utf-8")
    _copy(folder / "torch-ext" / "attn_kernels")
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        _copy(variant)
        metadata = {
            "id": f"attn_kernels_{backend}_{_digest()}",  # the import name
            "name": NAME,
            "version": MAJOR,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2), encoding="utf-8")


def _copy(to: Path) -> None:
    shutil.copytree(PACKAGE, to, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.pyd"))
    shutil.copy(ROOT / "LICENSE", to)


def _digest() -> str:
    """A digest of the sources. Versions have different names, so that a process can load two of them."""
    found = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        found.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def main() -> None:
    parser = argparse.ArgumentParser("python -m tools.hub_kernel", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder of the new repository; it must not exist")
    folder = parser.parse_args().folder
    if folder.exists():
        parser.error(f"{folder} exists")
    write(folder)


if __name__ == "__main__":
    main()
