"""The output of the benchmarks can be copied, and the output that tests read is the same in every terminal."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("typer", "rich"):
    pytest.importorskip(package, reason="the benchmarks need the dependency group bench")

import typer  # noqa: E402
from rich.console import Group  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from bench import cli, machine  # noqa: E402

ROOT = Path(__file__).parent.parent
PATH = "/a/folder with spaces/[brackets]/" + "long-" * 60 + "/result.json"


def test_a_path_is_printed_in_one_piece() -> None:
    console = cli.Terminal(file=io.StringIO(), width=20)
    console.print(f"Written: {PATH}", style="red")
    console.print(Group(machine.as_text({"compiler": PATH, "device": "a processor with a name, 2 cores"})))
    lines = console.file.getvalue().splitlines()
    assert lines == [f"Written: {PATH}", f"compiler: {PATH}", "device: a processor with a name, 2 cores"]


def test_an_error_is_printed_in_one_piece() -> None:
    app = cli.application()

    @app.command()
    def refuse() -> None:
        raise typer.BadParameter(f"{PATH} is not a file of this program")

    result = CliRunner().invoke(app, [], env={"COLUMNS": "20", "FORCE_COLOR": "1", "GITHUB_ACTIONS": "true"})
    assert result.exit_code == 2 and f"{PATH} is not a file of this program" in result.output


@pytest.mark.slow
def test_tests_of_printed_output_pass_in_any_terminal(tmp_path: Path) -> None:
    """A narrow one with colours, as some CI has, a language of bytes, another time zone and a long temporary path."""
    hostile = {"COLUMNS": "40", "LINES": "5", "FORCE_COLOR": "1", "GITHUB_ACTIONS": "true", "COLORTERM": "truecolor"}
    hostile |= {"TERM": "xterm-256color", "LC_ALL": "C", "TZ": "Pacific/Chatham", "HOME": str(tmp_path)}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | hostile
    del environment["NO_COLOR"]
    files = [f"tests/test_{name}.py" for name in ("g2p", "bench", "sweep", "swap_bench", "terminal", "limits")]
    words = "continues or another_run or damaged or error or help or command or left_out or seeds or one_piece"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-k", words, "-p", "no:cacheprovider", *files]
    command += ["--basetemp", str(tmp_path / ("very-" * 20 + "long"))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
