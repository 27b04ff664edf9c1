"""Decoders: attention within loops, options, control flow, two attentions in one module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from . import ALIGNMENTS, CONTEXT, A, H, M, case, linears, step, step_padded


class Inner(linears(W=(H, A), U=(M, A), v=(A, 1, False))):
    """Weights only: the caller makes the context."""

    def forward(self, state, memory, padding=None):
        e = self.v(torch.tanh(self.W(state).unsqueeze(1) + self.U(memory))).squeeze(2)
        if padding is not None:
            e = e.masked_fill(padding, -1e9)
        return F.softmax(e, dim=1)


@case(ALIGNMENTS, step_padded)
class Loop(nn.Module):
    """Steps of a cell in a Python loop over a module of attention."""

    def __init__(self):
        super().__init__()
        self.attention, self.cell = Inner(), nn.GRUCell(M, H)

    def forward(self, state, memory, padding):
        states = []
        for _ in range(3):
            a = self.attention(state, memory, padding)
            state = self.cell(torch.bmm(a.unsqueeze(1), memory).squeeze(1), state)
            states.append(state)
        return torch.stack(states, 1)


@case(CONTEXT, step)
class LoopWithin(nn.Module):
    """The loop and the attention in one forward."""

    def __init__(self):
        super().__init__()
        self.W, self.U, self.v = nn.Linear(H, A), nn.Linear(M, A), nn.Linear(A, 1, bias=False)
        self.cell = nn.LSTMCell(M, H)

    def forward(self, state, memory):
        cell = torch.zeros_like(state)
        for _ in range(3):
            e = self.v(torch.tanh(self.W(state).unsqueeze(1) + self.U(memory)))
            context = (F.softmax(e, 1) * memory).sum(1)
            state, cell = self.cell(context, (state, cell))
        return state


@case(CONTEXT, step, additive={"kind": "additive"}, joined={"kind": "joined"})
class Options(nn.Module):
    """One class for several mechanisms, chosen by a string."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.W, self.U, self.v = nn.Linear(H, A), nn.Linear(M, A), nn.Linear(A, 1, bias=False)
        self.J = nn.Linear(H + M, A)

    def forward(self, state, memory):
        if self.kind == "additive":
            x = self.W(state)[:, None] + self.U(memory)
        else:
            x = self.J(torch.cat([state[:, None].expand(-1, memory.size(1), -1), memory], -1))
        e = self.v(torch.tanh(x)).squeeze(-1)
        return torch.bmm(F.softmax(e, -1)[:, None], memory)[:, 0]


@case(CONTEXT, step)
class TwoMemories(linears(W=(H, A), U=(M, A), v=(A, 1, False))):
    """Double use: one set of layers on the memory and on its reverse."""

    def attend(self, state, memory):
        e = self.v(torch.tanh(self.W(state)[:, None] + self.U(memory))).squeeze(-1)
        return torch.bmm(torch.softmax(e, 1)[:, None], memory)[:, 0]

    def forward(self, state, memory):
        return self.attend(state, memory) + 2 * self.attend(state, memory.flip(1) * 0.5)


@case(CONTEXT, step)
class InPlaceSum(linears(W=(H, A), U=(M, A), v=(A, 1, False))):
    """The sum is added to in place, and its tanh is taken in place."""

    def forward(self, state, memory):
        x = self.W(state)[:, None] + self.U(memory)
        x = x.tanh_()
        e = self.v(x).squeeze(-1)
        return torch.bmm(torch.softmax(e, 1)[:, None], memory)[:, 0]


@case(CONTEXT, step)
class AnyMask(linears(W=(H, A), U=(M, A), v=(A, 1, False))):
    """mask=None by default, made by a method."""

    def forward(self, state, memory, mask=None):
        e = self.v(torch.tanh(self.W(state)[:, None] + self.U(memory))).squeeze(-1)
        if mask is not None:
            e = e.masked_fill(mask == 0, torch.finfo(e.dtype).min)
        return torch.bmm(torch.softmax(e, 1)[:, None], memory)[:, 0]


@case("context in attention.v", step_padded)
class Caller(nn.Module):
    """Weights from a module, the context and the cell here: one chain over two modules."""

    def __init__(self):
        super().__init__()
        self.attention, self.rnn, self.out = Inner(), nn.GRU(M, H), nn.Linear(H + M, 4)

    def forward(self, state, memory, padding):
        a = self.attention(state, memory, padding).unsqueeze(1)
        context = torch.bmm(a, memory)
        output, state = self.rnn(context.transpose(0, 1), state.unsqueeze(0))
        return self.out(torch.cat((output.squeeze(0), context.squeeze(1)), 1)), state.squeeze(0), a
