"""The ops of recurrent layers and of searches, which seq2seq calls on the CPU.

They are registered in the same library as the attention ops (ops.py). They have no autograd formula: some write to
their arguments, others run without gradients.
"""

from __future__ import annotations

import torch

from .ops import NAMESPACE, library

# lstm_step, gru_step --------------------------------------------------------------------------------------------------

# Steps of recurrent cells, which write to their arguments. The layers that call them are autograd functions themselves
# (formulas: seq2seq/fused/cell_steps.py). B rows, H units; rows are contiguous; float32 or float64.
for _name, _schema in (
    (
        "lstm_step",
        "(Tensor(a!) gates, Tensor cell, Tensor(b!) new_cell, Tensor(c!) tanh, Tensor(d!) hidden, Tensor(e!)? again)",
    ),
    (
        "lstm_step_backward",
        "(Tensor dhidden, Tensor gates, Tensor cell, Tensor tanh, Tensor(a!) dcell, Tensor(b!) dgates)",
    ),
    (
        "gru_step",
        "(Tensor(a!) gates, Tensor products, Tensor? bias, Tensor before, Tensor(b!) recurrent, Tensor(c!) hidden, "
        "Tensor(d!)? again)",
    ),
    (
        "gru_step_backward",
        "(Tensor dhidden, Tensor gates, Tensor before, Tensor recurrent, Tensor(a!) dbefore, Tensor(b!) dgates, "
        "Tensor(c!) dproducts)",
    ),
):
    library.define(f"{_name}.cpu{_schema} -> ()", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{NAMESPACE}::{_name}.cpu", lambda *_: None, lib=library)

# One direction of a layer over few sentences; seq2seq/fused/few_sentences.py calls it without gradients. gates: (B, S,
# G), without the products with states. weight: (G, H). bias: of these products, for a GRU. The states, (B, H), are
# overwritten with those after the last step of each sentence. This op and the ops below have no fake kernels.
library.define(
    "recurrent_steps.cpu(Tensor gates, Tensor weight, Tensor? bias, Tensor lengths, bool reverse, Tensor(a!) hidden, "
    "Tensor(b!)? cell, Tensor(c!) out) -> ()"
)

# decoder_search -------------------------------------------------------------------------------------------------------

# A weight (n, k) in float32, rounded to bfloat16, in the layout that products of few rows read: see csrc/decode.h.
library.define("rounded_blocks.cpu(Tensor weight) -> Tensor")

# All steps of a greedy or beam search with a decoder of seq2seq. seq2seq/fused/one_call.py calls it, on plain tensors
# and without gradients. blocks: none, or rounded_blocks of each weight in the order layers (two each), of_token, query,
# of_context, of_state, output; an empty tensor for None. It has no fake kernel: the number of steps depends on values,
# and the op is never traced.
library.define(
    "decoder_search.cpu(Tensor[] layers, Tensor embedding, Tensor of_token, Tensor? query, float query_factor, "
    "float query_eps, Tensor? of_context, Tensor of_state, Tensor output, Tensor? output_bias, Tensor keys, "
    "Tensor values, Tensor? v, Tensor? bias, Tensor? prepared, float scale, Tensor? memory_lengths, Tensor? mask, "
    "Tensor[] hidden, Tensor[] cell, Tensor? feed, int bos, int eos, int max_length, int beam_size, "
    "int num_hypotheses, float length_penalty, float coverage_penalty, bool early_stopping, int table_bytes, "
    "Tensor[] blocks) -> "
    "(Tensor tokens, Tensor lengths, Tensor scores, Tensor alignments)"
)
