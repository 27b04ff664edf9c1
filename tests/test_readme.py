"""The examples of README.md and docs/ run and give the stated shapes; figures, links and commands are correct."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import attn_kernels
from attn_kernels import seq2seq

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "examples/g2p/README.md",
]
OPTIONAL = ("huggingface_hub", "matplotlib", "onnxruntime")  # a block that imports one is left out where it is missing
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def run_examples(page: Path) -> dict[str, Any]:
    """What the examples of a page leave behind. They find a ``model``."""
    torch.manual_seed(0)
    names: dict[str, Any] = {"model": nn.Linear(2, 2)}
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        if all(find_spec(package) for package in OPTIONAL if re.search(rf"^(import|from) {package}\b", block, re.M)):
            exec(compile(block, page.name, "exec"), names)
    return names


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    return run_examples(README)


def test_the_eager_code_is_equivalent(names: dict[str, Any]) -> None:
    tensors = [names[name].double() for name in ("query", "keys", "values", "v")]
    lengths = names["lengths"].clamp(min=1)  # the eager code gives NaN for a length of 0
    expected = names["eager_attention"](*tensors, lengths)
    for result, other in zip(names["additive_attention"](*tensors, memory_lengths=lengths), expected, strict=True):
        torch.testing.assert_close(result, other)


def test_shapes(names: dict[str, Any]) -> None:
    assert names["averaged"].shape == (8, 1, 1024)
    assert names["states"].shape == (64, 30, 256)
    assert names["context"].shape == (64, 30, 512)
    assert names["logits"].shape == (8, 10, 40)
    assert names["alignments"].shape == (8, 10, 12)
    assert names["loss"].isfinite()
    assert len(names["hypotheses"]) == 8
    assert len(names["report"].fused) == 1


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_run(page: Path) -> None:
    names = run_examples(page)
    if page == ROOT / "docs/patching.md":
        assert [replaced.name for replaced in names["report"].replaced] == ["attention"]
    if page == ROOT / "docs/start.md":
        assert names["losses"][-1] < 0.7 * names["losses"][0]
    if page == ROOT / "docs/seq2seq.md":
        assert names["loss"].isfinite() and all(len(hypotheses) == 3 for hypotheses in names["best"])


def test_the_readme_is_read_in_one_sitting() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 160


def test_speed_is_that_of_the_files() -> None:
    """Each row of the table has the figures of the file that its command writes."""

    def rows_of(file: str, key: str) -> list[dict[str, Any]]:
        return json.loads((ROOT / "bench/results" / file).read_text(encoding="utf-8"))[key]

    def op(passes: str, *shape: int) -> str:
        cell = next(
            cell
            for cell in rows_of("ops-cpu.json", "cells")
            if (cell["op"], cell["passes"]) == ("additive_attention", passes)
            and tuple(cell["shape"].values())[:4] == shape
        )
        providers = {provider["name"]: provider for provider in cell["ways"]}
        times = [providers[name]["times_ours"]["median"] for name in ("eager", "torch.compile")]
        return f"| {providers['cpu']['milliseconds']['median']:.3g} | {times[0]:.1f}x | {times[1]:.1f}x | "

    def training_step() -> str:
        row = next(row for row in rows_of("loop-cpu.json", "rows") if row["B,S,T"] == [32, 80, 96])
        return f"| {row['ms']['loop']['median']:.0f} | {row['eager / ours']['loop']['median']:.1f}x | - | "

    def captions() -> str:
        row = next(
            row for row in rows_of("fuse-cpu.json", "rows") if (row["case"], row["passes"]) == ("captions", "training")
        )
        times = [row["times fused"][name]["median"] for name in ("original", "torch.compile")]
        return f"| {row['ms']['fused']['median']:.0f} | {times[0]:.1f}x | {times[1]:.1f}x | "

    section = README.read_text(encoding="utf-8").partition("## Speed")[2].partition("## Modules")[0]
    rows = [line for line in section.splitlines() if "`python -m" in line and line.startswith("|")]
    found = [op("forward", 64, 1, 50, 512), op("forward+backward", 32, 50, 50, 512), training_step(), captions()]
    assert len(rows) == len(found)
    for row, figures in zip(rows, found, strict=True):
        assert figures in row, row


@pages
def test_links(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, _ = target.partition("#")
        assert target.startswith("https://") or not path or (page.parent / path).exists(), target


@pages
def test_commands_exist(page: Path) -> None:
    """Every ``python -m`` of the pages is a module of this repository or of the package."""
    for module in re.findall(
        r"python -m ((?:bench|tools|examples|attn_kernels)[\w.]*)", page.read_text(encoding="utf-8")
    ):
        place = ROOT / module.rstrip(".").replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), module


def test_citation_has_the_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == attn_kernels.__version__


def test_what_is_public_is_in_the_reference() -> None:
    """A new name of the package needs a line in a page of docs/api/; those of mechanisms are found by themselves."""
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/api").glob("*.md"))
    documented = {name.rpartition(".")[2] for name in re.findall(r"^\.\. auto\w+:: (\S+)$", text, re.MULTILINE)}
    assert set(attn_kernels.__all__) - {"__version__"} <= documented
    assert set(seq2seq.__all__) <= documented


def test_every_page_is_in_the_table_of_contents() -> None:
    contents = ROOT / "docs/README.md"
    linked = re.findall(r"^- \[.*?\]\((.*?)\)", contents.read_text(encoding="utf-8"), re.MULTILINE)
    assert {(contents.parent / target).resolve() for target in linked} >= {*PAGES} - {contents}


def test_limits_of_the_design_are_those_of_the_kernels() -> None:
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    header = (ROOT / "csrc/additive_math.h").read_text(encoding="utf-8")
    told = re.findall(r"^\| `(kMax\w+)` \| (\d+) \|", text, re.MULTILINE)
    assert len(told) == 5
    for name, limit in told:
        assert f" {name} = {limit}.0f;" in header, name


FOLDERS = ("attn_kernels", "bench", "csrc", "docs", "examples", "tests", "tools")


@pages
def test_files_exist(page: Path) -> None:
    """Every file that the text names by the end of its path, and every folder that it names from the root."""
    paths = [f"/{path.relative_to(ROOT)}" for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    paths += [f"/{path.name}" for path in ROOT.iterdir()]
    written = "/bench/results/local"  # by ``make bench``
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for name in re.findall(r"`([\w./-]+\.(?:py|h|cpp|cu|cuh|c|md|toml))`", text):
        assert any(path.endswith(f"/{name}") for path in paths), name
    for name in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", text):
        assert f"/{name.rstrip('/')}" in (*paths, written), name
