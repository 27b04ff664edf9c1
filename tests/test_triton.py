"""Features of the Triton backend only: splits of a decoding step, configurations and their tuning."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType

import pytest
import torch

import attn_kernels
from conftest import available
from matrix import OPS, VARIANTS, Case, Op, assert_bit_equal, check, device_of, lay_out, make, run, slow_if
from test_padding import padded_with, poisoned_empty

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'attn_kernels[triton]'"
)

names = [name for name, op in OPS.items() if op.masked]
attending = pytest.mark.parametrize(
    "op", [VARIANTS[name] for name in (*names, "leaky_relu")], ids=(*names, "leaky_relu")
)


def launches_of_decode(monkeypatch: pytest.MonkeyPatch, programs: int) -> list[str]:
    """The names of the kernels that decoding launches from now on, on a device of so many multiprocessors."""
    decode = importlib.import_module("attn_kernels.triton.decode")
    launched, launch = [], decode.launch
    monkeypatch.setattr(decode, "NUM_SMS", programs)
    monkeypatch.setattr(
        decode, "launch", lambda kernel, *args: launched.append(kernel.__name__) or launch(kernel, *args)
    )
    return launched


def splitting() -> AbstractContextManager[None]:
    """The steps of a row are divided among programs however few they are."""
    return importlib.import_module("attn_kernels.triton.configurations").overriding("decode", dict(bytes=1))


@slow_if(lambda dtype, **_: dtype != torch.float32)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(B=2, Tq=1, Tk=45, A=17, D=33),
        Case(B=3, Tq=5, Tk=37, A=8, D=130, lengths="random"),
        Case(B=2, Tq=8, Tk=33, A=16, D=16, lengths="random", mask="pairs"),
    ],
    ids=["plain", "lengths", "mask"],
)
@attending
def test_steps_split_over_programs(op: Op, case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same results whether one program walks the steps of a row or several do, some of which find nothing."""
    available("triton")
    launched = launches_of_decode(monkeypatch, programs=10)
    with splitting():
        check(op, case, dtype, "triton")
    assert "combine_kernel" in launched


@slow_if(lambda with_values, **_: not with_values)
@pytest.mark.parametrize("with_values", [True, False], ids=["values", "no values"])
def test_options_of_split_steps(with_values: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """log_total, dropout, score_bias, clip and the sigmoid do not depend on how many programs walk the steps."""
    device = device_of(available("triton"))
    launched = launches_of_decode(monkeypatch, programs=20)
    rng = torch.Generator().manual_seed(0)
    shapes = ((3, 2, 8), (3, 37, 8), (3, 37, 130), (3, 2, 37))
    query, keys, values, score_bias = (torch.randn(shape, generator=rng).to(device) for shape in shapes)
    lengths = torch.tensor([37, 0, 5], device=device)
    options = dict(score_bias=score_bias, clip=2.0, normalizer="sigmoid", dropout_p=0.4, need_log_total=True)

    def run() -> list[torch.Tensor]:
        torch.manual_seed(1)
        given = values if with_values else None
        found = attn_kernels.dot_attention(query, keys, given, memory_lengths=lengths, backend="triton", **options)
        return [x for x in found if x is not None]

    expected = run()
    assert "combine_kernel" not in launched
    with splitting():
        found = run()
    assert "combine_kernel" in launched
    assert len(found) == 2 + with_values
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@slow_if(lambda Tq, **_: Tq > 1)
@pytest.mark.parametrize(
    ("shape", "strides"),
    [((2, 5, 24), (2**31 + 16, 24, 1)), ((1, 5, 24), (0, 2**29 + 8, 1)), ((1, 5, 300), (0, 1, 2**23))],
    ids=["rows of the batch", "steps", "units"],
)
@pytest.mark.parametrize("Tq", [1, 9])
def test_offsets_beyond_31_bits(Tq: int, shape: tuple[int, int, int], strides: tuple[int, int, int]) -> None:
    """Keys and values that lie so far apart that 32-bit offsets would wrap; memory between them is never touched.

    Other strides are another compilation, which may lay out a tile in another way and add up in another order: the
    results are the same but for a rounding.
    """
    device = device_of(available("triton"))
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    try:
        far = torch.empty(size, dtype=torch.bfloat16, device=device).as_strided(shape, strides)
    except RuntimeError as error:
        pytest.skip(f"no {size * 2 >> 30} GiB of address space: {error}")
    near = torch.randn(shape).to(device, torch.bfloat16)
    far.copy_(near)
    query = torch.randn(shape[0], Tq, shape[2]).to(device, torch.bfloat16)
    v = torch.rand(shape[2]).to(device, torch.bfloat16)

    def results(keys: torch.Tensor) -> list[torch.Tensor]:
        leaf = query.clone().requires_grad_()
        additive = attn_kernels.additive_attention(leaf, keys, keys, v, backend="triton")
        dot = attn_kernels.dot_attention(leaf, keys, keys, backend="triton")
        scores = attn_kernels.additive_scores(leaf, keys, v, backend="triton")
        total = sum(output.float().sum() for output in (*additive, *dot, scores))
        return [*additive, *dot, scores, *torch.autograd.grad(total, leaf)]

    for a, b in zip(results(far), results(near), strict=True):
        torch.testing.assert_close(a, b, rtol=torch.finfo(a.dtype).eps, atol=1e-6)


@slow_if(lambda layout, **_: layout != "contiguous")
@pytest.mark.parametrize("layout", ["contiguous", "columns", "misaligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_exponentials_of_keys(dtype: torch.dtype, layout: str) -> None:
    """They are exact to one unit in the last place, and finite whatever a key is: padding may hold anything."""
    device = device_of(available("triton"))
    additive = importlib.import_module("attn_kernels.triton.additive_attention")
    keys = torch.linspace(-43, 43, 2 * 19 * 133).reshape(2, 19, 133).to(device, dtype)
    exact = torch.exp(2 * keys.double())
    beyond = torch.tensor([float("nan"), float("inf"), -float("inf"), torch.finfo(dtype).max, 44, -44])
    keys[1, 3:9, 7] = beyond.to(device, dtype)
    exact[1, 3:9, 7] = 1.0
    for extra in (None, torch.zeros_like(keys)):
        found = additive._key_exponentials(lay_out(keys, layout), extra)
        assert found.dtype == torch.float32 and found.is_contiguous()
        torch.testing.assert_close(found.double(), exact, rtol=2**-23, atol=0)


# The number of queries from which on they are made before, and several blocks of queries that read them.
KEYS_ONCE = {
    "16": Case(B=2, Tq=16, Tk=9, A=20, D=6, lengths="random"),
    "17, lengths": Case(B=2, Tq=17, Tk=19, A=37, D=6, lengths="random", layout="columns"),
    "17, length 0": Case(B=2, Tq=17, Tk=9, A=20, D=6, lengths="zero"),
    "40, steps": Case(B=1, Tq=40, Tk=9, A=5, D=6, mask="steps", layout="transposed"),
    "70, pairs": Case(B=1, Tq=70, Tk=18, A=20, D=6, lengths="random", mask="pairs"),
}


@slow_if(lambda case: case is not KEYS_ONCE["17, lengths"])
@pytest.mark.parametrize("case", KEYS_ONCE.values(), ids=KEYS_ONCE)
def test_exponentials_of_keys_are_made_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """With many queries, in one launch; and what padding holds changes no gradient."""
    device = device_of(available("triton"))
    additive = importlib.import_module("attn_kernels.triton.additive_attention")
    launched = []
    launch = additive.launch
    monkeypatch.setattr(additive, "launch", lambda kernel, *args: launched.append(kernel) or launch(kernel, *args))
    monkeypatch.setattr(additive, "_backward_splits", lambda programs, blocks, Tk, block_k: (blocks, 1, Tk, 1))
    op = OPS["additive_attention"]
    check(op, case, torch.float32, "triton")
    assert launched.count(additive.key_exponentials_kernel) == (case.Tq > 16)
    clean, poisoned = (padded_with(op, case, torch.bfloat16, device, fill) for fill in (0.5, math.nan))
    expected = run(op.function, op, clean, backend="triton")
    with poisoned_empty():
        assert_bit_equal(run(op.function, op, poisoned, backend="triton"), expected)


@slow_if(lambda name, special, **_: (name, special) != ("keys", math.inf))
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["query", "keys", "values"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_special_values_of_relu_under_a_mask(activation: str, name: str, special: float) -> None:
    """Many queries: the backward has one form where all that is attended is finite, and one for the rest.

    With a negative v an Inf makes a score of -Inf, whose gradient is 0: only the product with the Inf shows in dv.
    """
    op = VARIANTS[activation]
    case = Case(B=2, Tq=9, Tk=11, A=48, D=16, mask="pairs")
    arguments = make(op, case, torch.float32, device_of(available("triton")))
    arguments.tensors[name][0, 3, 2] = special
    arguments.tensors["v"][2] = -0.1
    check(op, case, torch.float32, "triton", arguments=arguments)


@pytest.fixture
def configurations() -> ModuleType:
    available("triton")
    return importlib.import_module("attn_kernels.triton.configurations")


def test_own_table_goes_before_the_shipped_one(configurations: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "new" / "configurations.json"
    candidates = configurations.CANDIDATES["backward"]
    assert configurations.table_of("A", file)["backward"] == candidates[0]
    configurations.write("A", {"backward": candidates[1]}, file)
    configurations.write("B", {"backward": candidates[2]}, file)  # and A stays
    assert configurations.table_of("A", file)["backward"] == candidates[1]
    assert configurations.table_of("B", file)["backward"] == candidates[2]
    assert configurations.table_of("C", file)["backward"] == candidates[0]
    assert configurations.table_of("A", file)["decode"] == configurations.CANDIDATES["decode"][0]
    assert [path.name for path in file.parent.iterdir()] == [file.name], "something unfinished is left"


def test_a_user_without_a_home_has_the_shipped_table(
    configurations: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in containers that run with the number of a user whom they do not know."""

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    table = configurations.table_of("A", configurations.path())
    assert table == {entry: candidates[0] for entry, candidates in configurations.CANDIDATES.items()}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"A": []}', '{"A": {"backward": {"BLOCK_Q": 3, "BLOCK_A": 128}}}', '{"A": {"no such": {}}}'],
)
def test_a_table_that_is_not_right_is_named_and_not_used(configurations: ModuleType, tmp_path: Path, text: str) -> None:
    file = tmp_path / "configurations.json"
    file.write_text(text)
    with pytest.warns(UserWarning, match="configurations.json"):
        table = configurations.table_of("A", file)
    assert table == {entry: candidates[0] for entry, candidates in configurations.CANDIDATES.items()}


@pytest.mark.slow
def test_tuning_takes_what_wins(configurations: ModuleType, tmp_path: Path) -> None:
    """On small inputs and with a clock that prefers the second candidate; every candidate gives the same results."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is tuned by the command itself")
    tuning = importlib.import_module("attn_kernels.triton.tuning")
    loads = [load._replace(sizes=[(1, min(load.sizes[-1][1], 18), 20, 33)]) for load in tuning.workloads()]
    said: list[str] = []
    clock = {entry: iter([2.0, 1.0] + [1.99] * len(configurations.CANDIDATES)) for entry in configurations.CANDIDATES}
    running = iter([load.entry for load in loads for _ in configurations.CANDIDATES[load.entry]])
    file = tuning.tune(
        torch.device("cpu"), tmp_path / "table.json", lambda run: next(clock[next(running)]), loads, said.append
    )
    table = configurations.table_of("cpu", file)
    for entry, candidates in configurations.CANDIDATES.items():
        assert table[entry] == candidates[1], entry
    assert set(json.loads(file.read_text())) == {"cpu"}
    assert len([line for line in said if "of the time" in line]) == len(loads)


def test_tune_says_that_it_needs_a_gpu() -> None:
    if torch.cuda.is_available() or torch.xpu.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "-m", "attn_kernels", "tune"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert process.returncode == 1
    assert "needs a GPU" in process.stderr
    assert "Traceback" not in process.stderr
