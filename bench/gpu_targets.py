"""What the kernels aim at, each beside what was measured, and the run as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .gpu_cells import COLD, GRAPH, LAUNCHED, OURS, RATES, SCORES
from .problems import FORWARD, TRAINING, Shape
from .roofline import ADDITIVE, DOT, ITEM

ON_AN_H100 = "aimed at on an H100"


class Target(NamedTuple):
    what: str
    cell: str
    measured: float | None  # None where nothing was
    aim: float
    at_least: bool  # or at most
    unit: str

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= self.aim if self.at_least else self.measured <= self.aim


def evaluate(state: Mapping[str, Any]) -> list[Target]:
    """All targets that the cells of a run can judge; rates of pairs are those stated for an H100."""
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
    # Results and gradients are about as large as the inputs, and float32 scores and sums come on top.
    share = memory / cell["inputs_mb"] if memory else None
    yield Target("training: peak memory / inputs", label, share, 4.0, False, "x")


def _rates(cells: list[Mapping[str, Any]]) -> Iterable[Target]:
    """Pairs a second of the scores and of their gradients; the latter take what training has beyond the forward."""
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
    """Within rounds where both have that mode; launched by the host where a graph could not be made."""
    ratios = way(cell, name).get("times_ours", {})
    return (ratios.get(mode) or ratios.get(LAUNCHED) or {}).get("median")


# Text -----------------------------------------------------------------------------------------------------------------


def report(state: Mapping[str, Any]) -> str:
    """The run as a page of text: no package is needed to print it."""
    lines = [f"{name}: {value}" for name, value in state["machine"].items()]
    tests = state.get("tests") or {}
    lines += ["", f"tests: {tests.get('counts')}" + ("" if tests.get("complete") else ", NOT COMPLETE")]
    lines += [f"  red: {backend}: {reason}" for backend, reason in tests.get("red", {}).items()]
    lines += [f"  failed: {one['test']}: {one['reason']}" for one in tests.get("failed", [])[:20]]
    for tool, found in (state.get("sanitizer") or {}).items():
        lines.append(f"compute-sanitizer {tool}: {found}")
    ceilings = {name: value for name, value in (state.get("ceilings") or {}).items() if value is not None}
    lines += ["", "Ceilings of this device (measured, best of several rounds)"]
    lines += [
        f"  {name}: {value:.4g}" if isinstance(value, float) else f"  {name}: {value}"
        for name, value in ceilings.items()
    ]
    lines += ["", "Microseconds, medians: launched by the host / in a CUDA graph / in a graph, inputs from memory"]
    for cell in state.get("cells", []):
        lines.append(cell["key"] + _beside(cell))
        if cell.get("failure"):
            lines.append(f"    failed: {cell['failure']}")
        for one in cell["ways"]:
            lines.append("    " + _line(one))
    lines += [f"  no time for {key}" for key in state.get("no time for", [])]
    lines += ["", "Targets"]
    for target in evaluate(state):
        value = (
            "not measured" if target.measured is None else f"{target.measured:.3g}{target.unit and ' ' + target.unit}"
        )
        verdict = {True: "met", False: "MISSED", None: "-"}[target.met]
        aim = f"{'>=' if target.at_least else '<='} {target.aim:g}"
        lines.append(f"  {verdict:6} {value:>18} ({aim}) {target.what}: {target.cell}")
    return "\n".join(lines)


def _beside(cell: Mapping[str, Any]) -> str:
    parts = []
    if cell.get("floor_us"):
        parts.append(f"floor {cell['floor_us']:.4g} us ({cell['floor_by']}, computed)")
    if cell.get("predicted_us_h100"):
        parts.append(f"predicted on an H100 {cell['predicted_us_h100']:.4g} us (computed)")
    return ": " + ", ".join(parts) if parts else ""


def _line(one: Mapping[str, Any]) -> str:
    if one.get("failure"):
        return f"{one['name']:24} none: {one['failure']}"
    us = " / ".join(
        f"{one['us'][mode]['median']:.4g}" if mode in one["us"] else "-" for mode in (LAUNCHED, GRAPH, COLD)
    )
    text = f"{one['name']:24} {us:30}"
    ratio = one.get("times_one") or one.get("times_ours", {}).get(GRAPH) or one.get("times_ours", {}).get(LAUNCHED)
    if ratio and one["name"] != OURS:
        text += f" {ratio['median']:.2f}x"
    rates = (one.get("rates") or {}).get(COLD) or (one.get("rates") or {}).get(GRAPH) or {}
    if rates.get("bytes_per_s"):
        text += f"  {rates['bytes_per_s'] / 1e9:.0f} GB/s"
    if rates.get("pairs_per_s"):
        text += f"  {rates['pairs_per_s'] / 1e12:.2f}e12 pairs/s"
    if one.get("memory_mb") is not None:
        text += f"  {one['memory_mb']:.0f} MB"
    return text
