"""Times the decoder's whole loop in training and decoding: ``python -m bench.models.loop --help``.

Four variants of the same model with the same parameters are timed in turns: plain PyTorch step by step, as an
experienced user would write it; the same with a compiled step; our fused attention step by step; and the loop as one
op. In decoding, the last variant is a search as one op, also with weights in bfloat16. It supports a limited number of
rows; for more rows Python calls the steps. Then follow training steps of a model with location-sensitive attention,
whose steps read the alignments of the previous steps. With ``--ragged`` the sentences have different lengths, and the
model in plain PyTorch packs them; only training steps are timed then. With ``--every-token`` our variants do not
use that tokens occur more than once. With ``--attention`` the two fused variants with that attention of Seq2Seq are
timed, without plain PyTorch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple
from unittest import mock

import torch
import typer
from rich.table import Table
from torch import Tensor, nn

from attn_kernels import Attention, Memory
from attn_kernels.mechanisms import CumulativeLocationState, StatefulResult
from attn_kernels.seq2seq import Seq2Seq
from attn_kernels.seq2seq.fused import distinct, one_call
from attn_kernels.seq2seq.options import SearchOptions
from attn_kernels.seq2seq.search import search

from .. import eager, machine, report, results, timing
from ..cli import AllocatorOption, OutputOption, Run, ThreadsOption, application, parse_sizes, progress_bars
from ..machine import Allocator

app = application()

EAGER, COMPILED, STEPS, LOOP = "eager steps", "torch.compile", "fused steps", "loop"
LAUNCHED = "loop, no graph"  # on a GPU the loop otherwise runs as a CUDA graph
ROUNDED = "loop, bfloat16"  # a search with rounded weights, of the same model as the loop
VOCABULARY = 64
TOLERANCE = 1e-3  # for gradients in float32, relative to their largest element


class Shape(NamedTuple):
    B: int  # sentences
    S: int  # source steps
    T: int  # target steps


SHAPES = (
    Shape(64, 8, 8),
    Shape(64, 32, 32),
    Shape(32, 80, 96),
    Shape(16, 200, 200),
    Shape(1, 8, 8),
    Shape(1, 50, 50),
)
WITH_LOCATION = (Shape(32, 80, 96), Shape(64, 32, 32))  # shapes for training steps with location-sensitive attention
RAGGED_SHAPES = SHAPES[:4]
FULL, RAGGED = "S", "S/2..S"  # lengths of the sentences
QUICK = SHAPES[:1]
BEAM = 5
ADDITIVE, LOCATION = "bahdanau", "location-cumulative"  # attentions of Seq2Seq


class EagerAttention(nn.Module):
    """Additive attention as written without this package, with the parameters of a BahdanauAttention."""

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.query_projection, self.memory_projection, self.v = fused.query_projection, fused.memory_projection, fused.v

    def memory(self, outputs: Tensor, memory_lengths: Tensor) -> Memory:
        return Memory(self.memory_projection(outputs), outputs, memory_lengths)

    def forward(self, query: Tensor, memory: Memory) -> Attention:
        return eager.additive_attention(
            self.query_projection(query), memory.keys, memory.values, self.v, memory_lengths=memory.memory_lengths
        )


class EagerLSTM(nn.LSTM):
    """A subclass of ``nn.LSTM``. The encoder of Seq2Seq calls it on packed sequences, as it does for changed layers."""


class EagerLocation(EagerAttention):
    """Location-sensitive attention (Shen et al. 2018, section 2.2), parameters of a LocationSensitiveAttention."""

    def __init__(self, fused: nn.Module) -> None:
        super().__init__(fused)
        self.bias = fused.bias
        self.location_convolution, self.location_projection = fused.location_convolution, fused.location_projection

    def initial_state(self, memory: Memory, hypotheses: int = 1) -> CumulativeLocationState:
        zeros = memory.keys.new_zeros(memory.batch_size, hypotheses, memory.keys.shape[1])
        return CumulativeLocationState(zeros, zeros)

    def forward(  # type: ignore[override]
        self, query: Tensor, memory: Memory, state: CumulativeLocationState
    ) -> StatefulResult:
        """query: (B, 1, *), one hypothesis."""
        located = self.location_projection(self.location_convolution(torch.cat(state, 1)).mT)
        context, alignments = eager.additive_attention(
            self.query_projection(query),
            memory.keys,
            memory.values,
            self.v,
            self.bias,
            memory_lengths=memory.memory_lengths,
            extra=located,
        )
        after = CumulativeLocationState(alignments, state.cumulative + alignments)
        return StatefulResult(context, alignments, after)


class Variant(NamedTuple):
    name: str
    model: Seq2Seq


def make_variants(
    size: int, device: torch.device, names: list[str], attention: str = ADDITIVE, vocabulary: int = VOCABULARY
) -> list[Variant]:
    """Models with the same parameters. size: the size of embedding, states and attention."""
    variants = []
    for name in names:
        torch.manual_seed(0)
        decoder = "loop" if name in (LOOP, LAUNCHED, ROUNDED) else "steps"
        graph = name == LOOP
        sizes = (VOCABULARY, vocabulary, size, size, size)
        model = Seq2Seq(*sizes, attention=attention, decoder=decoder, cuda_graph=graph).to(device)
        if name in (EAGER, COMPILED):
            make = EagerAttention if attention == ADDITIVE else EagerLocation
            model.decoder.attention = make(model.decoder.attention)
            model.encoder.rnn.__class__ = EagerLSTM
        if name == COMPILED:
            model.decoder._step = torch.compile(model.decoder._step, dynamic=False)
        variants.append(Variant(name, model))
    return variants


def training_step(model: Seq2Seq, data: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Tensor]:
    """Forward, loss and backward, without the optimizer step, which is the same for all variants."""

    def step() -> Tensor:
        model.zero_grad()
        logits, _ = model(*data)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), data[2].flatten())
        loss.backward()
        return loss.detach()

    return step


def decoding(
    name: str, model: Seq2Seq, data: tuple[Tensor, Tensor, Tensor], beam_size: int, encoded: bool
) -> Callable[[], object]:
    """A search of as many steps as the target has. encoded: excludes the encoder."""
    model.eos = model.decoder.output.out_features  # a token that never occurs: all searches run all steps
    choice: dict[str, Any] = {"beam_size": beam_size, "max_length": data[2].shape[1]}
    in_one_call = name in (LOOP, ROUNDED)
    if name == ROUNDED:
        choice["weight_dtype"] = torch.bfloat16
    options = SearchOptions(bos=model.bos, eos=model.eos, **choice).checked()
    model.eval()
    with torch.no_grad():
        start = model.encode(*data[:2])

    @torch.no_grad()
    def call() -> object:
        with mock.patch.object(one_call, "MAX_ROWS", one_call.MAX_ROWS if in_one_call else 0):
            if encoded:
                return search(model.decoder, *start, options)
            return model.generate(*data[:2], **choice)

    return call


def ragged_lengths(shape: Shape, least: float) -> Tensor:
    """Lengths uniform in least * S..S, or in 1..S if least is 0; one sentence has all S steps."""
    lengths = torch.randint(
        max(1, round(least * shape.S)), shape.S + 1, (shape.B,), generator=torch.Generator().manual_seed(2)
    )
    lengths[0] = shape.S
    return lengths


def make_data(shape: Shape, device: torch.device, lengths: str = FULL) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(3, VOCABULARY, (shape.B, shape.S), generator=generator)
    target = torch.randint(3, VOCABULARY, (shape.B, shape.T), generator=generator)
    steps = torch.full((shape.B,), shape.S) if lengths == FULL else ragged_lengths(shape, 0.5)
    return source.to(device), steps, target.to(device)


def largest_error(variants: list[Variant], data: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    """Largest difference in loss and gradients of each variant from the first, relative to the largest value."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, model in variants:
        loss = training_step(model, data)()
        found[name] = {"loss": loss, **{key: weight.grad.clone() for key, weight in model.named_parameters()}}
        model.zero_grad()
    expected = found[variants[0].name]
    return {
        name: max(
            ((got[key] - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)).item()
            for key, wanted in expected.items()
        )
        for name, got in found.items()
    }


# Prefixes of PyTorch operator names, for the shares of the time.
_ENCODER = ("aten::mkldnn_rnn", "aten::_cudnn_rnn", "aten::_thnn", "attn_kernels::recurrent_steps")
_SEARCH = "attn_kernels::decoder_search"
_ATTENTION = ("attn_kernels::", "aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::mv", "aten::masked_fill")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::linear", "mkldnn::")


def shares(call: Callable[[], object]) -> dict[str, float]:
    """Shares of the time: encoder, products of cells and projections, attention, and the rest, mostly overhead.

    A search as one op is one share, which includes its products and attention.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        call()
    parts = {"encoder": 0.0, "products": 0.0, "attention": 0.0, "search": 0.0, "rest": 0.0}
    for event in profile.key_averages(group_by_input_shape=True):
        in_four_axes = any(len(shape) == 4 for shape in event.input_shapes if isinstance(shape, list))
        if event.key.startswith(_ENCODER):
            part = "encoder"
        elif event.key == _SEARCH:
            part = "search"
        elif event.key.startswith(_ATTENTION) or in_four_axes:  # (B, Tq, Tk, A) of the eager formula
            part = "attention"
        else:
            part = "products" if event.key.startswith(_PRODUCTS) else "rest"
        parts[part] += event.self_cpu_time_total
    total = sum(parts.values())
    return {part: round(value / total, 3) for part, value in parts.items() if value > 0}


def measure(
    shape: Shape,
    size: int,
    device: torch.device,
    names: list[str],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    attention: str = ADDITIVE,
    vocabulary: int = VOCABULARY,
    lengths: str = FULL,
) -> list[dict[str, Any]]:
    """A row for a training step and, with additive attention, for searches with and without the encoder, at one shape.

    clock: for the CPU. vocabulary: target vocabulary size. lengths: source lengths; ragged sources have no searches.
    """
    timer = timing.WallTimer(clock) if device.type == "cpu" else timing.timer_for(device)
    variants = make_variants(size, device, names, attention, vocabulary)
    trained = [variant for variant in variants if variant.name != ROUNDED]
    data = make_data(shape, device, lengths)
    errors = largest_error(trained, data)
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE}
    if wrong:
        raise RuntimeError(f"loop: loss or gradients at {tuple(shape)} are off by {wrong}: nothing is timed")
    calls = {name: training_step(model, data) for name, model in trained}
    rows = [measure_row("training step", shape, timer, calls, seconds, attention, lengths)]
    if attention != ADDITIVE or lengths != FULL:
        return rows
    for kind, beam_size in (("greedy decoding", 1), (f"beam search of {BEAM}", BEAM)):
        timed = [variant for variant in variants if is_search(variant.name, shape.B * beam_size, device)]
        for encoded in (False, True):
            calls = {name: decoding(name, model, data, beam_size, encoded) for name, model in timed}
            title = f"{kind}, encoder left out" if encoded else kind
            rows.append(measure_row(title, shape, timer, calls, seconds))
    return rows


def is_search(name: str, rows: int, device: torch.device) -> bool:
    """Whether a variant has its own search for so many rows (hypotheses of all sentences)."""
    if name in (LOOP, ROUNDED):
        return device.type == "cpu" and rows <= one_call.MAX_ROWS
    return name in (EAGER, COMPILED, STEPS)


def measure_row(
    kind: str,
    shape: Shape,
    timer: Any,
    calls: dict[str, Callable[[], object]],
    seconds: float,
    attention: str = ADDITIVE,
    lengths: str = FULL,
) -> dict[str, Any]:
    samples = timing.interleave(calls, timer, seconds=seconds, least_rounds=5, most_rounds=60)
    row: dict[str, Any] = {
        "kind": kind,
        "attention": attention,
        "B,S,T": list(shape),
        "lengths": lengths,
        "rounds": len(next(iter(samples.values()))),
        "ms": {name: results.rounded(timing.spread(samples[name]).scaled(1e3)) for name in calls},
        "eager / ours": {
            name: timing.ratios(samples, EAGER, name)._asdict() for name in calls if name != EAGER and EAGER in calls
        },
        "shares": {name: shares(call) for name, call in calls.items() if name != COMPILED},
    }
    if LOOP in calls:
        row["steps / one op"] = timing.ratios(samples, STEPS, LOOP)._asdict()
    return row


def peak_memories(
    shape: Shape,
    size: int,
    device: torch.device,
    names: list[str],
    attention: str = ADDITIVE,
    vocabulary: int = VOCABULARY,
    lengths: str = FULL,
) -> dict[str, float | None]:
    """Peak MB of a training step, minus the memory held before it."""
    data = make_data(shape, device, lengths)
    memory = {}
    for name, model in make_variants(size, device, names, attention, vocabulary):
        step = training_step(model, data)
        step()
        memory[name] = machine.peak_memory(step, device)
    return memory


def table(rows: list[dict[str, Any]], names: list[str]) -> Table:
    title = "Seq2Seq, LSTM, input feeding: ms, and times as fast as eager; loop: a search as one op"
    shown = report.table(
        title, "", "attention", "B,S,T", "lengths", *names, "MB (eager, loop)", "of the loop's time", wrap=True
    )
    for row in rows:
        cells = []
        for name in names:
            if name not in row["ms"]:
                cells.append("")
                continue
            ratio = row["eager / ours"].get(name)
            text = report.figure(row["ms"][name]["median"])
            cells.append(f"{text}  {report.times(ratio['median'])}" if ratio else text)
        memory = row.get("MB", {})
        megabytes = ", ".join(report.megabytes(memory[name]) for name in (EAGER, LOOP) if name in memory)
        ours = row["shares"].get(LOOP) or row["shares"].get(STEPS, {})
        parts = ", ".join(f"{part} {share:.0%}" for part, share in ours.items())
        shape = ",".join(map(str, row["B,S,T"]))
        shown.add_row(row["kind"], row["attention"], shape, row["lengths"], *cells, megabytes, parts)
    return shown


@app.command()
def main(
    size: Annotated[int, typer.Option(min=1, help="Size of embedding, states and attention.")] = 256,
    shape: Annotated[list[str] | None, typer.Option(help="B,S,T; may be repeated.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Seconds for each row of the table.")] = 20.0,
    threads: ThreadsOption = 1,
    compiled: Annotated[bool, typer.Option(help="Also time torch.compile; its first calls take minutes.")] = True,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Measure the CPU time of one thread, for a machine under load.")
    ] = False,
    vocabulary: Annotated[int, typer.Option(min=VOCABULARY, help="Of the target.")] = VOCABULARY,
    ragged: Annotated[
        bool, typer.Option("--ragged", help="Training steps with additive attention on sources of S/2 to S steps.")
    ] = False,
    every_token: Annotated[
        bool,
        typer.Option(
            "--every-token",
            help="Ours multiplies every embedded token with the weights, as with dropout on the embeddings.",
        ),
    ] = False,
    attention: Annotated[
        list[str] | None,
        typer.Option(
            help="Training steps with this attention of Seq2Seq, single steps against the loop; may be repeated."
        ),
    ] = None,
    allocator: AllocatorOption = Allocator.reuse,
    quick: Annotated[bool, typer.Option(help="One shape and few rounds.")] = False,
    output: OutputOption = results.LOCAL,
) -> None:
    """Times training steps and searches of Seq2Seq: eager, torch.compile, fused steps, and all steps as one op."""
    run = Run(threads, allocator, device)
    chosen = QUICK if quick else RAGGED_SHAPES if ragged else SHAPES
    shapes = [_parse_shape(text) for text in shape] if shape else list(chosen)
    with_location = () if ragged else shapes if shape else () if quick else WITH_LOCATION
    lengths = RAGGED if ragged else FULL
    cases = [*((ADDITIVE, one) for one in shapes), *((LOCATION, one) for one in with_location)]
    if attention:
        cases = [(name, one) for name in attention for one in shapes]
    left_out = {ROUNDED} if ragged or run.device.type == "cuda" else set()
    if attention:
        left_out |= {EAGER, COMPILED, ROUNDED}
    if run.device.type != "cuda":
        left_out.add(LAUNCHED)
    if not compiled:
        left_out.add(COMPILED)
    names = [name for name in (EAGER, COMPILED, STEPS, LAUNCHED, LOOP, ROUNDED) if name not in left_out]
    rows: list[dict[str, Any]] = []
    repeats = math.inf if every_token else distinct.MIN_REPEATS
    with mock.patch.object(distinct, "MIN_REPEATS", repeats), progress_bars() as progress:
        task = progress.add_task("shapes", total=len(cases) * 2)
        for name, one in cases:
            progress.update(task, description=f"{name}, B,S,T = {','.join(map(str, one))}")
            clock = time.process_time if cpu_time else time.perf_counter
            time_a_row = 1.0 if quick else seconds
            rows += measure(one, size, run.device, names, time_a_row, clock, name, vocabulary, lengths)
            progress.advance(task)
        machine.set_allocator_for_memory(allocator)
        for name, one in cases:
            progress.update(task, description=f"{name}, memory of {','.join(map(str, one))}")
            measured = [variant for variant in (EAGER, STEPS, LOOP) if variant in names]
            memory = peak_memories(one, size, run.device, measured, name, vocabulary, lengths)
            next(row for row in rows if (row["attention"], row["B,S,T"]) == (name, list(one)))["MB"] = memory
            progress.advance(task)
    settings: dict[str, Any] = {"size": size, "threads": threads, "dtype": "float32", "vocabulary": vocabulary}
    settings["clock"] = "CPU" if cpu_time else "wall"
    variant = "-".join(name for name, is_set in (("ragged", ragged), ("every-token", every_token)) if is_set)
    run.finish("loop", rows, table(rows, names), output, variant=variant, **settings)


def _parse_shape(text: str) -> Shape:
    sizes = parse_sizes(text)
    if len(sizes) != 3:
        raise typer.BadParameter(f"a shape is B,S,T, three positive numbers; got {text!r}")
    return Shape(*sizes)


if __name__ == "__main__":
    app()
