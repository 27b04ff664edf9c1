"""The CUDA kernels without a GPU and without PyTorch: programs that run them in the emulator, and the emulator itself.

The matrix tests the ops that use them, as ``backend="cuda"``. Here they run in other orders of warps and blocks, and
with less shared memory. test_cuda_check.py checks the machine code.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import attn_kernels
from attn_kernels.backends import emulated
from conftest import available
from matrix import VARIANTS, Case, assert_bit_equal, check, make, run, slow_if

ROOT = Path(__file__).parent.parent
OBJECTS = ROOT / "build/emulated/objects"  # of the kernels, as tests/cpp/build_emulated.py has compiled them

# A program of tests/cpp, and the sources in csrc/cuda that it is linked with.
PROGRAMS = {
    "check_emulator": (),
    "check_additive_math": (),
    "check_tiles": (),
    "check_decode": ("decode",),
    "check_softmax": ("softmax", "gemm_small_m", "gemm"),
}


def flags() -> list[str]:
    path = ROOT / "tests/cpp/build_emulated.py"
    spec = importlib.util.spec_from_file_location("build_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FLAGS


@pytest.mark.long(25)
@slow_if(lambda program: PROGRAMS[program])
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


@pytest.fixture
def emulator() -> str:
    """The backend, where its kernels run in the emulator."""
    name = available("cuda")
    if not emulated():
        pytest.skip("the kernels run on a GPU")
    return name


# What waits for what: parts of a decoding step in a cluster, or in blocks of which the last combines them; values in
# turns of warps; slices of products; staged rows of scores; sums over warps in the backward.
RACES = {
    "cluster": ("additive_attention", Case(B=1, Tq=2, Tk=140, A=40, D=36, lengths="full"), torch.float32),
    "cluster, mask": ("dot_attention", Case(B=2, Tq=3, Tk=90, A=24, D=33, mask="pairs"), torch.float32),
    "last block": ("additive_attention", Case(B=1, Tq=1, Tk=600, A=8, D=16), torch.float64),
    "tiles": ("additive_attention", Case(B=2, Tq=19, Tk=37, A=40, D=24, lengths="random"), torch.float32),
    "tiles, mask": ("additive_attention", Case(B=2, Tq=19, Tk=37, A=30, D=24, mask="pairs"), torch.float32),
    "relu, cluster, mask": ("relu", Case(B=2, Tq=3, Tk=90, A=40, D=33, mask="pairs"), torch.float32),
    "relu, tiles": ("leaky_relu", Case(B=2, Tq=19, Tk=37, A=40, D=24, lengths="random"), torch.float32),
    "tensor cores": ("dot_attention", Case(B=1, Tq=20, Tk=70, A=40, D=40, mask="pairs"), torch.bfloat16),
}


@pytest.mark.parametrize("order", ["first", "last", "random:1", "random:2"])
@pytest.mark.parametrize("name", RACES)
def test_any_order_of_warps_and_blocks(name: str, order: str, emulator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, results and gradients, whichever warp gets ahead and whichever block comes first."""
    op, case, dtype = VARIANTS[RACES[name][0]], *RACES[name][1:]
    arguments = make(op, case, dtype)
    expected = run(op.function, op, arguments, backend=emulator)
    monkeypatch.setenv("ATTN_EMULATOR_ORDER", order)
    assert_bit_equal(run(op.function, op, arguments, backend=emulator), expected)


def test_unknown_order(emulator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_EMULATOR_ORDER", "backwards")
    with pytest.raises((ValueError, RuntimeError), match="ATTN_EMULATOR_ORDER"):  # torch 2.15 makes it the latter
        attn_kernels.dot_attention(torch.ones(1, 1, 4), torch.ones(1, 2, 4), torch.ones(1, 2, 4), backend=emulator)


@pytest.mark.parametrize("kib", [227, 163, 99], ids=["H100", "A100", "others"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 100, 4, 512), (2, 128, 4, 512), (1, 128, 2, 1024)], ids=str)
@pytest.mark.parametrize("name", ["additive_scores", "relu scores"])
def test_shared_memory_of_each_device(
    name: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    kib: int,
    emulator: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shapes for which many threads would share the units of few tiles, if there were room for what each brings."""
    monkeypatch.setenv("ATTN_EMULATOR_SHARED_MEMORY", str(kib * 1024))
    B, Tq, Tk, A = shape
    case = Case(B, Tq, Tk, A, without=("bias",), receives=())
    check(VARIANTS[name], case, dtype, emulator)


# Small inputs and a large v. A: units; of more than 512, 8 queries take two blocks.
LARGE_V = {
    "keys": dict(A=600),
    "keys, not aligned": dict(A=37),
    "prepared": dict(A=600, prepared=True),
    "extra": dict(A=40, extra=True),
    "keys that cancel the queries": dict(A=200, size=5.0, bias=True),
}


@pytest.mark.parametrize("name", LARGE_V)
def test_steps_of_several_queries_need_no_tanh_for_a_large_v(
    name: str, emulator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take the compensated form. A single query takes tanh itself."""
    monkeypatch.setenv("ATTN_EMULATOR_TANH", "nan")
    case = {"size": 1e-3, "prepared": False, "extra": False, "bias": False} | LARGE_V[name]
    size, units, lengths = case["size"], case["A"], torch.tensor([19, 6])
    random = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> torch.Tensor:
        return 2 * torch.rand(shape, generator=random) - 1

    for queries in (1, 2, 3, 8):
        query, keys, v = size * uniform(1, queries, units), size * uniform(2, 19, units), 50 * uniform(units)
        query, options = query.repeat(2, 1, 1), {}
        if case["bias"]:
            options["bias"] = uniform(units)
            keys = 1e-3 * uniform(2, 19, units) - query[:, :1] - options["bias"]
        if case["extra"]:
            options["extra"] = size * uniform(2, 19, units)
        if case["prepared"]:
            options["prepared"] = attn_kernels.prepare_keys(keys, backend=emulator)
        weights = attn_kernels.additive_attention(
            query, keys, uniform(2, 19, 8), v, memory_lengths=lengths, backend=emulator, **options
        ).alignments.double()
        if queries == 1:
            assert weights[1, 0, :6].isnan().all()
            continue
        shifts = [options[name].double() for name in ("extra", "bias") if name in options]
        tanh = torch.tanh(query.double()[:, :, None] + sum(shifts, keys.double())[:, None])
        exact = (tanh @ v.double()).masked_fill(torch.arange(19) >= lengths[:, None, None], -torch.inf).log_softmax(-1)
        # As in test_large_v_of_small_sums, and the rounding of softmax. Weights near 0 are not normal numbers.
        allowed = ((2.5e-7 * tanh.abs() + 6e-9 * min(1, size)) @ v.double().abs()).amax(-1, keepdim=True) + 1e-6
        error = torch.where(exact > -80, (weights.log() - exact).abs(), 0.0)
        assert (error / allowed).max() < 1, f"{queries} queries"
