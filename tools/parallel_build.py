"""What both builds of compiled modules share: setup.py and tests/cpp/build_emulated.py."""

from __future__ import annotations

import os
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools.command.build_ext import build_ext

JOBS = int(os.environ.get("ATTN_KERNELS_BUILD_JOBS") or os.cpu_count() or 1)

# The limited API of Python 3.10: one binary for it and all later ones. A free-threaded Python has none before 3.15.
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")
LIMITED_API: list[tuple[str, str | None]] = [("Py_LIMITED_API", "0x030A0000")] if LIMITED else []


class ParallelBuild(build_ext):
    """JOBS sources of an extension at one time, in their order."""

    def build_extensions(self) -> None:
        compile_all = self.compiler.compile

        def compile_each(sources: list[str], *arguments: Any, **options: Any) -> list[str]:
            with ThreadPoolExecutor(JOBS) as pool:
                objects = pool.map(lambda source: compile_all([source], *arguments, **options), sources)
                return [name for names in objects for name in names]

        self.compiler.compile = compile_each
        super().build_extensions()

    def copy_extensions_to_source(self) -> None:
        """In place; and without an earlier build for this Python alone, which it would import instead."""
        super().copy_extensions_to_source()
        for module in self.extensions if LIMITED else ():
            built = Path(self.get_finalized_command("build_py").get_package_dir("attn_kernels"))
            kept = Path(self.get_ext_filename(module.name)).name
            for other in built.glob(f"{module.name.rpartition('.')[2]}.*.so"):
                if other.name != kept:
                    other.unlink()
