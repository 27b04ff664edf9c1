"""Attention that must stay as it is: no query, another user of the tanh, another activation, a gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from . import A, H, M, case, linears, step, step_padded


def _memory(s, d):
    return (d(s.B, s.Tk, M),)


@case(None, _memory, why="no query")
class Pooling(linears(k=(M, A), v=(A, 1, False))):
    """Nothing is broadcast, so that nothing is gained."""

    def forward(self, x):
        a = torch.softmax(self.v(torch.tanh(self.k(x))), 1)
        return (a * x).sum(1)


@case(None, lambda s, d: (d(s.Tk, M),), why="no query")
class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.Sequential(nn.Linear(M, A), nn.Tanh(), nn.Linear(A, 1))

    def forward(self, x):
        a = F.softmax(self.attention(x).transpose(1, 0), dim=1)
        return torch.mm(a, x), a


@case(None, _memory, why="no query")
class GatedBag(linears(V=(M, A), U=(M, A), w=(A, 1))):
    def forward(self, x):
        a = self.w(torch.tanh(self.V(x)) * torch.sigmoid(self.U(x)))
        return (torch.softmax(a, 1) * x).sum(1)


@case(None, step, why="used for something else")
class TanhIsUsedTwice(linears(W=(H, A), U=(M, A), v=(A, 1))):
    def forward(self, state, memory):
        joint = torch.tanh(self.W(state)[:, None] + self.U(memory))
        a = torch.softmax(self.v(joint).squeeze(-1), 1)
        return torch.bmm(a[:, None], memory), joint.mean(1)


@case(None, step, why="score vectors")
class SeveralVectors(linears(W=(H, A), U=(M, A), v=(A, 4))):
    def forward(self, state, memory):
        a = torch.softmax(self.v(torch.tanh(self.W(state)[:, None] + self.U(memory))), 1)
        return torch.bmm(a.transpose(1, 2), memory)


@case(None, step)
class TanhAfter(linears(W=(H, A), U=(M, A), v=(A, 1))):
    """The tanh is taken of the score."""

    def forward(self, state, memory):
        a = torch.softmax(torch.tanh(self.v(self.W(state)[:, None] + self.U(memory))).squeeze(-1), 1)
        return torch.bmm(a[:, None], memory)


@case(None, step)
class NormBeforeTanh(nn.Module):
    def __init__(self):
        super().__init__()
        self.W, self.U, self.v, self.norm = nn.Linear(H, A), nn.Linear(M, A), nn.Linear(A, 1), nn.LayerNorm(A)

    def forward(self, state, memory):
        x = torch.tanh(self.norm(self.W(state)[:, None] + self.U(memory)))
        a = torch.softmax(self.v(x).squeeze(-1), 1)
        return torch.bmm(a[:, None], memory)


@case(None, lambda s, d: (d(s.B, s.Tk, M),), why="no query")
class PairsAndTheirTranspose(linears(W=(M, A), U=(M, A), v=(A, 1))):
    """x + x.T: both terms have all axes."""

    def forward(self, x):
        pairs = self.W(x)[:, None] * self.U(x)[:, :, None]
        e = self.v(torch.tanh(pairs + pairs.transpose(1, 2))).squeeze(-1)
        return torch.softmax(e, 1)


@case(None, step)
class PerChannel(linears(W=(H, A), U=(M, A), V=(A, M))):
    """Weights for each channel: no score vector."""

    def forward(self, state, memory):
        a = torch.softmax(self.V(torch.tanh(self.W(state)[:, None] + self.U(memory))), 1)
        return (a * memory).sum(1)


@case("context", step, train=None, why="tanh")
class DropsTanh(nn.Module):
    """Dropout of the tanh: in training it is another computation."""

    def __init__(self):
        super().__init__()
        self.W, self.U, self.v = nn.Linear(H, A), nn.Linear(M, A), nn.Linear(A, 1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, state, memory):
        x = self.dropout(torch.tanh(self.W(state)[:, None] + self.U(memory)))
        a = torch.softmax(self.v(x).squeeze(-1), 1)
        return torch.bmm(a[:, None], memory)


@case(None, step)
class TanhOfSomethingElse(linears(out=(H + M, A))):
    """A tanh, but no attention."""

    def forward(self, state, memory):
        return torch.tanh(self.out(torch.cat([state, memory.mean(1)], -1)))


@case(None, step_padded)
class WrittenThroughAView(linears(W=(H, A), U=(M, A), v=(A, 1))):
    """Part of the keys is overwritten through a view before they are used."""

    def forward(self, state, memory, padding):
        x = self.W(state)[:, None] + self.U(memory)
        x[:, 0] = 0.5
        a = torch.softmax(self.v(torch.tanh(x)).squeeze(-1), 1)
        return torch.bmm(a[:, None], memory)
