"""Result files. They are written atomically and have fixed names."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .timing import Samples, Spread, ratios, spread

FOLDER = Path(__file__).parent / "results"  # the published results
LOCAL = FOLDER / "local"  # ignored by git

SCHEMA = 1  # increased when the meaning of a field changes


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """``write`` writes a temporary file, which then replaces ``path``: an interrupt leaves the old file intact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")  # the suffix tells savefig the format
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, result: dict[str, object]) -> None:
    text = json.dumps({"schema": SCHEMA, **result}, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda partial: partial.write_text(text))


def shown(path: Path) -> str:
    """The path as a user would type it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def rounded(value: Any) -> Any:
    """Rounds every float in ``value`` to five digits: more would be noise. A spread becomes a dictionary."""
    if isinstance(value, Spread):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def comparison(samples: Samples, ours: str) -> dict[str, Any]:
    """The figures of a row: rounds, ms of each call, and the ratios of the others to ``ours``."""
    return {
        "rounds": len(samples[ours]),
        "ms": {name: rounded(spread(values).scaled(1e3)) for name, values in samples.items()},
        f"times {ours}": {name: ratios(samples, name, ours)._asdict() for name in samples if name != ours},
    }
