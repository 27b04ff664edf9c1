"""Files that are written as a whole or not at all: an interrupt leaves the old file, never a partial one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path("g2p-results")  # in the working directory: the default folder of the commands' output


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """``write`` makes a file beside ``path``, which then replaces ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as beside:
        partial = Path(beside) / path.name
        write(partial)
        partial.replace(path)


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
