"""A GPU to measure on: CUDA graphs of calls, and the measured limits of the device (ceilings)."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence

import torch

from .. import timing

Call = Callable[[], object]


class Gpu:
    """The interface to the device. Tests replace it by one that runs on the CPU."""

    def __init__(self, index: int = 0) -> None:
        self.device = torch.device("cuda", index)
        self.timer = timing.CudaTimer()
        properties = torch.cuda.get_device_properties(self.device)
        self.l2_bytes = int(getattr(properties, "L2_cache_size", 0)) or 50_000_000
        self.memory_bytes = properties.total_memory

    def capture(self, calls: Sequence[Call]) -> Call:
        """Returns a call that replays all calls as one CUDA graph."""
        beside = torch.cuda.Stream(self.device)
        beside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(beside):  # the first calls compile and allocate, which a capture forbids
            for call in calls:
                call()
                call()
        torch.cuda.current_stream(self.device).wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def release(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()


def describe(gpu: Gpu) -> dict[str, str | int | float]:
    """Facts about the device that ``machine.describe`` does not include, for the result file."""
    properties = torch.cuda.get_device_properties(gpu.device)
    query = [
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit",
        "--format=csv,noheader",
    ]
    query.append(f"--id={gpu.device.index}")
    try:
        smi = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        smi = "unknown"
    return {
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory, GB": round(properties.total_memory / 1e9, 1),
        "L2 cache, MB": round(gpu.l2_bytes / 1e6, 1),
        "driver, clocks, power": smi,
        "cores of the host": os.cpu_count() or 0,
    }


def slug(device_name: str) -> str:
    """For file names: "h100-80gb-hbm3"."""
    name = re.sub(r"\b(nvidia|geforce|tesla|graphics|device)\b", "", device_name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "unknown"


# Ceilings: each is the best of several rounds, whereas benchmark times are medians ------------------------------------


def best(gpu: Gpu, call: Call, rounds: int = 10, repeats: int = 10) -> float:
    """Seconds of the fastest round."""
    call()
    return min(gpu.timer(call, repeats) for _ in range(rounds))


def _large(gpu: Gpu) -> torch.Tensor:
    """A tensor much larger than the cache."""
    return torch.ones(min(1 << 30, gpu.memory_bytes // 8) // 4, device=gpu.device)


def copy_bandwidth(gpu: Gpu) -> float:
    """Bytes per second read and written by a copy."""
    source = _large(gpu)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best(gpu, lambda: target.copy_(source))


def read_bandwidth(gpu: Gpu) -> float:
    """Bytes per second read by a sum, which writes almost nothing."""
    source = _large(gpu)
    return source.nbytes / best(gpu, source.sum)


def launch_time(gpu: Gpu) -> float:
    """Host microseconds for one call of the smallest PyTorch op, as in a loop of eager ops."""
    x = torch.zeros(1, device=gpu.device)
    times = []
    for _ in range(5):
        gpu.release()
        start = time.perf_counter()
        for _ in range(1000):
            x.add_(1)
        gpu.release()
        times.append((time.perf_counter() - start) / 1000)
    return 1e6 * min(times)


def graph_node_time(gpu: Gpu, nodes: int = 200) -> float:
    """Microseconds per node of a CUDA graph with many small nodes, each of which waits for the previous one."""
    x = torch.zeros(1, device=gpu.device)
    return 1e6 * best(gpu, gpu.capture([lambda: x.add_(1)] * nodes)) / nodes


def arithmetic_rate(gpu: Gpu, *, special: bool) -> float:
    """float32 multiply-adds or special functions per second, in a Triton kernel of independent chains in registers."""
    from . import kernels as gpu_kernels

    blocks = 32 * torch.cuda.get_device_properties(gpu.device).multi_processor_count
    out = torch.empty(blocks * gpu_kernels.BLOCK, device=gpu.device)
    turns = 4096

    def call() -> None:
        gpu_kernels.chains[(blocks,)](out, turns, SPECIAL=special, BLOCK=gpu_kernels.BLOCK, num_warps=gpu_kernels.WARPS)

    return blocks * gpu_kernels.BLOCK * turns * gpu_kernels.UNROLLED / best(gpu, call, repeats=3)


# By name: bandwidth of a copy and of a read, costs of a launch and of a graph node, rates of float32 multiply-adds and
# of special functions.
CEILINGS: dict[str, Callable[[Gpu], float]] = {
    "copy_bytes_per_s": copy_bandwidth,
    "read_bytes_per_s": read_bandwidth,
    "launch_us": launch_time,
    "graph_node_us": graph_node_time,
    "ffma_per_s": lambda gpu: arithmetic_rate(gpu, special=False),
    "special_per_s": lambda gpu: arithmetic_rate(gpu, special=True),
}
