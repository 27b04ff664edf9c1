"""Tiles and warps of the kernels: a shipped table, so that a first call does not tune, and the user's own table.

``python -m attn_kernels tune`` times the candidates of each entry on the current GPU and writes the fastest ones to the
user's cache directory, by the name of the device. Entries there take precedence over the shipped table. Keys have no
lengths: an entry is selected by kernel, dtype and kind of problem, and is used for all sizes.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

Configuration = Mapping[str, int]


def _pairs(BLOCK_Q: int, BLOCK_K: int, THREAD_Q: int, THREAD_K: int, warps: int) -> Configuration:
    return dict(BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K, THREAD_Q=THREAD_Q, THREAD_K=THREAD_K, warps=warps)


def _walk(BLOCK_Q: int, BLOCK_A: int) -> Configuration:
    return dict(BLOCK_Q=BLOCK_Q, BLOCK_A=BLOCK_A)


def _product(BLOCK_Q: int, BLOCK_K: int, BLOCK_A: int, warps: int) -> Configuration:
    return dict(BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K, BLOCK_A=BLOCK_A, warps=warps)


def _sum(BLOCK_M: int, BLOCK_X: int, BLOCK_N: int, warps: int) -> Configuration:
    return dict(BLOCK_M=BLOCK_M, BLOCK_X=BLOCK_X, BLOCK_N=BLOCK_N, warps=warps)


# The candidates of each entry; the first is the shipped one. "16" in a name: bfloat16 and float16.
CANDIDATES: Mapping[str, tuple[Configuration, ...]] = {
    # Additive scores of many queries. 16 pairs per thread take 3.4 instructions per unit, 32 take 3.3; 8 take 3.7, but
    # occupy more warps if there are few tiles.
    "scores, many tiles": (
        _pairs(16, 32, 4, 4, 1),
        _pairs(32, 32, 4, 4, 2),
        _pairs(64, 64, 8, 4, 4),
        _pairs(16, 64, 8, 4, 1),
        _pairs(8, 32, 4, 2, 1),
    ),
    "scores, few tiles": (_pairs(8, 32, 4, 2, 1), _pairs(16, 32, 4, 2, 2), _pairs(16, 32, 4, 4, 1)),
    # Their backward. A step takes 8 instructions for each query and about 30 others, which are 10% with 32 queries.
    # With 16 queries the others are 38, or 23%, because they include the exponential of the key. A thread has one unit.
    "backward": (_walk(32, 128), _walk(32, 64), _walk(16, 128), _walk(16, 64)),
    # Products of rows with rows, and weighted sums of rows. "masked": the mask and its check take registers.
    "product": (_product(32, 64, 32, 4), _product(64, 32, 32, 4), _product(32, 32, 32, 4)),
    "product 16": (_product(64, 64, 32, 4), _product(64, 64, 64, 4), _product(64, 128, 64, 8), _product(32, 64, 64, 4)),
    "sum": (_sum(32, 32, 64, 4), _sum(32, 32, 32, 4)),
    "sum 16": (_sum(32, 32, 64, 4), _sum(32, 32, 32, 4), _sum(64, 64, 64, 8)),
    "sum, masked": (_sum(16, 32, 32, 4), _sum(32, 32, 32, 4)),
    "sum 16, masked": (_sum(16, 32, 32, 4), _sum(32, 32, 32, 4), _sum(32, 32, 64, 8)),
    # A decoding step: the bytes that one program may read although others idle, to save a second launch that combines.
    "decode": tuple(dict(bytes=1 << bits) for bits in (18, 16, 17, 19, 20)),
}


def configuration(entry: str, tensor: Tensor) -> Configuration:
    """The configuration of an entry for the device of tensor."""
    if entry in _overriding:
        return _overriding[entry]
    return _of_device(tensor.device)[entry]


def of_width(kernel: str, tensor: Tensor, regime: str = "") -> str:
    """The name of the entry of a kernel for the dtype of tensor."""
    return kernel + (" 16" if tensor.element_size() == 2 else "") + (f", {regime}" if regime else "")


@contextmanager
def overriding(entry: str, chosen: Configuration) -> Iterator[None]:
    """Uses the chosen configuration for an entry on all devices: for tuning and tests."""
    _overriding[entry] = chosen
    try:
        yield
    finally:
        del _overriding[entry]


_overriding: dict[str, Configuration] = {}


def device_name(device: torch.device) -> str:
    """The name of a device in the tables."""
    if device.type in ("cuda", "xpu"):
        name: str = getattr(torch, device.type).get_device_name(device)
        return name
    return device.type  # Triton's interpreter


def path() -> Path:
    """The user's own table."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser(
        "~/.cache"
    )  # without a home directory, "~" is not expanded
    return Path(cache) / "attn_kernels" / "configurations.json"


def write(name: str, chosen: Mapping[str, Configuration], file: Path) -> None:
    """Writes the entries of a device to a table and keeps those of other devices. The file is replaced atomically."""
    table = _read(file) | {name: {entry: dict(values) for entry, values in chosen.items()}}
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        unfinished.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def table_of(name: str, file: Path) -> dict[str, Configuration]:
    """The complete table of a device. An entry of a file is used only if it is a candidate: no others are tested."""
    table = {entry: candidates[0] for entry, candidates in CANDIDATES.items()}
    try:
        own = _read(file).get(name, {})
        unknown = [entry for entry, chosen in own.items() if chosen not in CANDIDATES.get(entry, ())]
    except (AttributeError, ValueError) as error:
        warnings.warn(f"attn_kernels: {file} is not a table of configurations ({error})", stacklevel=2)
        return table
    if unknown:
        warnings.warn(f"attn_kernels: {file} is of another version: 'tune' again for {unknown}", stacklevel=2)
    return table | {entry: chosen for entry, chosen in own.items() if entry not in unknown}


@functools.cache
def _of_device(device: torch.device) -> dict[str, Configuration]:
    return table_of(device_name(device), path())


def _read(file: Path) -> dict[str, dict[str, Configuration]]:
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except OSError:  # there is no file or no home directory
        return {}
    if not isinstance(table, dict):
        raise ValueError("it holds no object")
    return table
