"""Scores that are products: dot, general, scaled, heads, pooling by weights; and what only looks like it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import ALIGNMENTS, CONTEXT, A, H, M, case, linears, step, step_padded


def _same_width(s, d):
    """State and memory of one width."""
    return d(s.B, M), d(s.B, s.Tk, M)


def _same_width_many(s, d):
    return d(s.B, s.Tq, M), d(s.B, s.Tk, M), d.padding(s.B, s.Tk)


def _memory(s, d):
    return (d(s.B, s.Tk, M),)


@case(ALIGNMENTS, lambda s, d: (d(1, s.B, M), d(s.Tk, s.B, M)))
class DotTimeMajor(nn.Module):
    """Product and sum, transposed, a softmax; the caller makes the context."""

    def forward(self, hidden, outputs):
        energies = torch.sum(hidden * outputs, dim=2).t()
        return F.softmax(energies, dim=1).unsqueeze(1)


@case(ALIGNMENTS, lambda s, d: (d(1, s.B, H), d(s.Tk, s.B, M)))
class GeneralTimeMajor(linears(attn=(M, H))):
    """The memory is projected to the width of the state."""

    def forward(self, hidden, outputs):
        energies = torch.sum(hidden * self.attn(outputs), dim=2).t()
        return F.softmax(energies, dim=1).unsqueeze(1)


@case(CONTEXT, step_padded)
class GeneralOfState(linears(linear_in=(H, M, False), linear_out=(H + M, H, False))):
    """The state is projected; the attentional state behind it is the user's."""

    def forward(self, h, context, mask):
        target = self.linear_in(h).unsqueeze(2)
        attn = torch.bmm(context, target).squeeze(2)
        attn = F.softmax(attn.masked_fill(mask, -float("inf")), dim=1)
        weighted = torch.bmm(attn.unsqueeze(1), context).squeeze(1)
        return torch.tanh(self.linear_out(torch.cat((weighted, h), 1))), attn


@case(CONTEXT, step)
class GeneralOfMemory(linears(W=(M, H))):
    """The keys are projected in each step."""

    def forward(self, state, memory):
        e = self.W(memory) @ state.unsqueeze(-1)
        return (F.softmax(e, 1) * memory).sum(1)


@case(CONTEXT, _same_width_many)
class ScaledByTheRoot(nn.Module):
    """No weights: the scale is the root of a size that may vary."""

    def forward(self, q, x, padding):
        scores = torch.bmm(q, x.transpose(1, 2)) / math.sqrt(q.size(-1))
        scores = scores.masked_fill(padding[:, None], -1e9)
        return torch.bmm(F.softmax(scores, dim=-1), x)


@case(CONTEXT, lambda s, d: (d(s.B, s.Tk, M), d.padding(s.B, s.Tk)), two={"heads": 2}, one={"heads": 1})
class HeadsOfSelfAttention(nn.Module):
    """Queries, keys and values of one input, heads as an axis of their own."""

    def __init__(self, heads):
        super().__init__()
        self.heads, self.width = heads, 4
        self.q, self.k, self.v = (nn.Linear(M, heads * 4) for _ in range(3))
        self.out = nn.Linear(heads * 4, M)

    def split(self, x):
        return x.view(x.size(0), x.size(1), self.heads, self.width).transpose(1, 2)

    def forward(self, x, padding):
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        scores = torch.matmul(q / self.width**0.5, k.transpose(-2, -1))
        scores = scores.masked_fill(padding[:, None, None], torch.finfo(scores.dtype).min)
        context = torch.matmul(torch.softmax(scores, -1), v)
        return self.out(context.transpose(1, 2).reshape(x.size(0), x.size(1), -1))


@case(CONTEXT, lambda s, d: (d(s.B, s.Tk, M),))
class CausalByAddition(linears(q=(M, A), k=(M, A))):
    """The mask is a matrix of 0 and -inf that is added."""

    def forward(self, x):
        steps = x.size(1)
        later = torch.full((steps, steps), float("-inf"), dtype=x.dtype).triu(1)
        return torch.softmax(torch.einsum("bqa,bka->bqk", self.q(x), self.k(x)) * 0.3 + later, -1) @ x


@case(CONTEXT, lambda s, d: (d(s.B, H), d(s.B, M, 3, s.Tk)))
class MapByEinsum(linears(q=(H, M))):
    """Positions of a map of features."""

    def forward(self, state, x):
        e = torch.einsum("bc,bchw->bhw", self.q(state), x)
        a = F.softmax(e.flatten(1), 1).view_as(e)
        return torch.einsum("bhw,bchw->bc", a, x)


@case(CONTEXT, step)
class ProductOfTanhs(linears(W=(H, A), U=(M, A))):
    def forward(self, state, memory):
        e = (torch.tanh(self.W(state))[:, None] * torch.tanh(self.U(memory))).sum(-1)
        return torch.bmm(F.softmax(e, -1)[:, None], memory)[:, 0]


@case(CONTEXT, step)
class LoopOfGeneral(nn.Module):
    """Steps with input feeding; the projection is written within the loop."""

    def __init__(self):
        super().__init__()
        self.W, self.cell, self.out = nn.Linear(M, H), nn.GRUCell(H, H), nn.Linear(H + M, H)

    def forward(self, state, memory):
        fed = torch.zeros_like(state)
        for _ in range(3):
            state = self.cell(fed, state)
            a = F.softmax(torch.bmm(self.W(memory), state[:, :, None]).squeeze(2), 1)
            fed = torch.tanh(self.out(torch.cat((state, torch.bmm(a[:, None], memory)[:, 0]), 1)))
        return fed


@case(CONTEXT, _memory)
class LinearPooling(linears(score=(M, 1))):
    """A bias that cancels, and the scores in an axis of their own."""

    def forward(self, x):
        a = torch.softmax(self.score(x), dim=1)
        return (a * x).sum(1), a


@case(CONTEXT, lambda s, d: (d(s.Tk, s.B, M),))
class PoolingTimeMajor(linears(scalar=(M, 1, False))):
    def forward(self, x):
        alpha = F.softmax(self.scalar(x), dim=0).permute(1, 2, 0)
        return torch.bmm(alpha, x.transpose(0, 1))[:, 0, :], alpha


@case(CONTEXT, _memory)
class SeveralPoolings(linears(score=(M, 3))):
    """A vector of weights for each of three views of a sentence."""

    def forward(self, x):
        a = torch.softmax(self.score(x).transpose(1, 2), -1)
        return torch.bmm(a, x)


@case(CONTEXT, lambda s, d: (d(s.B, s.Tk, M), d.padding(s.B, s.Tk)))
class LearnedQuery(nn.Module):
    """One query that is a weight, keys and values projected."""

    def __init__(self):
        super().__init__()
        self.query, self.k, self.v = nn.Parameter(torch.randn(A)), nn.Linear(M, A), nn.Linear(M, 4)

    def forward(self, x, padding):
        e = (self.k(x) @ self.query).masked_fill(padding, -1e10)
        return (F.softmax(e, -1).unsqueeze(-1) * self.v(x)).sum(1)


@case(CONTEXT, step, train=ALIGNMENTS)
class DropsWeightsOfProducts(nn.Module):
    def __init__(self):
        super().__init__()
        self.W, self.dropout = nn.Linear(H, M), nn.Dropout(0.3)

    def forward(self, state, memory):
        a = self.dropout(F.softmax(torch.bmm(memory, self.W(state)[:, :, None]), 1))
        return torch.bmm(a.transpose(1, 2), memory)


@case(CONTEXT, lambda s, d: (d(s.B, s.Tq, M), d(s.B, s.Tk, M), d(s.B, s.Tq, s.Tk)))
class BiasOfPairs(nn.Module):
    """Numbers that differ from pair to pair, with gradients of their own, are added to the scores."""

    def forward(self, q, x, bias):
        return torch.softmax(q @ x.mT + bias, -1) @ x


# What must stay as it is ----------------------------------------------------------------------------------------------


@case(None, _memory, why="no attention")
class Classifier(linears(out=(M, 4))):
    """A softmax over classes, whose vectors are weights."""

    def forward(self, x):
        return F.softmax(self.out(x), -1)


@case(None, step, why="no query")
class PoolingOfFeatures(linears(W=(H, A), U=(M, A), w=(A, 1))):
    """Features of an activation, weighed by a vector of weights: nothing is broadcast."""

    def forward(self, state, memory):
        a = F.softmax(self.w(F.relu(self.W(state)[:, None] + self.U(memory))), 1)
        return (a * memory).sum(1)


@case(None, _same_width, why="used for something else")
class ScoresOfProductsReturned(nn.Module):
    def forward(self, state, memory):
        e = torch.bmm(memory, state[:, :, None]).squeeze(2)
        return torch.bmm(F.softmax(e, 1)[:, None], memory)[:, 0], e


@case(None, _same_width, why="not far below")
class FillThatIsNotLow(nn.Module):
    def forward(self, state, memory):
        e = torch.bmm(memory, state[:, :, None]).squeeze(2)
        e = e.masked_fill(e.detach() < 0, -1e4)
        return torch.bmm(F.softmax(e, 1)[:, None], memory)[:, 0]


@case(None, _same_width)
class SigmoidOfProducts(nn.Module):
    """Scores that are no softmax."""

    def __init__(self):
        super().__init__()
        self.softmax = None  # its name alone makes the module be looked at

    def forward(self, state, memory):
        return (torch.sigmoid(memory @ state[:, :, None]) * memory).sum(1)
