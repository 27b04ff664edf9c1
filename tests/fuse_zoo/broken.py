"""Forwards that TorchDynamo captures as several graphs: sizes as numbers, packed sequences, choices by value."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from . import CONTEXT, A, H, M, case, linears, step


def _lengths(s, d):
    return d(s.B, H), d(s.B, s.Tk, M), d.lengths(s.B, s.Tk)


@case(CONTEXT, _lengths)
class LengthsAsNumbers(linears(W=(H, A), U=(M, A), v=(A, 1))):
    """The mask is made row by row from a list of numbers."""

    def padding(self, lengths, steps):
        return torch.tensor([[t >= n for t in range(steps)] for n in lengths])

    def forward(self, state, memory, lengths):
        mask = self.padding(lengths.tolist(), memory.size(1))
        e = self.v(torch.tanh(self.W(state)[:, None] + self.U(memory))).squeeze(-1)
        a = F.softmax(e.masked_fill(mask, -float("inf")), -1)
        return torch.bmm(a[:, None], memory)[:, 0], a


@case(CONTEXT, _lengths)
class PackedBefore(nn.Module):
    """A packed GRU makes the memory, attention follows."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(M, M, batch_first=True)
        self.W, self.U, self.v = nn.Linear(H, A), nn.Linear(M, A), nn.Linear(A, 1, bias=False)

    def forward(self, state, x, lengths):
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        memory, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        e = self.v(torch.tanh(self.W(state)[:, None] + self.U(memory)))
        return (F.softmax(e, 1) * memory).sum(1)


@case(CONTEXT, step)
class ChoiceByValue(linears(W=(H, A), U=(M, A), v=(A, 1))):
    """What is done after the attention depends on a number that is read."""

    def forward(self, state, memory):
        e = self.v(torch.tanh(self.W(state)[:, None] + self.U(memory))).squeeze(-1)
        context = torch.bmm(F.softmax(e, 1)[:, None], memory)[:, 0]
        if context.detach().sum().item() > 0:
            context = 2 * context
        return context


@case(None, _lengths, why="not one graph")
class NoAttentionInParts(linears(U=(M, A), v=(A, 1))):
    def forward(self, state, memory, lengths):
        x = torch.tanh(self.U(memory))
        if x.detach().sum().item() > 0:
            x = 2 * x
        return x.sum(1)
