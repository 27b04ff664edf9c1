"""Addresses for the page on PyPI: ``python -m tools.links https://github.com/OWNER/NAME``, before a release is built.

README.md links to files beside it, which PyPI does not have: they become links to the files at the tag of the version.
pyproject.toml gets ``[project.urls]``. Both are changed in place, in the checkout that is built, and are not committed:
the repository is what builds the release, and its address is written down nowhere else.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def absolute(text: str, address: str, version: str) -> str:
    """Markdown whose links and pictures of the repository are addresses. Code blocks stay as they are."""

    def link(found: re.Match[str]) -> str:
        code, picture, label, target = found.groups()
        if code or re.match(r"https?:|mailto:|#", target):
            return found[0]
        return f"{picture}[{label}]({address}/{'raw' if picture else 'blob'}/v{version}/{target})"

    return re.sub(r"(^```.*?^```$)|(!?)\[([^]]*)\]\(([^)\s]+)\)", link, text, flags=re.DOTALL | re.MULTILINE)


def urls(address: str) -> str:
    """The table, with the names that PyPI has icons for."""
    pages = {
        "Source": address,
        "Documentation": f"{address}/blob/HEAD/docs/README.md",
        "Changelog": f"{address}/blob/HEAD/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }
    return "\n[project.urls]\n" + "".join(f'{name} = "{page}"\n' for name, page in pages.items())


def write(root: Path, address: str) -> None:
    version = re.search(r'^__version__ = "(.*)"$', (root / "attn_kernels/version.py").read_text("utf-8"), re.MULTILINE)
    assert version is not None
    readme, project = root / "README.md", root / "pyproject.toml"
    settings = project.read_text("utf-8")
    if "[project.urls]" in settings:
        raise SystemExit("pyproject.toml has [project.urls] already")
    readme.write_text(absolute(readme.read_text("utf-8"), address, version[1]), "utf-8")
    project.write_text(settings + urls(address), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser("python -m tools.links", description=__doc__.partition("\n")[0])
    parser.add_argument("address", help="of the repository, https://github.com/OWNER/NAME")
    address = parser.parse_args().address.rstrip("/")
    if not re.fullmatch(r"https://[\w.-]+/[\w.-]+/[\w.-]+", address):
        parser.error(f"address must be https://HOST/OWNER/NAME, got {address!r}")
    write(ROOT, address)


if __name__ == "__main__":
    main()
