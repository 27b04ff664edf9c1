"""A predicted time for every row of the GPU benchmark, made before the first run on a GPU.

    python -m bench.gpu.predictions            # prints the table; --write stores it and puts it into docs/gpu.md;
                                               # ``make gpu`` prints predictions beside measurements

An op is a sequence of launches (csrc/cuda/kernels.cu). The time of a launch is the longest of four times: its bytes,
its issue slots as counted in the machine code (``roofline``), its matrix products, and the minimum of a launch. In a
CUDA graph the launches run one after the other. The time of eager comes from its passes over (B, Tq, Tk, A), the time
of SDPA from its matrix products. All predictions are for an H100 SXM.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.cuda_check import roofline
from tools.cuda_check.roofline import ADDITIVE, DOT, FEW_QUERIES, H100, ITEM
from tools.cuda_check.rules import MANY_BACKWARD, MANY_FORWARD, Finding

from .. import results
from ..cases import TRAINING, Shape
from . import targets as gpu_targets
from .cells import COLD, GRAPH, LAUNCHED, OURS, SCORES, Row, rows

FILE = results.FOLDER / "gpu-predictions.json"
COUNTED = FILE.with_name("cuda-check.json")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"
BEGIN, END = "<!-- predictions: python -m bench.gpu.predictions --write -->", "<!-- end of predictions -->"

# Assumptions, each of which may be wrong. ``Kind.wrong`` below states the likely error for each kind of row.
LEAST_US = 2.0  # minimum time of a kernel: it starts, reads, waits for one or two barriers, and ends
NODE_US = 1.0  # gap between a node of a graph and the next node, which depends on it
HOST_US = {"op": 9.0, "launch": 2.5, "training": 35.0, "eager op": 5.0}  # host time
OF_BANDWIDTH = 0.85  # fraction of the data sheet bandwidth that streaming kernels reach
L2_BYTES, L2_BANDWIDTH = 40e6, 5.5e12  # bytes of repeated inputs that the L2 cache keeps, and its bandwidth
OF_FLOAT32 = 0.5  # fraction of the peak that matrix products on float32 lanes reach
OF_TENSOR = 0.25  # fraction of the tensor cores' peak (with wgmma) that products with mma.sync reach
CLUSTER_US, COUNTER_US = 1.0, 2.5  # two cluster barriers; the node that clears a counter, and the last block


class Kind(NamedTuple):
    """A kind of row: what limits it, how its prediction may be wrong, and what to examine first in that case."""

    name: str
    limited_by: str
    wrong: str
    first: str
    factor: float  # the measured time is expected within this factor of the prediction


KINDS = {
    "decode, large": Kind(
        "decode, large",
        "memory bandwidth",
        "too few loads under way: bandwidth below 80% with all multiprocessors busy",
        "loads under way for each warp in ScoreTile (decode_scores.cuh), then blocks for each multiprocessor",
        1.25,
    ),
    "decode, small": Kind(
        "decode, small",
        "latency: one launch, and the exchange between the blocks of a sentence",
        "cluster barriers or the counter's node take longer than assumed",
        "the second cluster barrier (.release is a fence of all memory: .relaxed is enough, it orders reads only); "
        "then the memset node of the last-block form, which a counter that the last block resets would save; then "
        "kMaxSteps of decode.cu",
        1.6,
    ),
    "few queries, training": Kind(
        "few queries, training",
        "six to nine short launches, each of which reads keys or values once",
        "launches weigh more than bytes",
        "the number of launches: the last sum_parts, then softmax_backward with its product",
        1.6,
    ),
    "many queries": Kind(
        "many queries",
        "issue slots of pairs, then padding of tiles",
        "a warp issues less often than in half of the cycles: special functions or shared memory wait",
        "stalls of many_queries_scores_kernel (ncu: MIO throttle or short scoreboard); then tiles of choose_tile",
        1.35,
    ),
    "many queries, training": Kind(
        "many queries, training",
        "issue slots of the backward pairs",
        "occupancy of scores_backward_kernel, or the float32 partial sums of dquery and dkeys in memory",
        "the cut into parts of the backward's choose_tile; then sum_parts; then dvalues on float32 lanes",
        1.4,
    ),
    "dot": Kind(
        "dot",
        "products, on float32 lanes or tensor cores",
        "mma.sync far below the assumed quarter of the peak, or float32 tiles below half of theirs",
        "wgmma in place of mma.sync; the stages of the loads of gemm_mma.cuh; for float32 the tile of gemm_simt.cuh",
        1.6,
    ),
    "beams": Kind(
        "beams",
        "memory bandwidth for one query, issue slots from five on; nine and ten take the launches of many queries",
        "the tile of eight queries computes for six and seven, too, and nine queries compute for sixteen",
        "kMaxDecodeQueries, and a tile of six; for nine and ten the cut of choose_tile",
        1.5,
    ),
}


def kind_of(row: Row) -> Kind:
    few = row.shape.Tq <= FEW_QUERIES
    if row.beams:
        name = "beams"
    elif few and row.op != SCORES:
        large = row.shape.B * row.shape.Tk * (row.shape.A + row.shape.D) * ITEM[row.dtype] >= 16e6
        name = "few queries, training" if row.passes == TRAINING else "decode, large" if large else "decode, small"
    elif row.op == DOT:
        name = "dot"
    else:
        name = "many queries, training" if row.passes == TRAINING else "many queries"
    return KINDS[name]


# Ours -----------------------------------------------------------------------------------------------------------------


def memory_us(size: float, *, cached: bool) -> float:
    """The time to stream so many bytes from memory; cached: from L2, where repeated calls keep all of them."""
    return 1e6 * size / (L2_BANDWIDTH if cached else OF_BANDWIDTH * H100.bandwidth)


def product_us(flops: float, dtype: str) -> float:
    peak = 2 * H100.slots * OF_FLOAT32 if dtype == "float32" else H100.tensor * OF_TENSOR
    return 1e6 * flops / peak


def splits(shape: Shape, processors: int = H100.processors) -> tuple[int, bool]:
    """choose_splits of csrc/cuda/decode.cu for compute capability 9.0: blocks per sentence; whether in a cluster."""
    wanted, least = max(1, 2 * processors // shape.B), -(-shape.Tk // 1024)
    n = 1
    while n < 16 and (n < least or (2 * n <= wanted and shape.Tk >= 16 * n)):
        n *= 2
    if n >= least and (2 * n > wanted or -(-shape.Tk // n) <= 96):
        return n, n > 1
    most = math.isqrt(2 * shape.Tk - 1) + 1
    return max(least, min(wanted, most, max(1, shape.Tk // 16))), False


def decode_launches(row: Row, kernels: Mapping[str, Finding], cached: bool) -> list[float]:
    shape, item = row.shape, ITEM[row.dtype]
    size = (shape.B * shape.Tk + shape.B * shape.Tq) * (shape.A + shape.D) * item
    pairs = shape.B * shape.Tk * shape.A * slots_of_queries(shape.Tq) if row.op == ADDITIVE else 0
    time = max(memory_us(size, cached=cached), 1e6 * pairs / (0.6 * H100.slots))
    blocks, cluster = splits(shape)
    extra = CLUSTER_US if cluster else COUNTER_US if blocks > 1 else 0.0
    return [LEAST_US + time + extra]


def slots_of_queries(queries: int) -> float:
    """Counted issue slots of few_queries_kernel for all queries of one unit of a step. Its tiles are 1, 2, 4, 8."""
    tile = next(tile for tile in (1, 2, 4, 8) if queries <= tile)
    return tile * {1: 9.9, 2: 7.4, 4: 6.3, 8: 5.9}[tile]


def pairs_us(shape: Shape, part: str, kernels: Mapping[str, Finding]) -> float:
    """The time of the kernel of a regime; the lower bound from the formula if no kernel was counted."""
    if part in kernels:
        return 1e6 * roofline._pairs_time(shape, kernels[part], H100)[0]
    return 1e6 * shape.B * shape.Tq * shape.Tk * shape.A * roofline.LEAST_SLOTS[part] / H100.slots / 0.8


def launches(row: Row, kernels: Mapping[str, Finding], *, cached: bool) -> list[float]:
    """Microseconds of each launch in a call of our op, in order."""
    B, Tq, Tk, A, D = shape = row.shape
    item, training, few = ITEM[row.dtype], row.passes == TRAINING, row.shape.Tq <= FEW_QUERIES
    weights = B * Tq * Tk

    def bytes_us(*sizes: float) -> float:
        size = sum(sizes)
        return memory_us(size, cached=cached and size < L2_BYTES)

    def product(units: int, *, steps_out: bool = False) -> float:
        """The product of weights (B, Tq, Tk) with rows of ``units`` elements, or the product that gives weights."""
        size = item * (B * Tk * units + B * Tq * units) + 4 * weights
        return max(bytes_us(size), 0.0 if few else product_us(2 * weights * units, row.dtype))

    found = []
    if row.op == SCORES:
        found.append(max(pairs_us(shape, MANY_FORWARD, kernels), bytes_us(item * (B * (Tq + Tk) * A + weights))))
    elif few:
        found += decode_launches(row, kernels, cached and B * Tk * (A + D) * item < L2_BYTES)
    else:
        found.append(pairs_us(shape, MANY_FORWARD, kernels) if row.op == ADDITIVE else product(A))
        found += [bytes_us((4 + item) * weights), product(D)]  # softmax; context
    if not training:
        return [max(LEAST_US, us) for us in found]
    if row.op == SCORES:
        found.append(bytes_us((item + 4) * weights))  # conversion to float32
    else:
        found += [product(D), bytes_us((2 * item + 8) * weights)]  # grad_context @ values^T; softmax
    if row.op == DOT:
        found += [product(A), product(A)]  # dquery, dkeys
    else:
        backward = pairs_us(shape, MANY_BACKWARD, kernels)
        found.append(max(backward, bytes_us(item * 2 * B * (Tq + Tk) * A)))
        found += [bytes_us(8 * B * Tq * A), LEAST_US]  # reduction of partial sums: dquery or dkeys; dv
    if row.op != SCORES:
        found.append(product(D))  # dvalues
    return [max(LEAST_US, us) for us in found]


def in_graph(each: Sequence[float]) -> float:
    return sum(each) + NODE_US * (len(each) - 1) + 0.5


def beams_us(row: Row, kernels: Mapping[str, Finding]) -> list[float]:
    """Times for 1 to 10 queries."""
    each = [row._replace(shape=row.shape._replace(Tq=n), beams=False) for n in range(1, 11)]
    return [in_graph(launches(one, kernels, cached=True)) for one in each]


# Others ---------------------------------------------------------------------------------------------------------------


def eager_us(row: Row) -> dict[str, float]:
    """The time of the eager formula: passes over (B, Tq, Tk, A) for additive attention, products for dot attention."""
    B, Tq, Tk, A, D = row.shape
    weights, item, training = B * Tq * Tk, ITEM[row.dtype], row.passes == TRAINING
    operations = (6 if row.op != DOT else 3) * (3 if training else 1)
    flops = 2 * weights * (D if row.op == ADDITIVE else A + D if row.op == DOT else 0) * (3 if training else 1)
    passes = (11 if training else 4) if row.op != DOT else 0
    hidden = passes * weights * A * item
    inputs = item * B * (Tk + Tq) * (A + D) * (3 if training else 1)
    # cuBLAS reaches three quarters of the peak for float32 on the lanes, a third for 16 bits on tensor cores.
    products = 1e6 * flops / (1.5 * H100.slots if row.dtype == "float32" else H100.tensor / 3)
    device = memory_us(hidden + inputs, cached=hidden + inputs < L2_BYTES) + products
    graph = device + (LEAST_US + NODE_US) * operations
    return {LAUNCHED: max(graph, HOST_US["eager op"] * operations), GRAPH: graph}


def others(row: Row) -> dict[str, dict[str, float]]:
    """The times of the other providers, launched and in a graph."""
    if row.beams:
        return {}
    found = {"eager": eager_us(row)}
    if row.op == DOT:
        # A guess. For heads of more than 256 elements SDPA uses its memory-efficient kernel, not the flash kernel.
        share = 0.8 if row.shape.Tq > 1 else 1.0
        found["sdpa"] = {mode: share * us for mode, us in found["eager"].items()}
    if row.compile and row.op == ADDITIVE:
        # Inductor does not store the hidden layer in the forward, and recomputes it for each sum of the backward: a
        # tanh of about 25 slots per pair, four times in training.
        pairs = row.shape.B * row.shape.Tq * row.shape.Tk * row.shape.A
        turns = 4 if row.passes == TRAINING else 1
        device = 1e6 * pairs * turns * 25 / (0.7 * H100.slots)
        found["torch.compile"] = {LAUNCHED: max(device + 10, 40.0 * turns), GRAPH: device + 10}
    return found


# All rows -------------------------------------------------------------------------------------------------------------


def predict(row: Row, kernels: Mapping[str, Finding]) -> dict[str, Any]:
    kind = kind_of(row)
    result: dict[str, Any] = {"kind": kind.name, "factor": kind.factor}
    if row.beams:
        return result | {"us": {}, "beams_us": [rounded(us) for us in beams_us(row, kernels)]}
    each = launches(row, kernels, cached=True)
    host = HOST_US["op"] + HOST_US["launch"] * len(each) + (HOST_US["training"] if row.passes == TRAINING else 0)
    us = {LAUNCHED: max(host, in_graph(each)), GRAPH: in_graph(each)}
    if row.shape.Tq == 1 and row.passes != TRAINING:
        us[COLD] = in_graph(launches(row, kernels, cached=False))
    return result | {
        "launches": len(each),
        "us": {mode: rounded(value) for mode, value in us.items()},
        "others": {name: {mode: rounded(us) for mode, us in each.items()} for name, each in others(row).items()},
    }


def rounded(us: float) -> float:
    return float(f"{us:.3g}")


def counted_kernels(path: Path = COUNTED) -> dict[str, Finding]:
    """The instruction counts of the kernels from ``make cuda-check``."""
    findings = json.loads(path.read_text())["kernels"] if path.exists() else []
    return roofline.counted(Finding(**kernel) for kernel in findings)


def make() -> dict[str, Any]:
    kernels = counted_kernels()
    return {
        "part": "gpu-predictions",
        "device": H100.name,
        "rows": {row.key: predict(row, kernels) for row in rows()},
        "ceilings": {
            "copy_bytes_per_s": 2.9e12,
            "read_bytes_per_s": 3.0e12,
            "launch_us": 5.0,
            "graph_node_us": 1.6,
            "ffma_per_s": rounded(0.97 * H100.slots),
            "special_per_s": rounded(0.97 * H100.specials),
        },
    }


def as_measured(row: Row, predicted: Mapping[str, Any]) -> dict[str, Any]:
    """A cell as ``make gpu`` would store it if it measured the predicted times; for targets.py."""

    def spread(us: float) -> dict[str, float]:
        return {"median": us}

    cell: dict[str, Any] = {
        "key": row.key, "op": row.op, "shape": list(row.shape), "passes": row.passes, "dtype": row.dtype,
        "prepared": row.prepared, "beams": row.beams, "inputs_mb": 0.0,
    }  # fmt: skip
    if row.beams:
        each = predicted["beams_us"]
        return cell | {"ways": [{"name": str(i), "times_one": spread(us / each[0])} for i, us in enumerate(each, 1)]}
    us = predicted["us"]
    ours: dict[str, Any] = {"name": OURS, "us": {mode: spread(value) for mode, value in us.items()}, "times_ours": {}}
    if COLD in us:
        size = roofline.call_work(row.op, row.shape, row.passes, row.dtype).bytes
        ours["rates"] = {COLD: {"bytes_per_s": size / us[COLD] * 1e6}}
    ways = [
        {
            "name": name,
            "us": {},
            "times_ours": {mode: spread(theirs / us[mode]) for mode, theirs in each.items() if mode in us},
        }
        for name, each in predicted["others"].items()
    ]
    return cell | {"ways": [ours, *ways]}


def predicted_targets(predictions: Mapping[str, Any]) -> list[gpu_targets.Target]:
    """The targets, evaluated with the predicted times."""
    if not predictions:
        return []
    cells = [as_measured(row, predictions["rows"][row.key]) for row in rows() if row.key in predictions["rows"]]
    return gpu_targets.evaluate({"ceilings": predictions.get("ceilings"), "cells": cells})


def load(path: Path = FILE) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def markdown(predictions: Mapping[str, Any]) -> str:
    lines = ["| row | launched | graph | graph, cold | others, launched / graph | within | kind |"]
    lines += ["|---|---:|---:|---:|---|---:|---|"]
    for key, row in predictions["rows"].items():
        us = [f"{row['us'][mode]:g}" if mode in row["us"] else "" for mode in (LAUNCHED, GRAPH, COLD)]
        more = [f"{name} {each[LAUNCHED]:g} / {each[GRAPH]:g}" for name, each in row.get("others", {}).items()]
        if "beams_us" in row:
            more = ["1 to 10 queries: " + " ".join(f"{value:g}" for value in row["beams_us"])]
        lines.append(f"| {key} | {' | '.join(us)} | {', '.join(more)} | {row['factor']:g}x | {row['kind']} |")
    lines += ["", "| kind | what limits it | how it may be wrong | what is looked at first |", "|---|---|---|---|"]
    lines += [f"| {k.name} | {k.limited_by} | {k.wrong} | {k.first} |" for k in KINDS.values()]
    lines += ["", "| target | row | aim | predicted |", "|---|---|---:|---:|"]
    for target in predicted_targets(predictions):
        aim = f"{'>=' if target.at_least else '<='} {target.aim:g}"
        value = "" if target.measured is None else f"{target.measured:.2g}{'' if target.met else ', missed'}"
        lines.append(f"| {target.what} | {target.cell} | {aim} {target.unit} | {value} |")
    return "\n".join(lines)


def put_into(page: str, table: str) -> str:
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.predictions", description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help=f"to {results.shown(FILE)} and {results.shown(PAGE)}")
    options = parser.parse_args(None if arguments is None else list(arguments))
    predictions = make()
    if options.write:
        results.write_json(FILE, predictions)
        PAGE.write_text(put_into(PAGE.read_text(), markdown(predictions)))
    print(markdown(predictions))


if __name__ == "__main__":
    main()
