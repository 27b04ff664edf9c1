"""Builds the compiled module attn_kernels._C; everything else stands in pyproject.toml.

ATTN_KERNELS_CPU=0 leaves the module out (reference and Triton remain). ATTN_KERNELS_CUDA=auto|0|1 is for the CUDA
module: 1 fails where it cannot be built.
"""

import os
import sys
from glob import glob
from pathlib import Path

import torch
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

TORCH = Path(torch.__file__).parent


def cpu_module() -> Pybind11Extension:
    return Pybind11Extension(
        "attn_kernels._C",
        sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")),
        depends=sorted(glob("csrc/*.h") + glob("csrc/cpu/*.h")),
        include_dirs=["csrc", str(TORCH / "include"), str(TORCH / "include/torch/csrc/api/include")],
        # By name and without an rpath: "import torch" has loaded the library by the time the module is imported.
        library_dirs=[str(TORCH / "lib")],
        libraries=["torch_cpu"],
        define_macros=[
            ("TORCH_TARGET_VERSION", "0x020A000000000000"),
            ("TORCH_BUILD_VERSION", f'"{torch.__version__}"'),
        ],
        extra_compile_args=[
            "-O3",
            "-ffp-contract=fast",
            "-fno-math-errno",
            "-fno-trapping-math",
            f"-ffile-prefix-map={TORCH}=torch",  # in error messages, no path of the machine that built it
            "-Wall",
            "-Wno-psabi",
        ],
        cxx_std=17,
    )


def switch(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, default)
    if value not in allowed:
        sys.exit(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


if switch("ATTN_KERNELS_CUDA", "auto", ("auto", "0", "1")) == "1":
    sys.exit(
        "ATTN_KERNELS_CUDA=1: this version of attn_kernels has no CUDA C++ sources; Triton computes the ops on GPUs"
    )

ParallelCompile("ATTN_KERNELS_BUILD_JOBS", default=os.cpu_count() or 1).install()
setup(ext_modules=[cpu_module()] if switch("ATTN_KERNELS_CPU", "1", ("0", "1")) == "1" else [])
