"""Attention within a window that moves with the alignments: it prevents a decoder from skipping and going back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..attention_module import AttentionModule
from ..checks import check_size
from ..errors import ArgumentTypeError
from ..memory import Memory
from .alignments import first_step_alignments
from .heads import MultiHeadAttention
from .local import LocalAttention, window_mask
from .normalizers import NormalizedAttention
from .pointer import PointerAttention
from .stateful import StatefulAttention, StatefulResult


class WindowedAttention(StatefulAttention):
    r"""An attention mechanism restricted to a window around the step with the largest previous alignment.

    .. math::
        p_i = \operatorname{argmax}_j \; alignments_{i-1,j}, \quad
        \text{allowed: } p_i - behind \le j \le p_i + ahead

    Each row, and each hypothesis of a search, has its own window. It is called like a mechanism with a state::

        attention = WindowedAttention(LocationSensitiveAttention(query_size, memory_size, units))
        memory = attention.memory(encoder_outputs, memory_lengths)
        state = attention.initial_state(memory)
        context, alignments, state = attention(decoder_state, memory, state)

    Source: the attention constraint of Ping et al., "Deep Voice 3: scaling text-to-speech with convolutional sequence
    learning", 2018, as speech synthesis uses it at inference. ``behind`` is ESPnet's ``backward_window`` and the
    ``win_back`` of coqui-tts; ``ahead + 1`` is ``forward_window`` and ``win_front``. Both libraries support one
    sentence only.

    If the alignments of a step are all 0, the window does not move. To move it, pass a state with other positions:
    ``(positions, *state[1:])``.

    Args:
        attention: the mechanism, with a state or without: a module of ``attn_kernels`` or ``attn_kernels.mechanisms``,
            or ``NormalizedAttention``. PointerAttention, MultiHeadAttention and LocalAttention are not supported;
            LocalAttention has its own window.
        behind, ahead: how many steps before and after p may be attended.
        in_training: whether the window also applies in training mode. If not, steps attend the whole memory in
            training, and the positions are still updated.

    Parameters: those of ``attention``, with that prefix.

    State: a tuple of the positions and the tensors of the state of ``attention``. positions: (B, K, 1) int64; initially
    the first step that may be attended.
    """

    attention: Any

    def __init__(
        self,
        attention: AttentionModule | NormalizedAttention,
        behind: int = 1,
        ahead: int = 2,
        in_training: bool = False,
    ) -> None:
        super(AttentionModule, self).__init__()  # the only parameters are those of the mechanism
        self._name = type(self).__name__
        module = attention.attention if isinstance(attention, NormalizedAttention) else attention
        refused = (PointerAttention, MultiHeadAttention, LocalAttention, WindowedAttention)
        if not isinstance(module, AttentionModule) or isinstance(module, refused):
            expected = "a mechanism of a context and one row of alignments, without a window of its own"
            raise ArgumentTypeError(f"{self._name}: attention must be {expected}, got {type(module).__name__}")
        self.attention = attention
        self.behind: int = check_size(self._name, "behind", behind, least=0)
        self.ahead: int = check_size(self._name, "ahead", ahead, least=0)
        self.in_training = in_training
        self.query_size: int = module.query_size
        self.memory_size: int = module.memory_size
        self.key_size: int = module.key_size
        self.backend: str | None = module.backend

    def reset_parameters(self) -> None:
        module = self.attention
        (module.attention if isinstance(module, NormalizedAttention) else module).reset_parameters()

    def memory(
        self,
        memory: Tensor | PackedSequence,
        memory_lengths: Tensor | None = None,
        mask: Tensor | None = None,
        memory_offsets: Tensor | None = None,
    ) -> Memory:
        """The memory of the mechanism, computed once per sentence. A packed memory is padded."""
        made: Memory = self.attention.memory(memory, memory_lengths, mask, memory_offsets)
        return made.padded()

    def initial_state(self, memory: Memory, hypotheses: int = 1) -> tuple[Tensor, ...]:
        first = first_step_alignments(memory, hypotheses, torch.float32)
        inner = self.attention.initial_state(memory, hypotheses) if self._has_state() else ()
        return _most(first, first.new_zeros(*first.shape[:2], 1, dtype=torch.int64)), *inner

    def _step(self, query: Tensor, memory: Memory, state: Any) -> StatefulResult:
        position, *inner = state
        if self.in_training or not self.training:
            mask = window_mask(position.squeeze(2), (self.behind, self.ahead), memory.keys.shape[1])
            if memory.mask is not None:
                mask = mask & (memory.mask if memory.mask.dim() == 3 else memory.mask[:, None])
            memory = memory.with_mask(mask)
        if self._has_state():
            context, alignments, inner = self.attention(query, memory, tuple(inner))
        else:
            context, alignments = self.attention(query, memory)
        return StatefulResult(context, alignments, (_most(alignments, position), *inner))

    def _has_state(self) -> bool:
        return isinstance(self.attention, StatefulAttention)

    def _check(self, query: Tensor, memory: Memory) -> None:
        if not isinstance(memory, Memory):
            self._refuse(memory, "a Memory")
        self._check_query(query, memory.batch_size)  # the mechanism checks the rest

    def _check_state(self, query: Tensor, state: Any) -> None:
        super()._check_state(query, state)
        position = state[0] if state else None
        if position is None or position.dim() != 3 or position.shape[2] != 1 or position.is_floating_point():
            got = "()" if position is None else f"{tuple(position.shape)} of {position.dtype}"
            raise ArgumentTypeError(
                f"{self._name}: the first tensor of state must be positions, (B, K, 1) int64, got {got}"
            )

    def extra_repr(self) -> str:
        return f"behind={self.behind}, ahead={self.ahead}, in_training={self.in_training}"


def _most(alignments: Tensor, position: Tensor) -> Tensor:
    """(B, K, 1): the step with the largest weight of each row; the previous position if all weights are 0."""
    if alignments.shape[2] == 0:
        return position
    largest, step = alignments.max(2, keepdim=True)
    return torch.where(largest > 0, step, position)
