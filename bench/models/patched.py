"""patch(model) on models of other libraries: ``make swap``, ``python -m bench.models.patched --help``.

The first model is arabic-diacritizer with its own weights on real sentences: each character attends to all others. Then
follow the recurrent decoders of JoeyNMT and ESPnet with random weights, as only the shape of a step matters there.
"""

from __future__ import annotations

import copy
import gzip
import importlib
import importlib.util
import json
import logging
import subprocess
import sys
import time
import types
from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from attn_kernels import patch

from .. import machine, plots, report, results, timing
from ..cli import AllocatorOption, OutputOption, application, console, finish, prepare
from ..machine import Allocator

app = application()

LENGTHS = (64, 128, 256, 512, 1024)  # characters
SENTENCES = 520
ORIGINAL, PATCHED = "original", "patched"


class Variant(str, Enum):
    original = ORIGINAL
    patched = PATCHED


class Missing(Exception):
    """A case cannot run: a library is not installed, or ``patch`` does not replace its class."""


# arabic-diacritizer ---------------------------------------------------------------------------------------------------


def diacritizer(variant: str) -> Any:
    """The package's model with its weights."""
    model = _library("diacritize.baseline.model", "arabic-diacritizer").BiLSTMDiacritizer.from_pretrained()
    return _patched(model, 1) if variant == PATCHED else model


def sentences() -> list[str]:
    """Sentences without diacritics, from the dictionary in the package."""
    folder = _library("diacritize.config", "arabic-diacritizer").DATA_DIR
    with gzip.open(folder / "word_cache.json.gz", "rt", encoding="utf-8") as file:
        return list(json.load(file)["sentences"])


def choose_sentences(every: list[str], count: int, longest: int = 200) -> list[str]:
    """Selects ``count`` evenly spaced sentences of 20 to ``longest`` characters."""
    fit = [sentence for sentence in every if 20 <= len(sentence) <= longest]
    step = max(1, len(fit) // count)
    return fit[::step][:count]


def text_of(every: list[str], length: int) -> str:
    """Joins sentences to a text of ``length`` characters."""
    text = ""
    for sentence in every[len(every) // 2 :]:
        text += sentence + " "
        if len(text) >= length:
            return text[:length]
    raise ValueError(f"text_of: the sentences have fewer than {length} characters")


def compare_diacritics(count: int) -> dict[str, int]:
    """Counts the sentences that get the same diacritics from the original and the patched model."""
    original, patched = diacritizer(ORIGINAL), diacritizer(PATCHED)
    chosen = choose_sentences(sentences(), count)
    same = sum(
        original.diacritize(sentence) == patched.diacritize(sentence)
        for sentence in track(chosen, "sentences", console=console)
    )
    return {"sentences": len(chosen), "characters": sum(map(len, chosen)), "identical": same}


@app.command(hidden=True)
def child(variant: Variant, length: int, seconds: float, allocator: Allocator) -> None:
    """Measures one variant at one length in a separate process: prints a line of JSON."""
    torch.set_num_threads(1)
    machine.set_allocator(allocator)
    model, text = diacritizer(variant.value), text_of(sentences(), length)
    result = model.diacritize(text)
    times = []
    start = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        model.diacritize(text)
        times.append(time.perf_counter() - before)
    machine.set_allocator_for_memory(allocator)
    memory = machine.peak_memory(lambda: model.diacritize(text), torch.device("cpu"))
    print(json.dumps({"ms": 1e3 * min(times), "calls": len(times), "MB": memory, "output": result}))


def measure_diacritizer(length: int, seconds: float, allocator: Allocator) -> dict[str, Any]:
    """Times original and patched in turns, twice each; the best time of each counts."""
    best: dict[str, dict[str, Any]] = {}
    for variant in (ORIGINAL, PATCHED, PATCHED, ORIGINAL):
        command = [
            sys.executable,
            "-m",
            "bench.models.patched",
            "child",
            variant,
            str(length),
            str(seconds / 4),
            allocator.value,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"patched: {variant} at {length} characters failed:\n{done.stderr[-2000:]}")
        result = json.loads(done.stdout.splitlines()[-1])
        if variant not in best or result["ms"] < best[variant]["ms"]:
            best[variant] = result
    same = best[ORIGINAL].pop("output") == best[PATCHED].pop("output")
    return {
        "T": length,
        **best,
        "times patched": best[ORIGINAL]["ms"] / best[PATCHED]["ms"],
        "identical": same,
    }


# Decoders of other libraries ------------------------------------------------------------------------------------------


def joeynmt_calls(kind: str) -> dict[str, Callable[[], Tensor]]:
    """Search with a recurrent decoder: 512 units, 16 sentences of 50 steps, a vocabulary of 2000."""
    for name, attribute in (
        ("torch.utils.tensorboard", "SummaryWriter"),
        ("joeynmt.vocabulary", "Vocabulary"),
        ("joeynmt.batch", "Batch"),
    ):  # its search module needs these for annotations only, and they need further packages
        if importlib.util.find_spec("joeynmt") is not None and name not in sys.modules:
            stub = types.ModuleType(name)
            setattr(stub, attribute, object)
            sys.modules[name] = stub
    decoders = _library("joeynmt.decoders", "JoeyNMT")
    search = _library("joeynmt.search", "JoeyNMT")
    batch, source, size, vocabulary, steps = 16, 50, 512, 2000, 30

    class Net(nn.Module):
        bos_index, eos_index, pad_index, unk_index, sep_index = 2, 3, 1, 0, None
        lang_tags: list[int] = []  # noqa: RUF012
        specials: list[int] = []  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(vocabulary, 256)
            encoder = types.SimpleNamespace(output_size=size)
            self.decoder = decoders.RecurrentDecoder("gru", 256, size, encoder, "bahdanau", 1, vocabulary)

        def forward(self, **arguments: Any) -> Any:
            given = [arguments.get(name) for name in ("encoder_output", "encoder_hidden", "src_mask", "unroll_steps")]
            given += [arguments.get("decoder_hidden"), arguments.get("att_vector")]
            return self.decoder(self.embed(arguments["trg_input"]), *given)

    torch.manual_seed(0)
    models = _both(Net().eval())
    lengths = torch.randint(source // 2, source + 1, (batch,))
    lengths[0] = source
    mask = (torch.arange(source) < lengths[:, None])[:, None]
    memory, state = torch.randn(batch, source, size) * mask.mT, torch.randn(batch, size)
    target = torch.randint(4, vocabulary, (batch, steps))

    def call(model: Net) -> Tensor:
        if kind == "greedy":
            return search.greedy(mask, steps, model, memory, state, min_output_length=steps)[0]
        if kind == "beam 5":
            return search.beam_search(model, 5, memory, state, mask, steps, 1.0, min_output_length=steps // 2)[0]
        leaf = memory.clone().requires_grad_()
        model.zero_grad()
        given = {"encoder_output": leaf, "encoder_hidden": state, "src_mask": mask, "unroll_steps": steps}
        model(trg_input=target, **given)[0].square().mean().backward()
        return leaf.grad

    return {name: (lambda model=model: call(model)) for name, model in models.items()}


def espnet_calls(attention: str) -> dict[str, Callable[[], Tensor]]:
    """A training step of ESPnet's decoder: 320 units, 16 utterances of 200 frames, 50 characters."""
    attentions = _library("espnet.nets.pytorch_backend.rnn.attentions", "ESPnet")
    decoder = _library("espnet.nets.pytorch_backend.rnn.decoders", "ESPnet").Decoder
    logging.disable(logging.WARNING)  # ESPnet warns in every step that the module cannot be traced
    batch, frames, size, steps, vocabulary = 16, 200, 320, 50, 50
    sizes = (size, size, size, 10, 100) if attention == "AttLoc" else (size, size, size)
    torch.manual_seed(0)
    attending = nn.ModuleList([getattr(attentions, attention)(*sizes)])
    names = [str(n) for n in range(vocabulary)]
    model = decoder(size, vocabulary, "lstm", 1, size, vocabulary - 1, vocabulary - 1, attending, 0, names)
    models = _both(model)
    lengths = torch.randint(frames // 2, frames + 1, (batch,)).sort(descending=True).values
    lengths[0] = frames
    memory = torch.randn(batch, frames, size)
    target = torch.randint(1, vocabulary - 1, (batch, steps))

    def call(model: nn.Module) -> Tensor:
        leaf = memory.clone().requires_grad_()
        model.zero_grad()
        model(leaf, lengths, target)[0].backward()
        return leaf.grad

    return {name: (lambda model=model: call(model)) for name, model in models.items()}


DECODERS: dict[str, Callable[[], dict[str, Callable[[], Tensor]]]] = {
    "JoeyNMT, greedy": lambda: joeynmt_calls("greedy"),
    "JoeyNMT, beam 5": lambda: joeynmt_calls("beam 5"),
    "JoeyNMT, training step": lambda: joeynmt_calls("training"),
    "ESPnet AttAdd, training step": lambda: espnet_calls("AttAdd"),
    "ESPnet AttLoc, training step": lambda: espnet_calls("AttLoc"),
    "ESPnet AttDot, training step": lambda: espnet_calls("AttDot"),
}


def measure_decoder(name: str, seconds: float) -> dict[str, Any]:
    """Times original and patched in turns, after a check that their results agree."""
    try:
        calls = DECODERS[name]()
    except Missing as error:
        return {"what": name, "skipped": str(error)}
    expected, got = calls[ORIGINAL](), calls[PATCHED]()
    expected, got = torch.as_tensor(expected), torch.as_tensor(got)
    if not alike(got, expected):
        raise RuntimeError(f"patched: {name} gives another result when it is patched: nothing is timed")
    samples = timing.interleave(calls, timing.WallTimer(), seconds=seconds, least_rounds=5, most_rounds=60)
    return {
        "what": name,
        "rounds": len(samples[ORIGINAL]),
        "ms": {variant: results.rounded(timing.spread(samples[variant]).scaled(1e3)) for variant in calls},
        "times patched": timing.ratios(samples, ORIGINAL, PATCHED)._asdict(),
    }


def alike(got: Tensor, expected: Tensor) -> bool:
    """Whether tokens are equal, or gradients agree within the rounding errors of many steps."""
    if not expected.is_floating_point():
        return torch.equal(got, expected)
    return torch.allclose(got, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def _both(model: nn.Module) -> dict[str, Any]:
    return {ORIGINAL: model, PATCHED: _patched(copy.deepcopy(model), 1)}


def _patched(model: Any, modules: int) -> Any:
    report = patch(model)
    if len(report.replaced) != modules:
        reasons = "; ".join(f"{name}: {reason}" for name, _, reason in report.skipped)
        raise Missing(f"not patched ({reasons})")
    return model


def _library(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Missing(f"{name} cannot be imported: {error}") from None


# The command ----------------------------------------------------------------------------------------------------------


def tables(result: dict[str, Any]) -> list[Table]:
    columns = ("characters", "original, ms", "patched, ms", "times", "original, MB", "patched, MB", "same output")
    demonstration = report.table("arabic-diacritizer, whole model", *(f">{column}" for column in columns), wrap=True)
    for row in result["diacritizer"]:
        variants = [row[variant] for variant in (ORIGINAL, PATCHED)]
        cells = [str(row["T"]), *(f"{variant['ms']:.1f}" for variant in variants), f"{row['times patched']:.2f}x"]
        cells += [report.megabytes(variant["MB"]) for variant in variants]
        demonstration.add_row(*cells, "yes" if row["identical"] else "NO")
    decoders = report.table("Decoders", "", "original, ms", "patched, ms", "times", wrap=True)
    for row in result["decoders"]:
        if "skipped" in row:
            decoders.add_row(row["what"], "skipped: " + row["skipped"], "", "")
        else:
            medians = [f"{row['ms'][variant]['median']:.1f}" for variant in (ORIGINAL, PATCHED)]
            decoders.add_row(row["what"], *medians, f"{row['times patched']['median']:.2f}x")
    return [demonstration, decoders]


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    seconds: Annotated[float, typer.Option(min=0, help="Seconds for each row of the tables.")] = 12.0,
    count: Annotated[int, typer.Option(min=1, help="Number of sentences whose diacritics are compared.")] = SENTENCES,
    length: Annotated[list[int] | None, typer.Option(min=1, help="Number of characters; may be repeated.")] = None,
    allocator: AllocatorOption = Allocator.default,
    output: OutputOption = results.LOCAL,
) -> None:
    """Times original against patched on one thread: all of arabic-diacritizer, then JoeyNMT's and ESPnet's decoders."""
    if context.invoked_subcommand is not None:
        return
    start = time.perf_counter()
    in_effect = prepare(1, allocator)
    result: dict[str, Any] = {"part": "swap", "machine": machine.describe(torch.device("cpu"), in_effect)}
    result |= {"diacritizer": [], "decoders": []}
    try:
        result["sentences"] = compare_diacritics(count)
        lengths = length or LENGTHS
        result["diacritizer"] = [
            measure_diacritizer(one, seconds, allocator) for one in track(lengths, "lengths", console=console)
        ]
    except Missing as error:
        console.print(f"arabic-diacritizer: skipped: {error}")
    result["decoders"] = [measure_decoder(name, seconds) for name in track(DECODERS, "decoders", console=console)]
    path = output / "swap-cpu.json"
    results.write_json(path, result)
    if result["diacritizer"]:
        plots.swap(path.with_suffix(".png"), result["diacritizer"])
    finish(tables(result), result["machine"], start, path)
    if "sentences" in result:
        compared = result["sentences"]
        console.print(f"Identical diacritics in {compared['identical']} of {compared['sentences']} sentences.")
    if "sentences" in result and (
        result["sentences"]["identical"] < result["sentences"]["sentences"]
        or not all(row["identical"] for row in result["diacritizer"])
    ):
        console.print("The patched model gave another output.", style="red")
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
