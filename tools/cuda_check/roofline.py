"""The limits of a GPU, and the times that our kernels should reach: computed from sizes and machine code, not measured.

The floor of a call is the longest of four times: its bytes at the memory bandwidth, its operations of the special
function units, its issue slots for pairs and float32 products, and its 16-bit products on tensor cores. The prediction
uses the issue slots per pair that were counted in the machine code. It also counts whole tiles, spread over whole
multiprocessors. Neither includes launch overhead, staging of tiles, or memory latency.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from bench.cases import BACKWARD, FORWARD, GPU_SHAPES, SHAPES, SHORT, TRAINING, Shape, work_of

from .rules import DECODE, MANY_BACKWARD, MANY_FORWARD, Finding

if TYPE_CHECKING:
    from rich.table import Table

ADDITIVE, DOT = "additive_attention", "dot_attention"
ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}
FEW_QUERIES = 8  # kMaxDecodeQueries of csrc/cuda/kernels.h: up to this number one launch reads keys and values once

# The minimum issue slots per pair. Forward: three units share a reciprocal in nine instructions. Backward: the
# multiply-add of 1 + E, its reciprocal, p, g, and the sums of dq, dk and dv.
LEAST_SLOTS = {MANY_FORWARD: 3.0, MANY_BACKWARD: 7.0}
LEAST_SPECIAL = {MANY_FORWARD: 1 / 3, MANY_BACKWARD: 1.0}


class Device(NamedTuple):
    name: str
    processors: int
    clock: float  # Hz
    bandwidth: float  # bytes per second
    tensor: float  # 16-bit operations per second
    lanes: int = 128  # float32 lanes of a multiprocessor, equal to its issue slots (of threads) per clock
    special: int = 16  # special-function operations of a multiprocessor per clock

    @property
    def slots(self) -> float:
        """Issue slots (of threads) per second; a float32 multiply-add takes one."""
        return self.processors * self.clock * self.lanes

    @property
    def specials(self) -> float:
        return self.processors * self.clock * self.special


# From the data sheet, but with the clock under sustained load. At this clock float32 reaches 59e12 operations per
# second; the maximum is 67e12.
H100 = Device("H100 SXM", 132, 1.755e9, 3.35e12, 989e12)
LAUNCH_US = 2.0  # approximate cost of a CUDA graph node; not included in any figure here
# A warp waits for its own results: it issues in at most half of the cycles.
WARP_ISSUE = 0.5


class CallWork(NamedTuple):
    """The work of a whole call, independent of the implementation."""

    bytes: int
    forward_pairs: int
    backward_pairs: int
    flops: int  # of matrix products


def call_work(op: str, shape: Shape, passes: str, dtype: str) -> CallWork:
    """Every input is read once and every output written once; the forward pass of training also writes alignments."""
    item = ITEM[dtype]
    forward = work_of(op, shape, FORWARD, item)
    size = forward.read + forward.written
    if passes == FORWARD:
        return CallWork(size, forward.pairs, 0, 2 * forward.macs)
    backward = work_of(op, shape, BACKWARD, item)
    size += shape.B * shape.Tq * shape.Tk * item + backward.read + backward.written
    return CallWork(size, forward.pairs, backward.pairs, 2 * (forward.macs + backward.macs))


@dataclass
class Prediction:
    op: str
    shape: Shape
    passes: str
    dtype: str
    bytes_us: float
    pairs_us: float
    floor_us: float
    floor_by: str
    predicted_us: float | None = None  # None if no kernel was counted
    padding: float | None = None  # pairs computed / pairs wanted
    blocks: int | None = None
    basis: str = "computed, not measured"


def floor(op: str, shape: Shape, passes: str, dtype: str, device: Device = H100) -> Prediction:
    work = call_work(op, shape, passes, dtype)
    special = work.forward_pairs * LEAST_SPECIAL[MANY_FORWARD] + work.backward_pairs * LEAST_SPECIAL[MANY_BACKWARD]
    slots = work.forward_pairs * LEAST_SLOTS[MANY_FORWARD] + work.backward_pairs * LEAST_SLOTS[MANY_BACKWARD]
    pairs = max(special / device.specials, slots / device.slots)
    on_tensor_cores = dtype != "float32"
    times = {
        "memory": work.bytes / device.bandwidth,
        "special functions": special / device.specials,
        "issue slots": (slots + (0 if on_tensor_cores else work.flops / 2)) / device.slots,
        "tensor cores": work.flops / device.tensor if on_tensor_cores else 0.0,
    }
    longest = max(times, key=lambda name: times[name])
    return Prediction(
        op, shape, passes, dtype, 1e6 * times["memory"], 1e6 * pairs, 1e6 * times[longest], longest
    )  # fmt: skip


def counted(findings: Iterable[Finding], target: str = "sm_90a") -> dict[str, Finding]:
    """For each regime the kernel with a counted loop: CUDA C++ is preferred to Triton, then the fastest kernel."""
    best: dict[str, Finding] = {}
    for found in findings:
        same_target = found.target.rstrip("a") == target.rstrip("a")
        if not same_target or found.slots_per_pair is None:
            continue
        before = best.get(found.regime)
        if before is None or _order(found) < _order(before):
            best[found.regime] = found
    return best


def _order(found: Finding) -> tuple[bool, float]:
    return found.origin.startswith("triton:"), found.slots_per_pair


def predict(
    op: str, shape: Shape, passes: str, dtype: str, kernels: Mapping[str, Finding], device: Device = H100
) -> Prediction:
    """The floor and the predicted time of the kernels."""
    result = floor(op, shape, passes, dtype, device)
    work = call_work(op, shape, passes, dtype)
    few = shape.Tq <= FEW_QUERIES
    parts = [] if op == DOT else [DECODE if few else MANY_FORWARD, *([MANY_BACKWARD] if passes == TRAINING else [])]
    if not parts or any(part not in kernels for part in parts):
        return result
    seconds = 0.0
    for part in parts:
        kernel = kernels[part]
        time, padding, blocks = _pairs_time(shape, kernel, device)
        seconds += time
        if part == MANY_FORWARD:
            result.padding, result.blocks = padding, blocks
    on_tensor_cores = dtype != "float32"
    seconds += work.flops / (device.tensor if on_tensor_cores else 2 * device.slots)
    result.predicted_us = 1e6 * max(seconds, work.bytes / device.bandwidth)
    return result


def _pairs_time(shape: Shape, kernel: Finding, device: Device) -> tuple[float, float, int | None]:
    """Seconds for all pairs; pairs computed / pairs wanted; number of blocks. If the tiles of a kernel are unknown, the
    multiprocessors share the pairs evenly.
    """
    wanted = shape.B * shape.Tq * shape.Tk * shape.A
    of_slots, of_special = kernel.slots_per_pair / device.lanes, kernel.special_per_pair / device.special
    clocks = max(of_slots, of_special)  # per pair, of a multiprocessor
    if kernel.thread_tile is None:
        return wanted * clocks / device.processors / device.clock, 1.0, None
    best = (math.inf, 1.0, 0)
    for threads_q, threads_k, shares in _blocks(shape, kernel):
        rows = threads_q * kernel.thread_tile[0], threads_k * kernel.thread_tile[1]
        blocks = shape.B * -(-shape.Tq // rows[0]) * -(-shape.Tk // rows[1])
        threads = shares * -(-threads_q * threads_k // 32) * 32
        at_once = max(1, min(kernel.warps * 32 // threads, -(-blocks // device.processors)))
        issue = min(1.0, WARP_ISSUE * at_once * threads / device.lanes)
        computed = threads // shares * math.prod(kernel.thread_tile) * shape.A  # whole warps compute
        rounds = -(-blocks // (device.processors * at_once)) * at_once
        time = rounds * computed * max(of_slots / issue, of_special) / device.clock
        if time < best[0]:
            best = time, blocks * computed / wanted, blocks
    return best


def _blocks(shape: Shape, kernel: Finding) -> Iterable[tuple[int, int, int]]:
    """Possible shapes of a block: (threads along queries, along steps, shares of the units), all with tiles of equal
    size.
    """
    all_q, all_k = -(-shape.Tq // kernel.thread_tile[0]), -(-shape.Tk // kernel.thread_tile[1])
    for tiles_q in range(1, all_q + 1):
        for tiles_k in range(1, all_k + 1):
            threads_q, threads_k = -(-all_q // tiles_q), -(-all_k // tiles_k)
            whole = -(-threads_q * threads_k // 32) * 32
            for shares in range(1, min(kernel.threads // whole, 8) + 1):
                yield threads_q, threads_k, shares


def predict_all(findings: Iterable[Finding], device: Device = H100) -> list[Prediction]:
    """Predictions for every standard shape, forward and with backward; float32, and bfloat16 for the largest shape."""
    kernels = counted(findings)
    cells = [(ADDITIVE, shape, "float32") for shape in [*SHAPES, *GPU_SHAPES, TARGET_SHAPE]]
    cells += [(ADDITIVE, shape, "bfloat16") for shape in GPU_SHAPES]
    return [
        predict(op, shape, passes, dtype, kernels, device)
        for op, shape, dtype in cells
        for passes in (FORWARD, TRAINING)
    ]


TARGET_SHAPE = Shape(64, 100, 100, 512, 512)  # the target rates for many queries refer to this shape


def prediction_table(predictions: list[Prediction], device: Device = H100) -> Table:
    from bench.report import table

    result = table(
        f"{device.name}, microseconds: computed from sizes and machine code, not measured",
        *("B,Tq,Tk,A", "dtype", "pass", ">bytes", ">pairs", ">floor", "floor is"),
        *(">predicted", ">/ floor", ">padding", ">blocks"),
        caption=f"Without launches: about {LAUNCH_US:g} us for each kernel in a CUDA graph. "
        "padding: pairs computed for each that is wanted.",
        caption_justify="left",
        wrap=True,
    )
    for p in predictions:
        known = p.predicted_us is not None
        result.add_row(
            str(p.shape), p.dtype, SHORT[p.passes],
            f"{p.bytes_us:.1f}", f"{p.pairs_us:.1f}", f"{p.floor_us:.1f}", p.floor_by,
            f"{p.predicted_us:.1f}" if known else "-", f"{p.predicted_us / p.floor_us:.2f}x" if known else "-",
            "-" if p.padding is None else f"{p.padding:.2f}", "-" if p.blocks is None else str(p.blocks),
        )  # fmt: skip
    return result
