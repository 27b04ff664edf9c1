"""Values of the loop's attention, multiplied with the weight that reads the context: results and gradients stay."""

from __future__ import annotations

import pytest
import torch

import formulas
from attn_kernels import Memory
from attn_kernels.seq2seq import Seq2Seq
from attn_kernels.seq2seq.fused import sequence
from sentences import SOURCE, TARGET, Batch, random_batch, run


def make(attention: str) -> tuple[Seq2Seq, Batch]:
    torch.manual_seed(0)
    model = Seq2Seq(SOURCE, TARGET, 5, 6, 7, attention=attention, dtype=torch.float64)
    return model, random_batch(torch.tensor([9, 4, 0, 1]), 9, 7, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("attention", ["bahdanau", "luong-dot", "cosine", "location-cumulative"])
def test_results_and_gradients(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = make(attention)
    results = []
    for projects in (True, False):
        monkeypatch.setattr(sequence, "gains", lambda _, projects=projects: projects)
        results.append(run(model, data))
        model.zero_grad()
    formulas.assert_same(*results, atol=1e-12, rtol=1e-9)


def test_padding_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values in the padding and behind the mask are not read, in the backward neither."""
    model, (source, lengths, target) = make("bahdanau")
    mask = torch.rand(4, 9, generator=torch.Generator().manual_seed(2)) > 0.3
    monkeypatch.setattr(sequence, "gains", lambda _: True)
    found = []
    for fill in (0.0, torch.nan):
        memory, state = model.encode(source, lengths)
        unread = ~(mask & (torch.arange(9) < lengths[:, None]))[..., None]
        values = memory.values.detach().masked_fill(unread, fill).requires_grad_()
        logits, _ = model.decoder(target, state, Memory(memory.keys, values, memory.memory_lengths, mask))
        logits.square().sum().backward()
        found.append({name: x.grad for name, x in model.named_parameters() if x.grad is not None})
        found[-1] |= {"values": values.grad, "logits": logits.detach()}
        model.zero_grad()
    formulas.assert_same(*found, atol=1e-12, rtol=1e-9)
    assert found[1]["decoder.attentional.weight"].any()
