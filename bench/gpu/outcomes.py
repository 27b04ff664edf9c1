"""A pytest plugin (``-p bench.gpu.outcomes``) for tests on a GPU, and a summary of the outcomes for each backend.

Each outcome is written to a file at once, one JSON object per line, so that an interrupted run keeps its outcomes. The
most informative tests run first. A test that hangs ends its process after a time limit; the earlier outcomes are kept.
After the CUDA context is lost, the remaining tests are skipped; another process runs them.
"""

from __future__ import annotations

import faulthandler
import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "ATTN_KERNELS_OUTCOMES"  # names the file
STAGE = "ATTN_KERNELS_OUTCOMES_OF"  # the backend that the run tests; every failure counts for it
DONE = "ATTN_KERNELS_OUTCOMES_DONE"  # a file of tests that must not run again, one per line
SECONDS = "ATTN_KERNELS_OUTCOMES_SECONDS"  # time limit of a test
BACKENDS = ("cuda", "triton")
BEGUN, LOST = "begun", "the CUDA context was lost by "

# Order by parts of the names: CUDA graphs first, as only a GPU can test them, then numerics; long compilations last.
FIRST = ("captured_on_cuda", "test_gpu_models", "test_ops", "test_numerics", "test_few_queries", "test_padding")
FIRST += ("test_functional", "test_autograd", "test_location", "test_loop", "test_memory_gradient", "test_robustness")
LAST = ("test_fuzz", "test_compile", "compile")

_lost_by: list[str] = []


def lost(outcome: dict[str, str]) -> bool:
    """Whether a test was skipped because the CUDA context was lost. Another process must run it."""
    return outcome["outcome"] == "skipped" and LOST in outcome["reason"]


# In the process that runs the tests -----------------------------------------------------------------------------------


def rank(test: str) -> int:
    """The position of a test: lower ranks run earlier."""
    if any(name in test for name in LAST) and FIRST[0] not in test:
        return len(FIRST) + 1 + max(i for i, name in enumerate(LAST) if name in test)
    return next((i for i, name in enumerate(FIRST) if name in test), len(FIRST))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done = set(Path(os.environ[DONE]).read_text().splitlines()) if os.environ.get(DONE) else set()
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = sorted((item for item in items if item.nodeid not in done), key=lambda item: rank(item.nodeid))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    """Runs a test under a watchdog that needs no GIL: a test that waits for a hanging kernel may hold the GIL."""
    seconds = float(os.environ.get(SECONDS) or 0)
    if not seconds:
        return (yield)
    _write(item.nodeid, BEGUN, "")
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if _lost_by:
        pytest.skip(LOST + _lost_by[0])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Any:
    report = yield
    if report.failed and call.excinfo and "CUDA error" in str(call.excinfo.value) and not _lost_by:
        _lost_by.append(item.nodeid)
    return report


# In the process that receives all outcomes ----------------------------------------------------------------------------


def pytest_runtest_logreport(report: Any) -> None:
    """With pytest-xdist only the main process gets all reports; the workers must not write."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    if report.when == "call" or report.outcome != "passed":
        _write(report.nodeid, report.outcome, _reason(report))


def pytest_collectreport(report: Any) -> None:
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        _write(report.nodeid, "failed", _reason(report))


def _reason(report: Any) -> str:
    """The reason in one line why a test failed or was skipped."""
    if isinstance(report.longrepr, tuple):  # for a skipped test: file, line, reason
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message.splitlines()[0] if crash else "".join(report.longreprtext.strip().splitlines()[-1:])


def _write(test: str, outcome: str, reason: str) -> None:
    line = {"test": test, "outcome": outcome, "reason": reason[:300] if outcome in ("failed", "skipped") else ""}
    if os.environ.get(STAGE):
        line["stage"] = os.environ[STAGE]
    with open(os.environ[VARIABLE], "a") as file:
        file.write(json.dumps(line) + "\n")


# Reading --------------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, str]]:
    """The last outcome of each test. A test that began and has no outcome killed its process."""
    if not path.exists():
        return []
    last: dict[str, dict[str, str]] = {}
    for line in path.read_text().splitlines():
        if line.endswith("}"):
            one = json.loads(line)
            if one["outcome"] != BEGUN or last.get(one["test"], {}).get("outcome") in (None, BEGUN):
                last[one["test"]] = one
    return list(last.values())


def summary(outcomes: Iterable[dict[str, str]]) -> dict[str, Any]:
    """Counts, failures by name, and for each red backend the reason: no test passed, or a test failed.

    A failure counts for the backend that the run tests. In a run of all backends it counts for the backends in the
    parameters of the test, and for all backends if the parameters name none.
    """
    outcomes = [
        {**one, "outcome": "failed", "reason": "it began, and its process ended"} if one["outcome"] == BEGUN else one
        for one in outcomes
    ]
    failed = [one for one in outcomes if one["outcome"] == "failed"]
    result: dict[str, Any] = {"counts": dict(Counter(one["outcome"] for one in outcomes)), "failed": failed, "red": {}}
    for backend in BACKENDS:
        own = [one for one in failed if concerns(one, backend)]
        passed = any(one["outcome"] == "passed" and _named(one["test"], backend) for one in outcomes)
        if own:
            result["red"][backend] = f"{len(own)} failed, first {own[0]['test']}"
        elif not passed:
            result["red"][backend] = "none passed"
    return result


def concerns(outcome: dict[str, str], backend: str) -> bool:
    if "stage" in outcome:
        return outcome["stage"] == backend
    test = outcome["test"]
    return _named(test, backend) or not any(_named(test, other) for other in BACKENDS)


def _named(test: str, backend: str) -> bool:
    return backend in test.partition("[")[2]
