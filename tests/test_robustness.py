"""Long-running programs: repeated calls, changing numbers of threads, calls from threads and processes."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from conftest import SIMD_LEVELS, available, simd
from matrix import (
    CASES,
    DTYPES,
    OPS,
    Case,
    Op,
    assert_bit_equal,
    check,
    interpreted,
    is_slow,
    make,
    run,
    slow_if,
    slow_interpreted,
)

ops = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
ROOT = Path(__file__).parent.parent

# More work than one grain of at::parallel_for, so that it is split.
SPLIT = {
    "many rows": Case(B=17, Tq=9, Tk=33, A=64, D=40, lengths="random"),
    "one row": Case(B=1, Tq=1, Tk=513, A=300, D=128),
    "one row, 1000 steps": Case(B=1, Tq=1, Tk=1000, A=64, D=96),
    "33 queries": Case(B=2, Tq=33, Tk=65, A=100, D=48, lengths="full"),
    "one sentence": Case(B=1, Tq=33, Tk=129, A=64, D=64, mask="steps"),
}


@pytest.fixture
def threads() -> Iterator[None]:
    """Leaves the number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@slow_interpreted()
@ops
def test_repeats_are_bit_equal(op: Op, fused: str, device: str) -> None:
    slow = is_slow(fused)
    for dtype in (torch.float32, torch.bfloat16):
        arguments = make(op, CASES["mask (B, Tk)"] if slow else SPLIT["many rows"], dtype, device)
        first = run(op.function, op, arguments, backend=fused)
        for _ in range(1 if slow else 10 if interpreted(fused) else 125):
            assert_bit_equal(run(op.function, op, arguments, backend=fused), first)


@slow_if(lambda compiled, name, **_: compiled != "cpu" or name not in ("many rows", "one row, 1000 steps"))
@pytest.mark.every_level
@pytest.mark.parametrize("name", SPLIT)
@ops
def test_numbers_of_threads(op: Op, name: str, compiled: str, threads: None) -> None:
    """For each number bit-equal results in each repeat; right for all of them, and so equal within rounding."""
    arguments = make(op, SPLIT[name], torch.float32)
    for count, repeats in {1: 20, 2: 20, 3: 5, 5: 5, 16: 5}.items():
        torch.set_num_threads(count)
        check(op, SPLIT[name], torch.float32, compiled, arguments=arguments)
        first = run(op.function, op, arguments, backend=compiled)
        for _ in range(repeats):
            assert_bit_equal(run(op.function, op, arguments, backend=compiled), first)


THREADS = """
import os, sys, threading, time
sys.path[:0] = sys.argv[1:]
import torch
torch.set_num_threads(1)  # before anything starts the pool
from matrix import OPS, make, run
from test_robustness import SPLIT

tasks = lambda: set(os.listdir("/proc/self/task"))
calls = [(op, make(op, case, torch.float32)) for op in OPS.values() for case in SPLIT.values()]
def work(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for op, arguments in calls:
            run(op.function, op, arguments, backend="cpu")

# Which threads exist, seen from a thread beside the calls: one that came and went in a call would be noticed.
seen, stop = set(), threading.Event()
def watch():
    while not stop.wait(1e-4):
        seen.update(tasks())
watcher = threading.Thread(target=watch)

watcher.start()
before = tasks()
work(0.5)
assert seen <= before, f"{len(seen - before)} new threads with set_num_threads(1)"
torch.set_num_threads(2)
work(0.5)
assert len(seen - before) <= 1, f"{len(seen - before)} new threads with set_num_threads(2)"
print(len(seen - before))
stop.set()
watcher.join()

# The pool's thread is there now, and has to be left alone.
torch.set_num_threads(1)
time.sleep(0.2)
others = time.process_time() - time.thread_time()
work(0.5)
others = time.process_time() - time.thread_time() - others
assert others < 0.05, f"{others} s of other threads with set_num_threads(1)"
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc/self/task")
def test_set_num_threads_is_obeyed() -> None:
    """1: no other thread comes or works; 2: one thread more, that of PyTorch's pool, and it is used."""
    available("cpu")
    paths = [str(Path(__file__).parent), str(ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)]), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", THREADS, *paths], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1", "PyTorch's second thread was not used"


@pytest.mark.skipif(len(SIMD_LEVELS) < 2, reason="the C++ kernels have one SIMD level here")
@ops
def test_levels_change_during_calls(op: Op) -> None:
    """Threads compute while another one goes round the SIMD levels: each result is that of one level."""
    backend = available("cpu")
    arguments = make(op, SPLIT["many rows"], torch.float32)._replace(grads={})
    expected = []
    for level in SIMD_LEVELS:
        with simd(level):
            expected.append(run(op.function, op, arguments, backend=backend))
    wrong, stop = [], threading.Event()

    def work() -> None:
        while not stop.is_set():
            results = run(op.function, op, arguments, backend=backend)
            if not any(all(torch.equal(results[name], e[name]) for name in e) for e in expected):
                wrong.append(results)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for worker in workers:
        worker.start()
    for level in SIMD_LEVELS * 100:
        with simd(level):
            time.sleep(5e-4)
    stop.set()
    for worker in workers:
        worker.join(timeout=600)
    assert not wrong


@ops
def test_python_threads(op: Op) -> None:
    """8 threads, 200 calls each, of sizes of their own: kernels share no scratch memory."""
    backend = available("cpu")
    cases = [
        Case(B=1 + i % 3, Tq=1 + i % 4, Tk=5 + 7 * i, A=3 + 5 * i, D=2 + 3 * i, lengths="random") for i in range(8)
    ]
    failures = []

    def work(case: Case, seed: int) -> None:
        try:
            arguments = make(op, case, DTYPES[seed % len(DTYPES)], seed=seed)
            first = run(op.function, op, arguments, backend=backend)
            for _ in range(200):
                assert_bit_equal(run(op.function, op, arguments, backend=backend), first)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(case, i), daemon=True) for i, case in enumerate(cases)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=600)
    assert not any(worker.is_alive() for worker in workers), "hangs"
    assert not failures, failures[0]


FORK = """
import os, sys, torch, attn_kernels
torch.set_num_threads(2)
x = torch.randn(64, 9, 64, requires_grad=True)
def work():
    context, _ = attn_kernels.additive_attention(x, x, x, torch.randn(64), backend="cpu")
    context.sum().backward()
work()
children = []
for _ in range(3):
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # as the workers of a DataLoader do
        work()
        os._exit(0)
    children.append(child)
work()
assert all(os.waitpid(child, 0)[1] == 0 for child in children)
"""

SPAWN = """
import torch, torch.multiprocessing as mp
import attn_kernels
def work(rank, query, keys, v, expected):
    scores = attn_kernels.additive_scores(query, keys, v, backend="cpu")
    torch.testing.assert_close(scores, expected, rtol=0, atol=0)
if __name__ == "__main__":
    query, keys, v = torch.randn(2, 3, 16), torch.randn(2, 5, 16), torch.randn(16)
    mp.spawn(work, (query, keys, v, attn_kernels.additive_scores(query, keys, v, backend="cpu")), nprocs=2)
"""


@slow_if(lambda script: script is SPAWN)
@pytest.mark.parametrize("script", [FORK, SPAWN], ids=["fork", "spawn"])
def test_processes(script: str, tmp_path: Path) -> None:
    """A fork after use, and spawned workers that are given tensors: no crash, no hang."""
    available("cpu")
    file = tmp_path / "script.py"
    file.write_text(script)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)])}
    done = subprocess.run([sys.executable, str(file)], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc/self/statm")
def test_memory_does_not_grow() -> None:
    """Many calls of random shapes: ATTN_KERNELS_CALLS=100000 for the long run."""
    backend = available("cpu")
    rng = random.Random(0)

    def calls(count: int) -> int:
        for i in range(count):
            op = rng.choice(list(OPS.values()))
            sizes = {
                axis: rng.randint(1, limit) for axis, limit in {"B": 6, "Tq": 6, "Tk": 40, "A": 60, "D": 60}.items()
            }
            run(op.function, op, make(op, Case(**sizes, lengths="random"), rng.choice(DTYPES), seed=i), backend=backend)
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1])

    count = int(os.environ.get("ATTN_KERNELS_CALLS", 3000))
    calls(max(1000, count // 20))
    before = calls(count // 2)
    after = calls(count // 2)
    assert after <= 1.01 * before, f"{after / before - 1:.2%} more memory after {count // 2} calls"


OUT_OF_MEMORY = """
import resource, sys, torch, attn_kernels
torch.set_num_threads(1)

def used():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

q, k, x = (torch.randn(8, 300, 512, requires_grad=True) for _ in range(3))
v = torch.randn(512)
calls = {
    "attention": lambda q, k, x: attn_kernels.additive_attention(q, k, x, v),
    "prepare": lambda q, k, x: attn_kernels.prepare_keys(k),
}
small = [x.detach()[:1, :9] for x in (q, k, x)]
for call in calls.values():  # what is loaded by a first call
    call(*small)
op, kibibytes = sys.argv[1], int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (used() + (kibibytes << 10), -1))
try:
    calls[op](q, k, x)
    print("fits")
except Exception as error:
    print(type(error).__name__, error)
"""


@slow_if(lambda op, kibibytes: (op, kibibytes) != ("attention", 6_000))
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
@pytest.mark.parametrize(("op", "kibibytes"), [("attention", 64), ("attention", 6_000), ("prepare", 64)])
def test_a_failed_allocation_says_memory(op: str, kibibytes: int) -> None:
    available("cpu")
    command = [sys.executable, "-c", OUT_OF_MEMORY, op, str(kibibytes)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    said = result.stdout.strip()
    assert "you tried to allocate" in said, said
