"""Checksums, to find out whether tensors still have the values of an earlier call.

Nothing detects every write to a tensor. Autograd's version counter misses ``x.data.copy_(y)``, writes through a NumPy
array that shares the storage, and ``x.data = y``; the address misses in-place writes. So the current values are
compared with the earlier ones by 64-bit checksums. That takes about a fifteenth of the time of a linear layer over the
same values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .backends import checksums as _find_checksums

_checksums = _find_checksums()  # None without the compiled module: then no tensor is readable


def is_cacheable(source: Any) -> bool:
    """Whether a tensor's values may be read in each call.

    Only on the CPU: reading values on a GPU would wait for the device. Not within ``torch.compile``, where a cached
    value would become a constant of the graph.
    """
    return source.is_cpu and not is_compiling()


def are_readable(*tensors: Tensor | None) -> bool:
    """Whether the values can be compared: plain tensors in main memory, not of a subclass, outside of transforms."""
    if _checksums is None or torch._C._are_functorch_transforms_active():
        return False
    for tensor in tensors:
        if tensor is not None and not (
            is_cacheable(tensor) and type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        ):
            return False
    return True


def value_of(tensor: Tensor | None) -> Any:
    """A key that differs if a tensor has other values, another shape, dtype or ``requires_grad``."""
    if tensor is None:
        return None
    return tensor.shape, tensor.dtype, tensor.requires_grad, checksums(tensor, 1)


def checksums(tensor: Tensor, pieces: int) -> Any:
    """A 64-bit checksum of each of ``pieces`` equal parts along the first axis. The tensor must be readable."""
    if not tensor.is_contiguous():
        tensor = tensor.detach().contiguous()
    return _checksums(tensor.data_ptr(), tensor.nbytes // pieces if pieces else 0, pieces)


def current_modes() -> tuple[Any, ...]:
    """The modes that may change a result for the same values."""
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast
