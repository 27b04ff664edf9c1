"""The adapters of Tacotron 2, coqui-tts, SpeechBrain and Keras, on classes written like theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_kernels import patch
from steps import compare, stand_in

pytestmark = pytest.mark.usefixtures("at_any_size")

Q, M, A, D = 6, 7, 9, 4  # of the state, the memory, the hidden layer, the output


class LinearNorm(nn.Module):
    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.linear_layer = nn.Linear(inputs, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_layer(x)


class Location(nn.Module):
    """Features of two rows of alignments."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.dense = nn.Conv1d(2, 3, 5, padding=2, bias=False), nn.Linear(3, A, bias=False)

    def forward(self, both: Tensor) -> Tensor:
        return self.dense(self.conv(both).transpose(1, 2))


class Tacotron(nn.Module):
    score_mask_value = -float("inf")

    def __init__(self) -> None:
        super().__init__()
        self.query_layer, self.memory_layer, self.v = LinearNorm(Q, A), LinearNorm(M, A), LinearNorm(A, 1)
        self.location_layer = Location()

    def forward(self, state: Tensor, memory: Tensor, processed: Tensor, both: Tensor, mask: Tensor | None) -> Any:
        hidden = self.query_layer(state)[:, None] + self.location_layer(both) + processed
        scores = self.v(hidden.tanh()).squeeze(2)
        if mask is not None:
            scores = scores.masked_fill(mask, -torch.inf)
        alignments = scores.softmax(1)
        return (alignments[:, None] @ memory)[:, 0], alignments


def tacotron_steps(module: nn.Module, memory: Tensor, states: Tensor, padding: Tensor | None = None) -> list[Tensor]:
    processed, total, results = module.memory_layer(memory), memory.new_zeros(memory.shape[:2]), []
    alignments = total
    for state in states:
        context, alignments = module(state, memory, processed, torch.stack([alignments, total], 1), padding)
        total = total + alignments
        results += [context, alignments]
    return results


class Coqui(nn.Module):
    _mask_value = -float("inf")

    def __init__(self, norm: str = "softmax", forward_attn: bool = False, location_attention: bool = True) -> None:
        super().__init__()
        self.query_layer, self.inputs_layer, self.v = LinearNorm(Q, A), LinearNorm(M, A), LinearNorm(A, 1, bias=True)
        self.location_layer = Location()
        self.norm, self.forward_attn, self.location_attention = norm, forward_attn, location_attention
        self.windowing = self.trans_agent = False

    def update_location_attention(self, alignments: Tensor) -> None:
        self.attention_weights_cum = self.attention_weights_cum + alignments

    def apply_forward_attention(self, alignments: Tensor) -> Tensor:
        moved = (self.alpha + self.alpha.roll(1, 1)) * alignments
        return moved / moved.sum(1, keepdim=True)

    def forward(self, query: Tensor, inputs: Tensor, processed: Tensor, mask: Tensor | None) -> Tensor:
        hidden = self.query_layer(query)[:, None] + processed
        if self.location_attention:
            hidden = hidden + self.location_layer(torch.stack([self.attention_weights, self.attention_weights_cum], 1))
        scores = self.v(hidden.tanh()).squeeze(2)
        if mask is not None:
            scores = scores.masked_fill(~mask, self._mask_value)
        alignments = scores.softmax(1)
        if self.norm == "sigmoid":
            alignments = scores.sigmoid() / scores.sigmoid().sum(1, keepdim=True)
        if self.location_attention:
            self.update_location_attention(alignments)
        if self.forward_attn:
            self.alpha = alignments = self.apply_forward_attention(alignments)
        self.attention_weights = alignments
        return (alignments[:, None] @ inputs)[:, 0]


def coqui_steps(module: nn.Module, memory: Tensor, states: Tensor, padding: Tensor | None = None) -> list[Tensor]:
    module.attention_weights = module.attention_weights_cum = memory.new_zeros(memory.shape[:2])
    module.alpha = torch.full_like(module.attention_weights, 0.5)
    processed, results = module.inputs_layer(memory), []
    for state in states:
        results += [module(state, memory, processed, None if padding is None else ~padding), module.attention_weights]
    return results


class Brain(nn.Module):
    def __init__(self, scaling: float = 1.5) -> None:
        super().__init__()
        self.mlp_enc, self.mlp_dec = nn.Linear(M, A), nn.Linear(Q, A)
        self.mlp_attn, self.mlp_out = nn.Linear(A, 1, bias=False), nn.Linear(M, D)
        self.scaling = scaling
        self.reset()

    def reset(self) -> None:
        self.precomputed_enc_h = self.mask = None

    def forward(self, memory: Tensor, lengths: Tensor, state: Tensor) -> Any:
        if self.precomputed_enc_h is None:
            self.precomputed_enc_h, self.mask = self.mlp_enc(memory), length_to_mask(lengths, memory.shape[1], None)
        scores = self.mlp_attn(torch.tanh(self.precomputed_enc_h + self.mlp_dec(state)[:, None])).squeeze(2)
        alignments = (self.scaling * scores.masked_fill(self.mask == 0, -torch.inf)).softmax(1)
        return self.mlp_out((alignments[:, None] @ memory)[:, 0]), alignments


def length_to_mask(lengths: Tensor, max_len: int, device: Any) -> Tensor:
    return (torch.arange(max_len) < lengths[:, None]).to(lengths.dtype)


def brain_steps(module: nn.Module, memory: Tensor, states: Tensor, padding: Tensor | None = None) -> list[Tensor]:
    lengths = torch.full((len(memory),), memory.shape[1]) if padding is None else (~padding).sum(1)
    results = []
    for _ in range(2):
        module.reset()
        for state in states:
            results += module(memory, lengths.to(memory.dtype), state)
    return results


class Layer(nn.Module):
    """Keras's: what it computes is in ``call``; a layer is called with lists."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(M))
        self.scale = type("Variable", (), {"value": property(lambda _: self.weight)})()
        self.use_scale, self.dropout = True, 0.0

    def _validate_inputs(self, inputs: Any, mask: Any = None) -> None:
        if not isinstance(inputs, list):
            raise ValueError("it must be called on a list")

    def forward(self, inputs: Any, **options: Any) -> Any:
        return self.call(inputs, **options)

    def call(
        self, inputs: Any, mask: Any = None, training: bool = False, return_attention_scores: bool = False, *_: Any
    ) -> Any:
        self._validate_inputs(inputs, mask)
        query, values = inputs
        scores = (self.weight * torch.tanh(query[:, :, None] + values[:, None])).sum(3)
        if mask is not None:
            scores = torch.where(mask[1][:, None], scores, scores - 1e9)
        alignments = scores.softmax(2)
        return (alignments @ values, alignments) if return_attention_scores else alignments @ values


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "tacotron2.model:Attention", Tacotron)
    stand_in(monkeypatch, "TTS.tts.layers.tacotron.attentions:OriginalAttention", Coqui)
    stand_in(monkeypatch, "speechbrain.nnet.attention:ContentBasedAttention", Brain)
    stand_in(monkeypatch, "keras.src.layers.attention.additive_attention:AdditiveAttention", Layer)
    import speechbrain.nnet.attention as brain

    monkeypatch.setattr(brain, "length_to_mask", length_to_mask, raising=False)


def inputs(masked: bool, empty: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(0)
    given = {"memory": torch.randn(3, 11, M).double(), "states": torch.randn(4, 3, Q).double()}
    if masked:
        given["padding"] = torch.arange(11) >= torch.tensor([11, 4, 0 if empty else 1])[:, None]
    return given


CASES = {
    "Tacotron 2": (Tacotron, tacotron_steps),
    "coqui-tts": (Coqui, coqui_steps),
    "coqui-tts, forward": (lambda: Coqui(forward_attn=True), coqui_steps),
    "coqui-tts, no location": (lambda: Coqui(location_attention=False), coqui_steps),
    "SpeechBrain": (Brain, brain_steps),
}
cases = pytest.mark.parametrize("case", CASES)


@cases
@pytest.mark.parametrize("masked", [False, True])
def test_decoding(case: str, masked: bool) -> None:
    make, steps = CASES[case]
    assert compare(make(), steps, inputs(masked)) == []


@cases
def test_a_sentence_that_is_all_padding(case: str) -> None:
    make, steps = CASES[case]
    assert compare(make(), steps, inputs(True, empty=True)) == ["a row with nothing to attend"]


def test_another_norm_falls_through() -> None:
    assert compare(Coqui(norm="sigmoid"), coqui_steps, inputs(False)) == ["a norm other than softmax"]


@pytest.mark.parametrize("masked", [False, True])
def test_a_layer_of_keras(masked: bool) -> None:
    torch.manual_seed(0)
    layer, given = Layer(), [torch.randn(2, 3, M), torch.randn(2, 5, M)]
    options: dict[str, Any] = {"return_attention_scores": True}
    if masked:
        options["mask"] = [None, torch.arange(5) < torch.tensor([5, 2])[:, None]]
    expected = layer(given, **options)
    report = patch(layer)
    for got, right in zip(layer(given, **options), expected, strict=True):
        torch.testing.assert_close(got, right)
    assert len(report.replaced) == 1 and report.fallbacks == []
    with pytest.raises(ValueError, match="it must be called on a list"):
        layer(given[0])
