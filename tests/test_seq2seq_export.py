"""Seq2Seq as exported programs: equal hypotheses from torch.export, ONNX and AOTInductor; errors with reasons."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_kernels.mechanisms import NormalizedAttention, monotonic_alignments
from attn_kernels.seq2seq import Encoder, Seq2Seq, export
from attn_kernels.seq2seq.attentions import STATEFUL, STATELESS
from matrix import slow_if
from sentences import SOURCE, TARGET

SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": dict(beam_size=4, num_hypotheses=3, length_penalty=0.6, coverage_penalty=0.2),
}


def model_of(attention: str = "bahdanau", dtype: torch.dtype = torch.float64, **options: Any) -> Seq2Seq:
    """Untrained, with outputs of different lengths."""
    torch.manual_seed(0)
    model = Seq2Seq(SOURCE, TARGET, 6, 8, 7, attention=attention, dropout=0.3, dtype=dtype, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    return model


def sentences(lengths: tuple[int, ...] = (9, 1, 0, 5, 8)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, SOURCE, (len(lengths), max(max(lengths), 1)), generator=generator), torch.tensor(lengths)


def check_searches(model: Seq2Seq, exported: export.ExportedSeq2Seq, rtol: float = 1e-9) -> None:
    for name, options in SEARCHES.items():
        for source, lengths in (sentences(), sentences((1,)), sentences((4,))):
            expected = model.generate(source, lengths, max_length=10, **options)
            found = exported.generate(source, lengths, max_length=10, **options)
            for of_one, others in zip(found, expected, strict=True):
                assert [h.tokens for h in of_one] == [h.tokens for h in others], name
                for ours, theirs in zip(of_one, others, strict=True):
                    assert ours.score == pytest.approx(theirs.score, rel=rtol)
                    torch.testing.assert_close(ours.alignments, theirs.alignments, rtol=rtol, atol=rtol)


@pytest.fixture(scope="module")
def model() -> Seq2Seq:
    return model_of()


@pytest.fixture(scope="module")
def programs(model: Seq2Seq) -> export.Programs:
    assert model.training
    return export.export_programs(model)


# Those whose steps are not made of the same parts as another's.
DISTINCT = (
    "luong-dot",
    "cosine",
    "location-cumulative",
    "forward-agent",
    "mocha",
    "local-p",
    "gmm",
    "dynamic-convolution",
)


@pytest.mark.slow
@pytest.mark.left_out_if(lambda attention: attention not in DISTINCT)
@pytest.mark.parametrize("attention", [*STATELESS, *STATEFUL])
def test_every_attention_finds_the_same(attention: str) -> None:
    kind: dict[str, Any] = {"gmm": dict(input_feeding=False), "luong-dot": dict(cell="gru", num_layers=2)}
    model = model_of(attention, **kind.get(attention, {}))
    check_searches(model, export.ExportedSeq2Seq.from_programs(export.export_programs(model)))


def test_the_same_hypotheses(model: Seq2Seq, programs: export.Programs) -> None:
    check_searches(model, export.ExportedSeq2Seq.from_programs(programs))


def test_the_model_stays_as_it_is(model: Seq2Seq, programs: export.Programs) -> None:
    assert all(module.training for module in model.modules())
    assert model.decoder.attention.backend is None
    assert programs.state == ("hidden.0", "cell.0", "feed") and (programs.bos, programs.eos) == (1, 2)


def test_saved_and_loaded(model: Seq2Seq, programs: export.Programs, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    export.save_exported(programs, folder)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "encoder.pt2", "step.pt2"]
    check_searches(model, export.load_exported(folder))


def test_another_sentence_of_the_batch_changes_nothing(programs: export.Programs) -> None:
    exported = export.ExportedSeq2Seq.from_programs(programs)
    source, lengths = sentences((3, 7))
    memory, state = exported.encode(source, lengths)
    alone, first = exported.encode(source[:1, :3], lengths[:1])
    torch.testing.assert_close(memory.keys[:1, :3], alone.keys, rtol=1e-12, atol=1e-12)
    for x, y in zip(state.tensors, first.tensors, strict=True):
        torch.testing.assert_close(x[:1], y, rtol=1e-12, atol=1e-12)


def test_sampling(model: Seq2Seq, programs: export.Programs) -> None:
    options: dict[str, Any] = dict(sample=True, num_hypotheses=3, temperature=0.7, max_length=6)
    source, lengths = sentences()
    expected = model.generate(source, lengths, generator=torch.Generator().manual_seed(5), **options)
    exported = export.ExportedSeq2Seq.from_programs(programs)
    found = exported.generate(source, lengths, generator=torch.Generator().manual_seed(5), **options)
    assert [[h.tokens for h in of_one] for of_one in found] == [[h.tokens for h in of_one] for of_one in expected]


@pytest.mark.long(20)
@slow_if(lambda attention: attention != "bahdanau")
@pytest.mark.parametrize("attention", ["bahdanau", "location", "mocha"])
@pytest.mark.filterwarnings("ignore")  # of the exporter, about itself
def test_onnx(attention: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    model = model_of(attention, torch.float32, num_layers=2)
    export.save_exported(export.export_programs(model), tmp_path, format="onnx")
    graph = onnx.load(tmp_path / "step.onnx").graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    assert [x.name for x in graph.input][:4] == ["tokens", "keys", "values", "memory_lengths"]
    assert [x.name for x in graph.output][:3] == ["logits", "alignments", "next.hidden.0"]
    check_searches(model, export.load_exported(tmp_path), rtol=1e-3)


@pytest.mark.long(50)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_aot_inductor(model: Seq2Seq, programs: export.Programs, tmp_path: Path) -> None:
    """With the ops of this package, which the compiled program calls."""
    export.save_exported(programs, tmp_path, format="aot-inductor")
    check_searches(model, export.load_exported(tmp_path))


@pytest.mark.slow
def test_reference_programs_need_no_attn_kernels(model: Seq2Seq, tmp_path: Path) -> None:
    export.save_exported(export.export_programs(model, backend="reference"), tmp_path)
    script = """
import sys, torch
encoder, step = (torch.export.load(f"{sys.argv[1]}/{name}.pt2").module() for name in ("encoder", "step"))
keys, values, lengths, *state = encoder(torch.full((1, 4), 5), torch.tensor([4]))
logits, *_ = step(torch.tensor([[1]]), keys, values, lengths, state)
assert "attn_kernels" not in sys.modules
print(logits.argmax().item())
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    hypothesis = model.generate(torch.full((1, 4), 5), torch.tensor([4]), max_length=1)[0][0]
    assert int(done.stdout) == (hypothesis.tokens or [model.eos])[0]


@slow_if(lambda cell: cell != "lstm")
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_an_encoder_alone(cell: str) -> None:
    """With first states, time-major, and NaN in the padding."""
    torch.manual_seed(2)
    encoder = Encoder(3, 4, 2, cell=cell, batch_first=False, bidirectional=True, dtype=torch.float64)
    sizes = {1: torch.export.Dim("batch")}, torch.export.Dim("steps")
    first = [torch.randn(4, 3, 4, dtype=torch.float64) for _ in range(2)]
    states: Any = tuple(first) if cell == "lstm" else first[0]
    lengths = torch.tensor([5, 0, 2])
    shapes = ({0: sizes[1], **sizes[0]}, {0: sizes[0][1]}, ({1: sizes[0][1]},) * 2 if cell == "lstm" else sizes[0])
    x = torch.randn(5, 3, 3, dtype=torch.float64)
    program = torch.export.export(encoder, (x, lengths, states), dynamic_shapes=shapes).module()
    padded = x.masked_fill((torch.arange(5)[:, None] >= lengths)[..., None], torch.nan)
    outputs, last = program(padded, lengths, states)
    expected, others = encoder(x, lengths, states)
    torch.testing.assert_close((outputs, last), (expected, others), rtol=1e-12, atol=1e-12)


def test_what_cannot_be_exported_is_said(model: Seq2Seq, programs: export.Programs, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"export_programs: model must be a Seq2Seq, got Linear"):
        export.export_programs(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"backend must be one of"):
        export.export_programs(model, backend="fastest")
    other = model_of()
    other.encoder.rnn = nn.Identity()
    with pytest.raises(
        ValueError, match=r"model\.encoder\.rnn must be an nn\.LSTM or nn\.GRU without .*, got Identity"
    ):
        export.export_programs(other)
    for other, change in ((model_of(), _watch), (model_of(), _double)):
        change(other.encoder)
        with pytest.raises(ValueError, match=r"nn\.LSTM or nn\.GRU without hooks, .* got one with other steps"):
            export.export_programs(other)
    with pytest.raises(ValueError, match=r"save_exported: format must be one of .*, got \['onnx'\]"):
        export.save_exported(programs, tmp_path, format=["onnx"])
    other = model_of()
    other.decoder.output = _Branching()
    with pytest.raises(RuntimeError, match=r"torch\.export cannot trace the step: .*data-dependent"):
        export.export_programs(other)
    with pytest.raises(ValueError, match=r"save_exported: format must be one of .*'onnx'.*, got 'tflite'"):
        export.save_exported(programs, tmp_path, format="tflite")
    with pytest.raises(TypeError, match=r"programs must be Programs, got Seq2Seq"):
        export.save_exported(model, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        export.load_exported(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"vocab": 3}))
    with pytest.raises(ValueError, match=r"is not a configuration file written by save_exported"):
        export.load_exported(tmp_path)


def _watch(encoder: Any) -> None:
    encoder.rnn.register_forward_hook(lambda *_: None)


def _double(encoder: Any) -> None:
    class Twice(nn.LSTM):
        def forward(self, *arguments: Any) -> Any:
            outputs, states = super().forward(*arguments)
            return 2 * outputs, states

    encoder.rnn.__class__ = Twice


def test_the_backend_of_a_mechanism_in_another() -> None:
    """A named backend is that of every part; bos, a token of the target, need not be one of the source."""
    model = Seq2Seq(5, TARGET, 6, 8, 7, bos=TARGET - 1)
    model.decoder.attention = NormalizedAttention(model.decoder.attention, "sigmoid")
    programs = export.export_programs(model, backend="reference")
    operators = {str(node.target).partition(".")[0] for node in programs.step.graph.nodes}
    assert "attn_kernels" not in operators
    assert model.decoder.attention.attention.backend is None


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 4, 5)])
def test_monotonic_alignments_of_any_axes(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    arguments = torch.rand(shape), torch.rand(shape)

    class Module(nn.Module):
        def forward(self, p: Tensor, previous: Tensor) -> Tensor:
            return monotonic_alignments(p, previous)

    program = torch.export.export(Module(), arguments)
    torch.testing.assert_close(program.module()(*arguments), monotonic_alignments(*arguments))


class _Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if bool(x.sum() > 0) else -x


def test_a_missing_package_is_named(programs: export.Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"save_exported: .*onnxscript: pip install 'attn_kernels\[onnx\]'"):
        export.save_exported(programs, tmp_path, format="onnx")
    assert not list(tmp_path.iterdir())


def test_arguments_of_an_exported_model(programs: export.Programs) -> None:
    exported = export.ExportedSeq2Seq.from_programs(programs)
    source, lengths = sentences()
    with pytest.raises(TypeError, match=r"source must be an int32 or int64 tensor, got torch\.float32"):
        exported.generate(source.float(), lengths)
    with pytest.raises(ValueError, match=r"source must have shape \(B, S\) with B and S >= 1, got \(0, 9\)"):
        exported.generate(source[:0], lengths[:0])
    with pytest.raises(ValueError, match=r"source_lengths must be in 0\.\.S = 0\.\.9, got 0\.\.10"):
        exported.generate(source, lengths + torch.tensor([1, 0, 0, 0, 0]))
    with pytest.raises(TypeError, match=r"has no option 'beams'"):
        exported.generate(source, lengths, beams=3)
    with pytest.raises(ValueError, match=r"num_hypotheses must be at most beam_size"):
        exported.generate(source, lengths, num_hypotheses=2)
