"""The files of the package: the allowed imports, and a limit on the length of each file."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import attn_kernels

ROOT = Path(attn_kernels.__file__).parent
MAX_LINES = 400


def imports(root: Path) -> dict[str, set[str]]:
    """Of each module below ``root`` the others that it imports, anywhere: for types only and within functions, too."""
    files = {".".join(file.relative_to(root.parent).with_suffix("").parts): file for file in root.rglob("*.py")}
    names = {name.removesuffix(".__init__") for name in files}
    found = {}
    for name, file in files.items():
        module = name.removesuffix(".__init__")
        package = name.split(".")[:-1]
        others = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                others |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) + 1 - node.level] if node.level else []
                source = ".".join([*base, *([node.module] if node.module else [])])
                inner = {f"{source}.{alias.name}" for alias in node.names}
                others |= {x if x in names else source for x in inner}
        found[module] = (others & names) - {module}
    return found


def test_imports_have_no_circle() -> None:
    found = imports(ROOT)
    assert {"attn_kernels.ops", "attn_kernels.types"} <= found["attn_kernels.attending"]
    TopologicalSorter(found).prepare()  # CycleError names the modules


def test_files_are_short() -> None:
    lines = {str(file): len(file.read_text(encoding="utf-8").splitlines()) for file in ROOT.rglob("*.py")}
    assert len(lines) > 100
    assert {file: count for file, count in lines.items() if count > MAX_LINES} == {}


def test_circles_are_found(tmp_path: Path) -> None:
    """Of a name, of a module, by an absolute name; for types only, and within a function."""
    root = tmp_path / "package"
    (root / "inner").mkdir(parents=True)
    (root / "__init__.py").write_text("")
    (root / "one.py").write_text("def f():\n    from package import two\n")
    (root / "two.py").write_text("from .inner import Three\n")
    (root / "inner" / "__init__.py").write_text("from .three import Three\n")
    (root / "inner" / "three.py").write_text("if TYPE_CHECKING:\n    from ..one import f\nclass Three: ...\n")
    with pytest.raises(CycleError) as caught:
        TopologicalSorter(imports(root)).prepare()
    expected = {"package.one", "package.two", "package.inner", "package.inner.three"}
    assert set(caught.value.args[1]) == expected
