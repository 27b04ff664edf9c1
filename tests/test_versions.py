"""tools/versions.py: its table; a failing row neither stops the others nor counts as done."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tools.versions", reason="tools is not here")

from tools import versions

FOUND = {
    "python": "CPython 3.12.1",
    "torch": "2.11.0+cu130",
    "triton": "3.6.0",
    "numpy": "2.3.5",
    "build": {"torch": "2.11.0+cu130"},
    "cuda build": {"emulated": False, "nvcc": "13.0"},
}
JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_ops" name="test_a[cpu]"/>
<testcase classname="tests.test_ops" name="test_b"><failure message="no"/></testcase>
<testcase classname="tests.test_ops" name="test_c"><skipped message="no GPU"/></testcase>
<testcase classname="tests.test_ops" name="test_d"><error message="no"/></testcase>
</testsuite></testsuites>"""


def test_outcomes(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(JUNIT)
    found = versions.outcomes(tmp_path / "report.xml")
    assert found == {"passed": 1, "failed": ["tests.test_ops::test_b", "tests.test_ops::test_d"], "skipped": 1}


def test_rows() -> None:
    result = {
        "combination": versions.Combination("3.12", "2.11.0")._asdict(),
        "commit": "abc",
        "arguments": ["-k", "dot"],
    }
    tested = {"found": FOUND, "steps": {"tests": 3}, "tests": {"passed": 5, "failed": [], "skipped": 2}}
    expected = "| 3.12.1 | 2.11.0+cu130 | 3.6.0 | 2.3.5 | yes | yes, nvcc 13.0 | `-k dot` | 5 / 0 / 2 | abc |"
    assert versions.row({**result, **tested}) == expected
    assert "| 5 / 0 / 2, not finished |" in versions.row({**result, **tested, "steps": {"tests": "Interrupted"}})
    emulated = {**FOUND, "cuda build": {"emulated": True}}
    assert "| yes | - |" in versions.row({**result, **tested, "found": emulated})
    assert "| 3.12 | 2.11.0 | - | - | failed: build |" in versions.row(
        {**result, "steps": {"python": 1, "build": "error"}}
    )
    assert "| not run |" in versions.row({"combination": result["combination"], "steps": {}})


def test_rows_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (versions.Combination("3.10", "2.10.0"), versions.Combination("3.12", "2.11.0"))
    monkeypatch.setattr(versions, "COMBINATIONS", rows)
    monkeypatch.setattr(versions, "RESULTS", tmp_path / "versions.json")
    monkeypatch.setattr(versions, "TABLE", tmp_path / "versions.md")
    monkeypatch.setattr(versions, "FOLDER", tmp_path / "work")
    monkeypatch.setattr(versions, "state_of_sources", lambda: "abc")
    monkeypatch.setattr(sys, "argv", ["versions", "--", "-k", "dot"])
    versions.TABLE.write_text(f"before\n{versions.BEGIN}\nold\n{versions.END}\nafter\n")
    examined: list[str] = []

    def examine(row, folder, emulator, arguments, result):
        examined.append(row.torch)
        result["steps"]["build"] = "no compiler" if examined == ["2.10.0"] else 1
        if examined == ["2.10.0"]:
            raise versions.StepFailed("no compiler")

    monkeypatch.setattr(versions, "examine", examine)
    with pytest.raises(SystemExit, match="failed steps"):
        versions.main()
    assert examined == ["2.10.0", "2.11.0"]
    assert [r["steps"] for r in json.loads(versions.RESULTS.read_text())] == [{"build": "no compiler"}, {"build": 1}]
    text = versions.TABLE.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "failed: build" in text and "old" not in text
    versions.main()  # what has passed is not done again
    assert examined == ["2.10.0", "2.11.0", "2.10.0"]


def test_a_step_keeps_its_last_lines(tmp_path: Path) -> None:
    program = "import sys; print('what went wrong'); sys.exit(1)"
    with pytest.raises(versions.StepFailed, match="what went wrong"):
        versions.run("build", tmp_path / "log", [sys.executable, "-c", program], tmp_path)


def test_copy_of_the_sources(tmp_path: Path) -> None:
    top = subprocess.run(["git", "rev-parse", "--show-toplevel"], cwd=versions.ROOT, capture_output=True, text=True)
    if top.returncode or Path(top.stdout.strip()) != versions.ROOT.resolve():
        pytest.skip("this is no clone")
    versions.copy_sources(tmp_path)
    assert (tmp_path / "setup.py").exists() and not list(tmp_path.glob("attn_kernels/*.so"))
