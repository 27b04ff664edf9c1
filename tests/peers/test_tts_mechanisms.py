"""coqui-tts 0.28.0: its attentions to positions against ours, with its weights."""

from __future__ import annotations

import pytest
import torch
from coqui import attentions

from attn_kernels.mechanisms import DynamicConvolutionAttention, GMMAttention

# Ours, theirs.
NAMES = {
    "filter_hidden.weight": "query_layer.weight",
    "filter_hidden.bias": "query_layer.bias",
    "filter_output.weight": "key_layer.weight",
    "static_projection": "static_filter_layer.weight",
    "dynamic_projection": "dynamic_filter_layer.weight",
    "bias": "dynamic_filter_layer.bias",
}


@pytest.mark.parametrize("masked", [False, True])
def test_dynamic_convolution(masked: bool) -> None:
    """With a mask: of the sentences that it leaves as they are. In the others its padding has a part in the softmax."""
    torch.manual_seed(0)
    theirs = attentions.MonotonicDynamicConvolutionAttention(6, 7, 9, 4, 5, 3, 7).double()
    with torch.no_grad():
        theirs.v.weight.mul_(5.0)
    ours = DynamicConvolutionAttention(6, 7, 9, 4, 5, 3, 7, dtype=torch.float64)
    weights = theirs.state_dict()
    ours.load_state_dict(
        {mine: weights[name] for mine, name in NAMES.items()}
        | {"static_filters": weights["static_filter_conv.weight"][:, 0], "v": weights["v.weight"][0]}
    )
    outputs = torch.randn(3, 15, 7, dtype=torch.float64)
    lengths = torch.tensor([15, 8, 15]) if masked else None
    mask = torch.arange(15) < lengths[:, None] if masked else None
    whole = torch.tensor([0, 2] if masked else [0, 1, 2])
    memory = ours.memory(outputs, lengths)
    state = ours.initial_state(memory)
    theirs.init_states(outputs)
    theirs.attention_weights = theirs.attention_weights.double()
    for _ in range(6):
        query = torch.randn(3, 6, dtype=torch.float64)
        expected = theirs(query, outputs, None, mask)
        context, alignments, state = ours(query, memory, state)
        # Its prior was made in float32.
        torch.testing.assert_close(context[whole], expected[whole], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(alignments[whole], theirs.attention_weights[whole], rtol=1e-5, atol=1e-7)


def test_mixtures_move_alike() -> None:
    """The means of GravesAttention are those of version 2. (What it makes of them is no Gaussian, but its own.)"""
    torch.manual_seed(0)
    theirs = attentions.GravesAttention(6, 4).eval()
    ours = GMMAttention(6, 7, None, 4, version=2)
    last = theirs.N_a[2]
    weight, sigma, delta = last.weight.detach().split(4)
    biases = last.bias.detach().split(4)
    ours.load_state_dict(
        {
            "mixture.weight": torch.cat([weight, delta, sigma]),
            "mixture.bias": torch.cat([biases[0], biases[2], biases[1]]),
        }
    )
    outputs = torch.randn(3, 9, 7)
    memory = ours.memory(outputs)
    state = ours.initial_state(memory)
    theirs.init_states(outputs)
    for query in torch.randn(5, 3, 6):
        theirs(query, outputs, None, None)
        _, _, state = ours(torch.relu(theirs.N_a[0](query)), memory, state)
        torch.testing.assert_close(state.means[:, 0], theirs.mu_prev)
