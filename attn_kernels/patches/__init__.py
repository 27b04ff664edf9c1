"""The earlier name of :mod:`attn_kernels.patching.libraries`. It will be removed in the next version."""

import importlib
import sys
import warnings

from ..patching.libraries import FILES

warnings.warn("attn_kernels.patches is attn_kernels.patching.libraries now", DeprecationWarning, stacklevel=2)

for _file in FILES:  # so that ``import attn_kernels.patches.<library>`` gives the same module, not a second one
    _module = importlib.import_module(f"..patching.libraries.{_file}", __name__)
    globals()[_file] = sys.modules[f"{__name__}.{_file}"] = _module
