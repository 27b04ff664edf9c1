"""Builds the compiled modules; all other settings of the package are in pyproject.toml.

attn_kernels._C has the CPU kernels. attn_kernels._C_cuda has the CUDA kernels; it is built if there are nvcc and a
PyTorch with CUDA.

ATTN_KERNELS_CPU=0 leaves out the CPU module (the reference and the GPU backends remain). ATTN_KERNELS_CUDA=auto|0|1
controls the CUDA module: 1 requires only nvcc, and fails without it. nvcc is searched in NVCC, CUDA_HOME, PATH and
/usr/local/cuda. ATTN_KERNELS_CUDA_ARCHITECTURES="80 90" selects compute capabilities; default: all known ones.
ATTN_KERNELS_BUILD_JOBS is the number of parallel processes of each compiler; default: the number of cores.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import pybind11
import torch
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

TORCH = Path(torch.__file__).parent
JOBS = int(os.environ.get("ATTN_KERNELS_BUILD_JOBS") or os.cpu_count() or 1)


def extension(name: str, sources: list[str], macros: list[tuple[str, str | None]]) -> Pybind11Extension:
    return Pybind11Extension(
        name,
        sources,
        depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cu*", recursive=True)),
        # pybind11's own headers come first: torch includes a copy that up to 2.11 does not work with the stable ABI.
        include_dirs=["csrc", pybind11.get_include(), str(TORCH / "include")],
        # No rpath: "import torch" has already loaded the library when the module is imported.
        library_dirs=[str(TORCH / "lib")],
        libraries=["torch_cpu"],
        define_macros=[
            ("TORCH_TARGET_VERSION", "0x020A000000000000"),
            ("TORCH_BUILD_VERSION", f'"{torch.__version__}"'),
            *macros,
        ],
        extra_compile_args=[
            "-O3",
            "-ffp-contract=fast",
            "-fno-math-errno",
            "-fno-trapping-math",
            f"-ffile-prefix-map={TORCH}=torch",  # error messages must not contain paths of the build machine
            "-Wall",
            "-Wno-psabi",
        ],
        cxx_std=17,
    )


def cpu_module() -> Pybind11Extension:
    return extension("attn_kernels._C", sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")), [])


def cuda_module(nvcc: Path) -> Pybind11Extension:
    """The C++ compiler compiles the bindings, nvcc the kernels. The static CUDA runtime lets it load on any machine."""
    module = extension(
        "attn_kernels._C_cuda",
        sorted(["csrc/additive_attention.cpp", "csrc/dot_attention.cpp", *glob("csrc/cuda/*.cpp")]),
        [
            ("ATTN_CUDA", None),
            ("ATTN_NVCC_VERSION", f'"{nvcc_version(nvcc)}"'),
            ("ATTN_CUDA_ARCHITECTURES", f'"{" ".join(f"sm_{a}" for a in architectures(nvcc))}"'),
        ],
    )
    module.library_dirs += [str(path) for path in cuda_libraries(nvcc)]
    module.libraries += ["cudart_static", "dl", "rt", "pthread"]
    return module


def find_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or ""
    candidates = (os.environ.get("NVCC"), home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc")
    return next((Path(path) for path in candidates if path and shutil.which(path)), None)


def nvcc_version(nvcc: Path) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([0-9.]+)", text)[1]


def architectures(nvcc: Path) -> list[str]:
    """The compute capabilities to build for: 8.0, 9.0 and 10.0, if this nvcc supports them."""
    wanted = os.environ.get("ATTN_KERNELS_CUDA_ARCHITECTURES", "").replace(";", " ").split()
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    chosen = [name.removeprefix("sm_") for name in wanted] or [n for n in ("80", "90", "100") if f"sm_{n}" in known]
    unknown = [name for name in chosen if f"sm_{name}" not in known]
    if unknown or not chosen:
        sys.exit(
            f"ATTN_KERNELS_CUDA_ARCHITECTURES must be some of {' '.join(known)}, got {' '.join(unknown) or 'none'}"
        )
    return chosen


def cuda_libraries(nvcc: Path) -> list[Path]:
    """The folders of libcudart_static.a. nvcc may be a symbolic link into the toolkit, so links are resolved."""
    text = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    named = [Path(path) for path in re.findall(r'-L"?([^"\s]+)', text)]
    return [path for path in [*named, nvcc.resolve().parents[1] / "lib64"] if (path / "libcudart_static.a").exists()]


def compile_kernels(nvcc: Path, source: Path, folder: Path) -> str:
    """Compiles one .cu file for all architectures; returns the object file."""
    codes = architectures(nvcc)
    targets = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in codes]
    targets.append(f"-gencode=arch=compute_{codes[-1]},code=compute_{codes[-1]}")  # PTX for later GPUs
    to = folder / f"{source.stem}.o"
    options = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Icsrc", *targets]
    done = subprocess.run([nvcc, *options, "-c", source, "-o", to], capture_output=True, text=True)
    if done.returncode:
        command = " ".join(map(str, done.args))
        sys.exit(f"nvcc failed: {command}\n{done.stdout}{done.stderr}\nATTN_KERNELS_CUDA=0 builds without CUDA kernels")
    return str(to)


class BuildExtension(build_ext):
    """nvcc compiles the .cu files while the C++ compiler builds the CPU module."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # a module from an earlier build may be for other architectures

    def build_extensions(self) -> None:
        compiler = self.compiler.compiler_cxx[0] if getattr(self.compiler, "compiler_cxx", None) else None
        if compiler and not shutil.which(compiler):
            sys.exit(
                f"attn_kernels needs a C++17 compiler, and {compiler!r} was not found: install one (Debian: g++), "
                "set CXX=..., or build without the C++ kernels: ATTN_KERNELS_CPU=0 (reference and Triton remain)"
            )
        if all(ext.name != "attn_kernels._C_cuda" for ext in self.extensions):
            return super().build_extensions()
        self.folder = Path(self.build_temp) / "cuda"
        self.folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(JOBS) as pool:
            sources = sorted(Path("csrc/cuda").glob("*.cu"))
            self.kernels = pool.map(lambda source: compile_kernels(nvcc, source, self.folder), sources)
            try:
                super().build_extensions()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def build_extension(self, ext: Pybind11Extension) -> None:
        if ext.name != "attn_kernels._C_cuda":
            return super().build_extension(ext)
        ext.extra_objects = list(self.kernels)
        before, self.build_temp = self.build_temp, str(self.folder)  # both modules compile the same binding sources
        try:
            super().build_extension(ext)
        finally:
            self.build_temp = before


def switch(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, default)
    if value not in allowed:
        sys.exit(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


modules = [cpu_module()] if switch("ATTN_KERNELS_CPU", "1", ("0", "1")) == "1" else []
cuda = switch("ATTN_KERNELS_CUDA", "auto", ("auto", "0", "1"))
nvcc = find_nvcc() if cuda == "1" or (cuda == "auto" and torch.version.cuda) else None
if nvcc is not None:
    modules.append(cuda_module(nvcc))
elif cuda == "1":
    sys.exit("ATTN_KERNELS_CUDA=1: nvcc was not found; set NVCC=... or CUDA_HOME=...")

ParallelCompile("ATTN_KERNELS_BUILD_JOBS", default=JOBS).install()
setup(ext_modules=modules, cmdclass={"build_ext": BuildExtension})
