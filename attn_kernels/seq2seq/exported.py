"""Programs of a ``Seq2Seq`` that was exported: their files in three formats, and a search that runs them."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.export import ExportedProgram

from .. import ops
from ..backends import backends
from ..errors import ArgumentTypeError, ArgumentValueError
from ..mechanisms.stateful import reorder_state, select_state
from ..memory import Memory
from ..version import __version__
from .options import SearchOptions
from .recurrent import checked_lengths
from .search import Hypothesis, search

MEMORY = ("keys", "values", "memory_lengths")
FORMATS = {"torch.export": ".pt2", "onnx": ".onnx", "aot-inductor": ".pt2"}  # and the endings of their files
_CONFIG = "config.json"


class Programs(NamedTuple):
    r"""The result of :func:`export_programs`.

    encoder: a ``torch.export.ExportedProgram`` of source (B, S) and source_lengths (B,), int64. It returns keys
        (B, S, A), values (B, S, D), memory_lengths (B,) and the tensors of the first state, (B, 1, \*) each.
    step: one of tokens (B, K) int64, keys, values, memory_lengths and the tensors of a state, (B, K, \*) each, for K
        hypotheses of each sentence. It returns logits (B, K, vocab), alignments (B, K, S) and the next state.
    state: the names of the tensors of a state, in their order: "hidden.0" of the lowest layer, ..., "cell.0", ...,
        "feed" with input feeding, "attention.alignments" and the like of an attention that has a state.
    bos, eos: the tokens that begin and end an output.
    """

    encoder: ExportedProgram
    step: ExportedProgram
    state: tuple[str, ...]
    bos: int
    eos: int


class ExportedState(NamedTuple):
    r"""The tensors of a state, (B, K, \*) each, with what a search does to them."""

    tensors: tuple[Tensor, ...]

    def select(self, indices: Tensor) -> ExportedState:
        """The sentences at ``indices``, (n,)."""
        return ExportedState(select_state(self.tensors, indices))

    def reorder(self, hypotheses: Tensor) -> ExportedState:
        """For each sentence its hypotheses at ``hypotheses``, (B, n), each in 0..K-1; repeats are allowed."""
        return ExportedState(reorder_state(self.tensors, hypotheses))


class ExportedSeq2Seq:
    """Runs the searches of ``Seq2Seq`` with an exported encoder and step, without the model.

    Args:
        encoder: called with source (B, S) and source_lengths (B,), int64; returns keys, values, memory_lengths and the
            tensors of the first state, as :class:`Programs` says.
        step: called with tokens (B, K) int64, keys, values, memory_lengths and a list of the tensors of a state;
            returns logits, alignments and the tensors of the next state. Both may be programs in any runtime.
        bos, eos: the tokens that begin and end an output.
    """

    def __init__(
        self, encoder: Callable[..., Sequence[Tensor]], step: Callable[..., Sequence[Tensor]], *, bos: int, eos: int
    ) -> None:
        self.encoder = encoder
        self._step = step
        self.bos = bos
        self.eos = eos

    @classmethod
    def from_programs(cls, programs: Programs) -> ExportedSeq2Seq:
        """Runs programs of ``torch.export`` as they are, without a file."""
        return cls(programs.encoder.module(), programs.step.module(), bos=programs.bos, eos=programs.eos)

    def encode(self, source: Tensor, source_lengths: Tensor) -> tuple[Memory, ExportedState]:
        """The memory and first state. source: (B, S) int tokens, B and S at least 1. source_lengths: (B,) int, 0..S.

        Raises ValueError or TypeError where an argument does not fit.
        """
        if not isinstance(source, Tensor) or source.dtype not in (torch.int32, torch.int64):
            got = source.dtype if isinstance(source, Tensor) else type(source).__name__
            raise ArgumentTypeError(f"ExportedSeq2Seq: source must be an int32 or int64 tensor, got {got}")
        if source.dim() != 2 or 0 in source.shape:
            expected = "(B, S) with B and S >= 1"
            raise ArgumentValueError(f"ExportedSeq2Seq: source must have shape {expected}, got {tuple(source.shape)}")
        lengths = checked_lengths("ExportedSeq2Seq", "source_lengths", source_lengths, *source.shape)
        keys, values, memory_lengths, *state = self.encoder(source.long(), lengths.to(source.device))
        return Memory(keys, values, memory_lengths), ExportedState(tuple(state))

    def step(self, tokens: Tensor, state: ExportedState, memory: Memory) -> tuple[Tensor, Tensor, ExportedState]:
        """One step of K hypotheses per sentence; arguments and results as of ``Seq2Seq.decoder.step``."""
        of_memory = (memory.keys, memory.values, memory.memory_lengths)
        logits, alignments, *after = self._step(tokens, *of_memory, list(state.tensors))
        return logits, alignments, ExportedState(tuple(after))

    def generate(
        self, source: Tensor, source_lengths: Tensor, *, max_length: int = 64, **options: Any
    ) -> list[list[Hypothesis]]:
        """As ``Seq2Seq.generate``, with the same options by name and the same hypotheses.

        Raises ValueError or TypeError where an argument does not fit.
        """
        unknown = options.keys() - (set(SearchOptions._fields) - {"bos", "eos"})
        if unknown:
            raise ArgumentTypeError(f"ExportedSeq2Seq.generate: Seq2Seq.generate has no option {min(unknown)!r}")
        chosen = SearchOptions(self.bos, self.eos, max_length, **options).checked()
        with torch.no_grad():
            memory, state = self.encode(source, source_lengths)
            return search(self, memory, state, chosen)


def save_exported(programs: Programs, folder: str | os.PathLike[str], *, format: str = "torch.export") -> None:
    """Writes the two programs into a folder: ``encoder`` and ``step`` with the ending of the format, and config.json.

    programs: of :func:`export_programs`.
    folder: made where it does not exist. Each file appears when it is complete, the configuration last.
    format: "torch.export", which :func:`torch.export.load` reads. "onnx": in operators of ONNX alone, for which ops of
        this package become the formula of the reference; needs the package ``onnxscript``; for float32, float64 and
        float16, and at most 2 GB of weights. "aot-inductor": compiled for the device of the model and this kind of
        processor by AOTInductor, which needs a C++ compiler and takes about a minute; libtorch loads it, too.

    Raises ValueError or TypeError where an argument does not fit; ImportError, with the extra to install, where a
    package is missing.
    """
    _check_format("save_exported", format)
    if not isinstance(programs, Programs):
        raise ArgumentTypeError(f"save_exported: programs must be Programs, got {type(programs).__name__}")
    if format == "onnx":
        _import("onnxscript", "save_exported")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "format": format,
        "bos": programs.bos,
        "eos": programs.eos,
        "state": list(programs.state),
        "attn_kernels": __version__,
        "torch": torch.__version__,
    }
    inputs = {"encoder": ["source", "source_lengths"], "step": ["tokens", *MEMORY, *programs.state]}
    outputs = {
        "encoder": [*MEMORY, *programs.state],
        "step": ["logits", "alignments", *(f"next.{name}" for name in programs.state)],
    }
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as unfinished:
        for name in ("encoder", "step"):
            path = os.path.join(unfinished, name + FORMATS[format])
            _write(getattr(programs, name), path, format, inputs[name], outputs[name])
        with open(os.path.join(unfinished, _CONFIG), "w", encoding="utf-8") as file:
            json.dump(config, file, indent=2)
        for made in sorted(os.listdir(unfinished), key=lambda file: file == _CONFIG):
            os.replace(os.path.join(unfinished, made), folder / made)


def _write(program: ExportedProgram, path: str, format: str, inputs: list[str], outputs: list[str]) -> None:
    if format == "torch.export":
        torch.export.save(program, path)
    elif format == "onnx":
        torch.onnx.export(
            program,
            (),
            path,
            dynamo=True,
            verbose=False,
            input_names=inputs,
            output_names=outputs,
            external_data=False,
        )
    else:
        importlib.import_module("torch._inductor.lowering")  # which has the list
        ops.call_from_inductor()
        torch._inductor.aoti_compile_and_package(program, package_path=path)


def load_exported(folder: str | os.PathLike[str]) -> ExportedSeq2Seq:
    """Loads what :func:`save_exported` has written, in whichever format.

    ONNX runs in onnxruntime, on the CPU. Programs of ``torch.export`` and packages of AOTInductor run on the device of
    the model that was exported. Load what you trust: a package is machine code.

    Raises FileNotFoundError where there is no such folder; ValueError where its configuration is not of this version;
    ImportError, with the extra to install, where a package is missing.
    """
    folder = Path(folder)
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    if not isinstance(config, dict) or not {"format", "bos", "eos"} <= config.keys():
        raise ArgumentValueError(
            f"load_exported: {folder / _CONFIG} is not a configuration file written by save_exported"
        )
    format = config["format"]
    _check_format("load_exported", format)
    backends()  # makes the kernels known that programs may call
    encoder, step = (_load(str(folder / (name + FORMATS[format])), format) for name in ("encoder", "step"))
    return ExportedSeq2Seq(encoder, step, bos=config["bos"], eos=config["eos"])


def _load(path: str, format: str) -> Callable[..., Sequence[Tensor]]:
    if format == "torch.export":
        return torch.export.load(path).module()
    if format == "aot-inductor":
        return torch._inductor.aoti_load_package(path)
    session = _import("onnxruntime", "load_exported").InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(*arguments: Any) -> list[Tensor]:
        flat = [x for argument in arguments for x in (argument if isinstance(argument, list) else [argument])]
        given = {name: x.numpy() for name, x in zip(names, flat, strict=True)}
        return [torch.from_numpy(x) for x in session.run(None, given)]

    return run


def _import(package: str, function: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        install = "pip install 'attn_kernels[onnx]'"
        raise ImportError(f"{function}: format 'onnx' needs the package {package}: {install}") from error


def _check_format(function: str, format: object) -> None:
    if not isinstance(format, str) or format not in FORMATS:
        raise ArgumentValueError(f"{function}: format must be one of {', '.join(map(repr, FORMATS))}, got {format!r}")
