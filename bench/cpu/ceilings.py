"""The limits of this CPU: bandwidth of reads, writes and copies in caches and memory, and the speed of bare loops.

The loops do the arithmetic of the kernels on data in the L1 cache. They are in loops.c, compiled for this machine.
"""

from __future__ import annotations

import ctypes
import math
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor

SOURCE = Path(__file__).with_name("loops.c")
MEMORY = "memory"
SAMPLE = 5e-3  # seconds; a shorter call is repeated within a sample
LEAST_SAMPLES = 3


# Loops ----------------------------------------------------------------------------------------------------------------


class CompilerError(Exception):
    """loops.c or scratch.c cannot be compiled here."""


class Data:
    """Converts a tensor to a pointer to its elements, for ctypes."""

    @classmethod
    def from_param(cls, tensor: Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(tensor.data_ptr())


_COUNT, _FLOAT = ctypes.c_int64, ctypes.c_float
_FUNCTIONS: dict[str, list[type]] = {
    "read_words": [Data, _COUNT, _COUNT],
    "write_floats": [Data, _COUNT, _FLOAT, _COUNT],
    "stream_floats": [Data, _COUNT, _FLOAT, _COUNT],
    "copy_floats": [Data, Data, _COUNT, _FLOAT, _COUNT],
    "copy_streaming": [Data, Data, _COUNT, _FLOAT, _COUNT],
    "add_integers": [ctypes.c_uint64, _COUNT],
    "multiply_add": [_FLOAT, _FLOAT, _COUNT, Data],
    "exponentials": [Data, _COUNT, _COUNT, Data],
    "forward_divided": [Data, Data, Data, _COUNT, _COUNT, Data],
    "forward_estimated": [Data, Data, Data, _COUNT, _COUNT, Data],
    "relu_pairs": [Data, Data, Data, _COUNT, _COUNT, Data],
    "backward_shared": [Data, Data, Data, _COUNT, _COUNT, Data, Data, Data],
    "backward_single": [Data, Data, Data, _COUNT, _COUNT, Data, Data, Data],
    "backward_estimated": [Data, Data, Data, _COUNT, _COUNT, Data, Data, Data],
}
_RESULTS = {"read_words": ctypes.c_uint32, "add_integers": ctypes.c_uint64}


class Loops:
    """The functions and constants of loops.c. The functions take tensors as pointers and run without the GIL."""

    read_words: Callable[..., int]
    add_integers: Callable[..., int]
    write_floats: Callable[..., None]
    stream_floats: Callable[..., None]
    copy_floats: Callable[..., None]
    copy_streaming: Callable[..., None]
    multiply_add: Callable[..., None]
    exponentials: Callable[..., None]
    forward_divided: Callable[..., None]
    forward_estimated: Callable[..., None]
    relu_pairs: Callable[..., None]
    backward_shared: Callable[..., None]
    backward_single: Callable[..., None]
    backward_estimated: Callable[..., None]

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
    """The command of the C compiler: $CC with its arguments, or cc, gcc or clang."""
    command = shlex.split(os.environ.get("CC", ""))
    if command:
        if shutil.which(command[0]) is None:
            raise CompilerError(f"the C compiler of $CC was not found: {command[0]}")
        return command
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name) is not None:
            return [name]
    raise CompilerError("no C compiler was found (cc, gcc, clang); install one, or name it in $CC")


def compile_for_here(source: Path) -> tuple[ctypes.CDLL, str]:
    """Compiles a C file for this processor and loads it; also returns the compiler and its flags."""
    command = find_compiler()
    flags = ["-O3", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC"]
    with tempfile.TemporaryDirectory() as folder:  # a loaded library no longer needs its file
        path = Path(folder) / f"{source.stem}.so"
        # Older Clang for Arm does not know -march=native.
        for native in ("-march=native", "-mcpu=native"):
            try:
                done = subprocess.run(
                    [*command, *flags, native, str(source), "-o", str(path)],
                    capture_output=True,
                    text=True,
                    timeout=240,
                )
            except (OSError, subprocess.SubprocessError) as error:
                raise CompilerError(f"{shlex.join(command)}: {error}") from None
            if done.returncode == 0:
                return ctypes.CDLL(str(path)), f"{_version(command)}, {' '.join([*flags, native])}"
    raise CompilerError(f"{shlex.join(command)} cannot compile {source.name}:\n{done.stderr.strip()}")


def compile_loops() -> Loops:
    """Compiles loops.c for this processor and loads it."""
    return Loops(*compile_for_here(SOURCE))


def _version(command: list[str]) -> str:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True)
    return (done.stdout.splitlines() or [shlex.join(command)])[0]


# The machine ----------------------------------------------------------------------------------------------------------


class Cache(NamedTuple):
    name: str
    size: int  # bytes
    cores: int  # number of cores that share it

    def capacity(self, threads: int) -> int:
        """Total bytes of this cache for ``threads`` threads on neighbouring cores."""
        return self.size * -(-threads // self.cores)


def caches(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> list[Cache]:
    """The data caches of the first core, fastest first; typical sizes if the system does not report them."""
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
    """The number of CPUs in a list such as "0-3,8"."""
    ends = [part.split("-") for part in cpus.split(",")]
    return sum(int(part[-1]) - int(part[0]) + 1 for part in ends)


def level_of(size: int, caches: list[Cache], threads: int) -> str:
    """The level that keeps ``size`` bytes between calls. Only half of the last cache counts."""
    for i, cache in enumerate(caches):
        if size * (2 if i + 1 == len(caches) else 1) <= cache.capacity(threads):
            return cache.name
    return MEMORY


def sizes_of_buffers(caches: list[Cache], threads: int) -> dict[str, int]:
    """Bytes that each thread reads and writes: half of a cache, a quarter of the last one, much more for memory."""
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
    """Bytes per ns (GB/s) of all threads together; a copy counts bytes read and bytes written."""

    buffer: int  # bytes per thread
    read: float
    write: float
    copy: float
    streaming_write: float | None = None
    streaming_copy: float | None = None

    def milliseconds(self, read: int, written: int, *, streaming: bool) -> float:
        """The time to read and write these bytes: the smaller amount of both as a copy, the rest separately."""
        write, copy = self.write, self.copy
        if streaming:
            write, copy = self.streaming_write or write, self.streaming_copy or copy
        both = min(read, written)
        return (2 * both / copy + (read - both) / self.read + (written - both) / write) / 1e6


@dataclass(frozen=True)
class Ceilings:
    """Rates per ns of all threads together; ``clock`` is the clock of one thread."""

    threads: int
    clock: float  # cycles per ns of one thread
    bandwidth: dict[str, Bandwidth]  # by level
    macs: float  # float32 multiply-adds
    exponentials: float
    forward_pairs: float  # one pair: one query, one key, one unit; the faster of the next two
    forward_pairs_divided: float  # three units share a division
    forward_pairs_estimated: float  # three units share a refined estimate of the reciprocal
    relu_pairs: float  # forward, with relu in place of tanh
    backward_pairs: float  # the fastest of the next three
    backward_pairs_shared: float  # two queries share a division
    backward_pairs_single: float  # each query has its own division
    backward_pairs_estimated: float  # each query has its own refined estimate

    def cycles(self, rate: float, number: int) -> float:
        """Cycles of one thread for ``number`` operations, if all threads together do ``rate`` operations per ns."""
        return self.clock * number * self.threads / rate


class ThreadTeam:
    """Threads that run a loop at the same time. A rate is the best of all samples, as other programs may interfere."""

    def __init__(self, threads: int, seconds: float) -> None:
        self.threads, self.seconds = threads, seconds

    def rate(self, amount: float, call: Callable[[int, int], object]) -> float:
        """Work per ns of all threads; call(i, repeats) does work of size ``amount`` on thread i ``repeats`` times."""
        with ThreadPoolExecutor(self.threads) as pool:
            repeats, samples, best = 1, 0, math.inf
            start = time.perf_counter()
            while samples < LEAST_SAMPLES or time.perf_counter() - start < self.seconds:
                taken = self._sample(pool, call, repeats)
                if taken < SAMPLE / 2:  # checked every time: interrupted first samples look long enough
                    repeats = math.ceil(repeats * min(10.0, SAMPLE / max(taken, 1e-9)))
                else:
                    best = min(best, taken / repeats)
                    samples += 1
        return self.threads * amount / best / 1e9

    def _sample(self, pool: ThreadPoolExecutor, call: Callable[[int, int], object], repeats: int) -> float:
        """Seconds from the start of the first thread to the end of the last one."""
        barrier = threading.Barrier(self.threads)

        def work(i: int) -> tuple[float, float]:
            barrier.wait()
            start = time.perf_counter()
            call(i, repeats)
            return start, time.perf_counter()

        starts, ends = zip(*pool.map(work, range(self.threads)), strict=True)
        return max(ends) - min(starts)


Rate = Callable[[str, float, Callable[[int, int], object]], float]  # ThreadTeam.rate, with a name of the measurement


def measure(loops: Loops, caches: list[Cache], threads: int, seconds: float, progress: Progress) -> Ceilings:
    """Measures all figures, each for ``seconds``."""
    team = ThreadTeam(threads, seconds)
    sizes = sizes_of_buffers(caches, threads)
    task = progress.add_task("machine", total=9 + 3 * len(sizes) + 2 * loops.can_stream)

    def rate(what: str, amount: float, call: Callable[[int, int], object]) -> float:
        progress.update(task, description=f"machine: {what}")
        result = team.rate(amount, call)
        progress.advance(task)
        return result

    n = 8 * loops.block
    x = [torch.randn(n) for _ in range(threads)]
    y = [torch.empty(n) for _ in range(threads)]
    clock = rate("clock", 16, lambda i, repeats: loops.add_integers(3, repeats)) / threads
    macs = rate("multiply-adds", loops.chains * loops.lanes, lambda i, r: loops.multiply_add(0.5, 1.0, r, y[i]))
    exponentials = rate("exponentials", n, lambda i, repeats: loops.exponentials(x[i], n, repeats, y[i]))
    divided = measure_forward(loops, loops.forward_divided, threads, rate)
    estimated = measure_forward(loops, loops.forward_estimated, threads, rate)
    forward = (max(divided, estimated), divided, estimated)
    relu = measure_forward(loops, loops.relu_pairs, threads, rate)
    backward = [measure_backward(loops, loop, threads, rate) for loop in ("shared", "single", "estimated")]
    bandwidth = {level: measure_bandwidth(loops, level, size, threads, rate) for level, size in sizes.items()}
    progress.update(task, description="machine")
    return Ceilings(threads, clock, bandwidth, macs, exponentials, *forward, relu, max(backward), *backward)


def measure_forward(loops: Loops, loop: Callable[..., None], threads: int, rate: Rate) -> float:
    queries, keys = loops.forward_queries, loops.forward_keys
    units = 512 // loops.forward_units * loops.forward_units
    rows = [torch.rand(1 + queries + keys, units) + 0.5 for _ in range(threads)]
    sums = [torch.empty(queries, keys, loops.lanes) for _ in range(threads)]

    def call(i: int, repeats: int) -> None:
        c, q, k = rows[i], rows[i][1:], rows[i][1 + queries :]
        loop(c, q, k, units, repeats, sums[i])

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
    half = size // 8 // loops.block * loops.block  # floats; a copy goes from one half of a buffer to the other
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
