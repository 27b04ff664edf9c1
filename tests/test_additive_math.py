"""Constants that csrc and other languages duplicate must agree: guards of the factored form, numbers of activations."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from attn_kernels.activations import ACTIVATIONS  # noqa: E402
from attn_kernels.ops import kernel  # noqa: E402
from attn_kernels.triton import additive_math  # noqa: E402

HEADER = Path(__file__).parent.parent / "csrc/additive_math.h"
NORM2 = (0.0, 4.0, 4.001, 64.0, 64.01, 129.9, 130.1, 332.7, 332.9, 1e6, 1e38, math.inf, math.nan)
UNITS = (1, 100, 255, 256, 4096)


def upper_case(name: str) -> str:
    """kMaxBoundThree -> MAX_BOUND_THREE"""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name.removeprefix("k")).upper()


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Every constant of the header, and min_abs_bound(norm2, units), as a compiler reads them."""
    compiler = shutil.which("g++")
    if compiler is None or not HEADER.exists():
        pytest.skip("needs g++ and the sources")
    names = re.findall(r"\b(k[A-Z]\w*) = ", HEADER.read_text())
    lines = [f'std::printf("{name} %.17g\\n", double(attn::{name}));' for name in names]
    for norm2 in NORM2:
        value = {math.inf: "INFINITY"}.get(norm2, "NAN" if norm2 != norm2 else f"float({norm2})")
        lines += [f'std::printf("{norm2},{n} %g\\n", double(attn::min_abs_bound({value}, {n})));' for n in UNITS]
    folder = tmp_path_factory.mktemp("header")
    source = folder / "constants.cpp"
    source.write_text(f'#include "{HEADER}"\n#include <cstdio>\nint main() {{ {" ".join(lines)} }}\n')
    subprocess.run([compiler, "-std=c++17", source, "-o", folder / "constants"], check=True)
    printed = subprocess.run([folder / "constants"], capture_output=True, text=True, check=True).stdout
    return {name: float(value) for name, value in map(str.split, printed.splitlines())}


def test_constants_of_triton(header: dict[str, float]) -> None:
    # By the source: the interpreter adds names of its own to the modules of what it runs.
    names = re.findall(r"^([A-Z][A-Z0-9_]+)\b.* = ", Path(additive_math.__file__).read_text(), re.MULTILINE)
    here = {name: getattr(vars(additive_math)[name], "value", vars(additive_math)[name]) for name in names}
    theirs = {upper_case(name): value for name, value in header.items() if name.startswith("k")}
    assert len(here) >= 15
    assert here == {name: pytest.approx(theirs[name], rel=1e-7) for name in here}  # those of the header are float32


@triton.jit
def bounds_kernel(bounds, norm2, units):
    i = tl.program_id(0)
    tl.store(bounds + i, additive_math.min_abs_bound(tl.load(norm2 + i), tl.load(units + i)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the function by itself runs in the interpreter")
def test_min_abs_bound_of_triton(header: dict[str, float]) -> None:
    norm2, units = torch.tensor(NORM2).repeat_interleave(len(UNITS)), torch.tensor(UNITS * len(NORM2))
    bounds = torch.empty_like(norm2)
    bounds_kernel[(len(norm2),)](bounds, norm2, units)
    expected = [header[f"{n},{u}"] for n in NORM2 for u in UNITS]
    assert bounds.tolist() == expected
    assert set(expected) == {0.0, 2.0, 5.0, 10.0, math.inf}


def test_numbers_of_activations() -> None:
    header = HEADER.parent / "activations.h"
    if not header.exists():
        pytest.skip("needs the sources")
    found = re.search(r"enum class Activation : int64_t \{ (.*) \};", header.read_text())
    assert found and found[1].split(", ") == [*ACTIVATIONS, "count"]


@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_kernels_of_pieces_of_lines_refuse_others(fused: str, device: str, name: str) -> None:
    if fused == "triton":
        pytest.skip("its kernels have every activation")
    query, keys, v = (torch.ones(shape, device=device) for shape in ((1, 2, 3), (1, 4, 3), (3,)))
    with pytest.raises(RuntimeError, match="relu or leaky_relu"):
        kernel("activated_scores", fused)(query, keys, v, None, ACTIVATIONS.index(name), 0.0)
