"""Export of a trained ``Seq2Seq`` as two programs: the encoder, and a step of the decoder.

Both are programs of tensors alone, in an order that their names tell: the encoder makes of source and lengths what
decoding starts from, (keys, values, memory_lengths, *state), and the step of tokens and all of these (logits,
alignments, *state after it). What lies between two steps, a search, is not in a program: a caller may search as it
likes, and ``ExportedSeq2Seq`` searches as ``Seq2Seq.generate`` does. exported.py runs programs, and knows their files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..backends import choose
from ..errors import ArgumentTypeError, ArgumentValueError
from ..memory import Memory
from .decoder import Decoder
from .evaluation import in_evaluation
from .exported import FORMATS, ExportedSeq2Seq, Programs, load_exported, save_exported
from .model import Seq2Seq
from .scanned import can_scan
from .state import DecoderState

__all__ = ["FORMATS", "ExportedSeq2Seq", "Programs", "export_programs", "load_exported", "save_exported"]

_BATCH, _STEPS, _HYPOTHESES = 3, 7, 2  # of the examples that are traced; sizes of a model may be the same


class _Encoder(nn.Module):
    def __init__(self, model: Seq2Seq) -> None:
        super().__init__()
        self.model = model

    def forward(self, source: Tensor, source_lengths: Tensor) -> tuple[Tensor, ...]:
        memory, state = self.model.encode(source, source_lengths)
        lengths = memory.memory_lengths
        assert lengths is not None  # source_lengths
        return memory.keys, memory.values, lengths, *_tensors(state).values()


class _Step(nn.Module):
    """state_type: of the attention's state, or None."""

    def __init__(self, decoder: Decoder, names: Sequence[str], state_type: Any) -> None:
        super().__init__()
        self.decoder = decoder
        self.names = tuple(names)
        self.state_type = state_type

    def forward(
        self, tokens: Tensor, keys: Tensor, values: Tensor, memory_lengths: Tensor, state: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        logits, alignments, after = self.decoder.step(tokens, self._state(state), Memory(keys, values, memory_lengths))
        return logits, alignments, *_tensors(after).values()

    def _state(self, tensors: Sequence[Tensor]) -> DecoderState:
        def of(kind: str) -> tuple[Tensor, ...]:
            return tuple(x for name, x in zip(self.names, tensors, strict=True) if name.partition(".")[0] == kind)

        attention = None if self.state_type is None else self.state_type(*of("attention"))
        return DecoderState(of("hidden"), of("cell"), (*of("feed"), None)[0], attention)


def _tensors(state: DecoderState) -> dict[str, Tensor]:
    """The tensors of a state by their names, in the order that programs have."""
    found = {f"hidden.{n}": x for n, x in enumerate(state.hidden)}
    found |= {f"cell.{n}": x for n, x in enumerate(state.cell)}
    if state.feed is not None:
        found["feed"] = state.feed
    if state.attention is not None:
        names = getattr(state.attention, "_fields", range(len(state.attention)))
        found |= {f"attention.{name}": x for name, x in zip(names, state.attention, strict=True)}
    return found


def export_programs(model: Seq2Seq, *, backend: str | None = None) -> Programs:
    """Exports the encoder and a decoding step of a trained model by ``torch.export``, in evaluation mode.

    Numbers of sentences, of source steps and of hypotheses are free, each at least 1; device and dtype are those of the
    model. The encoder is a scan over the steps, with the results of ``nn.LSTM`` and ``nn.GRU`` on packed
    sentences. Lengths are not checked by the programs; they must be 0..S.

    model: stays as it is, whatever its mode.
    backend: of the attention; None: the model's own. "cpu", "triton" and "cuda" leave the op of this package in the
        step, which is faster, and whoever loads the program has to import ``attn_kernels`` first. "reference" is plain
        PyTorch: such programs run where this package is not installed.

    Raises:
        TypeError: model is no Seq2Seq. ValueError: it is one that cannot be exported, or the backend cannot run.
        RuntimeError: ``torch.export`` cannot trace a part of it, such as a module of another class that was put in.
    """
    if not isinstance(model, Seq2Seq):
        raise ArgumentTypeError(f"export_programs: model must be a Seq2Seq, got {type(model).__name__}")
    rnn = getattr(model.encoder, "rnn", None)
    if not can_scan(rnn):
        got = "one with other steps" if isinstance(rnn, nn.LSTM | nn.GRU) else type(rnn).__name__
        expected = "an nn.LSTM or nn.GRU without hooks, pruning, a forward of its own and proj_size"
        raise ArgumentValueError(f"export_programs: model.encoder.rnn must be {expected}, got {got}")
    device = next(model.parameters()).device
    if backend is not None:
        choose(backend, device.type)
    model = in_evaluation(model, always=True)
    attention: Any = model.decoder.attention
    if backend is not None:
        choosing = [part for part in attention.modules() if "backend" in vars(part)]
        if not choosing:
            raise ArgumentValueError(f"export_programs: backend must be None with {type(attention).__name__}")
        for part in choosing:  # a mechanism may hold another one
            part.backend = backend
    source, longer = (torch.zeros(_BATCH, n, dtype=torch.int64, device=device) for n in (_STEPS, _STEPS + 1))
    with torch.no_grad():
        lengths = torch.full((_BATCH,), _STEPS, device=device)
        memory, state = model.encode(source, lengths)
        if not isinstance(memory, Memory) or memory.mask is not None or memory.memory_lengths is None:
            made = type(attention).__name__
            raise ArgumentValueError(f"export_programs: the memory must have lengths and no mask, got that of {made}")
        others = _tensors(model.encode(longer, lengths)[1])
        given = _tensors(state.reorder(lengths.new_zeros(_BATCH, _HYPOTHESES)))
        batch, steps, hypotheses = (torch.export.Dim(name) for name in ("batch", "steps", "hypotheses"))
        of_state = [
            {0: batch, 1: hypotheses}
            | {axis: steps for axis in range(2, x.dim()) if x.shape[axis] != others[name].shape[axis]}
            for name, x in given.items()
        ]
        of_memory = ({0: batch, 1: steps}, {0: batch, 1: steps}, {0: batch})
        encoder = _export("the encoder", _Encoder(model), (source, lengths), of_memory[1:])
        step = _export(
            "the step",
            _Step(model.decoder, list(given), None if state.attention is None else type(state.attention)),
            (
                torch.full((_BATCH, _HYPOTHESES), model.bos, device=device),
                memory.keys,
                memory.values,
                memory.memory_lengths,
                list(given.values()),
            ),
            ({0: batch, 1: hypotheses}, *of_memory, of_state),
        )
    return Programs(encoder, step, tuple(given), model.bos, model.eos)


def _export(part: str, module: nn.Module, arguments: tuple[Any, ...], shapes: tuple[Any, ...]) -> ExportedProgram:
    try:
        program = torch.export.export(module, arguments, dynamic_shapes=shapes)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise RuntimeError(f"export_programs: torch.export cannot trace {part}: {reason}") from error
    # What it notes beyond the equal sizes of the inputs is that sizes that are free are not 1, nor their products. No
    # operator depends on that, and sentences and hypotheses may be single ones.
    program._guards_code = []
    return program
