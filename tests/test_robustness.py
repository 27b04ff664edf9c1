"""What long-running programs do: the same call again, with other numbers of threads, in threads and processes."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from conftest import available
from matrix import CASES, DTYPES, OPS, Case, Op, assert_bit_equal, check, interpreted, make, run

ops = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
ROOT = Path(__file__).parent.parent

# More work than one grain of at::parallel_for, so that it is split.
SPLIT = {
    "many rows": Case(B=17, Tq=9, Tk=33, A=64, D=40, lengths="random"),
    "one row": Case(B=1, Tq=1, Tk=513, A=300, D=128),
    "one sentence": Case(B=1, Tq=33, Tk=129, A=64, D=64, mask="steps"),
}


@pytest.fixture
def threads() -> Iterator[None]:
    """Leaves the number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@ops
def test_repeats_are_bit_equal(op: Op, fused: str, device: str) -> None:
    slow = interpreted(fused)
    for dtype in (torch.float32, torch.bfloat16):
        arguments = make(op, CASES["mask (B, Tk)"] if slow else SPLIT["many rows"], dtype, device)
        first = run(op.function, op, arguments, backend=fused)
        for _ in range(1 if slow else 125):
            assert_bit_equal(run(op.function, op, arguments, backend=fused), first)


@pytest.mark.parametrize("name", SPLIT)
@ops
def test_numbers_of_threads(op: Op, name: str, threads: None) -> None:
    """For each number bit-equal results in each repeat; right for all of them."""
    backend = available("cpu")
    arguments = make(op, SPLIT[name], torch.float32)
    for count in (1, 2, 3, 5, 16):
        torch.set_num_threads(count)
        check(op, SPLIT[name], torch.float32, backend, arguments=arguments)
        first = run(op.function, op, arguments, backend=backend)
        for _ in range(10):
            assert_bit_equal(run(op.function, op, arguments, backend=backend), first)


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
        worker.join(timeout=60)
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


@pytest.mark.parametrize("script", [FORK, SPAWN], ids=["fork", "spawn"])
def test_processes(script: str, tmp_path: Path) -> None:
    """A fork after use, and spawned workers that are given tensors: no crash, no hang."""
    available("cpu")
    file = tmp_path / "script.py"
    file.write_text(script)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)])}
    done = subprocess.run([sys.executable, str(file)], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


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
