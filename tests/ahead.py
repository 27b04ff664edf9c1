"""Compiles Triton kernels ahead of time for the tests, in processes without Triton's interpreter.

Kernels that were imported for the interpreter cannot be compiled. So a separate process imports everything once, which
takes seconds. Each request runs in a fork of that process, so that cases cannot affect each other.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent


def run_ahead(module: str, function: str, *arguments: Any, **environment: str) -> Any:
    """Calls a function of a test module in such a process; returns its result, passed as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        result, output = Path(folder) / "result.json", Path(folder) / "output"
        request = {"module": module, "function": function, "arguments": arguments, "environment": environment}
        process = _process()
        process.stdin.write(json.dumps(request | {"result": str(result), "output": str(output)}) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, "the process that compiles has ended"
        assert json.loads(answer) == 0, output.read_text()
        return json.loads(result.read_text())


@functools.cache
def _process() -> subprocess.Popen[str]:
    """Starts the process. It ends with this one, because its input ends."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = (str(TESTS.parent), str(TESTS), environment.get("PYTHONPATH"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def serve() -> None:
    aot = importlib.import_module("test_triton_aot")
    importlib.import_module("test_triton_hip")
    aot.launches(**aot.CASES["dot-decode"])  # the first tensors import as many modules again
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_answer(request))
        _, status = os.waitpid(child, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
        answers.flush()


def _answer(request: dict[str, Any]) -> int:
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(request["environment"])
    try:
        function = getattr(importlib.import_module(request["module"]), request["function"])
        Path(request["result"]).write_text(json.dumps(function(*request["arguments"])))
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        return 1
    return 0


if __name__ == "__main__":
    serve()
