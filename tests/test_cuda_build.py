"""The CUDA module as users build it with nvcc: host and device compilation, linking, import. Needs nvcc but no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.cuda_check import nvcc

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE = "90"
# Imports the package with the module at argv[1] in place of the installed one, and prints what came of it.
IMPORTED = """
import importlib.util, json, sys
import torch
name = "attn_kernels._C_cuda"
spec = importlib.util.spec_from_file_location(name, sys.argv[1])
sys.modules[name] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import attn_kernels
registered = [op for op in torch._C._dispatch_get_all_op_names() if op.startswith("attn_kernels::")
              and torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA")]
print(json.dumps({"info": module.build_info(), "registered": registered,
                  "backend": attn_kernels.backends()["cuda"]}))
"""


@pytest.fixture(scope="module")
def compiler() -> Path:
    if not (ROOT / "csrc").exists():
        pytest.skip("csrc is not here")
    try:
        return nvcc.find()
    except nvcc.NoCompiler as error:
        pytest.skip(str(error))


def run(*command: str | Path, seconds: float, **environment: str) -> str:
    environment = {**os.environ, **environment}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, env=environment)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_both_passes_of_nvcc(compiler: Path, tmp_path: Path) -> None:
    """The shortest source, which has all the common headers: nvcc reads them once for the GPU and once for the CPU."""
    source = ROOT / "csrc/cuda/additive_prepare.cu"
    target = [f"-arch=sm_{ARCHITECTURE}", "-I", ROOT / "csrc"]
    run(compiler, *nvcc.OPTIONS, *target, "-c", source, "-o", tmp_path / "object.o", seconds=300)


@pytest.mark.long(140)
@pytest.mark.slow
def test_module(compiler: Path, tmp_path: Path) -> None:
    """Built by setup.py for one architecture, whatever torch is here: a torch for the CPU loads it, too.

    Without optimization of what runs on the GPU, which takes two thirds of the time: make cuda-check reads that code.
    """
    settings = {
        "ATTN_KERNELS_CPU": "0",
        "ATTN_KERNELS_CUDA": "1",
        "ATTN_KERNELS_CUDA_ARCHITECTURES": ARCHITECTURE,
        "NVCC": str(compiler),
        "NVCC_APPEND_FLAGS": "-Xcicc -O0 -Xptxas -O0",
    }
    folders = ["--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "objects"]
    run(sys.executable, "setup.py", "build_ext", *folders, seconds=3600, **settings)
    (module,) = tmp_path.glob("lib/attn_kernels/_C_cuda*.so")
    found = json.loads(run(sys.executable, "-c", IMPORTED, module, seconds=300))
    assert not found["info"]["emulated"]
    assert found["info"]["architectures"] == f"sm_{ARCHITECTURE}"
    assert found["info"]["torch"] == torch.__version__
    names = {op.removeprefix("attn_kernels::").partition(".")[0] for op in found["registered"]}
    assert {"additive_attention", "additive_attention_backward", "dot_attention", "activated_scores"} <= names
    _, available, detail = found["backend"]
    assert available == torch.cuda.is_available()
    if torch.version.cuda is None:
        assert detail == "this PyTorch was built without CUDA"


def test_without_a_compiler_the_build_says_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "CXX": "no-such-compiler"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert "'no-such-compiler' was not found" in done.stderr
    assert "ATTN_KERNELS_CPU=0" in done.stderr
