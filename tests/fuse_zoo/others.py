"""Recommendation, forecasting, routing, sentiment, DSP: unusual axes and layouts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from . import ALIGNMENTS, CONTEXT, SCORES, A, H, M, case, linears, step


@case(ALIGNMENTS, lambda s, d: (d(s.B, H), d(s.B, H), d(s.B, 8, s.Tk)))
class SeriesAsKeys(linears(We=(2 * H, 8), Ue=(8, 8), ve=(8, 1, False))):
    """Attention over input series: units are time steps."""

    def forward(self, h, s, x):
        n = x.size(2)
        hs = torch.cat([h, s], 1).unsqueeze(1).repeat(1, n, 1)
        e = self.ve(torch.tanh(self.We(hs) + self.Ue(x.permute(0, 2, 1))))
        return F.softmax(e.squeeze(2), dim=1) * x[:, 0]


@case(SCORES, lambda s, d: (d(s.B, M), d(s.B, s.Tk, M), d.padding(s.B, s.Tk)))
class ScoresAsWeights(linears(W1=(M, A), W2=(M, A, False), q=(A, 1, False))):
    """No softmax: scores weigh the memory."""

    def forward(self, last, x, padding):
        alpha = self.q(torch.tanh(self.W1(last).view(last.size(0), 1, -1) + self.W2(x)))
        return (alpha * x * (~padding).unsqueeze(-1).to(x.dtype)).sum(1)


@case(CONTEXT, lambda s, d: (d(s.Tk, s.B, M), d(s.B, H), d.padding(s.B, s.Tk)))
class MatchedUtterances(linears(transform=(H + M, A, False), vector=(A, 1, False))):
    def forward(self, memory, x, padding):
        m_ = memory.transpose(0, 1)
        x_ = x.unsqueeze(1).expand(-1, memory.size(0), -1)
        alpha = F.softmax(self.vector(torch.tanh(self.transform(torch.cat([m_, x_], 2)))), 1).transpose(1, 2)
        return torch.bmm(alpha, m_)[:, 0, :], alpha


@case(ALIGNMENTS, lambda s, d: (d(s.B, s.Tq, M),))
class SelfPairs(linears(q=(M, A), k=(M, A), v=(A, 1))):
    """Every step is a query and a key; its own step is left out."""

    def forward(self, x):
        e = self.v(torch.tanh(self.q(x).unsqueeze(2) + self.k(x).unsqueeze(1))).squeeze(-1)
        e = e.masked_fill(torch.eye(x.size(1), dtype=torch.bool), -1e9)
        return F.softmax(e, -1)


@case(CONTEXT, lambda s, d: (d(s.B, s.Tq, M), d.padding(s.B, s.Tq)))
class CausalSelf(linears(q=(M, A), k=(M, A), v=(A, 1))):
    def forward(self, x, padding):
        e = self.v(torch.tanh(self.q(x).unsqueeze(2) + self.k(x).unsqueeze(1))).squeeze(-1)
        t = x.size(1)
        later = torch.ones(t, t, dtype=torch.bool).triu(1)
        e = e.masked_fill(later, float("-inf")).masked_fill(padding.unsqueeze(1), -1e9)
        a = F.softmax(e, -1)
        return torch.matmul(a, x)


@case(CONTEXT, step)
class NormalisedVector(nn.Module):
    """weight_norm of the score layer."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(H, A), nn.Linear(M, A)
        self.v = nn.utils.parametrizations.weight_norm(nn.Linear(A, 1))

    def forward(self, state, memory):
        a = torch.softmax(self.v(torch.tanh(self.q(state).unsqueeze(1) + self.k(memory))).squeeze(-1), 1)
        return torch.bmm(a.unsqueeze(1), memory)


@case(CONTEXT, step)
class KeysAsTheyAre(linears(q=(H, M), v=(M, 1))):
    """Nothing projected but the state."""

    def forward(self, state, memory):
        a = self.v(torch.tanh(memory + self.q(state)[:, None])).squeeze(-1).softmax(-1)
        return torch.einsum("bt,btm->bm", a, memory)


@case(CONTEXT, step)
class Difference(linears(q=(H, A), k=(M, A), v=(A, 1))):
    """W q - U k, both negated once more."""

    def forward(self, state, memory):
        a = self.v(torch.tanh(-(self.q(state)[:, None] - self.k(memory)))).squeeze(-1).softmax(-1)
        return torch.einsum("bt,btm->bm", a, memory)


@case(CONTEXT, lambda s, d: (d(s.B, s.Tq, H), d(s.B, s.Tk, M)))
class InterleavedRows(linears(q=(H, A), k=(M, A), v=(A, 1))):
    """repeat_interleave and repeat make all pairs in one axis."""

    def forward(self, query, memory):
        b, tq, tk = query.size(0), query.size(1), memory.size(1)
        q = self.q(query).repeat_interleave(tk, dim=1)
        k = self.k(memory).repeat(1, tq, 1)
        e = self.v(torch.tanh(q + k)).view(b, tq, tk)
        return torch.softmax(e, -1) @ memory


@case(CONTEXT, step)
class NamedTensordot(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(H, A), nn.Linear(M, A), nn.Parameter(torch.randn(A))

    def forward(self, state, memory):
        e = torch.tensordot(torch.tanh(self.k(memory) + self.q(state).unsqueeze(1)), self.v, dims=1)
        return torch.softmax(e, -1).unsqueeze(1) @ memory


@case(CONTEXT, lambda s, d: (d(s.B, 2, H), d(s.B, s.Tk, M), d.padding(s.B, s.Tk)))
class SumOfLayers(linears(W1=(M, A), W2=(H, A), V=(A, 1))):
    """The state is a sum over layers; a float mask is compared with 0."""

    def forward(self, hidden, memory, padding):
        mask = (~padding).to(memory.dtype)
        hidden = torch.sum(hidden, dim=1).unsqueeze(1)
        score = torch.tanh(self.W1(memory) + self.W2(hidden))
        scores = self.V(score).masked_fill(mask.unsqueeze(-1) == 0, -1e9)
        weights = torch.softmax(scores, dim=1)
        return torch.sum(weights * memory, dim=1), weights
