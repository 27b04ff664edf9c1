"""Whether tensors have the values that they had in an earlier call, by checksums.

Nothing tells of every write to a tensor: autograd's version counter misses ``x.data.copy_(y)``, arrays of NumPy that
share the storage, and ``x.data = y``; the address misses writes in place. So values that a result depends on are
compared with what they are now, by checksums of 64 bits, which takes about a fifteenth of the time of a linear layer
over them.
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

    On the CPU only: reading those of a GPU would wait for it. And not in ``torch.compile``, where what is kept would be
    a constant of the graph.
    """
    return source.is_cpu and not is_compiling()


def are_readable(*tensors: Tensor | None) -> bool:
    """Whether there are values to compare: of tensors in main memory, of no subclass, outside of transforms."""
    if _checksums is None or torch._C._are_functorch_transforms_active():
        return False
    for tensor in tensors:
        if tensor is not None and not (
            is_cacheable(tensor) and type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        ):
            return False
    return True


def value_of(tensor: Tensor | None) -> Any:
    """Differs if a tensor has other values, another shape, dtype or ``requires_grad``."""
    if tensor is None:
        return None
    return tensor.shape, tensor.dtype, tensor.requires_grad, checksums(tensor, 1)


def checksums(tensor: Tensor, pieces: int) -> Any:
    """64 bits for each of so many equal pieces along the first axis; for tensors that are readable."""
    if not tensor.is_contiguous():
        tensor = tensor.detach().contiguous()
    return _checksums(tensor.data_ptr(), tensor.nbytes // pieces if pieces else 0, pieces)


def current_modes() -> tuple[Any, ...]:
    """The modes under which the same values give another result."""
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast
