"""Builds attn_kernels._C_cuda for the CPU: the CUDA kernels in the emulator of cuda_emulator.h, for tests.

``python tests/cpp/build_emulated.py FOLDER`` writes the module to FOLDER; conftest.py loads it from there. Bindings and
kernels are the same files that nvcc compiles for a GPU (setup.py).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pybind11
import torch
from pybind11.setup_helpers import ParallelCompile
from setuptools import Distribution, Extension
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parents[2]
TORCH = Path(torch.__file__).parent
# No fortified longjmp: the fibers of the emulator jump between stacks.
FLAGS = ["-std=c++17", "-O1", "-g0", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]

LONGEST = ("decode", "gemm")  # the kernels that take longest to compile


def main(folder: Path) -> None:
    if torch.cuda.is_available():
        print("the CUDA kernels run on the GPU here, not in the emulator")
        return
    os.chdir(ROOT)
    objects = folder / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    sources = [Path("csrc/additive_attention.cpp"), Path("csrc/dot_attention.cpp"), *Path("csrc/cuda").glob("*.cpp")]
    for kernels in Path("csrc/cuda").glob("*.cu"):  # compilers choose the language by the suffix
        source = objects / f"{kernels.stem}.cpp"
        source.write_text(f'#include "{kernels.resolve()}"\n')
        sources.append(source)
    # The longest first (decode takes half of the total), so all processors finish at about the same time.
    sources.sort(key=lambda source: (source.stem not in LONGEST, source))
    extension = Extension(
        "_C_cuda",
        [os.path.relpath(source) for source in sources],
        include_dirs=[
            *("csrc", "csrc/cuda", "tests/cpp", pybind11.get_include()),
            *(str(TORCH / "include"), str(TORCH / "include/torch/csrc/api/include")),
        ],
        library_dirs=[str(TORCH / "lib")],
        libraries=["torch_cpu"],
        define_macros=[
            ("ATTN_CUDA", None),
            ("ATTN_EMULATED", None),
            ("TORCH_TARGET_VERSION", "0x020A000000000000"),
            ("TORCH_BUILD_VERSION", f'"{torch.__version__}"'),
        ],
        extra_compile_args=[*FLAGS, "-fvisibility=hidden"],
    )
    ParallelCompile(default=os.cpu_count() or 1).install()
    command = build_ext(Distribution({"name": "emulated", "ext_modules": [extension]}))
    command.build_lib, command.build_temp, command.force = str(folder), str(objects), True
    command.ensure_finalized()
    command.run()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
