"""Translation, summaries, dialogue: a decoder state and the states of an encoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from . import ALIGNMENTS, CONTEXT, A, H, M, case, linears, many, many_padded, step_padded, step_time_major


@case(ALIGNMENTS, step_time_major)
class JoinedRows(nn.Module):
    """The state repeated for every source step and joined with it, one layer for both."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Linear(H + M, A)
        self.score = nn.Linear(A, 1, bias=False)

    def forward(self, state, memory):
        steps = memory.shape[0]
        rows = state.unsqueeze(1).repeat(1, steps, 1)
        memory = memory.permute(1, 0, 2)
        energy = torch.tanh(self.energy(torch.cat((rows, memory), dim=2)))
        return F.softmax(self.score(energy).squeeze(2), dim=1)


@case(ALIGNMENTS, lambda s, d: (*step_time_major(s, d), d.padding(s.B, s.Tk)))
class JoinedRowsFilled(JoinedRows):
    def forward(self, state, memory, padding):
        steps = memory.size(0)
        rows = state[:, None].expand(-1, steps, -1)
        energy = self.energy(torch.cat((rows, memory.transpose(0, 1)), 2)).tanh()
        return self.score(energy)[:, :, 0].masked_fill(padding, -1e10).softmax(1)


@case(ALIGNMENTS, step_time_major)
class RepeatedVector(nn.Module):
    """Time-major, the score vector repeated for the batch and multiplied by bmm."""

    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(H + M, A)
        self.v = nn.Parameter(torch.rand(A))

    def forward(self, hidden, outputs):
        steps = outputs.size(0)
        h = hidden.repeat(steps, 1, 1).transpose(0, 1)
        outputs = outputs.transpose(0, 1)
        energy = torch.tanh(self.attn(torch.cat([h, outputs], 2))).transpose(2, 1)
        v = self.v.repeat(outputs.size(0), 1).unsqueeze(1)
        return F.softmax(torch.bmm(v, energy).squeeze(1), dim=1).unsqueeze(1)


@case(CONTEXT, lambda s, d: (d(s.B, 1, H), d(s.B, s.Tk, M)))
class TwoLayersSummed(linears(Wa=(H, A), Ua=(M, A), Va=(A, 1))):
    """Biases everywhere, also of the score layer."""

    def forward(self, query, keys):
        scores = self.Va(torch.tanh(self.Wa(query) + self.Ua(keys)))
        weights = F.softmax(scores.squeeze(2).unsqueeze(1), dim=-1)
        return torch.bmm(weights, keys), weights


@case(CONTEXT, step_padded)
class HiddenFill(linears(key=(M, A, False), query=(H, A, False), energy=(A, 1, False))):
    """Keys without a bias, a mask through .data."""

    def forward(self, state, memory, padding):
        scores = self.energy(torch.tanh(self.query(state.unsqueeze(1)) + self.key(memory))).squeeze(2).unsqueeze(1)
        scores.data.masked_fill_(padding.unsqueeze(1), -float("inf"))
        alphas = F.softmax(scores, dim=-1)
        return torch.bmm(alphas, memory), alphas


@case(CONTEXT, many_padded)
class FlatPairs(nn.Module):
    """All pairs flattened to one axis of rows, keys not projected, a bias of their own."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(H, A, bias=False), nn.Linear(M, A, bias=False)
        self.bias = nn.Parameter(torch.randn(A))
        self.score = nn.Linear(A, 1)
        self.dropout = nn.Dropout(0.0)

    def forward(self, query, memory, padding):
        b, tq, tk = query.size(0), query.size(1), memory.size(1)
        q = self.query(query).unsqueeze(2).expand(b, tq, tk, A)
        k = self.key(memory).unsqueeze(1).expand(b, tq, tk, A)
        rows = (q + k + self.bias).contiguous().view(b * tq * tk, A)
        scores = self.score(rows.tanh()).view(b, tq, tk)
        scores = scores.masked_fill(padding.unsqueeze(1).expand_as(scores), -1e12)
        weights = self.dropout(scores.softmax(-1))
        return torch.bmm(weights, memory), weights


@case(CONTEXT, lambda s, d: (*step_time_major(s, d), ~d.padding(s.B, s.Tk).t()))
class SharpenedTimeMajor(nn.Module):
    """Softmax over the first axis, a temperature, a product and a sum for the context."""

    def __init__(self):
        super().__init__()
        self.hid2ctx, self.ctx2ctx = nn.Linear(H, A), nn.Linear(M, A, bias=False)
        self.mlp = nn.Linear(A, 1, bias=False)
        self.temperature = 0.7

    def forward(self, hid, ctx, mask):
        inner = self.ctx2ctx(ctx) + self.hid2ctx(hid).unsqueeze(0)
        scores = self.mlp(torch.tanh(inner)).squeeze(-1) / self.temperature
        scores = scores.masked_fill(~mask, -1e8)
        alpha = F.softmax(scores, dim=0)
        return alpha, (alpha.unsqueeze(-1) * ctx).sum(0)


@case(CONTEXT, many, train=ALIGNMENTS)
class DropsWeights(nn.Module):
    """Dropout of the weights, as in a textbook: off in evaluation."""

    def __init__(self):
        super().__init__()
        self.W_q, self.W_k, self.w_v = (nn.Linear(n, m, bias=False) for n, m in ((H, A), (M, A), (A, 1)))
        self.dropout = nn.Dropout(0.4)

    def forward(self, queries, keys):
        features = torch.tanh(self.W_q(queries).unsqueeze(2) + self.W_k(keys).unsqueeze(1))
        weights = torch.softmax(self.w_v(features).squeeze(-1), dim=-1)
        return torch.bmm(self.dropout(weights), keys)


@case(
    ALIGNMENTS,
    lambda s, d: (d(s.B, H), d(s.B, s.Tk, M), (~d.padding(s.B, s.Tk)).to(d.dtype), d.constant(s.B, s.Tk)),
)
class Coverage(nn.Module):
    """Rows flattened, coverage as a feature, weights multiplied by a float mask and divided by their sum."""

    def __init__(self):
        super().__init__()
        self.W_h, self.W_s = nn.Linear(M, A, bias=False), nn.Linear(H, A)
        self.W_c, self.v = nn.Linear(1, A, bias=False), nn.Linear(A, 1, bias=False)

    def forward(self, s_t, memory, mask, coverage):
        b, t, n = memory.size()
        features = self.W_h(memory.contiguous().view(-1, n))
        state = self.W_s(s_t).unsqueeze(1).expand(b, t, A).contiguous().view(-1, A)
        seen = self.W_c(coverage.contiguous().view(-1, 1))
        scores = self.v(F.tanh(features + state + seen)).view(-1, t)
        weights = F.softmax(scores, dim=1) * mask
        weights = weights / weights.sum(1, keepdim=True)
        context = torch.bmm(weights.unsqueeze(1), memory).view(-1, n)
        return context, weights, coverage + weights


@case(CONTEXT, lambda s, d: (d(s.B, H), d(s.B, s.Tk, M), d.padding(s.B, s.Tk).to(d.dtype)))
class AddedMask(linears(q=(H, A), k=(M, A), v=(A, 1))):
    """A float mask times a large number, added to the scores."""

    def forward(self, state, memory, padding):
        scores = self.v(torch.tanh(self.q(state).unsqueeze(1) + self.k(memory))).squeeze(-1)
        weights = torch.softmax(scores + padding * -1e9, -1)
        return torch.einsum("bt,btm->bm", weights, memory)


@case(CONTEXT, step_padded)
class FilledByIndex(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(H, A), nn.Linear(M, A), nn.Parameter(torch.randn(A, 1))

    def forward(self, state, memory, padding):
        scores = torch.matmul(torch.tanh(self.q(state)[:, None, :] + self.k(memory)), self.v)[..., 0]
        scores[padding] = -1e18
        weights = scores.softmax(dim=1)
        return weights.unsqueeze(1).matmul(memory).squeeze(1)


@case(CONTEXT, step_padded)
class ChosenByWhere(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(H, A), nn.Linear(M, A), nn.Parameter(torch.randn(1, 1, A))

    def forward(self, state, memory, padding):
        e = (self.v * torch.tanh(self.k(memory) + self.q(state).unsqueeze(-2))).sum(dim=-1)
        e = torch.where(padding, torch.full_like(e, float("-inf")), e)
        return (e.softmax(-1).unsqueeze(-1) * memory).sum(dim=1)


@case(CONTEXT, many)
class AllPairsJoined(nn.Module):
    """Many queries, both sides expanded and joined: the largest tensors that are written."""

    def __init__(self):
        super().__init__()
        self.concat = nn.Sequential(nn.Linear(H + M, A), nn.Tanh(), nn.Linear(A, 1))

    def forward(self, query, memory):
        tq, tk = query.shape[1], memory.shape[1]
        pairs = torch.cat(
            [query.unsqueeze(2).expand(-1, -1, tk, -1), memory.unsqueeze(1).expand(-1, tq, -1, -1)], dim=-1
        )
        return torch.matmul(self.concat(pairs).squeeze(-1).softmax(-1), memory)


@case(ALIGNMENTS, lambda s, d: (d(s.B, H), d(s.B, H), d(s.B, s.Tk, M)))
class ThreeJoined(nn.Module):
    """Two states and the memory joined, repeated by permute."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 * H + M, A), nn.Tanh(), nn.Linear(A, 1))

    def forward(self, hidden, cell, memory):
        t = memory.size(1)
        hidden, cell = (x.unsqueeze(0).repeat(t, 1, 1).permute(1, 0, 2) for x in (hidden, cell))
        x = torch.cat((hidden, cell, memory), dim=2)
        beta = F.softmax(self.layers(x.view(-1, x.size(2))).view(-1, t), dim=1)
        return beta


@case(CONTEXT, lambda s, d: (d(s.B, H), d(s.B, s.Tk, M), d(s.B, s.Tk, A)))
class SumOfList(linears(q=(H, A), k=(M, A), v=(A, 1))):
    """Python's sum of a list of features."""

    def forward(self, state, memory, positions):
        parts = [self.k(memory), self.q(state).unsqueeze(1), positions]
        weights = F.softmax(self.v(torch.tanh(sum(parts))), dim=1)
        return weights.transpose(1, 2).bmm(memory).squeeze(1)


@case(CONTEXT, many)
class GrownBySquares(linears(q=(H, A), k=(M, A), v=(A, 1))):
    """Alignments used three times: for a mean, for squares, and as a result."""

    def forward(self, query, memory):
        a = torch.softmax(self.v(torch.tanh(self.q(query)[:, :, None] + self.k(memory)[:, None])).squeeze(3), 2)
        mean = a @ memory
        return mean, (a @ memory.square() - mean.square()), a
