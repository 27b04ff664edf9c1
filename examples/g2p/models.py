"""The model, and its file with everything that is needed to use it: weights, sizes, vocabulary, task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from attn_kernels.seq2seq import Hypothesis, Seq2Seq

from .data import BOS, EOS, PADDING, Vocabulary
from .files import write_whole

FORMAT = "attn_kernels bench.g2p model, 1"


@dataclass(frozen=True)
class ModelConfig:
    """The arguments of Seq2Seq, and the seed of the initial weights."""

    attention: str = "bahdanau"
    cell: str = "lstm"
    input_feeding: bool = True
    decoder: str = "loop"
    embedding_size: int = 256
    hidden_size: int = 256
    units: int = 256
    num_layers: int = 1
    dropout: float = 0.0
    seed: int = 0


class Model(NamedTuple):
    """The content of a file of ``save_model``. ``facts``: how it was trained and validated; JSON types only."""

    network: Seq2Seq
    config: ModelConfig
    vocabulary: Vocabulary
    task: str
    facts: dict[str, Any]


def make_model(
    config: ModelConfig, vocabulary: Vocabulary, device: torch.device, backend: str | None = None, **changes: Any
) -> Seq2Seq:
    """``changes``: other values for arguments of Seq2Seq. Raises ValueError if Seq2Seq rejects one."""
    settings = {**_fields_of(ModelConfig, config), **changes}
    torch.manual_seed(settings.pop("seed"))
    tokens = {"padding_idx": PADDING, "bos": BOS, "eos": EOS}
    return Seq2Seq(vocabulary.source_size, vocabulary.target_size, **settings, **tokens, backend=backend).to(device)


def _fields_of(cls: type, config: Any) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name in cls.__dataclass_fields__}


def contents(
    config: ModelConfig, vocabulary: Vocabulary, task: str, facts: dict[str, Any], weights: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """The content of a model file: tensors, numbers, strings, and lists and dictionaries of them; no code."""
    return {
        "format": FORMAT,
        "config": _fields_of(ModelConfig, config),
        "vocabulary": vocabulary.state(),
        "task": task,
        "facts": facts,
        "weights": {name: weight.detach().cpu() for name, weight in weights.items()},
    }


def save_model(path: Path, model: Model) -> None:
    state = contents(model.config, model.vocabulary, model.task, model.facts, model.network.state_dict())
    write_whole(path, lambda partial: torch.save(state, partial))


def read(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The dictionary in a file of torch.save; code in it is not executed. Raises ValueError if it is another file."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load may raise any exception on a file of another format
        if isinstance(error, OSError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is not a file of examples.g2p, or damaged: {reason}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a file of examples.g2p")
    return state


def load_model(path: Path, device: torch.device) -> Model:
    """From a file of ``export``, or the best of a checkpoint of ``train``.

    Raises FileNotFoundError, or ValueError if it is another file or its training has not been validated yet.
    """
    state = read(path)
    if "best" in state:  # a checkpoint
        state = state["best"]
        if state is None:
            raise ValueError(f"{path}: this training has not reached its first validation yet")
    if state.get("format") != FORMAT:
        raise ValueError(
            f"{path}: expected a checkpoint or an export of examples.g2p of the format {FORMAT!r}, "
            f"got {state.get('format')!r}"
        )
    config = ModelConfig(**state["config"])
    vocabulary = Vocabulary(**state["vocabulary"])
    network = make_model(config, vocabulary, device)
    network.load_state_dict(state["weights"])
    return Model(network.eval(), config, vocabulary, state["task"], state["facts"])


def generate(
    model: Seq2Seq,
    vocabulary: Vocabulary,
    words: Sequence[str],
    beam_size: int = 1,
    max_length: int = 40,
    batch_size: int = 200,
    advance: Callable[[int], object] = lambda words: None,
) -> list[Hypothesis]:
    """The best hypothesis for each word, in order. ``advance`` is called with the number of words just finished."""
    device = next(model.parameters()).device
    found: dict[int, Hypothesis] = {}
    for chunk in _by_length(words, batch_size):
        batch = vocabulary.batch([(words[i], ()) for i in chunk]).to(device)
        hypotheses = model.generate(batch.source, batch.source_lengths, beam_size=beam_size, max_length=max_length)
        found.update(zip(chunk, (best[0] for best in hypotheses), strict=True))
        advance(len(chunk))
    return [found[i] for i in range(len(words))]


def _by_length(words: Sequence[str], batch_size: int) -> Iterator[list[int]]:
    order = sorted(range(len(words)), key=lambda i: len(words[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
