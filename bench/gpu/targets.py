"""The performance targets of the kernels, with the measured values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tools.cuda_check.roofline import ADDITIVE, DOT, ITEM

from ..cases import FORWARD, TRAINING, Shape
from .cells import COLD, GRAPH, LAUNCHED, OURS, RATES, SCORES

ON_AN_H100 = "aimed at on an H100"


class Target(NamedTuple):
    what: str
    cell: str
    measured: float | None  # None if nothing was measured
    aim: float
    at_least: bool  # True: measured must be at least the aim; False: at most
    unit: str

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= self.aim if self.at_least else self.measured <= self.aim


def evaluate(state: Mapping[str, Any]) -> list[Target]:
    """All targets that the cells of a run can evaluate; the target rates of pairs are for an H100."""
    cells = [cell for cell in state.get("cells", []) if cell.get("ways") and "op" in cell]
    copy = (state.get("ceilings") or {}).get("copy_bytes_per_s")
    found: list[Target] = []
    for cell in cells:
        shape = Shape(*cell["shape"])
        label = f"{cell['op']} ({shape}) {cell['dtype']}"
        if cell.get("beams"):
            found += _beams(cell, label)
        elif cell["op"] == ADDITIVE and shape.Tq == 1 and cell["passes"] == FORWARD and cell["prepared"]:
            found += _decode(cell, shape, label, copy)
        elif cell["op"] == DOT and shape.Tq > 8 and cell["dtype"] != "float64":
            ratio = _ratio(cell, "sdpa", GRAPH)
            found.append(Target(f"dot, {cell['passes']}: time of SDPA / ours", label, ratio, 1.0, True, "x"))
        elif cell["op"] == ADDITIVE and cell["dtype"] in ("float16", "bfloat16") and cell["passes"] == TRAINING:
            found += _training(cell, label)
    return found + list(_rates(cells))


def _decode(cell: Mapping[str, Any], shape: Shape, label: str, copy: float | None) -> Iterable[Target]:
    size = shape.B * shape.Tk * (shape.A + shape.D) * ITEM[cell["dtype"]]
    if size >= 16e6:
        rate = (way(cell, OURS).get("rates", {}).get(COLD) or {}).get("bytes_per_s")
        share = rate / copy if rate and copy else None
        yield Target("decode from memory: share of copy bandwidth", label, share, 0.8, True, "")
    elif size < 8e6:
        yield Target("small decode in a CUDA graph", label, _us(cell, OURS, GRAPH), 5.0, False, "us")


def _beams(cell: Mapping[str, Any], label: str) -> Iterable[Target]:
    ratios = [one["times_one"]["median"] for one in cell["ways"] if one.get("times_one")]
    yield Target(
        "1 to 10 beams: slowest / one query", label, max(ratios) if len(ratios) == 10 else None, 1.15, False, "x"
    )


def _training(cell: Mapping[str, Any], label: str) -> Iterable[Target]:
    yield Target("training: time of eager / ours", label, _ratio(cell, "eager", LAUNCHED), 10.0, True, "x")
    yield Target(
        "training: time of torch.compile / ours", label, _ratio(cell, "torch.compile", LAUNCHED), 3.0, True, "x"
    )
    memory = way(cell, OURS).get("memory_mb")
    # Results and gradients are about as large as the inputs; float32 scores and sums are additional.
    share = memory / cell["inputs_mb"] if memory else None
    yield Target("training: peak memory / inputs", label, share, 4.0, False, "x")


def _rates(cells: list[Mapping[str, Any]]) -> Iterable[Target]:
    """Pairs per second of the scores and of their gradients. Time of gradients: training time minus forward time."""
    us = {
        passes: _us(cell, OURS, GRAPH)
        for cell in cells
        for passes in [cell["passes"]]
        if cell["op"] == SCORES and Shape(*cell["shape"]) == RATES
    }
    if not us:
        return
    pairs = RATES.B * RATES.Tq * RATES.Tk * RATES.A
    forward, training = us.get(FORWARD), us.get(TRAINING)
    label = f"{SCORES} ({RATES}) float32"
    rate = pairs / forward * 1e6 if forward else None
    yield Target(f"forward, many queries ({ON_AN_H100})", label, rate, 7.0e12, True, "pairs/s")
    rate = pairs / (training - forward) * 1e6 if forward and training and training > forward else None
    yield Target(f"backward, many queries ({ON_AN_H100})", label, rate, 2.8e12, True, "pairs/s")


def way(cell: Mapping[str, Any], name: str) -> dict[str, Any]:
    return next((one for one in cell["ways"] if one["name"] == name), {})


def _us(cell: Mapping[str, Any], name: str, mode: str) -> float | None:
    return way(cell, name).get("us", {}).get(mode, {}).get("median")


def _ratio(cell: Mapping[str, Any], name: str, mode: str) -> float | None:
    """The ratio per round if both have that mode; else the ratio of calls launched by the host."""
    ratios = way(cell, name).get("times_ours", {})
    return (ratios.get(mode) or ratios.get(LAUNCHED) or {}).get("median")
