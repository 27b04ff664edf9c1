"""Times several implementations of the same computation so that their ratios are reliable on a noisy machine.

The implementations are timed in turns: each round times all of them in random order, and gives one ratio. The median
and the quartiles of these ratios are reported. A slow second of the machine affects a round, not one implementation.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

Call = Callable[[], object]
Timer = Callable[[Call, int], float]  # seconds per call, over that many calls in a row
Samples = dict[str, list[float]]  # seconds per call, by name, one for each round


class Spread(NamedTuple):
    """A median with its quartiles."""

    median: float
    low: float
    high: float

    def scaled(self, factor: float) -> Spread:
        return Spread(*(factor * value for value in self))


class Budget:
    """Seconds to spend from now on; None: no limit."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds, self.clock = seconds, clock
        self.start = clock()

    @property
    def spent(self) -> float:
        return self.clock() - self.start

    @property
    def left(self) -> float:
        return math.inf if self.seconds is None else self.seconds - self.spent


class WallTimer:
    """Wall time, for the CPU."""

    shortest_sample = 1e-3  # seconds; shorter calls are repeated within a sample

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock

    def __call__(self, call: Call, repeats: int) -> float:
        start = self.clock()
        for _ in range(repeats):
            call()
        return (self.clock() - start) / repeats


class CudaTimer:
    """Time between two events of the current CUDA stream. The L2 cache is not flushed between calls."""

    shortest_sample = 5e-3

    def __call__(self, call: Call, repeats: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats


def timer_for(device: torch.device) -> WallTimer | CudaTimer:
    return CudaTimer() if device.type == "cuda" else WallTimer()


def interleave(
    calls: Mapping[str, Call],
    timer: WallTimer | CudaTimer,
    *,
    seconds: float,
    seed: int = 0,
    least_rounds: int = 5,
    most_rounds: int = 100,
    at_most: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> Samples:
    """Times rounds of all calls until ``seconds`` are spent; at least ``least_rounds`` and at most ``most_rounds``.

    at_most: seconds after which no further round begins, even if there were fewer than ``least_rounds``; one round
    always runs.
    """
    repeats, prime = {}, {}
    for name, call in calls.items():
        warm_up(call)
        expected = max(timer(call, 1), 1e-9)
        repeats[name] = max(1, round(timer.shortest_sample / expected))
        # Short calls are primed: otherwise their time would depend on the caches that another call left.
        prime[name] = expected < 20e-3
    order = random.Random(seed)
    names = list(calls)
    samples: Samples = {name: [] for name in names}
    start = clock()
    for done in range(most_rounds):
        spent = clock() - start
        if (done >= least_rounds and spent >= seconds) or (done >= 1 and spent >= at_most):
            break
        order.shuffle(names)
        for name in names:
            if prime[name]:
                calls[name]()
            samples[name].append(timer(calls[name], repeats[name]))
    return samples


def warm_up(call: Call, most: int = 6) -> None:
    """Runs the call at least twice, until the allocator requests no more fresh pages."""
    for done in range(most):
        before = _page_faults()
        call()
        if done >= 1 and _page_faults() - before < 64:
            return


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt if resource else 0


def spread(values: list[float]) -> Spread:
    """Median and quartiles."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def ratios(samples: Samples, name: str, ours: str) -> Spread:
    """Time of ``name`` / time of ``ours``, per round: above 1 if ours is faster."""
    return spread([theirs / own for theirs, own in zip(samples[name], samples[ours], strict=True)])
