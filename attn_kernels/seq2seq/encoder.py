"""Encoders: an LSTM or GRU over sentences of different lengths, and one with an embedding before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..checks import check_tensor, shape_of
from ..errors import ArgumentTypeError, ArgumentValueError
from .recurrent import States, checked_lengths, run_recurrent, run_sequence, run_tokens

CELLS: dict[str, type[nn.LSTM] | type[nn.GRU]] = {"lstm": nn.LSTM, "gru": nn.GRU}


class Encoder(nn.Module):
    r"""LSTM or GRU for a padded batch of sentences of different lengths: ``nn.LSTM`` or ``nn.GRU`` that takes lengths.

    The results are those of ``pack_padded_sequence``, the layer and ``pad_packed_sequence``, for sentences of length 0,
    too. On the CPU, where each step of PyTorch's packed layers has a backward that writes the whole batch, a layer is
    one node of autograd; other devices run packed.

    Args:
        input_size, hidden_size, num_layers, bias, dropout, bidirectional: as of ``nn.LSTM``. dropout: between layers.
        cell: "lstm" or "gru".
        batch_first: inputs and outputs are (B, S, \*); False: (S, B, \*).
        device, dtype: of the parameters.

    ``rnn`` is the ``nn.LSTM`` or ``nn.GRU`` that has the parameters. ``load_state_dict`` takes the state_dict of such a
    layer as well as that of an encoder. What is done to it is kept: with hooks, parametrizations, pruning or a class of
    its own it is called, with packed inputs, and so it is under torch.compile, autocast and transforms of torch.func,
    and in dtypes other than float32 and float64.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        cell: str = "lstm",
        bias: bool = True,
        batch_first: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if cell not in CELLS:
            raise ArgumentValueError(f"Encoder: cell must be one of {', '.join(map(repr, CELLS))}, got {cell!r}")
        options: dict[str, Any] = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
        self._set(
            CELLS[cell](input_size, hidden_size, num_layers, dropout=dropout, device=device, dtype=dtype, **options)
        )

    @classmethod
    def from_module(cls, rnn: nn.LSTM | nn.GRU) -> Encoder:
        """An encoder that runs the given layer itself; parameters are shared, not copied.

        Raises TypeError if it is none of ``nn.LSTM`` and ``nn.GRU``.
        """
        if not isinstance(rnn, nn.LSTM | nn.GRU):
            raise ArgumentTypeError(f"Encoder.from_module: rnn must be an nn.LSTM or nn.GRU, got {type(rnn).__name__}")
        encoder = cls.__new__(cls)
        nn.Module.__init__(encoder)
        encoder._set(rnn)
        return encoder.train(rnn.training)

    def _set(self, rnn: nn.LSTM | nn.GRU) -> None:
        self.rnn = rnn
        self.register_load_state_dict_pre_hook(_add_prefix)  # type: ignore[no-untyped-call]  # torch has no types for it

    def forward(
        self,
        inputs: Tensor | PackedSequence,
        lengths: Tensor | None = None,
        states: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor | tuple[Tensor, Tensor]]:
        r"""inputs: (B, S, input_size), or (S, B, \*) with batch_first=False. What their padding holds does not matter.
            Or a ``PackedSequence``, without lengths: the outputs are another one then, and nothing is padded.
        lengths: (B,) int32 or int64, 0..S; on the CPU, or it is waited for. states: the first ones, as of ``nn.LSTM``:
            (hidden, cell), of a GRU hidden, (num_layers * D, B, hidden_size) each, with D directions. None: zeros.

        Returns outputs, (B, S, D * hidden_size), with zeros in the padding, and the states after the last step of each
        sentence, shaped as the first ones; of an empty sentence, its first states.

        Raises ValueError or TypeError where an argument does not fit.
        """
        if isinstance(inputs, PackedSequence):
            return self._run_sequence(inputs, lengths, states)
        check_tensor("Encoder", "inputs", inputs)
        batch_first, size = getattr(self.rnn, "batch_first", True), getattr(self.rnn, "input_size", None)
        if inputs.dim() != 3 or (size is not None and inputs.shape[2] != size):
            axes = "(B, S, input_size)" if batch_first else "(S, B, input_size)"
            raise ArgumentValueError(f"Encoder: inputs must have shape {axes} = (*, *, {size}), got {shape_of(inputs)}")
        batch, steps = inputs.shape[:2] if batch_first else (inputs.shape[1], inputs.shape[0])
        lengths = checked_lengths("Encoder", "lengths", lengths, batch, steps)
        return run_recurrent(self.rnn, inputs, lengths, states)

    if TYPE_CHECKING:
        __call__ = forward

    def _run_sequence(
        self, inputs: PackedSequence, lengths: Tensor | None, states: States | None
    ) -> tuple[PackedSequence, States]:
        if lengths is not None:
            raise ArgumentValueError("Encoder: lengths must be None with a PackedSequence, which has its own")
        size = getattr(self.rnn, "input_size", None)
        if inputs.data.dim() != 2 or (size is not None and inputs.data.shape[1] != size):
            got = shape_of(inputs.data)
            raise ArgumentValueError(f"Encoder: inputs must have data (N, input_size) = (*, {size}), got {got}")
        return run_sequence(self.rnn, inputs, states)


def _add_prefix(encoder: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Names of a state_dict of an ``nn.LSTM`` become those of an encoder."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        rest = name[len(prefix) :]
        if rest.startswith(("weight_", "bias_")):
            state_dict[f"{prefix}rnn.{rest}"] = state_dict.pop(name)


class TokenEncoder(nn.Module):
    """The encoder of Seq2Seq: embedding, dropout, and bidirectional layers with ``hidden_size`` units per direction.

    With ``sum_directions`` the outputs of both directions are added, not concatenated: memory_size is then hidden_size,
    which attention without a projection of the memory needs, and not 2 * hidden_size.
    """

    def __init__(
        self,
        vocab: int,
        embedding_size: int,
        hidden_size: int,
        *,
        cell: str,
        num_layers: int,
        dropout: float,
        padding_idx: int,
        sum_directions: bool,
        factory: dict[str, Any],
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.padding_idx = padding_idx
        self.sum_directions = sum_directions
        self.embedding: nn.Embedding = nn.Embedding(vocab, embedding_size, padding_idx=padding_idx, **factory)
        self.dropout: nn.Dropout = nn.Dropout(dropout)
        self.rnn: nn.GRU | nn.LSTM = CELLS[cell](
            embedding_size,
            hidden_size,
            num_layers,
            batch_first=True,
            dropout=dropout if num_layers > 1 else 0.0,
            bidirectional=True,
            **factory,
        )

    @property
    def memory_size(self) -> int:
        return self.hidden_size if self.sum_directions else 2 * self.hidden_size

    def forward(self, source: Tensor, source_lengths: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """source: (B, S) tokens. source_lengths: (B,), 0..S.

        Returns the memory, (B, S, memory_size), with zeros in its padding, and the final states: one tensor
        (num_layers, B, 2 * hidden_size) for a GRU, two (hidden, cell) for an LSTM; zeros for a sentence of length 0.
        """
        lengths = source_lengths if torch.compiler.is_exporting() else source_lengths.to("cpu", torch.int64)
        outputs, final = run_tokens(self.rnn, self.embedding, self.dropout, source, lengths)
        if self.sum_directions:
            outputs = outputs[..., : self.hidden_size] + outputs[..., self.hidden_size :]
        states = tuple(self._join_directions(state) for state in (final if isinstance(final, tuple) else (final,)))
        return outputs, states

    if TYPE_CHECKING:
        __call__ = forward

    def _join_directions(self, state: Tensor) -> Tensor:
        """(num_layers * 2, B, hidden_size) -> (num_layers, B, 2 * hidden_size)"""
        forward, backward = state.unflatten(0, (self.num_layers, 2)).unbind(1)
        return torch.cat([forward, backward], dim=-1)
