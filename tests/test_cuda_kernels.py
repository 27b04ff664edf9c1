"""The CUDA kernels without a GPU, below PyTorch: programs that run them in the emulator, and the emulator itself.

The ops on top of them run in the matrix, as ``backend="cuda"``. The machine code is checked by test_cuda_check.py.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OBJECTS = ROOT / "build/emulated/objects"  # of the kernels, as tests/cpp/build_emulated.py has compiled them

# A program of tests/cpp, and the sources in csrc/cuda that it is linked with.
PROGRAMS = {
    "check_emulator": (),
    "check_shared_form": (),
    "check_decode": ("decode",),
    "check_attend": ("attend", "few_rows", "products"),
}


def flags() -> list[str]:
    path = ROOT / "tests/cpp/build_emulated.py"
    spec = importlib.util.spec_from_file_location("build_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FLAGS


@pytest.mark.slow_if(lambda program: PROGRAMS[program])
@pytest.mark.parametrize("program", PROGRAMS)
def test_program(program: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None or not (ROOT / "csrc").exists():
        pytest.skip("needs g++ and the sources")
    objects = [next(OBJECTS.rglob(f"{stem}.o"), None) for stem in PROGRAMS[program]]
    if None in objects:
        pytest.skip("the kernels were not built for the emulator: make test does it")
    source = ROOT / f"tests/cpp/{program}.cpp"
    includes = [f"-I{ROOT / folder}" for folder in ("csrc", "csrc/cuda", "tests/cpp")]
    command = [compiler, *flags(), "-Werror", "-DATTN_EMULATED", *includes, source, *objects, "-o", tmp_path / program]
    for step in (command, [tmp_path / program]):
        done = subprocess.run(step, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-3000:]}"
