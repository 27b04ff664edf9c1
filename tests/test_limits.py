"""The limits of a CPU: the loops of loops.c against plain formulas, bounds against hand counts, command line."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

for package in ("typer", "rich", "matplotlib"):
    pytest.importorskip(package, reason="the benchmarks need the dependency group bench")

import attn_kernels  # noqa: E402
from bench import cases, cli, timing  # noqa: E402
from bench.cases import Op, Work, work_of  # noqa: E402
from bench.cpu import ceilings, roofline  # noqa: E402
from bench.cpu.ceilings import Bandwidth, Cache, Ceilings  # noqa: E402

pytestmark = pytest.mark.usefixtures("same_threads")

CACHES = [Cache("L1", 32 << 10, 1), Cache("L2", 1 << 20, 1), Cache("L3", 32 << 20, 8)]
SHAPE = cases.Shape(2, 3, 5, 7, 11)


@pytest.fixture(scope="module")
def loops() -> ceilings.Loops:
    try:
        return ceilings.compile_loops()
    except ceilings.CompilerError as error:
        pytest.skip(str(error))


def normal(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(len(size) + size[0]))


# Loops ----------------------------------------------------------------------------------------------------------------


def test_reading_sums_every_word(loops: ceilings.Loops) -> None:
    words = torch.randint(-(2**31), 2**31, (3 * loops.block,), dtype=torch.int64).to(torch.int32)
    for repeats in (0, 1, 5):
        assert loops.read_words(words, words.numel(), repeats) == repeats * words.sum().item() % 2**32


@pytest.mark.parametrize("name", ["write_floats", "stream_floats"])
def test_writing_fills_what_it_is_given(loops: ceilings.Loops, name: str) -> None:
    if name == "stream_floats" and not loops.can_stream:
        pytest.skip("no non-temporal stores here")
    x = torch.zeros(4 * loops.block)
    getattr(loops, name)(x, 3 * loops.block, 1.5, 2)
    assert torch.equal(x[: 3 * loops.block], torch.full((3 * loops.block,), 1.5))
    assert x[3 * loops.block :].eq(0).all()


@pytest.mark.parametrize("name", ["copy_floats", "copy_streaming"])
def test_copying(loops: ceilings.Loops, name: str) -> None:
    if name == "copy_streaming" and not loops.can_stream:
        pytest.skip("no non-temporal stores here")
    n = 3 * loops.block
    x, y = normal(n), torch.zeros(n + loops.block)
    getattr(loops, name)(x, y, n, 0.25, 2)
    assert torch.equal(y[:n], x + 0.25)
    assert y[n:].eq(0).all()


def test_chains(loops: ceilings.Loops) -> None:
    assert loops.add_integers(3, 5) == 3 * 16 * 5
    sums = torch.empty(loops.lanes)
    loops.multiply_add(0.5, 3.0, 4, sums)
    expected = sum(chain / 2**4 + 3 * (1 + 1 / 2 + 1 / 4 + 1 / 8) for chain in range(loops.chains))
    assert torch.equal(sums, torch.full((loops.lanes,), expected))


def test_exponentials(loops: ceilings.Loops) -> None:
    x = torch.linspace(-20, 20, 4 * loops.block)
    e = torch.empty_like(x)
    loops.exponentials(x, x.numel(), 2, e)
    torch.testing.assert_close(e.double(), torch.exp(2 * x.double()), rtol=5e-6, atol=0)


@pytest.mark.parametrize("name", ["forward_divided", "forward_estimated"])
def test_forward_pairs(loops: ceilings.Loops, name: str) -> None:
    units = 5 * loops.forward_units
    c, q, k = normal(1, units).abs() + 0.1, normal(loops.forward_queries, units).exp(), normal(2, units).exp()
    sums = torch.empty(loops.forward_queries, loops.forward_keys, loops.lanes)
    getattr(loops, name)(c, q, k, units, 3, sums)
    expected = 1 / (c.double() + q.double()[:, None] * k.double())
    torch.testing.assert_close(sums.double().sum(-1), expected.sum(-1), rtol=1e-5, atol=0)


def test_relu_pairs(loops: ceilings.Loops) -> None:
    units = 5 * loops.lanes
    v, q, k = normal(1, units), normal(loops.forward_queries, units), normal(loops.forward_keys, units)
    sums = torch.empty(loops.forward_queries, loops.forward_keys, loops.lanes)
    loops.relu_pairs(v, q, k, units, 3, sums)
    expected = torch.relu(q.double()[:, None] + k.double()) @ v.double().squeeze(0)
    torch.testing.assert_close(sums.double().sum(-1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["backward_shared", "backward_single", "backward_estimated"])
def test_backward_pairs(loops: ceilings.Loops, name: str) -> None:
    queries, keys = loops.backward_queries, 9
    q, k, ds = normal(queries, loops.lanes), normal(keys, loops.lanes), normal(queries, keys)
    eq, ek = (torch.exp(torch.cat((2 * x, -2 * x))) for x in (q, k))
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros(loops.lanes)
    getattr(loops, name)(eq, ek, ds, keys, 2, dq, dk, dv)  # twice: sums go on

    leaves = [x.double().requires_grad_() for x in (q, k)]
    tanh = torch.tanh(leaves[0][:, None] + leaves[1])
    weighted = ds.double()[:, :, None] * tanh
    expected = torch.autograd.grad(weighted.sum(), leaves)
    for got, wanted in zip((dq, dk), expected, strict=True):
        torch.testing.assert_close(4 * got.double(), 2 * wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dv.double(), 2 * weighted.detach().sum((0, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_figures_of_the_machine_are_positive(loops: ceilings.Loops, threads: int) -> None:
    small = [Cache("L1", 16 << 10, 1), Cache("L2", 256 << 10, 2)]
    with cli.progress_bars() as progress:
        found = ceilings.measure(loops, small, threads, 0, progress)
    assert list(found.bandwidth) == ["L1", "L2", "memory"]
    figures = [found.clock, found.macs, found.exponentials, found.forward_pairs, found.backward_pairs]
    for rates in found.bandwidth.values():
        figures += [rates.read, rates.write, rates.copy]
    if loops.can_stream:
        figures += [found.bandwidth["memory"].streaming_write, found.bandwidth["memory"].streaming_copy]
    assert all(math.isfinite(figure) and figure > 0 for figure in figures)
    assert found.forward_pairs == max(found.forward_pairs_divided, found.forward_pairs_estimated)
    backward = (found.backward_pairs_shared, found.backward_pairs_single, found.backward_pairs_estimated)
    assert found.backward_pairs == max(backward)


def test_rate_counts_what_all_threads_do(monkeypatch: pytest.MonkeyPatch) -> None:
    done, clock = [0, 0], threading.local()  # each thread has a clock of its own

    def call(i: int, repeats: int) -> None:
        done[i] += repeats
        clock.now = 2e-5 * repeats

    monkeypatch.setattr(ceilings, "time", SimpleNamespace(perf_counter=lambda: vars(clock).pop("now", 0.0)))
    rate = ceilings.ThreadTeam(2, 0).rate(1000.0, call)
    assert done[0] == done[1] > 100
    assert rate == pytest.approx(2 * 1000 / 2e-5 / 1e9)


def test_rate_survives_an_interruption_of_its_first_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, clock = [], [0.0]

    def call(i: int, repeats: int) -> None:
        asked.append(repeats)
        clock[0] += 1e-5 * repeats + (2 * ceilings.SAMPLE if len(asked) <= 2 else 0)

    monkeypatch.setattr(ceilings, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert ceilings.ThreadTeam(1, 0).rate(1.0, call) == pytest.approx(1e-4)  # a call takes 1e4 ns
    assert asked[:3] == [1, 1, 1]
    assert asked[-1] > 10


# The machine ----------------------------------------------------------------------------------------------------------


def test_caches_are_those_of_the_system(tmp_path: Path) -> None:
    for i, (level, kind, size, cpus) in enumerate(
        [(1, "Data", "48K", "0,64"), (1, "Instruction", "32K", "0,64"), (3, "Unified", "36M", "0-15,64-79")]
    ):
        folder = tmp_path / f"index{i}"
        folder.mkdir()
        for name, text in {"level": level, "type": kind, "size": size, "shared_cpu_list": cpus}.items():
            (folder / name).write_text(f"{text}\n")
    assert ceilings.caches(tmp_path) == [Cache("L1", 48 << 10, 2), Cache("L3", 36 << 20, 32)]
    assert [cache.name for cache in ceilings.caches(tmp_path / "nowhere")] == ["L1", "L2", "L3"]


def test_working_sets_and_their_levels() -> None:
    sizes = {32 << 10: "L1", (32 << 10) + 1: "L2", 1 << 20: "L2", 16 << 20: "L3", (16 << 20) + 1: "memory"}
    assert {size: ceilings.level_of(size, CACHES, 1) for size in sizes} == sizes
    assert ceilings.level_of(2 << 20, CACHES, 2) == "L2"  # two cores have two of them
    assert ceilings.level_of(20 << 20, CACHES, 8) == "memory"  # and share the last one
    assert ceilings.sizes_of_buffers(CACHES, 1) == {
        "L1": 16 << 10,
        "L2": 512 << 10,
        "L3": 8 << 20,
        "memory": 256 << 20,
    }


# Bounds ---------------------------------------------------------------------------------------------------------------


def test_work_by_hand() -> None:
    # B, Tq, Tk, A, D = 2, 3, 5, 7, 11: query 42, keys 70, values 110, v 7, context 66 and alignments 30 elements.
    assert work_of(Op.additive_attention, SHAPE, "forward", 4) == (
        4 * (42 + 70 + 110 + 7),
        4 * 66,
        2 * 3 * 5 * 7,
        42 + 70,
        2 * 3 * 5 * 11,
    )
    assert work_of(Op.additive_attention, SHAPE, "backward", 4) == (
        4 * (42 + 70 + 110 + 7 + 66 + 30),
        4 * (42 + 70 + 110 + 7),
        2 * 3 * 5 * 7,
        42 + 70,
        2 * (2 * 3 * 5 * 11),
    )
    assert work_of(Op.dot_attention, SHAPE, "forward", 2) == (2 * (42 + 70 + 110), 2 * 66, 0, 0, 30 * (7 + 11))
    assert work_of(Op.dot_attention, SHAPE, "backward", 2) == (
        2 * (42 + 70 + 110 + 66 + 30),
        2 * (42 + 70 + 110),
        0,
        0,
        2 * 30 * (7 + 11),
    )


def _limits(threads: int = 1) -> Ceilings:
    levels = {name: Bandwidth(0, 100.0, 50.0, 80.0) for name in ("L1", "L2", "L3")}
    memory = Bandwidth(0, 20.0, 10.0, 16.0, 25.0, 40.0)
    return Ceilings(threads, 4.0, {**levels, "memory": memory}, 64.0, 8.0, 16.0, 16.0, 12.0, 32.0, 4.0, 4.0, 3.0, 2.0)


def test_bytes_go_in_a_copy_as_far_as_they_can() -> None:
    rates = Bandwidth(0, 20.0, 10.0, 16.0, 25.0, 40.0)
    assert rates.milliseconds(3_000_000, 1_000_000, streaming=False) == pytest.approx(2 / 16 + 2 / 20)
    assert rates.milliseconds(1_000_000, 3_000_000, streaming=False) == pytest.approx(2 / 16 + 2 / 10)
    assert rates.milliseconds(1_000_000, 3_000_000, streaming=True) == pytest.approx(2 / 40 + 2 / 25)
    none = Bandwidth(0, 20.0, 10.0, 16.0)
    assert none.milliseconds(1_000_000, 3_000_000, streaming=True) == pytest.approx(2 / 16 + 2 / 10)


def test_bound_is_the_larger_of_bytes_and_arithmetic() -> None:
    arithmetic = Work(1000, 0, pairs=16_000_000, exponentials=8_000_000, macs=64_000_000)
    bound = roofline.bound_of("additive_attention", arithmetic, "forward", _limits(), CACHES)
    assert (bound.level, bound.by, bound.streaming) == ("L1", "math", False)
    assert bound.milliseconds == bound.arithmetic_ms == pytest.approx(1 + 1 + 1)
    backward = roofline.bound_of("additive_attention", arithmetic, "backward", _limits(), CACHES)
    assert backward.milliseconds == pytest.approx(4 + 1 + 1)

    memory = roofline.bound_of("additive_attention", Work(40_000_000, 1_000_000, 0, 0, 1), "forward", _limits(), CACHES)
    assert (memory.level, memory.by, memory.streaming) == ("memory", "bytes", False)
    assert memory.milliseconds == pytest.approx(2 / 16 + 39 / 20)
    outputs = roofline.bound_of(
        "additive_attention", Work(40_000_000, 40_000_000, 0, 0, 1), "backward", _limits(), CACHES
    )
    assert outputs.streaming
    assert outputs.milliseconds == pytest.approx(80 / 40)


def test_figures_of_a_line() -> None:
    work = Work(1_500_000, 500_000, 8_000_000, 0, 0)
    bound = roofline.bound_of("additive_attention", work, "forward", _limits(), CACHES)
    cell = roofline.Cell(
        "additive_attention", SHAPE, "", "forward", work, bound, timing.Spread(2.0, 1.5, 2.5), best=1.25
    )
    assert cell.gigabytes_a_second == pytest.approx(1.0)
    assert cell.pairs_per_ns == pytest.approx(4.0)
    assert _limits().cycles(cell.pairs_per_ns, 16) == pytest.approx(16.0)
    assert _limits(threads=2).cycles(cell.pairs_per_ns, 16) == pytest.approx(32.0)
    assert cell.times_bound == pytest.approx(4.0)  # 8e6 pairs at 16 a ns


@pytest.mark.parametrize("op", [timed.value for timed in roofline.Timed])
def test_what_is_timed_is_the_op(op: str) -> None:
    if not attn_kernels.backends()["cpu"].available:
        pytest.skip(attn_kernels.backends()["cpu"].detail)
    settings = cases.Settings(torch.float32, roofline.CPU, 0, 1, False, False, cases.Lengths.none, 0)
    problem = cases.make_problem(op, SHAPE, settings)
    expected = cases.expected_results(op, problem, training=True)
    calls = roofline.calls_of(op, problem)
    got = dict(zip(problem.inputs, calls["backward"](), strict=False))
    torch.testing.assert_close(calls["forward"]()[0], expected["context"])
    for name in problem.inputs:
        torch.testing.assert_close(got[name], expected[f"d{name}"], rtol=1e-4, atol=1e-5)


# Command line ---------------------------------------------------------------------------------------------------------


def _invoke(*arguments: str, **environment: str) -> tuple[int, str]:
    from typer.testing import CliRunner

    result = CliRunner().invoke(roofline.app, arguments, env=environment)
    return result.exit_code, result.output


@pytest.mark.slow
def test_command_line_and_its_file(loops: ceilings.Loops, tmp_path: Path) -> None:
    if not attn_kernels.backends()["cpu"].available:
        pytest.skip(attn_kernels.backends()["cpu"].detail)
    code, output = _invoke(
        "--shape", "2,3,4,8", "--shape", "2,1,5,8,6", "--seconds", "0", "--allocator", "default", "--dtype", "bfloat16",
        "--output", str(tmp_path),
    )  # fmt: skip
    assert code == 0, output
    assert [path.name for path in tmp_path.iterdir()] == ["limits-cpu-bfloat16.json"]
    result = json.loads((tmp_path / "limits-cpu-bfloat16.json").read_text())
    assert {"schema", "part", "machine", "caches", "units", "limits", "settings", "cells"} == set(result)
    assert {"memory", "L1"} <= set(result["limits"]["bandwidth"])
    assert len(result["cells"]) == 2 * 2 * len(roofline.Timed)
    for cell in result["cells"]:
        assert cell["bound"]["by"] in ("bytes", "math")
        assert cell["bound"]["milliseconds"] > 0
        assert 0 < cell["milliseconds"]["best"] <= cell["milliseconds"]["median"]
        assert cell["times the bound"] > 0
        assert (cell["pairs per ns"] is None) == (cell["op"] == "dot_attention")


def test_no_compiler_is_told_and_stops() -> None:
    if not attn_kernels.backends()["cpu"].available:
        pytest.skip(attn_kernels.backends()["cpu"].detail)
    code, output = _invoke(CC="no-such-compiler -O1")
    assert code == 2
    assert "the C compiler of $CC was not found: no-such-compiler" in output
    code, output = _invoke(CC="false")
    assert code == 2
    assert "false cannot compile loops.c" in output


def test_no_compiler_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ceilings.CompilerError, match="no C compiler was found"):
        ceilings.find_compiler()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "1,2"], "a shape is B,Tq,Tk,A"),
        (["--dtype", "float64"], "float64"),
        (["--threads", "0"], "threads"),
    ],
)
def test_errors_of_the_command_line(arguments: list[str], message: str) -> None:
    code, output = _invoke(*arguments)
    assert code == 2
    assert message in output


def test_help() -> None:
    code, output = _invoke("--help")
    assert code == 0
    assert "--output" in output
