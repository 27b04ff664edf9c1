"""The kernel repository from tools/hub_kernel.py, loaded locally like by a client of the Hugging Face Hub."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import attn_kernels
from tools import hub_kernel

ROOT = Path(__file__).parent.parent
# Beside the package itself, in a process that has no network.
PROGRAM = """
import sys
from pathlib import Path
import torch
import attn_kernels

folder = Path(sys.argv[1])
{load}
assert kernel.__name__ != "attn_kernels" and kernel.__version__ == attn_kernels.__version__
assert Path(kernel.__file__).is_relative_to(folder)
assert kernel.additive_attention is not attn_kernels.additive_attention
assert not kernel.backends()["cpu"].available and kernel.backends()["reference"].available
query, keys, values, v = (torch.randn(size, requires_grad=True) for size in ((2, 3, 4), (2, 5, 4), (2, 5, 6), (4,)))
lengths = torch.tensor([5, 2])
ours = kernel.additive_attention(query, keys, values, v, memory_lengths=lengths)
theirs = attn_kernels.additive_attention(query, keys, values, v, memory_lengths=lengths)
torch.testing.assert_close(tuple(ours), tuple(theirs))
ours.context.sum().backward()
module = kernel.BahdanauAttention(4, 6, 4)
assert type(module.memory(values)) is kernel.Memory is not attn_kernels.Memory
assert hasattr(getattr(torch.ops, kernel.__name__), "additive_attention")
kernel.fuse(torch.nn.Linear(2, 2))
from importlib import import_module
model = import_module(kernel.__name__ + ".seq2seq").Seq2Seq(9, 9, 4, 4, 4)
model.generate(torch.ones(1, 2, dtype=torch.int64), lengths[1:])
print("loaded", len([name for name in sys.modules if name.startswith(kernel.__name__)]))
"""
BY_HAND = """
import importlib.util, json
variant = folder / "build" / "torch-cpu"
name = json.loads((variant / "metadata.json").read_text())["id"]
specification = importlib.util.spec_from_file_location(name, variant / "__init__.py")
sys.modules[name] = kernel = importlib.util.module_from_spec(specification)
specification.loader.exec_module(kernel)
"""
BY_KERNELS = """
from kernels import get_local_kernel
kernel = get_local_kernel(folder, backend="cpu")
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "attn-kernels"
    hub_kernel.write(folder)
    return folder


@pytest.mark.parametrize(
    "load", [BY_HAND, pytest.param(BY_KERNELS, marks=pytest.mark.slow)], ids=["by hand", "kernels"]
)
def test_loaded_beside_the_package(load: str, repository: Path) -> None:
    if load is BY_KERNELS and find_spec("kernels") is None:
        pytest.skip("the package kernels is not installed")
    command = [sys.executable, "-c", PROGRAM.format(load=load), str(repository)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 30


def test_build_toml_is_what_kernel_builder_reads(repository: Path) -> None:
    rust = pytest.importorskip("kernels._rust", reason="the package kernels is not installed")
    build = rust.Build.open(repository)
    assert [str(backend) for backend in build.general.backends] == list(hub_kernel.BACKENDS)
    for backend in hub_kernel.BACKENDS:
        metadata = rust.Metadata.read_from_file(repository / "build" / f"torch-{backend}" / "metadata.json")
        assert str(metadata.name) == "attn-kernels" and metadata.name.python_name == "attn_kernels"


def test_the_files(repository: Path) -> None:
    """The package as it is, nothing compiled, and a name that changes with the sources."""
    sources = {path.relative_to(hub_kernel.PACKAGE) for path in hub_kernel.PACKAGE.rglob("*.py")}
    ids = set()
    for folder in (repository / "torch-ext/attn_kernels", *(repository / "build").iterdir()):
        assert {path.relative_to(folder) for path in folder.rglob("*.py")} == sources
        assert not list(folder.rglob("*.so")) and (folder / "LICENSE").exists()
        if folder.parent.name == "build":
            ids.add(json.loads((folder / "metadata.json").read_text())["id"])
    assert len(ids) == len(hub_kernel.BACKENDS) and all(name.isidentifier() for name in ids)


def test_a_folder_that_exists_is_refused(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["hub_kernel", str(repository)])
    with pytest.raises(SystemExit, match="2"):
        hub_kernel.main()
    assert attn_kernels.__name__ == "attn_kernels"
