"""A second author's spellings: written from formulas, before anything was known of how they are searched for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from . import ALIGNMENTS, CONTEXT, SCORES, A, H, M, case, linears, many, step, step_padded


def _kept(s, d):
    """State, memory, and True for what may be attended."""
    state, memory, padding = step_padded(s, d)
    return state, memory, ~padding


def _kept_numbers(s, d):
    """The same as ones and zeros."""
    state, memory, keep = _kept(s, d)
    return state, memory, keep.to(memory.dtype)


def _previous(s, d):
    """Alignments of the step before and their sum."""
    return d(s.B, H), d(s.B, s.Tk, M), d.constant(s.B, s.Tk).softmax(-1), d.constant(s.B, s.Tk)


@case(CONTEXT, step)
class StateRepeatedAndJoined(linears(attn=(M + H, A), v=(A, 1, False))):
    """Weights are returned beside the context."""

    def forward(self, hidden, enc):
        h = hidden.unsqueeze(1).repeat(1, enc.shape[1], 1)
        energy = torch.tanh(self.attn(torch.cat((h, enc), dim=2)))
        a = F.softmax(self.v(energy).squeeze(2), dim=1)
        return torch.bmm(a.unsqueeze(1), enc).squeeze(1), a


@case(CONTEXT, lambda s, d: (d(1, s.B, H), d(s.Tk, s.B, M)))
class VectorRepeatedOverTheBatch(nn.Module):
    """Time-major, and the score vector is a batch of rows."""

    def __init__(self):
        super().__init__()
        self.attn, self.v = nn.Linear(H + M, A), nn.Parameter(torch.rand(A))

    def forward(self, hidden, enc):
        h = hidden.repeat(enc.size(0), 1, 1).transpose(0, 1)
        enc = enc.transpose(0, 1)
        e = torch.tanh(self.attn(torch.cat([h, enc], 2))).transpose(2, 1)
        e = torch.bmm(self.v.repeat(enc.size(0), 1).unsqueeze(1), e).squeeze(1)
        return F.softmax(e, dim=1).unsqueeze(1).bmm(enc)


@case(CONTEXT, step_padded)
class BiasOfItsOwn(nn.Module):
    """A bias parameter within the tanh, a bias of the score layer, a fill with -inf."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.s = nn.Linear(H, A, bias=False), nn.Linear(M, A, bias=False), nn.Linear(A, 1)
        self.b = nn.Parameter(torch.rand(A))

    def forward(self, q, m, drop):
        e = self.s(torch.tanh(self.q(q)[:, None] + self.k(m) + self.b)).squeeze(-1)
        a = e.masked_fill(drop, -float("inf")).softmax(-1)
        return (a[..., None] * m).sum(1), a


@case(CONTEXT, _kept)
class ExpandedFlattenedChosen(linears(fc1=(M, A), fc2=(H, A), fc3=(A, 1))):
    def forward(self, h, regions, keep):
        s = self.fc1(regions) + self.fc2(h).unsqueeze(1).expand(-1, regions.size(1), -1)
        e = self.fc3(s.tanh()).flatten(1)
        w = torch.softmax(torch.where(keep, e, torch.full_like(e, -1e9)), 1)
        return torch.einsum("bt,btd->bd", w, regions)


@case(CONTEXT, _kept_numbers)
class MaskOfNumbersAdded(linears(k=(M, A), q=(H, A), v=(A, 1))):
    def forward(self, q, m, keep):
        e = self.v(torch.tanh(self.k(m) + self.q(q).unsqueeze(1))).squeeze(2) + (1.0 - keep) * -10000.0
        return F.softmax(e, -1).unsqueeze(1) @ m


@case(ALIGNMENTS, _kept_numbers)
class MultipliedAndRenormalised(linears(k=(M, A, False), q=(H, A), v=(A, 1, False))):
    def forward(self, q, m, keep):
        batch, steps, width = m.shape
        feature = self.k(m.contiguous().view(-1, width))
        rows = self.q(q).unsqueeze(1).expand(batch, steps, feature.size(-1)).contiguous().view(-1, feature.size(-1))
        e = self.v(torch.tanh(feature + rows)).view(-1, steps)
        weights = F.softmax(e, dim=1) * keep
        a = weights / weights.sum(1, keepdim=True)
        return torch.bmm(a.unsqueeze(1), m).view(-1, width), a


@case(SCORES, step)
class ClippedChannelsFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.ref, self.q, self.v = nn.Conv1d(M, A, 1), nn.Linear(H, A), nn.Parameter(torch.rand(A))
        self.clip = 10.0

    def forward(self, q, m):
        r = self.ref(m.permute(0, 2, 1))
        expanded = self.q(q).unsqueeze(2).repeat(1, 1, r.size(2))
        v = self.v.unsqueeze(0).expand(q.size(0), -1).unsqueeze(1)
        return self.clip * torch.tanh(torch.bmm(v, torch.tanh(expanded + r)).squeeze(1))


@case(SCORES, _kept)
class LogOfTheMaskAdded(linears(w1=(M, A, False), w2=(H, A, False), vt=(A, 1, False))):
    def forward(self, s, m, keep):
        u = self.vt(torch.tanh(self.w1(m) + self.w2(s).unsqueeze(1))).squeeze(-1)
        return F.log_softmax(u + (keep.to(m.dtype) + 1e-45).log(), dim=-1)


@case(CONTEXT, many)
class PairsOfTheTextbook(nn.Module):
    def __init__(self):
        super().__init__()
        self.W_k, self.W_q = nn.Linear(M, A, bias=False), nn.Linear(H, A, bias=False)
        self.w_v, self.dropout = nn.Linear(A, 1, bias=False), nn.Dropout(0.0)

    def forward(self, queries, keys):
        features = torch.tanh(self.W_q(queries).unsqueeze(2) + self.W_k(keys).unsqueeze(1))
        w = F.softmax(self.w_v(features).squeeze(-1), dim=-1)
        return torch.bmm(self.dropout(w), keys)


@case(CONTEXT, many)
class OneMatrixOfAllPairs(linears(a=(M + H, A), b=(A, 1))):
    def forward(self, q, k):
        (batch, queries, _), steps = q.shape, k.shape[1]
        rows = q[:, :, None, :].expand(batch, queries, steps, H)
        columns = k[:, None].expand(batch, queries, steps, M)
        x = torch.cat([columns, rows], -1).reshape(batch * queries * steps, M + H)
        p = torch.softmax(self.b(torch.tanh(self.a(x))).reshape(batch, queries, steps), dim=2)
        return torch.matmul(p, k), p


@case(CONTEXT, lambda s, d: (d(s.B, H), d(s.B, M, 2, s.Tk)))
class MapSoftmaxOverPositions(nn.Module):
    """1x1 convolutions of a map of features, weights in its form."""

    def __init__(self):
        super().__init__()
        self.conv, self.lin, self.out = nn.Conv2d(M, A, 1), nn.Linear(H, A), nn.Conv2d(A, 1, 1, bias=False)

    def forward(self, h, x):
        batch, _, height, width = x.shape
        s = torch.tanh(self.conv(x) + self.lin(h).view(batch, -1, 1, 1))
        a = F.softmax(self.out(s).view(batch, -1), -1).view(batch, 1, height, width)
        return (x * a).sum((2, 3))


@case(CONTEXT, _previous)
class PreviousAndTheirSum(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.m = nn.Linear(H, A, bias=False), nn.Linear(M, A, bias=False)
        self.v, self.dense = nn.Linear(A, 1, bias=False), nn.Linear(3, A, bias=False)
        self.conv = nn.Conv1d(2, 3, 5, padding=2, bias=False)

    def forward(self, q, m, previous, total):
        location = self.dense(self.conv(torch.stack([previous, total], 1)).transpose(1, 2))
        e = self.v(torch.tanh(self.q(q.unsqueeze(1)) + location + self.m(m))).squeeze(-1)
        a = F.softmax(e, dim=1)
        return torch.bmm(a.unsqueeze(1), m).squeeze(1), a, total + a


@case(SCORES, lambda s, d: _previous(s, d)[:3])
class SigmoidOverItsSum(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.m, self.v = nn.Linear(H, A), nn.Linear(M, A), nn.Linear(A, 1)
        self.c = nn.Conv1d(1, A, 3, padding=1)

    def forward(self, q, m, previous):
        location = self.c(previous[:, None]).transpose(1, 2)
        s = torch.sigmoid(self.v(torch.tanh(self.q(q)[:, None] + self.m(m) + location)).squeeze(-1))
        a = s / s.sum(-1, keepdim=True)
        return a.unsqueeze(1) @ m, a


@case(CONTEXT, lambda s, d: (d(s.B, H), d(s.B, 4), d(s.B, s.Tk, M)))
class ThreePartsInSequential(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(M + H + 4, A), nn.Tanh(), nn.Linear(A, 1))

    def forward(self, h, s, x):
        steps = x.size(1)
        z = torch.cat((h.repeat(steps, 1, 1).permute(1, 0, 2), s.repeat(steps, 1, 1).permute(1, 0, 2), x), dim=2)
        beta = F.softmax(self.net(z.view(-1, z.size(2))).view(-1, steps), dim=1)
        return torch.bmm(beta.unsqueeze(1), x)[:, 0, :]


@case(CONTEXT, lambda s, d: (d(s.B, H), d(s.B, s.Tk, 8)))
class TwoHeadsPermuted(nn.Module):
    def __init__(self):
        super().__init__()
        self.h, self.q, self.k = 2, nn.Linear(H, 2 * A), nn.Linear(8, 2 * A)
        self.v = nn.Linear(A, 1, bias=False)

    def split(self, x):
        batch, steps, _ = x.shape
        return x.view(batch, steps, self.h, -1).permute(0, 2, 1, 3).reshape(batch * self.h, steps, -1)

    def forward(self, q, m):
        batch, steps, _ = m.shape
        rows = self.q(q).view(batch * self.h, 1, -1)
        a = torch.softmax(self.v(torch.tanh(self.split(self.k(m)) + rows)).squeeze(-1), -1)
        return torch.bmm(a.unsqueeze(1), self.split(m)).view(batch, -1), a.view(batch, self.h, steps)


@case(CONTEXT, lambda s, d: (d(s.B, H), d(s.B, s.Tk, M), d.lengths(s.B, s.Tk)))
class MaskOfLengthsByData(nn.Module):
    def __init__(self):
        super().__init__()
        self.p, self.c, self.v = nn.Linear(H, A), nn.Linear(M, A, bias=False), nn.Parameter(torch.randn(A, 1))

    def forward(self, q, m, n):
        e = torch.matmul(torch.tanh(self.c(m) + self.p(q).unsqueeze(1)), self.v).squeeze(-1)
        pad = torch.arange(m.size(1), device=m.device).expand(m.size(0), -1) >= n.unsqueeze(1)
        e.data.masked_fill_(pad, -1e18)
        return torch.matmul(F.softmax(e, dim=-1).unsqueeze(-2), m).squeeze(-2)


@case(CONTEXT, step)
class TwoHopsOfOneLayer(linears(k=(H, A), q=(H, A, False), v=(A, 1, False))):
    """The second hop asks with the first one's result; the memory is a part of what is given."""

    def hop(self, q, m):
        a = torch.softmax(self.v(torch.tanh(self.k(m) + self.q(q)[:, None, :])), dim=1)
        return (a * m).sum(dim=1)

    def forward(self, q, m):
        m = m[..., :H]
        return self.hop(self.hop(q, m) + q, m)


@case(CONTEXT, step)
class TemperatureAndOption(nn.Module):
    def __init__(self):
        super().__init__()
        self.k, self.q, self.v = nn.Linear(M, A), nn.Linear(H, A), nn.Linear(A, 1, bias=False)
        self.tau = 2.0

    def forward(self, query, memory, return_weights=True):
        e = self.v(torch.tanh(self.k(memory) + self.q(query).unsqueeze(1))).transpose(1, 2) / self.tau
        w = F.softmax(e, dim=2)
        out = torch.bmm(w, memory).squeeze(1)
        return (out, w.squeeze(1)) if return_weights else out


@case(ALIGNMENTS, lambda s, d: (d(s.B, H), d(s.B, s.Tk, 8)))
class SeriesAreAttended(linears(u=(8, A), w=(H, A), v=(A, 1))):
    """The axis of attention is that of the series, time is the units."""

    def forward(self, h, x):
        return F.softmax(self.v(torch.tanh(self.u(x) + self.w(h)[:, None])).squeeze(2), 1)


class _Weights(linears(l=(M + H, A), v=(A, 1, False))):
    def forward(self, h, m):
        x = torch.cat([h.unsqueeze(1).expand(-1, m.size(1), -1), m], 2)
        return F.softmax(self.v(torch.tanh(self.l(x))).squeeze(2), dim=1)


@case(ALIGNMENTS, lambda s, d: (d(s.B, 4, 3), d(s.B, s.Tk, M)))
class WholeDecoder(nn.Module):
    """Weights of a module, summed by its caller in a loop over steps."""

    def __init__(self):
        super().__init__()
        self.cell, self.attn, self.out = nn.GRUCell(3 + M, H), _Weights(), nn.Linear(H + M, 11)

    def forward(self, inputs, m):
        h, outputs = m.new_zeros(m.size(0), H), []
        for t in range(inputs.size(1)):
            c = self.attn(h, m).unsqueeze(1).bmm(m).squeeze(1)
            h = self.cell(torch.cat([inputs[:, t], c], 1), h)
            outputs.append(self.out(torch.cat([h, c], 1)))
        return torch.stack(outputs, 1)


@case(None, step, why="used for something else")
class MeanOfTheTanh(linears(k=(M, A), q=(H, A), v=(A, 1))):
    def forward(self, q, m):
        t = torch.tanh(self.k(m) + self.q(q).unsqueeze(1))
        return F.softmax(self.v(t).squeeze(-1), -1), t.mean()


@case(None, lambda s, d: (d(s.B, s.Tk, M),), why="score vectors")
class ClassesOfEachStep(linears(k=(M, A), v=(A, 4))):
    """A head of a classifier: its softmax is over classes."""

    def forward(self, m):
        return F.softmax(self.v(torch.tanh(self.k(m))), -1)
