"""The Triton backend: importing it registers its kernels for the ops of ops.py.

They run on CUDA (NVIDIA, AMD) and XPU (Intel) devices, and on the CPU in Triton's interpreter (TRITON_INTERPRET=1).
"""

from .. import ops
from . import attention, packed_attention
from .device import INTERPRETER

for _op, _kernel in {**attention.KERNELS, **packed_attention.KERNELS}.items():
    for _key in ("CUDA", "XPU", "CPU") if INTERPRETER.value else ("CUDA", "XPU"):
        ops.library.impl(f"{_op}.triton", _kernel, _key)
