"""The process that measures: ceilings and cells, stored one by one in the file of the run. Started by ``bench.gpu``."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from . import cuda_rules, files, gpu_cells, gpu_device, machine, roofline
from .gpu_cells import Row

COUNTED = (files.LOCAL / "cuda-check.json", files.LOCAL.parent / "cuda-check.json")


def counted_kernels(paths: tuple[Path, ...] = COUNTED) -> dict[str, cuda_rules.Finding]:
    """What ``make cuda-check`` counted in the kernels, if it ran here or its result is stored; for predictions."""
    for path in paths:
        if path.exists():
            findings = [cuda_rules.Finding(**kernel) for kernel in json.loads(path.read_text())["kernels"]]
            return roofline.counted(findings)
    return {}


def model_of(ceilings: dict[str, Any], description: dict[str, Any]) -> roofline.Device:
    """The device as it was measured; what was not is that of an H100."""
    clock = roofline.H100.clock
    processors = int(description.get("multiprocessors", roofline.H100.processors))
    if ceilings.get("ffma_per_s"):
        clock = ceilings["ffma_per_s"] / processors / roofline.H100.lanes
    bandwidth = ceilings.get("copy_bytes_per_s") or roofline.H100.bandwidth
    return roofline.H100._replace(
        name=str(description.get("device", "")), processors=processors, clock=clock, bandwidth=bandwidth
    )


def with_rates(
    cell: dict[str, Any], row: Row, device: roofline.Device, kernels: dict[str, cuda_rules.Finding]
) -> dict[str, Any]:
    """Adds bytes and pairs a second, the floor by this device's ceilings, and the prediction for an H100."""
    if row.op == gpu_cells.SCORES or not cell.get("ways"):
        work = roofline.work_of(roofline.ADDITIVE, row.shape, row.passes, row.dtype)
        of_bytes = None
    else:
        work = roofline.work_of(row.op, row.shape, row.passes, row.dtype)
        of_bytes = work.bytes
        floor = roofline.floor(row.op, row.shape, row.passes, row.dtype, device)
        prediction = roofline.predict(row.op, row.shape, row.passes, row.dtype, kernels)
        cell["floor_us"], cell["floor_by"] = floor.floor_us, floor.floor_by
        cell["predicted_us_h100"] = prediction.predicted_us
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


def measure(path: Path, gpu: Any, todo: list[Row], *, seconds: float, left: float, ceilings: bool) -> None:
    """Fills in the file of the run; a row that stands as begun there killed a process before this one."""
    until = time.monotonic() + left
    state = json.loads(path.read_text())
    if ceilings and not state.get("ceilings"):
        state["ceilings"] = gpu_device.ceilings(gpu)
        files.write_json(path, state)
    cells = {cell["key"]: cell for cell in state.get("cells", [])}
    if state.get("begun") and state["begun"] not in cells:
        cells[state["begun"]] = {"key": state["begun"], "failure": "the process that measured it ended", "ways": []}
    device = model_of(state.get("ceilings") or {}, state["machine"])
    kernels = counted_kernels()

    def store(row: Row, cell: dict[str, Any] | None) -> None:
        state["begun"] = row.key if cell is None else None
        if cell is not None:
            cells[row.key] = with_rates(cell, row, device, kernels)
        state["cells"] = list(cells.values())
        files.write_json(path, state)

    state["no time for"] = gpu_cells.run(
        gpu, [row for row in todo if row.key not in cells], state["tests"]["red"], store, until=until, seconds=seconds
    )
    files.write_json(path, state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--left", type=float, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--no-ceilings", action="store_true")
    parser.add_argument("--no-cells", action="store_true")
    options = parser.parse_args()
    gpu = gpu_device.Gpu()
    state = json.loads(options.path.read_text())
    state["machine"] |= machine.describe(gpu.device, "PyTorch's caching allocator") | gpu_device.describe(gpu)
    files.write_json(options.path, state)
    todo = [] if options.no_cells else gpu_cells.rows()
    measure(options.path, gpu, todo, seconds=options.seconds, left=options.left, ceilings=not options.no_ceilings)


if __name__ == "__main__":
    main()
