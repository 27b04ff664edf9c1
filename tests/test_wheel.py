"""The functions of the compiled module; tools/wheel.py: the allowed contents of a wheel, its table; tools/links.py."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import pytest

import attn_kernels
from attn_kernels.backends import build_info


@pytest.mark.skipif(build_info() is None, reason="there is no compiled module")
def test_functions_of_the_module() -> None:
    """Bad arguments are Python's errors; what they return has its types."""
    from attn_kernels import _C

    assert {type(value) for value in _C.build_info().values()} == {str}
    assert _C.simd_levels()[-1] == "portable"
    assert _C.checksums(0, 0, 0) == []
    words = (ctypes.c_uint64 * 2)(1, 1)
    first, second = _C.checksums(ctypes.addressof(words), 8, 2)
    assert first == second and type(first) is int and 0 <= first < 1 << 64
    for arguments, error in (((), TypeError), ((1, 2), TypeError), ((0, -1, 0), TypeError), ((0, 0, -1), TypeError)):
        with pytest.raises(error):
            _C.checksums(*arguments)
    with pytest.raises(TypeError):
        _C.use_simd(3)


MODULE, TYPED = "attn_kernels/_C.cpython-311-x86_64-linux-gnu.so", "attn_kernels/py.typed"
LICENSE = "attn_kernels-1.dist-info/licenses/LICENSE"


@pytest.mark.parametrize(
    ("names", "cuda", "wrong"),
    [
        ([MODULE, TYPED, LICENSE], False, ()),
        ([MODULE, "attn_kernels/_C_cuda.cpython-311-x86_64-linux-gnu.so", TYPED, LICENSE], True, ()),
        ([MODULE, "attn_kernels/_C_cuda.cpython-311-x86_64-linux-gnu.so", TYPED, LICENSE], False, ("_C_cuda",)),
        ([TYPED], False, ("got []", "LICENSE is missing")),
        ([MODULE, TYPED, LICENSE, "csrc/module.cpp", "tests/conftest.py"], False, ("csrc/module.cpp", "conftest")),
    ],
)
def test_files(names: list[str], cuda: bool, wrong: tuple[str, ...]) -> None:
    wheel = pytest.importorskip("tools.wheel", reason="tools is not here")
    found = wheel.unexpected(names, cuda)
    assert len(found) == len(wrong) and all(part in text for part, text in zip(wrong, found, strict=True))


def test_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row takes the place of one of the same Python and torch; what stands around the table stays."""
    wheel = pytest.importorskip("tools.wheel", reason="tools is not here")
    table = tmp_path / "versions.md"
    table.write_text(f"before\n<!-- begin: another -->\n| 1 |\n{wheel.END}\n{wheel.BEGIN}\n{wheel.END}\nafter\n")
    monkeypatch.setattr(wheel, "TABLE", table)

    def write(torch: str, passed: int, date: str, *arguments: str) -> None:
        result: dict[str, Any] = {
            "python": "CPython 3.12.1",
            "torch": torch,
            "numpy": "2.3.5",
            "build": {"simd": "avx2", "torch": "2.13.0+cpu", "compiler": "GCC 12.2.0"},
        }
        result["tests"] = {"passed": passed, "failed": [], "skipped": 2}
        file = Path("attn_kernels-1.0-cp312-cp312-linux_x86_64.whl")
        wheel.write(wheel.row(result, file, list(arguments or wheel.TESTS), date))

    write("2.11.0", 1, "2026-01-01")
    write("2.10.0", 3, "2026-01-02")
    write("2.11.0", 5, "2026-01-03", "-k", "dot")
    lines = table.read_text().splitlines()
    assert lines[:4] == ["before", "<!-- begin: another -->", "| 1 |", wheel.END] and lines[-2:] == [wheel.END, "after"]
    ends = "`cp312-cp312-linux_x86_64` | torch 2.13.0+cpu, GCC 12.2.0 |"
    assert lines[7:-2] == [
        f"| 3.12.1 | 2.10.0 | 2.3.5 | avx2 | default | 3 / 0 / 2 | {ends} 2026-01-02 |",
        f"| 3.12.1 | 2.11.0 | 2.3.5 | avx2 | `-k dot` | 5 / 0 / 2 | {ends} 2026-01-03 |",
    ]


def test_tags() -> None:
    """The wheel without the GIL is none for the Python with it, whose tag its own begins with."""
    wheel = pytest.importorskip("tools.wheel", reason="tools is not here")
    names = [f"attn_kernels-1-{tags}-linux_x86_64.whl" for tags in ("cp310-cp310", "cp314-cp314t", "cp314-cp314")]
    for python, name in zip(("3.10", "3.14t", "3.14"), names, strict=True):
        assert [other for other in names if wheel.tags(python) in other] == [name]


def test_links_of_a_release(tmp_path: Path) -> None:
    """On PyPI no link of README.md is one to a file beside it; the files are those of the version's tag."""
    links = pytest.importorskip("tools.links", reason="tools is not here")
    (tmp_path / "attn_kernels").mkdir()
    for name in ("README.md", "pyproject.toml", "attn_kernels/version.py"):
        (tmp_path / name).write_text((links.ROOT / name).read_text("utf-8"), "utf-8")
    before = (tmp_path / "README.md").read_text("utf-8")
    links.write(tmp_path, "https://example.org/owner/name")
    after = (tmp_path / "README.md").read_text("utf-8")

    prose = [re.sub(r"```.*?```", "", text, flags=re.DOTALL) for text in (before, after)]
    old, new = ([target for _, target in re.findall(r"\[([^]]*)\]\(([^)\s]+)\)", text)] for text in prose)
    place = f"https://example.org/owner/name/blob/v{attn_kernels.__version__}/"
    assert new == [target if target.startswith("https://") else place + target for target in old]
    assert place + "docs/start.md#without-padding" in new
    assert after.replace(place, "") == before
    assert links.absolute("![a](b.png) [c](#d)", "https://h/o/n", "1") == "![a](https://h/o/n/raw/v1/b.png) [c](#d)"
    with pytest.raises(SystemExit, match="already"):
        links.write(tmp_path, "https://example.org/owner/name")
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["urls"]["Issues"] == "https://example.org/owner/name/issues"
    assert all(url.startswith("https://example.org/owner/name") for url in project["urls"].values())
