"""The commands of ``python -m attn_kernels``; the report itself is tested in test_environment_report.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from attn_kernels.__main__ import main

MODELS = """
import torch
from torch import nn


class Additive(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, query, memory):
        scores = self.v(torch.tanh(self.q(query)[:, None] + self.k(memory))).squeeze(-1)
        return (torch.softmax(scores, -1)[..., None] * memory).sum(1)


class Gated(nn.Module):
    def forward(self, x):
        return torch.tanh(x) * torch.softmax(x, -1)


def additive():
    return Additive(), (torch.randn(2, 4), torch.randn(2, 5, 4))


def by_name():
    return Additive(), {"memory": torch.randn(2, 5, 4), "query": torch.randn(2, 4)}


def gated():
    return Gated(), torch.randn(2, 4)


def broken():
    return Additive(), (torch.randn(2, 3), torch.randn(2, 5, 4))


def neither():
    return 3
"""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "models_of_mine.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def run(*arguments: str) -> tuple[object, str, str]:
        """The exit status, or the message of one that is not 0, and what is printed."""
        monkeypatch.setattr(sys, "argv", ["attn_kernels", *arguments])
        status: object = 0
        try:
            main()
        except SystemExit as left:
            status = left.code
        return status, *capsys.readouterr()

    yield run
    sys.modules.pop("models_of_mine", None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("report", "tune", "patch-list", "fuse-report", "--json")),
        (("report",), ("bug reports", "--json")),
        (("tune",), ("GPU", "--output")),
        (("patch-list",), ("classes", "--json")),
        (("fuse-report",), ("MODULE:CALLABLE", "FILE.py:CALLABLE", "--calls", "Exit status")),
    ],
    ids=str,
)
def test_help(command, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    status, shown, _ = command(*arguments, "--help")
    assert status == 0
    for word in words:
        assert word in shown


def test_report_is_the_default(command) -> None:
    assert command()[:2] == command("report")[:2]
    for arguments in (("--json",), ("report", "--json"), ("--json", "report")):
        status, shown, _ = command(*arguments)
        assert status == 0 and "backends" in json.loads(shown), arguments


def test_what_is_not_understood(command) -> None:
    for words, *arguments in (
        ("'fuze'", "fuze"),
        ("TARGET", "fuse-report"),
        ("at least 1, got 0", "fuse-report", "models_of_mine:additive", "--calls", "0"),
        ("TARGET: must be MODULE:CALLABLE or FILE.py:CALLABLE, got 'models_of_mine'", "fuse-report", "models_of_mine"),
        ("TARGET: there is no file absent.py", "fuse-report", "absent.py:f"),
    ):
        status, shown, said = command(*arguments)
        assert (status, shown) == (2, "") and said.startswith("usage:") and words in said, arguments


@pytest.mark.parametrize("target", ["models_of_mine:additive", "models_of_mine.py:by_name"])
def test_fuse_report(command, target: str) -> None:
    status, shown, _ = command("fuse-report", target, "--calls", "1")
    assert status == 0
    assert "models_of_mine.Additive" in shown and "fused: context" in shown


def test_fuse_report_says_why_not(command) -> None:
    status, shown, _ = command("fuse-report", "models_of_mine:gated", "--calls", "1", "--json")
    report = json.loads(shown)
    assert status == 0 and report["fused"] == [] and report["fallbacks"] == []
    (skipped,) = report["skipped"]
    assert skipped["class"] == "models_of_mine.Gated" and skipped["reason"]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("models_of_mine:absent", "has no attribute 'absent'"),
        ("absent_module:f", "No module named 'absent_module'"),
        ("models_of_mine:neither", r"neither() must return a model and the arguments of its call, got int"),
        ("models_of_mine:broken", "RuntimeError: "),
    ],
)
def test_fuse_report_of_what_cannot_run(command, target: str, said: str) -> None:
    status, shown, _ = command("fuse-report", target)
    assert shown == ""
    assert isinstance(status, str) and status.startswith(f"attn_kernels fuse-report: {target}: ") and said in status
