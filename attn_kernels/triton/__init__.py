"""The Triton backend: importing it registers its kernels for the ops of ops.py.

They run on CUDA (NVIDIA, AMD) and XPU (Intel) devices, and on the CPU in Triton's interpreter (TRITON_INTERPRET=1).
"""

from .. import ops
from . import additive_attention, dot_attention, relu_attention, with_options
from .device import INTERPRETER

for _function in (
    additive_attention.additive_attention,
    additive_attention.additive_attention_backward,
    additive_attention.additive_scores,
    additive_attention.additive_scores_backward,
    relu_attention.relu_attention,
    relu_attention.relu_attention_backward,
    relu_attention.relu_scores,
    relu_attention.relu_scores_backward,
    dot_attention.dot_attention,
    dot_attention.dot_attention_backward,
    with_options.additive_attention_with_options,
    with_options.additive_attention_with_options_backward,
    with_options.relu_attention_with_options,
    with_options.relu_attention_with_options_backward,
    with_options.dot_attention_with_options,
    with_options.dot_attention_with_options_backward,
):
    for _key in ("CUDA", "XPU", "CPU") if INTERPRETER.value else ("CUDA", "XPU"):
        ops.library.impl(f"{_function.__name__}.triton", _function, _key)
