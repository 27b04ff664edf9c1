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
        hidden_size: units per direction of the encoder and of the decoder.
        units: size at which additive, "luong-concat" and "cosine" attention compare; the others do not use it.
        attention: "bahdanau", "bahdanau-normalized", "luong-dot", "luong-general", "luong-concat" or "cosine". For
            "luong-dot", which compares memory and state as they are, the outputs of the encoder's directions are added.
            Or one whose steps depend on the steps before (attn_kernels.mechanisms): "location", "location-cumulative",
            "coverage", "forward", "forward-agent", "monotonic", "mocha", "stepwise-monotonic", "local-m", "local-p",
            "milk", "gmm" or "dynamic-convolution". Its state is in ``DecoderState.attention``. Or "multi-head", with 4
            heads, each of ``units``, or "layer-norm". Or a module: a mechanism, or NormalizedAttention of one, whose
            query_size is ``hidden_size`` and memory_size 2 ``hidden_size``; one with a memory_size of ``hidden_size``
            gets the sum of the encoder's directions. Those with a state, "multi-head" and "layer-norm" go step by step
            in a search, and in training with input feeding, but for "location", "location-cumulative" and "coverage"
            with ``decoder="loop"``.
        cell: "lstm" or "gru".
        num_layers: of encoder and decoder.
        dropout: on embeddings, between layers and on the attentional vector.
        input_feeding: each step reads the attentional vector of the step before. Without it, training computes the
            attention of all steps in one call, which is much faster, if that has no state.
        decoder: how a whole target is computed with input feeding. "loop": as one op, which is faster; under
            torch.compile and autocast, which look into steps, and with most attentions that have a state, as "steps".
            "steps": one after the other. Parameters and results are the same.
        padding_idx: the token that fills up source and target; its embedding is 0.
        bos, eos: the target tokens before the first and after the last.
        backend: of the attention, as of :func:`attn_kernels.additive_attention`; None for a module, which has its own.
        cuda_graph: replay the loop on a GPU as a CUDA graph, captured when its shapes come for the second time; the
            lengths of source and target are padded to four sizes per doubling for that, and the 16 graphs used last
            are kept with their memory. False: launch its kernels one by one. It makes no difference to the results.
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
        result: tuple[Tensor, Tensor] = self.decoder(tokens, state, memory)
        return result

    if TYPE_CHECKING:
        __call__ = forward

    def encode(self, source: Tensor, source_lengths: Tensor) -> tuple[Memory, DecoderState]:
        """What decoding starts from: the memory, projected once, and the first state. Arguments as of ``forward``."""
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
        r"""Translates: for each sentence a list of hypotheses, each with tokens, score and alignments.

        **Beam search** returns the best hypotheses first; with ``beam_size=1`` and no penalty it is greedy search.
        Their score is

        .. math::
            \frac{\log P(Y \mid X)}{lp(Y)} + cp(X; Y) \qquad lp(Y) = \left(\frac{5 + |Y|}{6}\right)^\alpha \qquad
            cp(X; Y) = \beta \sum_j \log \min\Bigl(\sum_i a_{ij}, 1\Bigr)

        where Y counts eos as a token and a_ij is how much token i looked at step j of the source; a step at which none
        looked counts as 1.2e-38, so that scores stay finite. Source: Wu et al., "Google's neural machine translation
        system", 2016, section 7, equation 14.

        In each step every token continues every hypothesis of a sentence, and the log-probabilities decide: those among
        the best ``beam_size`` that end in eos are finished, the best ``beam_size`` that do not go on. Finished ones
        compete by score, and with them, after ``max_length`` steps, those that have not reached eos. A sentence leaves
        the batch as soon as the best log-probability that goes on, divided by lp at ``max_length``, is not above the
        score of finished hypothesis number ``num_hypotheses``: log-probabilities only fall and cp is at most 0, so that
        going on could not change the result. What a sentence gets does not depend on the others of its batch.

        **Sampling**, with ``sample=True``, draws each token from the probabilities of the model, and returns the
        hypotheses in the order drawn. Their score is the log-probability that the model gives them, whatever
        ``temperature`` and ``top_k`` were. The draws of a sentence depend on its batch.

        No token but eos is special: padding_idx and bos are generated where the model finds them probable.

        Args:
            source, source_lengths: as of ``forward``.
            beam_size: K, hypotheses of a sentence that are continued side by side.
            max_length: of the output, eos included; one that has not reached eos by then is returned as it is.
            length_penalty: alpha, at least 0; larger values favour longer outputs, 0 the likeliest.
            coverage_penalty: beta, at least 0; larger values favour outputs that look at all of the source.
            num_hypotheses: how many are returned for each sentence; None: ``beam_size``, and one sample. A sentence has
                fewer if there are no more outputs of a probability above 0, as in a tiny vocabulary, or the beam found
                no more.
            early_stopping: leave the batch also when ``beam_size`` hypotheses are finished, though others might become
                better yet. With a length penalty that is much sooner.
            weight_dtype: ``torch.bfloat16`` rounds the decoder's weights for this search, but for embeddings and
                biases: half as much memory is read in each step, which is faster where that decides, as with a large
                vocabulary. Products are of float32 states and summed in float32. For searches that run as one op. What
                was rounded is kept for the next search, which makes it anew if the weights have changed.
            sample: draw, and do not search.
            temperature: what the logits are divided by before drawing; above 0.
            top_k: draw from that many likeliest tokens only.
            generator: where the random numbers come from, on the device of the model; None: PyTorch's default.

        Without gradients, and as in evaluation mode, without dropout, whatever mode the model is in. No mode is
        switched: of a model that has modules in training mode, a shallow copy computes, so that another thread may
        train the model meanwhile. It shares parameters, buffers and hooks; attributes that a module of your own sets in
        its ``forward`` are set in the copy only. TorchScript modules keep the mode that they are in.

        Numbers may be those of NumPy.

        Raises ValueError or TypeError where an argument does not fit, or where searching or sampling has no use for it.
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
