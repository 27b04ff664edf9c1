"""The process that measures ceilings and cells and stores each in the file of the run. ``bench.gpu`` starts it."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.cuda_check import roofline

from .. import machine, results
from . import cells as gpu_cells
from . import device as gpu_device
from .cells import Row


def model_of(ceilings: dict[str, Any], description: dict[str, Any]) -> roofline.Device:
    """The device with its measured ceilings; H100 values replace those that were not measured."""
    clock = roofline.H100.clock
    processors = int(description.get("multiprocessors", roofline.H100.processors))
    if ceilings.get("ffma_per_s"):
        clock = ceilings["ffma_per_s"] / processors / roofline.H100.lanes
    bandwidth = ceilings.get("copy_bytes_per_s") or roofline.H100.bandwidth
    return roofline.H100._replace(
        name=str(description.get("device", "")), processors=processors, clock=clock, bandwidth=bandwidth
    )


def with_rates(cell: dict[str, Any], row: Row, device: roofline.Device) -> dict[str, Any]:
    """Adds bytes and pairs per second, and the lower bound of the time (floor) from this device's ceilings."""
    if row.op == gpu_cells.SCORES or not cell.get("ways"):
        work = roofline.call_work(roofline.ADDITIVE, row.shape, row.passes, row.dtype)
        of_bytes = None
    else:
        work = roofline.call_work(row.op, row.shape, row.passes, row.dtype)
        of_bytes = work.bytes
        floor = roofline.floor(row.op, row.shape, row.passes, row.dtype, device)
        cell["floor_us"], cell["floor_by"] = floor.floor_us, floor.floor_by
    pairs = work.forward_pairs + work.backward_pairs
    for way in cell.get("ways", ()):
        if row.beams:
            continue
        way["rates"] = {
            mode: {
                "bytes_per_s": of_bytes and of_bytes / us["median"] * 1e6,
                "pairs_per_s": (pairs or None) and pairs / us["median"] * 1e6,
            }
            for mode, us in way["us"].items()
        }
    return cell


ROW_SECONDS = 30.0  # a row that runs for longer hangs; torch.compile and its warm-up need more
COMPILED_ROW_SECONDS = 100.0
ENDED = "the process that measured it ended"


def begin(path: Path, state: dict[str, Any], what: str | None, limit: float | None = None) -> None:
    """Stores in the file of the run what is measured next, when it starts, and how long it may take."""
    state["begun"] = what and {"what": what, "at": time.time(), "limit": limit or ROW_SECONDS}
    results.write_json(path, state)


def stuck(path: Path, start: float) -> str | None:
    """What the process that began at ``start`` has measured for too long; None if nothing."""
    try:
        begun = json.loads(path.read_text()).get("begun")
    except (OSError, ValueError):
        return None
    over = begun and begun["at"] >= start and time.time() - begun["at"] > begun["limit"]
    return f"{begun['what']} took longer than {begun['limit']:.0f} s" if over else None


def measure_ceilings(path: Path, gpu: Any, ceilings: Mapping[str, Callable[[Any], float]]) -> None:
    """Writes each ceiling to the file of the run. A failure does not stop the others. One that hung is not retried."""
    state = json.loads(path.read_text())
    found = state.setdefault("ceilings", {"what": "best of several rounds, measured on this device"})
    hung = (state.get("begun") or {}).get("what")
    for name, work in ceilings.items():
        if name in found:
            continue
        if hung == name:
            found[name], found[f"{name} failed"] = None, ENDED
            continue
        begin(path, state, name)
        try:
            found[name] = work(gpu)
            gpu.release()
        except Exception as error:
            text = str(error).splitlines()[0] if str(error) else ""
            found[name], found[f"{name} failed"] = None, f"{type(error).__name__}: {text}"[:200]
            if "CUDA error" in text:  # this process can measure nothing more; the next process continues
                begin(path, state, None)
                raise SystemExit(3) from None
    begin(path, state, None)


def measure(path: Path, gpu: Any, todo: list[Row], *, seconds: float, left: float) -> None:
    """Adds rows to the file of the run. A row that is marked as begun there killed an earlier process."""
    until = time.monotonic() + left
    state = json.loads(path.read_text())
    cells = {cell["key"]: cell for cell in state.get("cells", [])}
    before = (state.get("begun") or {}).get("what")
    if before in {row.key for row in todo} and before not in cells:
        cells[before] = {"key": before, "failure": ENDED, "ways": []}
    device = model_of(state.get("ceilings") or {}, state["machine"])

    def store(row: Row, cell: dict[str, Any] | None) -> None:
        if cell is not None:
            cells[row.key] = with_rates(cell, row, device)
        state["cells"] = list(cells.values())
        begin(path, state, row.key if cell is None else None, COMPILED_ROW_SECONDS if row.compile else None)

    state["no time for"] = gpu_cells.run(
        gpu, [row for row in todo if row.key not in cells], store, until=until, seconds=seconds
    )
    state["cells"] = list(cells.values())
    begin(path, state, None)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("what", choices=("ceilings", "targets", "cells"))
    parser.add_argument("--left", type=float, required=True, help="seconds")
    parser.add_argument("--seconds", type=float, required=True, help="for the rounds of one cell")
    options = parser.parse_args(arguments)
    gpu = gpu_device.Gpu()
    state = json.loads(options.path.read_text())
    state["machine"] |= machine.describe(gpu.device, "PyTorch's caching allocator") | gpu_device.describe(gpu)
    results.write_json(options.path, state)
    if options.what == "ceilings":
        measure_ceilings(options.path, gpu, gpu_device.CEILINGS)
    else:
        todo = gpu_cells.targets() if options.what == "targets" else gpu_cells.rows()
        measure(options.path, gpu, todo, seconds=options.seconds, left=options.left)


if __name__ == "__main__":
    main()
