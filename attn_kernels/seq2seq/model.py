"""Seq2Seq: encoder, attention decoder and search in one model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..memory import Memory
from ..modules import BahdanauAttention, CosineAttention, LuongAttention
from .decoder import AttentionModule, Decoder, DecoderState
from .encoder import CELLS, Encoder
from .search import Hypothesis, greedy_search

ATTENTIONS = ("bahdanau", "bahdanau-normalized", "luong-dot", "luong-general", "luong-concat", "cosine")
DECODERS = ("loop", "steps")


class Seq2Seq(nn.Module):
    """Attentional sequence-to-sequence model: bidirectional encoder, decoder with attention and input feeding.

    Sources: Bahdanau, Cho, Bengio 2015 (bidirectional encoder, additive attention); Luong, Pham, Manning 2015
    (attentional vector, input feeding, multiplicative attention).

    Args:
        source_vocab, target_vocab: numbers of tokens.
        embedding_size: of source and target tokens.
        hidden_size: units per direction of the encoder and of the decoder.
        units: size at which additive, "luong-concat" and "cosine" attention compare; the others do not use it.
        attention: "bahdanau", "bahdanau-normalized", "luong-dot", "luong-general", "luong-concat" or "cosine". For
            "luong-dot", which compares memory and state as they are, the outputs of the encoder's directions are added.
        cell: "lstm" or "gru".
        num_layers: of encoder and decoder.
        dropout: on embeddings, between layers and on the attentional vector.
        input_feeding: each step reads the attentional vector of the step before. Without it, training computes the
            attention of all steps in one call, which is much faster.
        decoder: how a whole target is computed with input feeding. "loop": as one op, which is faster; under
            torch.compile and autocast, which look into steps, as "steps". "steps": one after the other. Parameters and
            results are the same.
        padding_idx: the token that fills up source and target; its embedding is 0.
        bos, eos: the target tokens before the first and after the last.
        backend: of the attention, as of :func:`attn_kernels.additive_attention`.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        source_vocab: int,
        target_vocab: int,
        embedding_size: int = 256,
        hidden_size: int = 256,
        units: int = 256,
        attention: str = "bahdanau",
        cell: str = "lstm",
        num_layers: int = 1,
        dropout: float = 0.0,
        input_feeding: bool = True,
        decoder: str = "loop",
        *,
        padding_idx: int = 0,
        bos: int = 1,
        eos: int = 2,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_choice("attention", attention, ATTENTIONS)
        _check_choice("cell", cell, tuple(CELLS))
        _check_choice("decoder", decoder, DECODERS)
        _check_token("padding_idx", padding_idx, source_vocab)
        for name, token in (("padding_idx", padding_idx), ("bos", bos), ("eos", eos)):
            _check_token(name, token, target_vocab)
        self.bos = bos
        self.eos = eos
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        rnn: dict[str, Any] = {"cell": cell, "num_layers": num_layers, "dropout": dropout, "padding_idx": padding_idx}
        self.encoder = Encoder(
            source_vocab,
            embedding_size,
            hidden_size,
            sum_directions=attention == "luong-dot",
            factory=factory,
            **rnn,
        )
        memory_size = self.encoder.memory_size
        self.decoder = Decoder(
            target_vocab,
            embedding_size,
            hidden_size,
            _make_attention(attention, hidden_size, memory_size, units, {"backend": backend, **factory}),
            memory_size,
            input_feeding=input_feeding,
            loop=decoder == "loop",
            factory=factory,
            **rnn,
        )

    def forward(self, source: Tensor, source_lengths: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher forcing: logits[:, t] are for target[:, t], given the source and target[:, :t].

        source: (B, S) int tokens. source_lengths: (B,) int, 0..S; a sentence of length 0 is an empty sentence.
        target: (B, T) int tokens to be predicted: without bos, which the model puts before them, and with eos. So the
            loss is ``cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=padding_idx)``.

        Returns logits (B, T, target_vocab) and alignments (B, T, S), which are 0 in the padding of the source. What the
        padding holds changes neither.

        Raises ValueError or TypeError where an argument does not fit; IndexError for a token outside the vocabulary.
        """
        memory, state = self.encode(source, source_lengths)
        batch = source.shape[0]
        _check_tokens("target", target, "(B, T)")
        if target.shape[0] != batch or target.shape[1] == 0:
            expected = f"(B, T) = ({batch}, 1 or more)"
            raise ValueError(f"Seq2Seq: target must have shape {expected}, got {tuple(target.shape)}")
        tokens = torch.cat([target.new_full((batch, 1), self.bos), target[:, :-1]], dim=1)
        return self.decoder(tokens, state, memory)

    def encode(self, source: Tensor, source_lengths: Tensor) -> tuple[Memory, DecoderState]:
        """What decoding starts from: the memory, projected once, and the first state. Arguments as of ``forward``."""
        _check_tokens("source", source, "(B, S)")
        batch, steps = source.shape
        if batch == 0:
            raise ValueError(f"Seq2Seq: source must have shape (B, S) with B >= 1, got {tuple(source.shape)}")
        if not isinstance(source_lengths, Tensor) or source_lengths.dtype not in (torch.int32, torch.int64):
            got = source_lengths.dtype if isinstance(source_lengths, Tensor) else type(source_lengths).__name__
            raise TypeError(f"Seq2Seq: source_lengths must be an int32 or int64 tensor, got {got}")
        if source_lengths.shape != (batch,):
            expected = f"(B,) = ({batch},)"
            raise ValueError(f"Seq2Seq: source_lengths must have shape {expected}, got {tuple(source_lengths.shape)}")
        lengths = source_lengths.cpu()  # packing needs them there; a caller who has them there saves a wait
        shortest, longest = (int(limit) for limit in lengths.aminmax())
        if shortest < 0 or longest > steps:
            raise ValueError(f"Seq2Seq: source_lengths must be in 0..S = 0..{steps}, got {shortest}..{longest}")
        outputs, states = self.encoder(source, lengths)
        return self.decoder.attention.memory(outputs, source_lengths.to(outputs.device)), self.decoder.start(states)

    def generate(
        self, source: Tensor, source_lengths: Tensor, *, beam_size: int = 1, max_length: int = 64
    ) -> list[list[Hypothesis]]:
        """Translates: for each sentence its hypotheses, best first, each with tokens, score and alignments.

        source, source_lengths: as of ``forward``.
        beam_size: 1, the likeliest token at each step.
        max_length: of the output, eos included; one that has not reached eos by then is returned as it is.

        Without gradients, and without dropout also in training mode.
        """
        if beam_size != 1:
            raise ValueError(f"Seq2Seq.generate: beam_size must be 1, got {beam_size!r}: a later version has beams")
        if not isinstance(max_length, int) or max_length < 1:
            raise ValueError(f"Seq2Seq.generate: max_length must be a positive integer, got {max_length!r}")
        with torch.no_grad(), _evaluating(self):
            memory, state = self.encode(source, source_lengths)
            return greedy_search(self.decoder, memory, state, bos=self.bos, eos=self.eos, max_length=max_length)


def _make_attention(
    attention: str, query_size: int, memory_size: int, units: int, options: dict[str, Any]
) -> AttentionModule:
    if attention in ("bahdanau", "bahdanau-normalized"):
        normalize = attention == "bahdanau-normalized"
        return BahdanauAttention(query_size, memory_size, units, normalize=normalize, **options)
    if attention == "cosine":
        return CosineAttention(query_size, memory_size, units, **options)
    score = attention.removeprefix("luong-")
    return LuongAttention(query_size, memory_size, units if score == "concat" else None, score=score, **options)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switches the modules that are in training mode to evaluation, and those back afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check_choice(argument: str, choice: str, choices: tuple[str, ...]) -> None:
    if choice not in choices:
        expected = ("one of " if len(choices) > 1 else "") + ", ".join(map(repr, choices))
        raise ValueError(f"Seq2Seq: {argument} must be {expected}, got {choice!r}")


def _check_token(argument: str, token: int, vocab: int) -> None:
    if not 0 <= token < vocab:
        raise ValueError(f"Seq2Seq: {argument} must be in 0..{vocab - 1}, the vocabulary, got {token!r}")


def _check_tokens(argument: str, tokens: Tensor, expected: str) -> None:
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int32, torch.int64):
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"Seq2Seq: {argument} must be an int32 or int64 tensor, got {got}")
    if tokens.dim() != 2:
        raise ValueError(f"Seq2Seq: {argument} must have shape {expected}, got {tuple(tokens.shape)}")
