"""Makes links absolute for PyPI, before a release is built: ``python -m tools.links https://github.com/OWNER/NAME``.

README.md links to files beside it, which PyPI does not have. These links become links to the files at the tag of the
version. pyproject.toml gets ``[project.urls]``. Both files are changed in place in the checkout that is built. The
changes are not committed: the release workflow passes the address, which is stored nowhere else.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def absolute(text: str, address: str, version: str) -> str:
    """Markdown with absolute addresses in links and images of the repository. Code blocks are unchanged."""

    def link(found: re.Match[str]) -> str:
        code, picture, label, target = found.groups()
        if code or re.match(r"https?:|mailto:|#", target):
            return found[0]
        return f"{picture}[{label}]({address}/{'raw' if picture else 'blob'}/v{version}/{target})"

    return re.sub(r"(^```.*?^```$)|(!?)\[([^]]*)\]\(([^)\s]+)\)", link, text, flags=re.DOTALL | re.MULTILINE)


def urls(address: str) -> str:
    """The table [project.urls], with names for which PyPI has icons."""
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
    parser.add_argument("address", help="address of the repository, https://github.com/OWNER/NAME")
    address = parser.parse_args().address.rstrip("/")
    if not re.fullmatch(r"https://[\w.-]+/[\w.-]+/[\w.-]+", address):
        parser.error(f"address must be https://HOST/OWNER/NAME, got {address!r}")
    write(ROOT, address)


if __name__ == "__main__":
    main()
