"""save_pretrained and from_pretrained of Seq2Seq, in local folders."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import attn_kernels
from sentences import SOURCE, TARGET

hub: Any = None
SIZES: dict[str, Any] = dict(embedding_size=5, hidden_size=6, units=7)


@pytest.fixture(autouse=True)
def packages() -> None:
    global hub
    for package in ("huggingface_hub", "safetensors"):
        pytest.importorskip(package, reason="the extra hub")
    hub = importlib.import_module("attn_kernels.seq2seq.hub")


def model_of(attention: str = "bahdanau", **options: Any) -> Any:
    torch.manual_seed(0)
    return hub.PretrainedSeq2Seq(SOURCE, TARGET, **SIZES, attention=attention, **options)


def test_numbers_of_numpy_are_kept(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    given = {"source_vocab": numpy.int64(9), "target_vocab": 9, "eos": numpy.int64(5), "dropout": numpy.float32(0.125)}
    hub.PretrainedSeq2Seq(**given, input_feeding=False).save_pretrained(tmp_path)
    loaded = hub.PretrainedSeq2Seq.from_pretrained(tmp_path)
    assert (loaded.eos, loaded.decoder.dropout.p, loaded.decoder.input_feeding) == (5, 0.125, False)


def test_attention_is_a_name() -> None:
    """A configuration would leave a module out, and what is loaded have another attention."""
    with pytest.raises(TypeError, match=r"^PretrainedSeq2Seq: attention must be a name.*got BahdanauAttention"):
        model_of(attn_kernels.BahdanauAttention(6, 12, 7))


@pytest.mark.parametrize("attention", ["bahdanau", "location", "luong-dot"])
def test_saved_and_loaded(attention: str, tmp_path: Path) -> None:
    model = model_of(attention, cell="gru", num_layers=2, dropout=0.2, input_feeding=False, eos=5)
    model.save_pretrained(tmp_path / "new" / "model")
    loaded = hub.PretrainedSeq2Seq.from_pretrained(tmp_path / "new" / "model")
    assert not loaded.training
    assert (loaded.eos, loaded.decoder.dropout.p, loaded.decoder.input_feeding) == (5, 0.2, False)
    weights = loaded.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    source, lengths = torch.randint(3, SOURCE, (3, 6)), torch.tensor([6, 2, 0])
    expected = model.generate(source, lengths, beam_size=3, max_length=7)
    found = loaded.generate(source, lengths, beam_size=3, max_length=7)
    assert [[h.tokens for h in of_one] for of_one in found] == [[h.tokens for h in of_one] for of_one in expected]


def test_the_files(tmp_path: Path) -> None:
    """The configuration names the model and no machine; a model card that was written by hand stays."""
    (tmp_path / "README.md").write_text("mine")
    model_of("coverage", backend="reference", cuda_graph=False, device="cpu").save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert (tmp_path / "README.md").read_text() == "mine"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["attention"] == "coverage" and config["source_vocab"] == SOURCE and config["dtype"] == "float32"
    assert config.keys().isdisjoint({"backend", "cuda_graph", "decoder", "device"})
    assert hub.PretrainedSeq2Seq.from_pretrained(tmp_path).decoder.attention.backend is None
    assert hub.PretrainedSeq2Seq.from_pretrained(tmp_path, backend="reference").decoder.attention.backend == "reference"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_dtype_stays(dtype: torch.dtype, tmp_path: Path) -> None:
    model_of(dtype=torch.float32).to(dtype).save_pretrained(tmp_path)
    assert {x.dtype for x in hub.PretrainedSeq2Seq.from_pretrained(tmp_path).parameters()} == {dtype}
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "nn"}))
    with pytest.raises(ValueError, match=r"PretrainedSeq2Seq: dtype must be the name of a dtype of torch, got 'nn'"):
        hub.PretrainedSeq2Seq.from_pretrained(tmp_path)


def test_saving_that_fails_leaves_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    model.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_model", full)
    torch.nn.init.zeros_(model.decoder.output.weight)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_weights_of_another_model_are_an_error(tmp_path: Path) -> None:
    model_of("bahdanau").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "attention": "bahdanau-normalized"}))
    with pytest.raises(RuntimeError, match=r"Missing key.*decoder\.attention\.g"):
        hub.PretrainedSeq2Seq.from_pretrained(tmp_path)


@pytest.mark.parametrize("package", ["huggingface_hub", "safetensors"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "safetensors.torch", raising=False)
    monkeypatch.delitem(sys.modules, "attn_kernels.seq2seq.hub")
    with pytest.raises(ImportError, match=rf"hub needs the package {package}.*: pip install 'attn_kernels\[hub\]'"):
        importlib.import_module("attn_kernels.seq2seq.hub")
