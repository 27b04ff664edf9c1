"""Available backends, reasons for missing ones, and named backends, which run or raise; also with parts missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attn_kernels
from attn_kernels.backends import NAMES, choose
from conftest import BEST_LEVEL, LOWER_LEVELS, SIMD_LEVELS, compiled_module, simd
from matrix import CASES, OPS, Op, assert_bit_equal, make, run

ROOT = Path(attn_kernels.__file__).parent.parent


def python(script: str, **environment: str) -> str:
    """What a fresh Python prints. It finds no compiler and no GPU, and its home can neither be read nor written."""
    clean = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "CC", "CXX")}
    clean |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "HOME": "/dev/null", "PATH": "/nonexistent"}
    clean["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:attn_kernels", "-c", script],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


USE = """
import torch, attn_kernels
query, keys, v = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 5, 4), torch.randn(4)
context, alignments = attn_kernels.additive_attention(query, keys, keys, v, memory_lengths=torch.tensor([5, 0]))
context.sum().backward()
assert context.shape == (2, 3, 4) and query.grad.isfinite().all() and (query.grad[1] == 0).all()
context, alignments = attn_kernels.dot_attention(query, keys, keys)
assert attn_kernels.additive_scores(query, keys, v).shape == (2, 3, 5)
for backend in attn_kernels.backends().values():
    print(backend.name, backend.available, backend.detail, sep="|")
    try:
        attn_kernels.dot_attention(query, keys, keys, backend=backend.name)
    except ValueError as error:
        print("refused", error)
"""
NO_COMPILED = "import sys; sys.modules['attn_kernels._C'] = None\n"
NO_TRITON = "import sys; sys.modules['triton'] = None\n"


def test_nothing_but_pytorch() -> None:
    """No compiled module, no triton, no GPU, no compiler, no home."""
    out = python(NO_COMPILED + NO_TRITON + USE)
    assert "reference|True|" in out
    assert "triton|False|triton is not installed: pip install" in out
    assert "cpu|False|the compiled module attn_kernels._C was not built" in out
    assert "cuda|False|" in out
    refusals = re.findall(
        r"^refused attn_kernels: backend='(\w+)' cannot be used on cpu tensors: \S", out, re.MULTILINE
    )
    assert refusals == ["cuda", "triton", "cpu"]


def test_interpreter_that_numpy_is_too_new_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said at once, instead of an error from within each kernel; a GPU needs no NumPy."""
    triton, numpy = pytest.importorskip("triton"), pytest.importorskip("numpy")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for versions, fails in {
        ("3.6.0", "2.4.0"): True,
        ("3.6.0+git1", "2.3.5"): False,
        ("3.7.0", "2.10.1"): False,
    }.items():
        monkeypatch.setattr(triton, "__version__", versions[0])
        monkeypatch.setattr(numpy, "__version__", versions[1])
        _, available, detail = attn_kernels.backends()["triton"]
        assert available != fails
        assert fails == (detail == "the interpreter of Triton 3.6.0 fails with NumPy 2.4.0: pip install 'numpy<2.4'")


def test_no_triton() -> None:
    out = python(NO_TRITON + USE)
    assert "triton|False|triton is not installed" in out and "refused attn_kernels: backend='triton'" in out


def test_no_gpu() -> None:
    if not attn_kernels.backends()["triton"].available:
        pytest.skip("triton is not installed")
    out = python(USE)
    assert "triton|False|no GPU was found" in out
    assert "refused attn_kernels: backend='triton' cannot be used on cpu tensors: no GPU was found" in out


def test_broken_compiled_module(tmp_path: Path) -> None:
    """A module that exists and does not load, as one built for another Python: the reason is what the loader said."""
    script = f"""
import importlib.abc, importlib.machinery, sys
class Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "attn_kernels._C" else None
    def create_module(self, spec): raise ImportError("undefined symbol: frobnicate")
    def exec_module(self, module): pass
sys.meta_path.insert(0, Broken())
{USE}"""
    assert "cpu|False|the compiled module failed to load: undefined symbol: frobnicate" in python(script)


def test_import_is_light() -> None:
    """Importing attn_kernels imports torch and nothing heavy, and neither warns nor prints nor starts a compiler."""
    script = """
import sys, torch
started = []
sys.addaudithook(lambda event, args: started.append(event) if event in ("subprocess.Popen", "os.system") else None)
before = set(sys.modules)
import attn_kernels
new = set(sys.modules) - before
print(sorted({name.partition(".")[0] for name in new} - sys.stdlib_module_names - {"torch", "attn_kernels"}))
heavy = ("torch._dynamo", "torch._inductor", "torch.distributed", "torch.onnx", "torch.utils.cpp_extension")
print(sorted(name for name in new if name.startswith(heavy)))
late = ("fusing", "graph", "seq2seq", "mechanisms", "triton", "compile", "distributed", "patching.libraries.")
print(sorted(name for name in new if name.startswith(tuple("attn_kernels." + part for part in late))))
print(started)
"""
    assert python(script).split() == ["[]"] * 4


def test_backends_lists_all() -> None:
    listed = attn_kernels.backends()
    assert tuple(listed) == NAMES
    for name, backend in listed.items():
        assert backend.name == name and isinstance(backend.available, bool) and backend.detail
    assert listed["reference"].available


@pytest.mark.skipif(compiled_module is None, reason="the compiled module was not built")
def test_simd_level_can_be_chosen() -> None:
    """By a private function, for tests; what is in use is what ``backends()`` and ``build_info()`` tell."""
    assert SIMD_LEVELS[-1] == "portable" and BEST_LEVEL in SIMD_LEVELS
    for level in (*SIMD_LEVELS, *LOWER_LEVELS):
        assert level.removesuffix("-estimate") in SIMD_LEVELS
        with simd(level):
            assert compiled_module.build_info()["simd"] == level
            assert f"{level} in use" in attn_kernels.backends()["cpu"].detail
            for first_choice in (None, ""):
                with simd(first_choice):
                    assert compiled_module.build_info()["simd"] == BEST_LEVEL
        assert compiled_module.build_info()["simd"] == BEST_LEVEL
    with pytest.raises(ValueError, match=f"must be one of {', '.join(SIMD_LEVELS)} on this CPU, got 'mmx'"):
        compiled_module.use_simd("mmx")
    assert compiled_module.build_info()["simd"] == BEST_LEVEL


@pytest.mark.skipif(not LOWER_LEVELS, reason="the C++ kernels have one SIMD level here")
def test_simd_level_of_the_environment() -> None:
    out = python("import attn_kernels; print(attn_kernels.backends()['cpu'])", ATTN_KERNELS_SIMD="portable")
    assert "portable in use" in out
    out = python("import attn_kernels; print(attn_kernels.backends()['cpu'])", ATTN_KERNELS_SIMD="mmx")
    assert "available=False" in out and "ATTN_KERNELS_SIMD must be one of" in out and "got 'mmx'" in out


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_default_on_cpu(op: Op) -> None:
    """The compiled kernels where they exist, else the reference; never the interpreter."""
    expected = "cpu" if attn_kernels.backends()["cpu"].available else "reference"
    assert choose(None, "cpu") == expected
    arguments = make(op, CASES["lengths"], torch.float32)
    assert_bit_equal(run(op.function, op, arguments), run(op.function, op, arguments, backend=expected))


def test_default_elsewhere() -> None:
    """A device that no kernel knows has the reference."""
    assert choose(None, "meta") == "reference"
    query = torch.empty(2, 3, 4, device="meta")
    context, alignments = attn_kernels.dot_attention(query, query, query)
    assert context.is_meta and context.shape == (2, 3, 4) and alignments.shape == (2, 3, 3)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "reference"])
def test_wrong_device_is_refused(name: str) -> None:
    query = torch.empty(2, 3, 4, device="meta")
    with pytest.raises(ValueError, match=rf"^attn_kernels: backend='{name}' cannot be used on meta tensors: \S+"):
        attn_kernels.dot_attention(query, query, query, backend=name)


@pytest.mark.parametrize("backend", ["gpu", "", "CPU", 5, True, ["cpu"]])
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_unknown_name(op: Op, backend: object) -> None:
    arguments = make(op, CASES["plain"], torch.float32)
    with pytest.raises(
        (ValueError, TypeError), match=r"backend must be one of 'cuda', 'triton', 'cpu', 'reference' or None"
    ):
        run(op.function, op, arguments, backend=backend)
