"""g2p-fa 1.1.0: its model is an encoder and a decoder without attention, and nothing of it may be replaced."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("g2p_fa", reason="g2p-fa is not installed: see tests/peers/requirements.txt")

from g2p_fa.hparams import hparams
from g2p_fa.model import Decoder, Encoder, Seq2Seq

from attn_kernels import patch, unpatch


def test_nothing_is_replaced():
    torch.manual_seed(0)
    sizes = hparams["HID_DIM"], hparams["N_LAYERS"]
    encoder = Encoder(hparams["INPUT_DIM"], hparams["ENC_EMB_DIM"], *sizes, hparams["ENC_DROPOUT"])
    decoder = Decoder(hparams["OUTPUT_DIM"], hparams["DEC_EMB_DIM"], *sizes, hparams["DEC_DROPOUT"])
    model = Seq2Seq(encoder, decoder, torch.device("cpu")).eval()
    original = copy.deepcopy(model)
    report = patch(model)
    assert report.replaced == report.skipped == report.fallbacks == []
    assert str(report) == "attn_kernels.patch: nothing in this model looks like attention"
    assert [type(module) for module in model.modules()] == [type(module) for module in original.modules()]
    source, target = (torch.randint(1, hparams[name], (7, 3)) for name in ("INPUT_DIM", "OUTPUT_DIM"))
    assert torch.equal(model(source, target, 0.0), original(source, target, 0.0))
    assert unpatch(model) == []
