"""A run of ``make gpu`` as plain text, with measured and predicted times; and the part of it that may be published."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from . import predictions as gpu_predictions
from . import targets as gpu_targets
from .cells import COLD, GRAPH, LAUNCHED, OURS
from .outcomes import BACKENDS

MODES = (LAUNCHED, GRAPH, COLD)
State = Mapping[str, Any]


def report(state: State, predictions: Mapping[str, Any] | None = None) -> str:
    """The run as plain text. Printing it needs no other package."""
    predictions = gpu_predictions.load() if predictions is None else predictions
    lines = [f"{name}: {value}" for name, value in state["machine"].items()]
    lines += _stages(state) + _first(state) + _tests(state)
    for tool, found in (state.get("sanitizer") or {}).items():
        lines.append(f"compute-sanitizer {tool}: {found}")
    lines += _ceilings(state, predictions.get("ceilings", {}))
    lines += ["", f"Microseconds, medians: {' / '.join(MODES)}; in brackets measured / predicted for an H100"]
    for cell in state.get("cells", []):
        lines += _cell(cell, predictions.get("rows", {}).get(cell["key"], {}))
    lines += [f"  no time for {key}" for key in state.get("no time for", [])]
    predicted = {(t.what, t.cell): t.measured for t in gpu_predictions.predicted_targets(predictions)}
    lines += ["", "Targets", *(_target(t, predicted.get((t.what, t.cell))) for t in gpu_targets.evaluate(state))]
    refused = {backend: why for backend in BACKENDS if (why := refusal(state, backend))}
    lines += [""] + [f"Not to be published: {backend}: {why}" for backend, why in refused.items()]
    return "\n".join(lines)


def _stages(state: State) -> list[str]:
    notes = state.get("stages") or {}
    return [""] + [f"{name}: {note.get('why') or 'done'}, {note['seconds']:.0f} s" for name, note in notes.items()]


def _first(state: State) -> list[str]:
    found = state.get("first")
    if not found:
        return ["", "first contact: not run"]
    total = sum(sum(counts.values()) for counts in found["counts"].values())
    lines = [
        "",
        f"first contact: {total} cases, {len(found['bad'])} bad; not complete: {found['not complete'] or 'none'}",
    ]
    return lines + [
        f"  {one['verdict']}: {one['group']}: {one['case']}: {one['detail'][:160]}" for one in found["bad"][:20]
    ]


def _tests(state: State) -> list[str]:
    tests = state.get("tests") or {}
    if not tests:
        return ["tests: not run"]
    complete = tests.get("complete") or {}
    cut_off = [backend for backend in BACKENDS if not complete.get(backend)]
    lines = [f"tests: {tests['counts']}" + (f", NOT COMPLETE: {', '.join(cut_off)}" if cut_off else "")]
    lines += [f"  red: {backend}: {reason}" for backend, reason in tests["red"].items()]
    return lines + [f"  failed: {one['test']}: {one['reason']}" for one in tests["failed"][:20]]


def _ceilings(state: State, predicted: Mapping[str, float]) -> list[str]:
    lines = ["", "Ceilings of this device (measured, best of several rounds)"]
    for name, value in (state.get("ceilings") or {}).items():
        if isinstance(value, float):
            beside = f"  [{value / predicted[name]:.2f} of what was predicted]" if predicted.get(name) else ""
            lines.append(f"  {name}: {value:.4g}{beside}")
        elif value is not None:
            lines.append(f"  {name}: {value}")
    return lines


def _cell(cell: Mapping[str, Any], predicted: Mapping[str, Any]) -> list[str]:
    floor = f": floor {cell['floor_us']:.4g} us ({cell['floor_by']}, computed)" if cell.get("floor_us") else ""
    lines = [cell["key"] + floor]
    if cell.get("failure"):
        lines.append(f"    failed: {cell['failure']}")
    if cell.get("wrong"):
        lines.append(f"    WRONG: {cell['wrong']}")
    far = False
    for one in cell["ways"]:
        expected = _expected(one["name"], cell, predicted)
        lines.append("    " + _line(one, expected))
        if one["name"] == OURS or cell.get("beams"):
            far |= any(
                not 1 / predicted["factor"] <= ratio <= predicted["factor"] for ratio in _ratios(one, expected).values()
            )
    if far:
        kind = gpu_predictions.KINDS[predicted["kind"]]
        lines.append(f"    far from the prediction: perhaps {kind.wrong}. First: {kind.first}")
    return lines


def _expected(name: str, cell: Mapping[str, Any], predicted: Mapping[str, Any]) -> Mapping[str, float]:
    """Predicted microseconds of one provider, by mode."""
    if cell.get("beams") and "beams_us" in predicted:
        return {GRAPH: predicted["beams_us"][int(name) - 1]}
    if name == OURS:
        return predicted.get("us", {})
    return predicted.get("others", {}).get(name, {})


def _ratios(one: Mapping[str, Any], expected: Mapping[str, float]) -> dict[str, float]:
    """Measured / predicted."""
    return {
        mode: one["us"][mode]["median"] / expected[mode] for mode in MODES if mode in one["us"] and mode in expected
    }


def _line(one: Mapping[str, Any], expected: Mapping[str, float]) -> str:
    if one.get("failure"):
        return f"{one['name']:24} none: {one['failure']}"
    ratios = _ratios(one, expected)
    us = " / ".join(
        f"{one['us'][mode]['median']:.4g}" + (f" [{ratios[mode]:.2f}]" if mode in ratios else "")
        if mode in one["us"]
        else "-"
        for mode in MODES
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
    return text + (f"  WRONG: {one['wrong']}" if one.get("wrong") else "")


def _target(target: gpu_targets.Target, predicted: float | None) -> str:
    unit = target.unit and f" {target.unit}"
    value = "not measured" if target.measured is None else f"{target.measured:.3g}{unit}"
    verdict = {True: "met", False: "MISSED", None: "-"}[target.met]
    aim = f"{'>=' if target.at_least else '<='} {target.aim:g}"
    beside = "" if predicted is None else f", predicted {predicted:.3g}"
    return f"  {verdict:6} {value:>18} ({aim}{beside}) {target.what}: {target.cell}"


# What may be published ------------------------------------------------------------------------------------------------


def refusal(state: State, backend: str) -> str | None:
    """The reason why no figure of a backend may be published: a check failed or did not run to its end."""
    tests = state.get("tests") or {}
    if not (tests.get("complete") or {}).get(backend):
        return "its tests were not run to their end"
    if backend in tests["red"]:
        return f"its tests are red: {tests['red'][backend]}"
    bad = [one for one in (state.get("first") or {}).get("bad", []) if backend in one["group"]]
    return f"first contact: {bad[0]['case']}: {bad[0]['verdict']}" if bad else None


def backend_of(one: Mapping[str, Any]) -> str | None:
    """The backend whose kernels a provider of a cell ran; None for other providers."""
    if one["name"] in BACKENDS:
        return one["name"]
    detail = one.get("detail") or ""
    return detail.split(";")[0].removeprefix("is ") if one["name"] == OURS else None


def publishable(state: State) -> list[dict[str, Any]]:
    """Cells without the providers that may not be published. Cells without a provider of ours are dropped."""
    found = []
    for cell in state.get("cells", []):
        if cell.get("wrong") or (cell.get("beams") and refusal(state, BACKENDS[0])):
            continue
        kept = [
            one
            for one in cell["ways"]
            if not one.get("failure") and not one.get("wrong")
            and ((backend := backend_of(one)) is None or refusal(state, backend) is None)
        ]  # fmt: skip
        if any(one["name"] == OURS or cell.get("beams") for one in kept):
            found.append({**cell, "ways": kept})
    return found


def markdown(state: State) -> str:
    """A table for the README of the figures that may be published, and the reasons for the rest."""
    lines = [f"{backend}: {why}" for backend in BACKENDS if (why := refusal(state, backend))]
    lines = [f"<!-- not published: {'; '.join(lines)} -->"] if lines else []
    cells = [cell for cell in publishable(state) if not cell.get("beams")]
    if not cells:
        return "\n".join([*lines, "Nothing of this run may be published."])
    machine = state["machine"]
    lines += [
        f"{machine['device']}, torch {machine.get('torch')}, {machine['date']}, commit {machine.get('commit')}.",
        "",
    ]
    lines += ["| | us, launched | us, in a graph | times as long: others |", "|---|---:|---:|---|"]
    for cell in cells:
        ours = gpu_targets.way(cell, OURS)
        us = [f"{ours['us'][mode]['median']:.4g}" if mode in ours["us"] else "" for mode in (LAUNCHED, GRAPH)]
        lines.append(f"| {cell['key']} | {' | '.join(us)} | {', '.join(_others(cell['ways']))} |")
    return "\n".join(lines)


def _others(ways: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    for one in ways:
        ratio = one["times_ours"].get(GRAPH) or one["times_ours"].get(LAUNCHED)
        if one["name"] != OURS and ratio:
            yield f"{one['name']} {ratio['median']:.2f}"
