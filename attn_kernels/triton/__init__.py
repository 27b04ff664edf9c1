"""The Triton backend: importing it registers its kernels for the ops of ops.py.

They run on CUDA (NVIDIA, AMD) and XPU (Intel) devices, and on the CPU in Triton's interpreter (TRITON_INTERPRET=1).
"""

from .. import ops
from . import (
    additive_attention,
    dot_attention,
    gated_additive_attention,
    packed_attention,
    relu_attention,
    with_extra,
    with_options,
)
from .device import INTERPRETER

_KERNELS = {
    function.__name__: function
    for function in (
        additive_attention.additive_attention,
        additive_attention.additive_attention_backward,
        additive_attention.additive_scores,
        additive_attention.additive_scores_backward,
        relu_attention.relu_attention,
        relu_attention.relu_attention_backward,
        relu_attention.relu_scores,
        relu_attention.relu_scores_backward,
        gated_additive_attention.gated_additive_scores,
        gated_additive_attention.gated_additive_scores_backward,
        dot_attention.dot_attention,
        dot_attention.dot_attention_backward,
    )
}
for _op, _kernel in {
    **_KERNELS,
    **with_options.KERNELS,
    **with_extra.KERNELS,
    **packed_attention.KERNELS,
}.items():
    for _key in ("CUDA", "XPU", "CPU") if INTERPRETER.value else ("CUDA", "XPU"):
        ops.library.impl(f"{_op}.triton", _kernel, _key)
