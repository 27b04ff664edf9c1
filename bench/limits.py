"""How far the kernels are from what this CPU allows: ``python -m bench.limits --help``.

First the machine: how fast it reads, writes and copies in each cache and in memory, and how fast bare loops of the
kernels' arithmetic run out of the first cache (``limits.c``, compiled for this machine). Then the ops: each pass beside
its bound, which is the larger of two times,

- bytes: every input read once and every output written once, at the speed of the level where all of them together fit;
- arithmetic: pairs, exponentials and multiply-adds, each at the speed of its bare loop, one after the other.

Arithmetic is that of float32 whatever the dtype: conversions are the kernels' own affair. Small terms are left out: the
softmax, and sums over a vector. Bounds are of this form of the arithmetic; another form has others.
"""

from __future__ import annotations

import ctypes
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn

import torch
import typer
from rich import box
from rich.console import Group, RenderableType
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import Tensor

import attn_kernels
from attn_kernels.ops import kernel

from . import files, machine, ops, timing
from .machine import Allocator
from .ops import Op, Shape
from .terminal import application, console

SOURCE = Path(__file__).with_name("limits.c")
BACKWARD = "backward"
MEMORY = "memory"
CPU = torch.device("cpu")

SAMPLE = 5e-3  # seconds; a shorter call of a loop is repeated within a sample
LEAST_SAMPLES = 3


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


# Loops ----------------------------------------------------------------------------------------------------------------


class CompilerError(Exception):
    """limits.c cannot be compiled here."""


class _Data:
    """Lets ctypes take a tensor where a pointer to its elements is wanted."""

    @classmethod
    def from_param(cls, tensor: Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(tensor.data_ptr())


_COUNT, _FLOAT = ctypes.c_int64, ctypes.c_float
_FUNCTIONS: dict[str, list[type]] = {
    "read_words": [_Data, _COUNT, _COUNT],
    "write_floats": [_Data, _COUNT, _FLOAT, _COUNT],
    "stream_floats": [_Data, _COUNT, _FLOAT, _COUNT],
    "copy_floats": [_Data, _Data, _COUNT, _FLOAT, _COUNT],
    "copy_streaming": [_Data, _Data, _COUNT, _FLOAT, _COUNT],
    "add_integers": [ctypes.c_uint64, _COUNT],
    "multiply_add": [_FLOAT, _FLOAT, _COUNT, _Data],
    "exponentials": [_Data, _COUNT, _COUNT, _Data],
    "forward_pairs": [_Data, _Data, _Data, _COUNT, _COUNT, _Data],
    "backward_shared": [_Data, _Data, _Data, _COUNT, _COUNT, _Data, _Data, _Data],
    "backward_single": [_Data, _Data, _Data, _COUNT, _COUNT, _Data, _Data, _Data],
}
_RESULTS = {"read_words": ctypes.c_uint32, "add_integers": ctypes.c_uint64}


class Loops:
    """The functions of limits.c, which take tensors for pointers, and its constants. They run without the GIL."""

    read_words: Callable[..., int]
    add_integers: Callable[..., int]
    write_floats: Callable[..., None]
    stream_floats: Callable[..., None]
    copy_floats: Callable[..., None]
    copy_streaming: Callable[..., None]
    multiply_add: Callable[..., None]
    exponentials: Callable[..., None]
    forward_pairs: Callable[..., None]
    backward_shared: Callable[..., None]
    backward_single: Callable[..., None]

    def __init__(self, library: ctypes.CDLL, compiler: str) -> None:
        self.compiler = compiler
        for name, arguments in _FUNCTIONS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, _RESULTS.get(name)
            setattr(self, name, function)

        def constant(name: str) -> int:
            return ctypes.c_int32.in_dll(library, name).value

        self.lanes = constant("lanes")
        self.block = constant("block")
        self.chains = constant("chains")
        self.forward_queries = constant("forward_queries")
        self.forward_keys = constant("forward_keys")
        self.forward_units = constant("forward_units")
        self.backward_queries = constant("backward_queries")
        self.can_stream = bool(constant("can_stream"))


def find_compiler() -> list[str]:
    """The command of the C compiler: $CC, with its arguments if it has any, or what the system calls one."""
    command = shlex.split(os.environ.get("CC", ""))
    if command:
        if shutil.which(command[0]) is None:
            raise CompilerError(f"the C compiler of $CC was not found: {command[0]}")
        return command
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name) is not None:
            return [name]
    raise CompilerError("no C compiler was found (cc, gcc, clang); install one, or name it in $CC")


def compile_loops() -> Loops:
    """Compiles limits.c for this processor and loads it."""
    command = find_compiler()
    flags = ["-O3", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC"]
    with tempfile.TemporaryDirectory() as folder:  # once loaded, the library needs its file no more
        path = Path(folder) / "limits.so"
        # Clang for ARM has known -march=native for a few years only.
        for native in ("-march=native", "-mcpu=native"):
            try:
                done = subprocess.run(
                    [*command, *flags, native, str(SOURCE), "-o", str(path)],
                    capture_output=True,
                    text=True,
                    timeout=120,
                )
            except (OSError, subprocess.SubprocessError) as error:
                raise CompilerError(f"{shlex.join(command)}: {error}") from None
            if done.returncode == 0:
                return Loops(ctypes.CDLL(str(path)), f"{_version(command)}, {' '.join([*flags, native])}")
    raise CompilerError(f"{shlex.join(command)} cannot compile {SOURCE.name}:\n{done.stderr.strip()}")


def _version(command: list[str]) -> str:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True)
    return (done.stdout.splitlines() or [shlex.join(command)])[0]


# The machine ----------------------------------------------------------------------------------------------------------


class Cache(NamedTuple):
    name: str
    size: int  # bytes
    cores: int  # that share it

    def capacity(self, threads: int) -> int:
        """Bytes that ``threads`` threads have together, side by side on neighbouring cores."""
        return self.size * -(-threads // self.cores)


def caches(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> list[Cache]:
    """The data caches of the first core, the fastest first; usual ones where the system does not tell."""
    found = []
    for index in sorted(folder.glob("index*")):
        try:
            level, kind, size, cpus = (
                (index / name).read_text().strip() for name in ("level", "type", "size", "shared_cpu_list")
            )
            if kind != "Instruction":
                found.append(Cache(f"L{int(level)}", _bytes(size), _count(cpus)))
        except (OSError, ValueError):
            continue
    return sorted(found) or [Cache("L1", 32 << 10, 1), Cache("L2", 1 << 20, 1), Cache("L3", 32 << 20, 8)]


def _bytes(text: str) -> int:
    unit = {"K": 10, "M": 20, "G": 30}.get(text[-1])
    return int(text[:-1]) << unit if unit is not None else int(text)


def _count(cpus: str) -> int:
    """How many there are in a list like 0-3,8."""
    ends = [part.split("-") for part in cpus.split(",")]
    return sum(int(part[-1]) - int(part[0]) + 1 for part in ends)


def level_of(size: int, caches: list[Cache], threads: int) -> str:
    """Where ``size`` bytes live between calls: a whole cache, but half of the last one, or else memory."""
    for i, cache in enumerate(caches):
        if size * (2 if i + 1 == len(caches) else 1) <= cache.capacity(threads):
            return cache.name
    return MEMORY


def sizes_of_buffers(caches: list[Cache], threads: int) -> dict[str, int]:
    """Bytes for each thread to read and write: half of a cache, a quarter of the last one, far beyond it for memory."""
    sizes: dict[str, int] = {}
    before = 0
    for i, cache in enumerate(caches):
        share = cache.capacity(threads) // threads
        sizes[cache.name] = max(share // (4 if i + 1 == len(caches) else 2), 2 * before)
        before = share
    sizes[MEMORY] = max(256 << 20, 4 * caches[-1].capacity(threads)) // threads
    return sizes


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a ns (GB/s) of all threads together; of a copy, bytes read and bytes written."""

    buffer: int  # bytes, of each thread
    read: float
    write: float
    copy: float
    streaming_write: float | None = None
    streaming_copy: float | None = None

    def milliseconds(self, read: int, written: int, *, streaming: bool) -> float:
        """The time of reading and writing so many bytes: as much of it as can be in one copy, the rest alone."""
        write, copy = self.write, self.copy
        if streaming:
            write, copy = self.streaming_write or write, self.streaming_copy or copy
        both = min(read, written)
        return (2 * both / copy + (read - both) / self.read + (written - both) / write) / 1e6


@dataclass(frozen=True)
class Limits:
    """What the machine can do; per ns, of all threads together, but for ``clock``."""

    threads: int
    clock: float  # cycles a ns, of one thread
    bandwidth: dict[str, Bandwidth]  # by level
    macs: float  # float32 multiply-adds
    exponentials: float
    forward_pairs: float  # of a query and a key, for one unit
    backward_pairs: float  # the better one of the next two
    backward_pairs_shared: float  # two queries share a division
    backward_pairs_single: float  # each has its own

    def cycles(self, rate: float, number: int) -> float:
        """Cycles that one thread takes for ``number`` things of which all threads do ``rate`` a ns."""
        return self.clock * number * self.threads / rate


class Crew:
    """Threads that do the same at the same time. Numbers are the best of all samples: others use the machine too."""

    def __init__(self, threads: int, seconds: float) -> None:
        self.threads, self.seconds = threads, seconds

    def rate(self, amount: float, call: Callable[[int, int], object]) -> float:
        """How much all threads do in a ns, where call(i, repeats) makes thread i do ``amount`` ``repeats`` times."""
        with ThreadPoolExecutor(self.threads) as pool:
            repeats, samples, best = 1, 0, math.inf
            start = time.perf_counter()
            while samples < LEAST_SAMPLES or time.perf_counter() - start < self.seconds:
                taken = self._sample(pool, call, repeats)
                if taken < SAMPLE / 2:  # at any time: where the first samples were interrupted, they looked long enough
                    repeats = math.ceil(repeats * min(10.0, SAMPLE / max(taken, 1e-9)))
                else:
                    best = min(best, taken / repeats)
                    samples += 1
        return self.threads * amount / best / 1e9

    def _sample(self, pool: ThreadPoolExecutor, call: Callable[[int, int], object], repeats: int) -> float:
        """Seconds from the first that begins to the last that ends."""
        barrier = threading.Barrier(self.threads)

        def work(i: int) -> tuple[float, float]:
            barrier.wait()
            start = time.perf_counter()
            call(i, repeats)
            return start, time.perf_counter()

        starts, ends = zip(*pool.map(work, range(self.threads)), strict=True)
        return max(ends) - min(starts)


Rate = Callable[[str, float, Callable[[int, int], object]], float]  # Crew.rate, with what is measured


def measure(loops: Loops, caches: list[Cache], threads: int, seconds: float, progress: Progress) -> Limits:
    """Takes ``seconds`` for each of the figures."""
    crew = Crew(threads, seconds)
    sizes = sizes_of_buffers(caches, threads)
    task = progress.add_task("machine", total=6 + 3 * len(sizes) + 2 * loops.can_stream)

    def rate(what: str, amount: float, call: Callable[[int, int], object]) -> float:
        progress.update(task, description=f"machine: {what}")
        result = crew.rate(amount, call)
        progress.advance(task)
        return result

    n = 8 * loops.block
    x = [torch.randn(n) for _ in range(threads)]
    y = [torch.empty(n) for _ in range(threads)]
    clock = rate("clock", 16, lambda i, repeats: loops.add_integers(3, repeats)) / threads
    macs = rate("multiply-adds", loops.chains * loops.lanes, lambda i, r: loops.multiply_add(0.5, 1.0, r, y[i]))
    exponentials = rate("exponentials", n, lambda i, repeats: loops.exponentials(x[i], n, repeats, y[i]))
    forward = measure_forward(loops, threads, rate)
    shared, single = (measure_backward(loops, loop, threads, rate) for loop in ("shared", "single"))
    bandwidth = {level: measure_bandwidth(loops, level, size, threads, rate) for level, size in sizes.items()}
    progress.update(task, description="machine")
    return Limits(threads, clock, bandwidth, macs, exponentials, forward, max(shared, single), shared, single)


def measure_forward(loops: Loops, threads: int, rate: Rate) -> float:
    queries, keys = loops.forward_queries, loops.forward_keys
    units = 512 // loops.forward_units * loops.forward_units
    rows = [torch.rand(1 + queries + keys, units) + 0.5 for _ in range(threads)]
    sums = [torch.empty(queries, keys, loops.lanes) for _ in range(threads)]

    def call(i: int, repeats: int) -> None:
        c, q, k = rows[i], rows[i][1:], rows[i][1 + queries :]
        loops.forward_pairs(c, q, k, units, repeats, sums[i])

    return rate("pairs, forward", queries * keys * units, call)


def measure_backward(loops: Loops, loop: str, threads: int, rate: Rate) -> float:
    function = getattr(loops, f"backward_{loop}")
    queries, keys = loops.backward_queries, 64
    exponentials = [torch.rand(2 * (queries + keys), loops.lanes) + 0.5 for _ in range(threads)]
    ds = [torch.randn(queries, keys) for _ in range(threads)]
    gradients = [torch.zeros(queries + keys + 1, loops.lanes) for _ in range(threads)]

    def call(i: int, repeats: int) -> None:
        e, g = exponentials[i], gradients[i]
        function(e, e[2 * queries :], ds[i], keys, repeats, g, g[queries:], g[queries + keys :])

    return rate("pairs, backward", queries * keys * loops.lanes, call)


def measure_bandwidth(loops: Loops, level: str, size: int, threads: int, rate: Rate) -> Bandwidth:
    half = size // 8 // loops.block * loops.block  # floats; a copy is from one half of a buffer to the other
    x = [torch.ones(2 * half) for _ in range(threads)]
    y = [buffer[half:] for buffer in x]
    n, moved = 2 * half, 8 * half

    def rate_of(what: str, call: Callable[[int, int], object]) -> float:
        return rate(f"{level}, {what}", moved, call)

    read = rate_of("read", lambda i, repeats: loops.read_words(x[i], n, repeats))
    write = rate_of("write", lambda i, repeats: loops.write_floats(x[i], n, 1.0, repeats))
    copy = rate_of("copy", lambda i, repeats: loops.copy_floats(x[i], y[i], half, 0.0, repeats))
    if level != MEMORY or not loops.can_stream:
        return Bandwidth(moved, read, write, copy)
    streaming_write = rate_of("streaming write", lambda i, repeats: loops.stream_floats(x[i], n, 1.0, repeats))
    streaming_copy = rate_of("streaming copy", lambda i, repeats: loops.copy_streaming(x[i], y[i], half, 0.0, repeats))
    return Bandwidth(moved, read, write, copy, streaming_write, streaming_copy)


# Bounds ---------------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What one call has to do at least."""

    read: int  # bytes
    written: int  # bytes
    pairs: int  # of a query and a key, for one unit
    exponentials: int
    macs: int


def work_of(op: Op, shape: Shape, passes: str, item_size: int) -> Work:
    """Forward: context alone, no alignments. Backward: starts from the alignments and the gradient of the context."""
    batch, queries, steps, units, width = shape
    pairs = batch * queries * steps
    query, context = batch * queries * units, batch * queries * width
    keys, values = batch * steps * units, batch * steps * width
    v = units if op is Op.additive_attention else 0
    inputs = query + keys + values + v
    if passes == ops.FORWARD:
        read, written, products = inputs, context, pairs * width
    else:
        # The gradient of the values and that of the alignments.
        read, written, products = inputs + pairs + context, inputs, 2 * pairs * width
    if op is Op.additive_attention:
        return Work(read * item_size, written * item_size, pairs * units, query + keys, products)
    products += pairs * units * (1 if passes == ops.FORWARD else 2)
    return Work(read * item_size, written * item_size, 0, 0, products)


@dataclass(frozen=True)
class Bound:
    level: str  # where inputs and outputs fit
    streaming: bool  # whether outputs are written past the caches
    bytes_ms: float
    arithmetic_ms: float

    @property
    def milliseconds(self) -> float:
        return max(self.bytes_ms, self.arithmetic_ms)

    @property
    def by(self) -> str:
        return "bytes" if self.bytes_ms >= self.arithmetic_ms else "math"


def bound_of(work: Work, passes: str, limits: Limits, caches: list[Cache]) -> Bound:
    level = level_of(work.read + work.written, caches, limits.threads)
    # Outputs larger than the last cache leave it in any case; smaller ones may stay for whoever reads them next.
    streaming = level == MEMORY and work.written > caches[-1].capacity(limits.threads)
    streaming = streaming and limits.bandwidth[level].streaming_copy is not None
    pairs = limits.forward_pairs if passes == ops.FORWARD else limits.backward_pairs
    arithmetic = work.pairs / pairs + work.exponentials / limits.exponentials + work.macs / limits.macs
    return Bound(
        level,
        streaming,
        limits.bandwidth[level].milliseconds(work.read, work.written, streaming=streaming),
        arithmetic / 1e6,
    )


# The ops --------------------------------------------------------------------------------------------------------------


@dataclass
class Cell:
    """One line of the table: one pass of an op at one shape."""

    op: Op
    shape: Shape
    label: str
    passes: str
    work: Work
    bound: Bound
    milliseconds: timing.Spread
    best: float  # ms

    @property
    def times_bound(self) -> float:
        return self.milliseconds.median / self.bound.milliseconds

    @property
    def gigabytes_a_second(self) -> float:
        """Of the bytes that have to move; the kernels may move more."""
        return (self.work.read + self.work.written) / self.milliseconds.median / 1e6

    @property
    def pairs_per_ns(self) -> float:
        return self.work.pairs / self.milliseconds.median / 1e6


def calls_of(op: Op, problem: ops.Problem) -> dict[str, Callable[[], object]]:
    """What is timed: the kernels as autograd calls them. The one place here that knows the signatures of the ops."""
    query, keys, values, *v = problem.inputs.values()
    parameters: tuple[object, ...] = (*v, None, None) if op is Op.additive_attention else (1.0,)
    masks = (problem.memory_lengths, None)
    forward, backward = kernel(op.value, "cpu"), kernel(f"{op.value}_backward", "cpu")
    alignments = forward(query, keys, values, *parameters, *masks, True)[1]
    inputs = (query, keys, values, *parameters, *masks)
    return {
        ops.FORWARD: lambda: forward(*inputs, False),
        BACKWARD: lambda: backward(problem.grad_context, None, *inputs, alignments, True, True),
    }


def time_ops(
    chosen: list[Op],
    shapes: dict[Shape, str],
    dtype: torch.dtype,
    limits: Limits,
    caches: list[Cache],
    seconds: float,
    progress: Progress,
) -> Iterator[Cell]:
    settings = ops.Settings(dtype, CPU, seconds, 5, False, False, ops.Lengths.none, 0)
    task = progress.add_task("ops", total=len(chosen) * len(shapes))
    for op in chosen:
        for shape, label in shapes.items():
            progress.update(task, description=f"ops: {op.value} ({shape})")
            calls = calls_of(op, ops.make_problem(op.value, shape, settings))
            for passes, call in calls.items():
                # One after the other, not in turns: each is to find in the caches what its own last call left there.
                samples = timing.interleave({passes: call}, timing.timer_for(CPU), seconds=seconds, most_rounds=1000)
                taken = [1e3 * sample for sample in samples[passes]]
                work = work_of(op, shape, passes, dtype.itemsize)
                bound = bound_of(work, passes, limits, caches)
                yield Cell(op, shape, label, passes, work, bound, timing.spread(taken), min(taken))
            progress.advance(task)
    progress.update(task, description="ops")


# Output ---------------------------------------------------------------------------------------------------------------


def as_result(
    cells: list[Cell],
    limits: Limits,
    caches: list[Cache],
    dtype: Dtype,
    seconds: float,
    description: dict[str, str | int],
) -> dict[str, object]:
    def entry(cell: Cell) -> dict[str, object]:
        additive = cell.op is Op.additive_attention
        return {
            "op": cell.op.value,
            "shape": cell.shape._asdict(),
            "label": cell.label,
            "passes": cell.passes,
            "milliseconds": {**cell.milliseconds._asdict(), "best": cell.best},
            "work": cell.work._asdict(),
            "GB/s": cell.gigabytes_a_second,
            "share of the bandwidth": cell.bound.bytes_ms / cell.milliseconds.median,
            "pairs per ns": cell.pairs_per_ns if additive else None,
            "cycles per 16 pairs": limits.cycles(cell.pairs_per_ns, 16) if additive else None,
            "bound": {**asdict(cell.bound), "milliseconds": cell.bound.milliseconds, "by": cell.bound.by},
            "times the bound": cell.times_bound,
            "times the bound, best": cell.best / cell.bound.milliseconds,
        }

    return _rounded(
        {
            "part": "limits",
            "machine": description,
            "caches": [cache._asdict() for cache in caches],
            "units": "GB/s, of a copy bytes read and bytes written; others a ns; of all threads, but the clock of one",
            "limits": asdict(limits),
            "settings": {"dtype": dtype.value, "seconds": seconds, "milliseconds": "median, quartiles and best"},
            "cells": [entry(cell) for cell in cells],
        }
    )


def _rounded(value: Any) -> Any:
    """Five digits of every float: more would be noise."""
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def tables(cells: list[Cell], limits: Limits, dtype: Dtype, description: dict[str, str | int]) -> RenderableType:
    parts: list[RenderableType] = [bandwidth_table(limits), Text(), rates_table(limits), Text()]
    for op, passes in dict.fromkeys((cell.op, cell.passes) for cell in cells):
        parts += [op_table([cell for cell in cells if (cell.op, cell.passes) == (op, passes)], limits, dtype), Text()]
    parts.append(
        Text(
            "forward: context alone; backward: the backward op alone. ms: median, and best\n"
            "sample. GB/s: each input and output once; %: of the time, what these take at\n"
            "least. /ns: pairs a ns; cyc.: cycles of one thread for 16 pairs. in: where\n"
            "inputs and outputs fit: L1, L2, half of the last cache, mem: memory, nt: memory,\n"
            "outputs written past the caches. bound: ms, by b: bytes or m: math, which is\n"
            "arithmetic. x: median / bound, and best / bound: where they are far apart,\n"
            "others were using the machine."
        )
    )
    parts.append(machine.as_text(description))
    return Group(*parts)


def bandwidth_table(limits: Limits) -> Table:
    result = _table(f"GB/s, {_threads(limits.threads)}", ["in"])
    for column in ("buffer", "read", "write", "copy", "streaming\nwrite", "streaming\ncopy"):
        result.add_column(column, justify="right", no_wrap=True)
    for level, rates in limits.bandwidth.items():
        size = f"{rates.buffer >> 10} KB" if rates.buffer < 1 << 20 else f"{rates.buffer >> 20} MB"
        figures = (rates.read, rates.write, rates.copy, rates.streaming_write, rates.streaming_copy)
        result.add_row(level, size, *("" if figure is None else f"{figure:.1f}" for figure in figures))
    return result


def rates_table(limits: Limits) -> Table:
    result = _table(f"float32 in L1, {_threads(limits.threads)}; {limits.clock:.2f} GHz", ["loop"])
    for column in ("per ns", "cycles for 16"):
        result.add_column(column, justify="right", no_wrap=True)
    for name, rate in (
        ("multiply-adds", limits.macs),
        ("exponentials", limits.exponentials),
        ("pairs, forward: three units share a division", limits.forward_pairs),
        ("pairs, backward: two queries share a division", limits.backward_pairs_shared),
        ("pairs, backward: a division each", limits.backward_pairs_single),
    ):
        result.add_row(name, f"{rate:.1f}", f"{limits.cycles(rate, 16):.2f}")
    return result


def op_table(cells: list[Cell], limits: Limits, dtype: Dtype) -> Table:
    op, passes = cells[0].op, cells[0].passes
    additive = op is Op.additive_attention
    result = _table(f"{op.value}, {passes}, {dtype.value}, {_threads(limits.threads)}", ["B,Tq,Tk,A"])
    for column in ("ms", "best", "GB/s", "%", *(["/ns", "cyc."] if additive else [])):
        result.add_column(column, justify="right", no_wrap=True)
    result.add_column("in", no_wrap=True)
    for column in ("bound", "by", "x", "best"):
        result.add_column(column, justify="right", no_wrap=True)
    for cell in cells:
        pairs = [_short(cell.pairs_per_ns), _short(limits.cycles(cell.pairs_per_ns, 16))] if additive else []
        result.add_row(
            str(cell.shape),
            _milliseconds(cell.milliseconds.median),
            _milliseconds(cell.best),
            _short(cell.gigabytes_a_second),
            f"{100 * cell.bound.bytes_ms / cell.milliseconds.median:.0f}",
            *pairs,
            "nt" if cell.bound.streaming else "mem" if cell.bound.level == MEMORY else cell.bound.level,
            _milliseconds(cell.bound.milliseconds),
            cell.bound.by[0],
            _ratio(cell.times_bound),
            _ratio(cell.best / cell.bound.milliseconds),
        )
    return result


def _milliseconds(value: float) -> str:
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 1}f}"


def _short(value: float) -> str:
    return f"{value:.{1 if value < 99.95 else 0}f}"


def _ratio(value: float) -> str:
    return f"{value:.{2 if value < 9.995 else 1}f}"


def _table(title: str, columns: list[str]) -> Table:
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for column in columns:
        result.add_column(column, no_wrap=True)
    return result


def _threads(number: int) -> str:
    return "1 thread" if number == 1 else f"{number} threads"


# Command line ---------------------------------------------------------------------------------------------------------

app = application()


@app.command()
def main(
    shape: Annotated[list[str] | None, typer.Option(help="B,Tq,Tk,A or B,Tq,Tk,A,D; may be repeated.")] = None,
    op: Annotated[list[Op] | None, typer.Option(help="May be repeated; both if left out.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the ops; the loops compute in float32.")] = Dtype.float32,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the loops and of the kernels.")] = 1,
    allocator: Annotated[
        Allocator,
        typer.Option(help="reuse: freed pages are kept. default: glibc's own, with fresh pages in each call."),
    ] = Allocator.reuse,
    seconds: Annotated[
        float, typer.Option(min=0, help="Time for each figure of the machine, and for each line of the tables.")
    ] = 0.5,
    output: Annotated[
        Path, typer.Option(help="Folder for the JSON file.", show_default=files.shown(files.LOCAL))
    ] = files.LOCAL,
) -> None:
    """Measures the limits of this CPU, and how far from them the kernels are. Needs a C compiler."""
    shapes = dict.fromkeys(map(ops.parse_shape, shape), "") if shape else ops.SHAPES
    backend = attn_kernels.backends()["cpu"]
    if not backend.available:
        _stop(f"the C++ kernels do not run here: {backend.detail}")
    try:
        loops = compile_loops()
    except CompilerError as error:
        _stop(str(error))
    torch.set_num_threads(threads)
    in_effect = machine.set_allocator(allocator)
    found = caches()
    with ops.progress_bars() as progress:
        limits = measure(loops, found, threads, seconds, progress)
        cells = list(time_ops(op or list(Op), shapes, getattr(torch, dtype.value), limits, found, seconds, progress))
    description = {**machine.describe(CPU, in_effect), "compiler of limits.c": loops.compiler}
    path = output / f"{'-'.join(['limits', 'cpu', *([] if dtype is Dtype.float32 else [dtype.value])])}.json"
    files.write_json(path, as_result(cells, limits, found, dtype, seconds, description))
    console.print(tables(cells, limits, dtype, description))
    console.print(f"Written: {files.shown(path)}")


def _stop(reason: str) -> NoReturn:
    console.print(f"No limits: {reason}", style="bold red")
    sys.exit(2)


if __name__ == "__main__":
    app()
