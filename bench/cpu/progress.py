"""The cells of a sweep as JSON, and the file of finished cells from which an interrupted sweep resumes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import attn_kernels

from .. import results, timing
from ..cases import Shape
from .grid import Cell, Measured


class ProgressFile:
    """A file of JSON lines beside the result: first the conditions of the sweep, then each cell when it is finished."""

    def __init__(self, path: Path, conditions: dict[str, object]) -> None:
        self.path = path
        self.conditions = conditions

    def start(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.conditions) + "\n")

    def resume(self, cells: list[Cell]) -> int:
        """Loads the finished cells and returns their number; raises ValueError if the conditions differ."""
        lines = self.path.read_text().splitlines(keepends=True)
        if not lines or not lines[0].endswith("\n"):  # interrupted while the first line was written
            self.start()
            return 0
        stored = json.loads(lines[0])
        names = {**stored, **self.conditions}
        differing = [
            f"{name} {stored.get(name)!r}, not {self.conditions.get(name)!r}"
            for name in names
            if stored.get(name) != self.conditions.get(name)
        ]
        if differing:
            raise ValueError(f"{results.shown(self.path)} belongs to another sweep: {'; '.join(differing)}")
        whole = [line for line in lines if line.endswith("\n")]
        if len(whole) < len(lines):  # an interrupt left an incomplete line: remove it before appending
            results.write_whole(self.path, lambda partial: partial.write_text("".join(whole)))
        found = {cell.key: cell for cell in map(read_cell, map(json.loads, whole[1:]))}
        taken = 0
        for cell in cells:
            before = found.get(cell.key)
            if before is not None and cell.not_run is None:
                cell.not_run, cell.failure = before.not_run, before.failure
                cell.first, cell.again = before.first, before.again
                taken += 1
        return taken

    def add(self, cell: Cell) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(as_json(cell), allow_nan=False) + "\n")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def as_json(cell: Cell) -> dict[str, object]:
    def measured(values: Measured | None) -> dict[str, object] | None:
        if values is None:
            return None
        times = {"ours ms": values.ours, "eager ms": values.eager, "ratio": values.ratio, "rounds": values.rounds}
        return results.rounded(times)

    return {
        "op": cell.op,
        "shape": cell.shape._asdict(),
        "passes": cell.passes,
        "not run": cell.not_run,
        "failure": cell.failure,
        "first": measured(cell.first),
        "again": measured(cell.again),
    }


def read_cell(entry: dict) -> Cell:
    def measured(values: dict | None) -> Measured | None:
        if values is None:
            return None
        return Measured(values["ours ms"], values["eager ms"], timing.Spread(**values["ratio"]), values["rounds"])

    return Cell(
        entry["op"],
        Shape(**entry["shape"]),
        entry["passes"],
        entry["not run"],
        entry["failure"],
        measured(entry["first"]),
        measured(entry["again"]),
    )


def code_digest() -> str:
    """A digest that identifies the state of the package, compiled part included, without git."""
    folder = Path(attn_kernels.__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*folder.rglob("*.py"), *folder.glob("_C*.so"), *folder.glob("_C*.pyd")]):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
