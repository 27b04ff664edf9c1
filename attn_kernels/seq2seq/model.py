"""Seq2Seq: encoder, attention decoder and search in one model."""

from __future__ import annotations

import numbers
import operator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..attention_module import AttentionModule
from ..errors import ArgumentTypeError
from ..mechanisms import NormalizedAttention
from ..memory import Memory
from .attentions import ATTENTIONS, check_attention
from .decoder import Decoder
from .encoder import CELLS, TokenEncoder
from .evaluation import in_evaluation
from .options import SearchOptions
from .recurrent import checked_lengths
from .search import Hypothesis, search
from .sharded import as_forward, gathered
from .state import DecoderState

DECODERS = ("loop", "steps")


class Seq2Seq(nn.Module):
    """Attentional sequence-to-sequence model: bidirectional encoder, decoder with attention and input feeding.

    Sources: Bahdanau, Cho, Bengio 2015 (bidirectional encoder, additive attention); Luong, Pham, Manning 2015
    (attentional vector, input feeding, multiplicative attention).

    Args:
        source_vocab, target_vocab: numbers of tokens.
        embedding_size: of source and target tokens.
        hidden_size: units per direction of the encoder, and of the decoder.
        units: size of the hidden layer of additive attentions, and of the projections of "cosine"; others ignore it.
        attention: a name or a module.
            Without a state: "bahdanau", "bahdanau-normalized", "luong-dot", "luong-general", "luong-concat", "cosine",
            "multi-head" (4 heads, each of ``units``) or "layer-norm". "luong-dot" compares memory and state without a
            projection, so the outputs of the encoder's directions are added.
            Stateful, with the state in ``DecoderState.attention`` (attn_kernels.mechanisms): "location",
            "location-cumulative", "coverage", "forward", "forward-agent", "monotonic", "mocha", "stepwise-monotonic",
            "local-m", "local-p", "milk", "gmm" or "dynamic-convolution".
            A module: a mechanism, or NormalizedAttention of one, whose query_size is ``hidden_size`` and memory_size
            2 ``hidden_size``. With a memory_size of ``hidden_size`` it gets the sum of the encoder's directions.
            Stateful attentions, "multi-head", "layer-norm" and NormalizedAttention run step by step in a search.
        cell: "lstm" or "gru".
        num_layers: of encoder and decoder.
        dropout: on embeddings, between layers and on the attentional vector.
        input_feeding: each step reads the attentional vector of the step before. Without it, training computes a
            stateless attention for all steps in one call, which is much faster.
        decoder: how training with input feeding runs the steps of a target. "loop": as one op, which is faster; it
            falls back to "steps" under torch.compile and autocast, and with modified modules, which need the single
            steps. "steps": one after the other. Parameters and results are the same.
        padding_idx: the padding token of source and target; its embedding is 0.
        bos, eos: the target tokens before the first and after the last.
        backend: of the attention, as in :func:`attn_kernels.additive_attention`; None for a module, which has its own.
        cuda_graph: on a GPU, replay the loop as a CUDA graph, captured when a shape occurs for the second time. Source
            and target lengths are padded for that, to four sizes per doubling; the 16 graphs used last are kept, with
            their memory. False: launch the kernels one by one. The results are the same.
        device, dtype: of the parameters.
    """

    _attention_by_name: ClassVar[bool] = False  # of a subclass whose arguments are written to a file

    def __init__(
        self,
        source_vocab: int,
        target_vocab: int,
        embedding_size: int = 256,
        hidden_size: int = 256,
        units: int = 256,
        attention: str | AttentionModule | NormalizedAttention = "bahdanau",
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
        cuda_graph: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(attention, str):
            _check_choice("attention", attention, tuple(ATTENTIONS))
            sum_directions = attention == "luong-dot"
        elif self._attention_by_name:
            expected, got = "a name, which a configuration can hold", type(attention).__name__
            raise ArgumentTypeError(f"{type(self).__name__}: attention must be {expected}, got {got}")
        else:
            sum_directions = check_attention(attention, hidden_size, backend) == hidden_size
        _check_choice("cell", cell, tuple(CELLS))
        _check_choice("decoder", decoder, DECODERS)
        _check_token("padding_idx", padding_idx, source_vocab)
        for name, token in (("padding_idx", padding_idx), ("bos", bos), ("eos", eos)):
            _check_token(name, token, target_vocab)
        self.bos: int
        self.eos: int
        padding_idx, self.bos, self.eos = (operator.index(token) for token in (padding_idx, bos, eos))
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        rnn: dict[str, Any] = {"cell": cell, "num_layers": num_layers, "dropout": dropout, "padding_idx": padding_idx}
        self.encoder: TokenEncoder = TokenEncoder(
            source_vocab,
            embedding_size,
            hidden_size,
            sum_directions=sum_directions,
            factory=factory,
            **rnn,
        )
        memory_size = self.encoder.memory_size
        if isinstance(attention, str):
            attention = ATTENTIONS[attention](hidden_size, memory_size, units, backend=backend, **factory)
        self.decoder: Decoder = Decoder(
            target_vocab,
            embedding_size,
            hidden_size,
            attention,
            memory_size,
            input_feeding=input_feeding,
            loop=decoder == "loop",
            cuda_graph=cuda_graph,
            factory=factory,
            **rnn,
        )

    def forward(self, source: Tensor, source_lengths: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher forcing: logits[:, t] are for target[:, t], given the source and target[:, :t].

        source: (B, S) int tokens. source_lengths: (B,) int, 0..S; a sentence of length 0 is an empty sentence.
        target: (B, T) int tokens to be predicted: without bos, which the model puts before them, and with eos. So the
            loss is ``cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=padding_idx)``.

        Returns logits (B, T, target_vocab) and alignments (B, T, S), which are 0 in the padding of the source. Tokens
        in the padding do not affect the results.

        Raises ValueError or TypeError if an argument does not fit; IndexError for a token outside the vocabulary.
        """
        memory, state = self.encode(source, source_lengths)
        batch = source.shape[0]
        _check_tokens("target", target, "(B, T)")
        if target.shape[0] != batch or target.shape[1] == 0:
            expected = f"(B, T) = ({batch}, 1 or more)"
            raise ValueError(f"Seq2Seq: target must have shape {expected}, got {tuple(target.shape)}")
        tokens = torch.cat([target.new_full((batch, 1), self.bos), target[:, :-1]], dim=1)
        result: tuple[Tensor, Tensor] = self.decoder(tokens, state, memory)
        return result

    if TYPE_CHECKING:
        __call__ = forward

    def encode(self, source: Tensor, source_lengths: Tensor) -> tuple[Memory, DecoderState]:
        """The projected memory and the first decoder state. Arguments as for ``forward``."""
        _check_tokens("source", source, "(B, S)")
        batch, steps = source.shape
        if batch == 0:
            raise ValueError(f"Seq2Seq: source must have shape (B, S) with B >= 1, got {tuple(source.shape)}")
        lengths = checked_lengths("Seq2Seq", "source_lengths", source_lengths, batch, steps)
        outputs, states = self.encoder(source, lengths)
        begin = as_forward(self.decoder, "begin")
        begun: tuple[Memory, DecoderState] = begin(outputs, states, source_lengths.to(states[0].device))
        return begun

    def generate(
        self,
        source: Tensor,
        source_lengths: Tensor,
        *,
        beam_size: int = 1,
        max_length: int = 64,
        length_penalty: float = 0.0,
        coverage_penalty: float = 0.0,
        num_hypotheses: int | None = None,
        early_stopping: bool = False,
        weight_dtype: torch.dtype | None = None,
        sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> list[list[Hypothesis]]:
        r"""Translates. Returns a list of hypotheses for each sentence, each with tokens, score and alignments.

        **Beam search** returns the best hypotheses first; with ``beam_size=1`` and no penalty it is greedy search.
        Their score is

        .. math::
            \frac{\log P(Y \mid X)}{lp(Y)} + cp(X; Y) \qquad lp(Y) = \left(\frac{5 + |Y|}{6}\right)^\alpha \qquad
            cp(X; Y) = \beta \sum_j \log \min\Bigl(\sum_i a_{ij}, 1\Bigr)

        where the length of Y includes eos and a_ij is the alignment of token i with step j of the source. The sum of a
        step that no token attends counts as 1.2e-38, so that scores stay finite. Source: Wu et al., "Google's neural
        machine translation system", 2016, section 7, equation 14.

        In each step all tokens extend all hypotheses of a sentence, ranked by log-probability. Those among the best
        ``beam_size`` that end in eos are finished; the best ``beam_size`` of the others are continued. Finished
        hypotheses are ranked by score, and so are, after ``max_length`` steps, those that have not reached eos. A
        sentence is done as soon as the best continued log-probability, divided by lp at ``max_length``, is not above
        the score of finished hypothesis number ``num_hypotheses``: log-probabilities only fall and cp is at most 0, so
        further steps cannot change the result. The result of a sentence does not depend on the rest of its batch.

        **Sampling**, with ``sample=True``, draws each token from the probabilities of the model, and returns the
        hypotheses in the order drawn. Their score is the model's log-probability, independent of ``temperature`` and
        ``top_k``. The draws of a sentence depend on its batch.

        Only eos is special: padding_idx and bos are generated like any other token.

        Args:
            source, source_lengths: as for ``forward``.
            beam_size: K, the number of hypotheses of a sentence that are continued.
            max_length: of the output, eos included; one that has not reached eos by then is returned as it is.
            length_penalty: alpha, at least 0; larger values favour longer outputs, 0 the most probable one.
            coverage_penalty: beta, at least 0; larger values favour outputs that attend the whole source.
            num_hypotheses: the number of hypotheses per sentence; None: ``beam_size``, or one sample. There are fewer
                if no more outputs have a probability above 0, as in a tiny vocabulary, or if the beam found no more.
            early_stopping: a sentence is also done when ``beam_size`` hypotheses are finished, even if others could
                still become better. With a length penalty this stops much sooner.
            weight_dtype: ``torch.bfloat16`` rounds the decoder's weights, except embeddings and biases, for this
                search. Each step then reads half as much memory, which is faster if memory is the bottleneck, as with a
                large vocabulary. Products are of float32 states, summed in float32. For searches that run as one op.
                The rounded weights are kept for the next search, which rounds again those that have changed.
            sample: draw samples rather than search.
            temperature: divides the logits before drawing; above 0.
            top_k: draw only from this many most probable tokens.
            generator: source of random numbers, on the device of the model; None: PyTorch's default.

        No gradients are recorded, and there is no dropout, whatever mode the model is in. The mode is not switched: if
        modules are in training mode, a shallow copy of the model runs in evaluation mode, so that another thread may
        train the model meanwhile. The copy shares parameters, buffers and hooks; attributes that a custom module sets
        in its ``forward`` are set in the copy only. TorchScript modules stay in their mode.

        Numbers may be NumPy scalars.

        Raises ValueError or TypeError if an argument does not fit, or is not used by the chosen search or sampling.
        """
        options = SearchOptions(
            bos=self.bos,
            eos=self.eos,
            max_length=max_length,
            beam_size=beam_size,
            num_hypotheses=num_hypotheses,
            length_penalty=length_penalty,
            coverage_penalty=coverage_penalty,
            early_stopping=early_stopping,
            weight_dtype=weight_dtype,
            sample=sample,
            temperature=temperature,
            top_k=top_k,
            generator=generator,
        ).checked()
        with torch.no_grad(), gathered(self):
            model = in_evaluation(self)
            memory, state = model.encode(source, source_lengths)
            return search(model.decoder, memory, state, options)


def _check_choice(argument: str, choice: str, choices: tuple[str, ...]) -> None:
    if choice not in choices:
        expected = ("one of " if len(choices) > 1 else "") + ", ".join(map(repr, choices))
        raise ValueError(f"Seq2Seq: {argument} must be {expected}, got {choice!r}")


def _check_token(argument: str, token: int, vocab: int) -> None:
    if not isinstance(token, numbers.Integral) or not 0 <= token < vocab:
        raise ValueError(f"Seq2Seq: {argument} must be in 0..{vocab - 1}, the vocabulary, got {token!r}")


def _check_tokens(argument: str, tokens: Tensor, expected: str) -> None:
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int32, torch.int64):
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"Seq2Seq: {argument} must be an int32 or int64 tensor, got {got}")
    if tokens.dim() != 2:
        raise ValueError(f"Seq2Seq: {argument} must have shape {expected}, got {tuple(tokens.shape)}")
