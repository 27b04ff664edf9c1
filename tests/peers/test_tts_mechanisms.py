"""coqui-tts 0.28.0: its attentions against our modules with its weights."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from coqui import attentions

from attn_kernels.mechanisms import (
    DynamicConvolutionAttention,
    ForwardAttention,
    GMMAttention,
    LocationSensitiveAttention,
)

SQRT_2_PI = math.sqrt(2 * math.pi)

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


def test_mixtures() -> None:
    """Weights, widths and means of GravesAttention are those of version 2. What it makes of them is its own.

    It has differences of 1 / (1 + sigmoid) where a mixture of Gaussians has their density: both are made here of the
    parameters that its layers give.
    """
    torch.manual_seed(0)
    theirs = attentions.GravesAttention(6, 4).double().eval()
    ours = GMMAttention(6, 7, None, 4, version=2, dtype=torch.float64)
    last = theirs.N_a[2]
    with torch.no_grad():
        last.weight.mul_(5.0)
        last.bias[4:8].sub_(9.0)  # widths of about 1, where those of its first steps of training are 10
    weight, sigma, delta = last.weight.detach().split(4)
    biases = last.bias.detach().split(4)
    ours.load_state_dict(
        {
            "mixture.weight": torch.cat([weight, delta, sigma]),
            "mixture.bias": torch.cat([biases[0], biases[2], biases[1]]),
        }
    )
    outputs = torch.randn(3, 9, 7, dtype=torch.float64)
    memory = ours.memory(outputs)
    state = ours.initial_state(memory)
    theirs.init_states(outputs)
    theirs.mu_prev = theirs.mu_prev.double()
    for query in torch.randn(5, 3, 6, dtype=torch.float64):
        theirs(query, outputs, None, None)
        context, alignments, state = ours(torch.relu(theirs.N_a[0](query)), memory, state)
        torch.testing.assert_close(state.means[:, 0], theirs.mu_prev)
        made = theirs.N_a(query).view(3, 3, 4)
        shares, widths = torch.softmax(made[:, 0], -1), torch.nn.functional.softplus(made[:, 1])
        for b, j in itertools.product(range(3), range(9)):
            own, density = 0.0, 0.0
            for share, width, mean in zip(shares[b], widths[b], theirs.mu_prev[b], strict=True):
                rises = [1 / (1 + torch.sigmoid((mean - (j + x)) / (width + 1e-5))) for x in (0.5, 1.5)]
                own = own + (share + 1e-5) * (rises[1] - rises[0])
                density = density + share * torch.exp(-((j + 1 - mean) ** 2) / (2 * width**2)) / (width * SQRT_2_PI)
            torch.testing.assert_close(theirs.attention_weights[b, j], own)
            torch.testing.assert_close(alignments[b, j], density)
        torch.testing.assert_close(context, (alignments[:, None] @ outputs)[:, 0])


ADDITIVE = {
    "query_projection.weight": "query_layer.linear_layer.weight",
    "memory_projection.weight": "inputs_layer.linear_layer.weight",
}
LOCATION = {
    "location_convolution.weight": "location_layer.location_conv1d.weight",
    "location_projection.weight": "location_layer.location_dense.linear_layer.weight",
}
AGENT = {"transition.weight": "ta.weight", "transition.bias": "ta.bias"}


@pytest.mark.parametrize("name", ["location", "forward", "agent"])
@pytest.mark.parametrize("masked", [False, True])
def test_original(name: str, masked: bool) -> None:
    """OriginalAttention: that of Tacotron 2, and forward attention.

    It adds 1e-8 to all alignments before, and divides by what is within reach: of four steps, 1e-6 or so.
    """
    torch.manual_seed(0)
    forward = name != "location"
    settings = {"windowing": False, "norm": "softmax", "forward_attn": forward, "forward_attn_mask": False}
    theirs = attentions.OriginalAttention(6, 7, 9, not forward, 4, 5, trans_agent=name == "agent", **settings).double()
    options = {"bias": False, "dtype": torch.float64}
    if forward:
        ours, names = ForwardAttention(6, 7, 9, name == "agent", **options), AGENT if name == "agent" else {}
    else:
        ours, names = LocationSensitiveAttention(6, 7, 9, 4, 5, cumulative=True, **options), LOCATION
    weights = theirs.state_dict()
    renamed = {mine: weights[of] for mine, of in (ADDITIVE | names).items()}
    ours.load_state_dict(renamed | {"v": weights["v.linear_layer.weight"][0]})
    outputs = torch.randn(3, 11, 7, dtype=torch.float64)
    lengths = torch.tensor([11, 6, 1]) if masked else None
    mask = torch.arange(11) < lengths[:, None] if masked else None
    memory = ours.memory(outputs, lengths)
    state = ours.initial_state(memory)
    theirs.init_states(outputs)
    for kept in ("attention_weights", "attention_weights_cum", "alpha", "u"):  # made in float32
        if hasattr(theirs, kept):
            setattr(theirs, kept, getattr(theirs, kept).double())
    if forward:  # not 1e-7 elsewhere
        theirs.alpha = theirs.alpha.round()
    tolerance = {"rtol": 0, "atol": 1e-5} if forward else {}
    for query in torch.randn(4, 3, 6, dtype=torch.float64):
        expected = theirs(query, outputs, theirs.preprocess_inputs(outputs), mask)
        context, alignments, state = ours(query, memory, state)
        torch.testing.assert_close(context, expected, **tolerance)
        torch.testing.assert_close(alignments, theirs.attention_weights, **tolerance)
