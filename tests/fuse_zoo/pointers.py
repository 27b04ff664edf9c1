"""Pointers, routing, reading, SQL: scores and log-probabilities as results."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import ALIGNMENTS, CONTEXT, SCORES, A, H, M, case, linears, many, many_padded, step, step_padded


@case(SCORES, step_padded)
class LogProbabilities(nn.Module):
    def __init__(self):
        super().__init__()
        self.W1, self.W2, self.vt = (
            nn.Linear(M, A, bias=False),
            nn.Linear(H, A, bias=False),
            nn.Linear(A, 1, bias=False),
        )

    def forward(self, state, memory, padding):
        u = self.vt(torch.tanh(self.W1(memory) + self.W2(state).unsqueeze(1))).squeeze(-1)
        return F.log_softmax(u + ((~padding).to(u.dtype) + 1e-45).log(), dim=-1)


@case(SCORES, step_padded)
class ClippedLogits(nn.Module):
    """Channels first, C tanh(u) as logits, visited places masked."""

    def __init__(self):
        super().__init__()
        self.project_q, self.project_ref = nn.Linear(H, A), nn.Conv1d(M, A, 1)
        self.v = nn.Parameter(torch.rand(A))

    def forward(self, query, ref, visited):
        ref = ref.permute(0, 2, 1)
        q = self.project_q(query).unsqueeze(2)
        e = self.project_ref(ref)
        expanded = q.repeat(1, 1, e.size(2))
        v = self.v.unsqueeze(0).expand(expanded.size(0), len(self.v)).unsqueeze(1)
        u = torch.bmm(v, torch.tanh(expanded + e)).squeeze(1)
        logits = 10 * torch.tanh(u)
        logits[visited] = -math.inf
        return e, torch.log_softmax(logits, 1)


@case(CONTEXT, step)
class Glimpse(nn.Module):
    """The projected references are the values, too."""

    def __init__(self):
        super().__init__()
        self.q, self.ref = nn.Linear(H, A), nn.Conv1d(M, A, 1)
        self.v = nn.Parameter(torch.rand(1, 1, A))

    def forward(self, query, ref):
        e = self.ref(ref.transpose(1, 2))
        u = torch.matmul(self.v, torch.tanh(e + self.q(query)[:, :, None])).squeeze(1)
        return torch.bmm(e, torch.softmax(u, -1).unsqueeze(2)).squeeze(2)


def _static_dynamic(s, d):
    return d(s.B, M, s.Tk), d(s.B, 4, s.Tk), d(s.B, H, 1)


@case(ALIGNMENTS, _static_dynamic)
class ExpandedWeights(nn.Module):
    """Three inputs joined, weights expanded over the batch, two bmms."""

    def __init__(self):
        super().__init__()
        self.v, self.W = nn.Parameter(torch.randn(1, 1, A)), nn.Parameter(torch.randn(1, A, M + 4 + H))

    def forward(self, static, dynamic, hidden):
        b = static.size(0)
        hidden = hidden.expand(b, H, static.size(2))
        joined = torch.cat((static, dynamic, hidden), 1)
        v, w = self.v.expand(b, 1, A), self.W.expand(b, A, -1)
        return F.softmax(torch.bmm(v, torch.tanh(torch.bmm(w, joined))), dim=2)


@case(CONTEXT, many_padded)
class Hops(nn.Module):
    """A hop of attention, and raw scores of a second one."""

    def __init__(self):
        super().__init__()
        self.wm, self.wq, self.v = (nn.Parameter(torch.randn(n, m) / 3) for n, m in ((M, A), (H, A), (A, 1)))
        self.wm2, self.wq2, self.v2 = (nn.Parameter(torch.randn(n, m) / 3) for n, m in ((M, A), (M, A), (A, 1)))

    def forward(self, query, memory, padding):
        k, k2 = torch.matmul(memory, self.wm), torch.matmul(memory, self.wm2)
        e = torch.matmul(torch.tanh(k.unsqueeze(1) + torch.matmul(query, self.wq).unsqueeze(2)), self.v).squeeze(-1)
        a = e.masked_fill(padding.unsqueeze(1), -1e18).softmax(-1)
        hop = torch.matmul(a, memory)
        return torch.matmul(torch.tanh(k2.unsqueeze(1) + torch.matmul(hop, self.wq2).unsqueeze(2)), self.v2).squeeze(-1)


@case(CONTEXT, lambda s, d: (d(1, H), d(s.Tk, M)))
class OneQuestion(nn.Module):
    """No batch: one state against the rows of a matrix, by a Sequential over pairs."""

    def __init__(self):
        super().__init__()
        self.compute_scores = nn.Sequential(nn.Linear(H + M, A), nn.Tanh(), nn.Linear(A, 1))

    def forward(self, query, memory):
        query = query.expand(memory.size(0), -1)
        scores = self.compute_scores(torch.cat([query, memory], 1)).squeeze(1)
        weights = F.softmax(scores, dim=0)
        return torch.mv(memory.t(), weights), weights


@case(SCORES, many)
class RawScores(linears(query=(H, A), key=(M, A), v=(A, 1))):
    def forward(self, query, memory):
        return self.v(torch.tanh(self.query(query)[:, :, None] + self.key(memory)[:, None])).squeeze(-1)


@case(SCORES, step)
class ScoresAlsoReturned(linears(query=(H, A), key=(M, A), v=(A, 1))):
    """Raw scores are a result besides the weights."""

    def forward(self, query, memory):
        e = self.v(torch.tanh(self.query(query)[:, None] + self.key(memory))).squeeze(-1)
        return e, torch.bmm(e.softmax(1)[:, None], memory)


@case(CONTEXT, many)
class ByEinsum(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.u, self.v = (nn.Parameter(torch.randn(n) / 2) for n in ((H, A), (M, A), (A,)))

    def forward(self, query, memory):
        q, k = torch.einsum("bqh,ha->bqa", query, self.w), torch.einsum("btm,ma->bta", memory, self.u)
        e = torch.einsum("bqta,a->bqt", torch.tanh(q[:, :, None] + k[:, None]), self.v)
        return torch.einsum("bqt,btm->bqm", torch.softmax(e, 2), memory)


@case(SCORES, step)
class OwnSoftmax(linears(query=(H, A), key=(M, A), v=(A, 1))):
    """exp of scores less the largest of the whole batch, by hand, with a small number in the denominator."""

    def forward(self, query, memory):
        e = self.v(torch.tanh(self.query(query).unsqueeze(1) + self.key(memory))).squeeze(-1)
        e = torch.exp(e - e.max())
        a = e / (e.sum(1, keepdim=True) + 1e-10)
        return (a.unsqueeze(2) * memory).sum(1)


@case(CONTEXT, step)
class InnerScaled(linears(query=(H, A), key=(M, A), v=(A, 1))):
    """C tanh inside, temperature outside."""

    def forward(self, query, memory):
        e = self.v(10 * torch.tanh(self.query(query).unsqueeze(1) + self.key(memory))).squeeze(-1) * 0.3
        return torch.bmm(torch.softmax(e, 1).unsqueeze(1), memory)
