"""Speech: location features, heads, tanh of each side, statistics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from . import ALIGNMENTS, CONTEXT, SCORES, A, H, M, case, linears, many_padded, step, step_padded


def _located(s, d):
    return d(s.B, H), d(s.B, s.Tk, M), d(s.B, s.Tk, A), d.constant(s.B, 2, s.Tk), d.padding(s.B, s.Tk)


@case(CONTEXT, _located)
class Location(nn.Module):
    """Keys given, features of the previous alignments by a convolution."""

    def __init__(self):
        super().__init__()
        self.query, self.v = nn.Linear(H, A, bias=False), nn.Linear(A, 1, bias=False)
        self.conv, self.dense = nn.Conv1d(2, 3, 5, padding=2, bias=False), nn.Linear(3, A, bias=False)

    def forward(self, state, memory, processed, previous, padding):
        located = self.dense(self.conv(previous).transpose(1, 2))
        energies = self.v(torch.tanh(self.query(state.unsqueeze(1)) + located + processed)).squeeze(-1)
        energies.data.masked_fill_(padding, float("-inf"))
        weights = F.softmax(energies, dim=1)
        return torch.bmm(weights.unsqueeze(1), memory).squeeze(1), weights


@case(SCORES, _located)
class Smoothed(Location):
    """Sigmoids divided by their sum."""

    def forward(self, state, memory, processed, previous, padding):
        located = self.dense(self.conv(previous).transpose(1, 2))
        energies = self.v(torch.tanh(self.query(state.unsqueeze(1)) + processed + located)).squeeze(-1)
        scores = torch.sigmoid(energies).masked_fill(padding, 0.0)
        return scores / scores.sum(dim=1, keepdim=True)


@case(SCORES, _located)
class MultipliedMask(Location):
    """Scores times a mask: padding keeps the weight of a score of 0."""

    def forward(self, state, memory, processed, previous, padding):
        u = self.v(torch.tanh(self.query(state).unsqueeze(1) + processed + self.dense(self.conv(previous).mT)))
        u = u.squeeze(-1) * (~padding).to(u.dtype)
        scores = F.softmax(u, dim=1)
        return scores.unsqueeze(-1).transpose(1, 2)


@case(CONTEXT, lambda s, d: (d(s.B, H), d(s.B, s.Tk, M), d.constant(s.B, s.Tk), d.lengths(s.B, s.Tk)))
class TanhOfEach(nn.Module):
    """A tanh of every side before the sum, and one after; a mask made of lengths; a temperature."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(H, A), nn.Linear(M, A)
        self.conv, self.loc = nn.Conv1d(1, 4, 3, padding=1), nn.Linear(4, A, bias=False)
        self.energy = nn.Linear(A, 1)

    def forward(self, state, memory, previous, lengths):
        q, k = torch.tanh(self.q(state)), torch.tanh(self.k(memory))
        loc = torch.tanh(self.loc(self.conv(previous.unsqueeze(1)).transpose(1, 2)))
        e = self.energy(torch.tanh(k + q.unsqueeze(1) + loc)).squeeze(2)
        e = e.masked_fill(torch.arange(e.size(1))[None] >= lengths[:, None], -float("inf")) / 0.5
        a = F.softmax(e, dim=-1)
        return a, torch.bmm(a.unsqueeze(1), memory).squeeze(1)


@case(CONTEXT, step_padded, one={"heads": 1}, three={"heads": 3})
class HeadsInBatch(nn.Module):
    """Heads folded into the batch, the score vector shared."""

    def __init__(self, heads=2):
        super().__init__()
        self.heads, self.d = heads, 4
        self.q, self.k, self.value = nn.Linear(H, heads * 4), nn.Linear(M, heads * 4), nn.Linear(M, heads * 2)
        self.v = nn.Linear(4, 1, bias=False)

    def forward(self, state, memory, padding):
        b, t, h = memory.size(0), memory.size(1), self.heads
        q = self.q(state).view(b, h, self.d).reshape(b * h, 1, self.d)
        k = self.k(memory).view(b, t, h, self.d).permute(0, 2, 1, 3).reshape(b * h, t, self.d)
        x = self.value(memory).view(b, t, h, 2).permute(0, 2, 1, 3).contiguous().view(b * h, t, 2)
        mask = padding.unsqueeze(1).repeat(1, h, 1).view(b * h, t)
        e = self.v(torch.tanh(q + k)).squeeze(-1).masked_fill(mask, -1e30)
        c = torch.bmm(F.softmax(e, -1).unsqueeze(1), x)
        return c.view(b, h * 2)


@case(CONTEXT, many_padded)
class ManyQueriesTimeMajor(nn.Module):
    """Queries and memory time-major outside, a mask per batch row, a temperature on the scores."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(H, A, bias=False), nn.Linear(M, A), nn.Linear(M, 4)
        self.v = nn.Linear(A, 1, bias=False)

    def forward(self, queries, memory, padding):
        queries, memory = queries.transpose(0, 1), memory.transpose(0, 1)
        keys, values = self.key(memory).transpose(0, 1), self.value(memory).transpose(0, 1)
        q = self.query(queries).transpose(0, 1)
        attn = self.v((q[:, :, None] + keys[:, None]).tanh())[..., 0] / 1.5
        attn.data.masked_fill_(padding[:, None].repeat(1, q.size(1), 1), -float("inf"))
        attn = F.softmax(attn, 2)
        return torch.bmm(attn, values).transpose(1, 2), attn


@case(SCORES, lambda s, d: (d(s.B, H), d(s.B, s.Tk, M)))
class NoiseBeforeSigmoid(nn.Module):
    """Monotonic: a normalised score vector, an offset, products of 1 - p."""

    def __init__(self):
        super().__init__()
        self.W, self.V = nn.Linear(H, A, bias=False), nn.Linear(M, A, bias=False)
        self.b, self.v = nn.Parameter(torch.zeros(A)), nn.Parameter(torch.randn(A))
        self.g, self.r = nn.Parameter(torch.tensor(0.4)), nn.Parameter(torch.tensor(-1.0))

    def forward(self, state, memory):
        v = self.g * self.v / self.v.norm()
        e = torch.tanh(self.W(state)[:, None] + self.V(memory) + self.b) @ v + self.r
        p = torch.sigmoid(e)
        return p * torch.cumprod(1 - p + 1e-6, dim=1)


@case(ALIGNMENTS, step)
class KeptOnModule(nn.Module):
    """The alignments are state of the module, and no context is made here."""

    def __init__(self):
        super().__init__()
        self.W, self.U, self.v = nn.Linear(H, A), nn.Linear(M, A), nn.Linear(A, 1)
        self.attention = None

    def forward(self, state, memory):
        scores = self.v(torch.tanh(self.W(state).unsqueeze(1) + self.U(memory)))
        self.attention = F.softmax(scores.squeeze(-1), dim=-1)
        return self.attention.unsqueeze(-1).transpose(1, 2)


@case(CONTEXT, step_padded)
class LogPrior(linears(W=(H, A), U=(M, A), v=(A, 1))):
    def forward(self, state, memory, padding):
        prior = torch.softmax(memory.mean(-1).detach(), -1)
        scores = self.v(torch.tanh(self.W(state).unsqueeze(1) + self.U(memory))).squeeze(-1) + torch.log(prior + 1e-6)
        return scores.masked_fill(padding, -1e9).softmax(1) @ memory.new_ones(memory.size(1), 2)
