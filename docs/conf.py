"""The documentation site: ``make docs``.

Its root is that of the repository, so that README, CONTRIBUTING and docs/ are pages as they are, with the links that
they have on GitHub. docs/README.md is the table of contents; docs/api/ takes the docstrings.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import attn_kernels  # noqa: E402

project = "attn_kernels"
version = release = attn_kernels.__version__
copyright = author = "the authors of attn_kernels"

root_doc = "docs/README"
include_patterns = ["*.md", "docs/**.md", "examples/g2p/README.md"]
exclude_patterns = [".*", "build", "dist", "node_modules", "examples-results", "g2p-results"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
html_theme = "furo"
html_title = f"attn_kernels {release}"
html_copy_source = False
highlight_language = "default"

myst_heading_anchors = 4  # a link to a heading that is not there is a warning, and warnings are errors

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # fields of tuples are documented as such already
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

# A reference to something of this package has to be found; PyTorch and Python are not part of the site.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!attn_kernels\.).*"),
    (r"py:class", r"attn_kernels\.(scores|memory_gradient)\..*"),  # in signatures only
    (r"py:class", r"attn_kernels\.patching\.registry\.F"),
]


def add_contents(app: Sphinx, name: str, source: list[str]) -> None:
    """The table of contents: each list of links under a heading of docs/README.md."""
    if name != root_doc:
        return
    trees = []
    for caption, text in re.findall(r"^## (.*?)$(.*?)(?=^## |\Z)", source[0], re.MULTILINE | re.DOTALL):
        pages = re.findall(r"^- \[([^]]+)\]\(([^)#]+)\.md\)", text, re.MULTILINE)
        entries = "\n".join(f"{title.replace('`', '')} <{page}>" for title, page in pages)
        trees.append(f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n")
    source[0] += "\n" + "\n".join(trees)


def name_arguments(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Paragraphs of lines ``argument: what it is``, without a heading, become a list of arguments or fields."""
    try:
        arguments = set(inspect.signature(thing).parameters)
    except (TypeError, ValueError):
        return
    result: list[str] = []
    inside = False  # a paragraph of such lines
    for line in lines:
        names = re.match(r"([a-z_]\w*(?:, [a-z_]\w*)*): ", line)
        begins = names is not None and set(names[1].split(", ")) <= arguments
        if begins and not inside and (not result or not result[-1].strip()):
            result += ["Attributes:" if what == "class" else "Args:"]
            inside = True
        elif not line.strip() or (line[0] != " " and not begins):
            if inside and line.strip():
                result.append("")  # a sentence right behind the list
            inside = False
        line = re.sub(r"(?<=[ (])\*(?=[),])", r"\\*", line)  # any size, as in (B, *): not the beginning of an emphasis
        result.append("    " + line if inside else line)
    lines[:] = result


def skip(app: Sphinx, what: str, name: str, thing: Any, would_skip: bool, options: Any) -> bool | None:
    """Fields of a NamedTuple, which its docstring has, and what PyTorch prints of a module."""
    return True if type(thing).__name__ == "_tuplegetter" or name == "extra_repr" else None


def add_front_page(app: Sphinx, error: Exception | None) -> None:
    """The address of the site leads to its first page."""
    if error is None and app.builder.name == "html":
        target = f"{root_doc}.html"
        page = f'<!doctype html><meta http-equiv="refresh" content="0; url={target}"><a href="{target}">{project}</a>\n'
        (Path(app.outdir) / "index.html").write_text(page, encoding="utf-8")


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", name_arguments, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", skip)
    app.connect("build-finished", add_front_page)
