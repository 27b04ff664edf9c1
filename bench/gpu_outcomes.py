"""A pytest plugin (``-p bench.gpu_outcomes``) that writes each outcome to a file as it comes, one JSON object a line:
tests that are cut off leave what they found. And what the file says about each backend.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

VARIABLE = "ATTN_KERNELS_OUTCOMES"  # names the file
BACKENDS = ("cuda", "triton")


def pytest_runtest_logreport(report: Any) -> None:
    """With pytest-xdist it is the first process that gets all reports; the others must not write."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    if report.when == "call" or report.outcome != "passed":
        _write(report.nodeid, report.outcome, getattr(report, "longreprtext", ""))


def pytest_collectreport(report: Any) -> None:
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        _write(report.nodeid, "failed", report.longreprtext)


def _write(test: str, outcome: str, text: str) -> None:
    reason = text.strip().splitlines()[-1:] if outcome == "failed" else []
    with open(os.environ[VARIABLE], "a") as file:
        file.write(json.dumps({"test": test, "outcome": outcome, "reason": "".join(reason)[:300]}) + "\n")


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def summary(outcomes: Iterable[dict[str, str]]) -> dict[str, Any]:
    """Counts, failures by name, and for each backend whether it may be timed: it passed something and failed nothing.

    A failure whose name has no backend in its parameters counts for all of them.
    """
    outcomes = list(outcomes)
    failed = [one for one in outcomes if one["outcome"] == "failed"]
    result: dict[str, Any] = {"counts": dict(Counter(one["outcome"] for one in outcomes)), "failed": failed, "red": {}}
    for backend in BACKENDS:
        own = [one for one in failed if concerns(one["test"], backend)]
        passed = any(one["outcome"] == "passed" and _named(one["test"], backend) for one in outcomes)
        if own:
            result["red"][backend] = f"{len(own)} failed, first {own[0]['test']}"
        elif not passed:
            result["red"][backend] = "none passed"
    return result


def concerns(test: str, backend: str) -> bool:
    return _named(test, backend) or not any(_named(test, other) for other in BACKENDS)


def _named(test: str, backend: str) -> bool:
    return backend in test.partition("[")[2]
