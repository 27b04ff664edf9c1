"""Text in images, formulas, captions, video: feature maps as memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from . import ALIGNMENTS, CONTEXT, A, H, M, case, linears, step, step_padded


def _map(s, d):
    return d(s.B, H), d(s.B, M, 3, s.Tk)


@case(CONTEXT, step)
class RecurrentCell(nn.Module):
    """Attention and the cell that reads its context in one module, the keys projected in each step."""

    def __init__(self):
        super().__init__()
        self.i2h, self.h2h, self.score = nn.Linear(M, A, bias=False), nn.Linear(H, A), nn.Linear(A, 1, bias=False)
        self.rnn = nn.GRUCell(M, H)

    def forward(self, hidden, feats):
        e = self.score(torch.tanh(self.i2h(feats) + self.h2h(hidden).unsqueeze(1)))
        alpha = F.softmax(e, 1)
        context = torch.bmm(alpha.permute(0, 2, 1), feats).squeeze(1)
        return self.rnn(context, hidden), alpha


@case(ALIGNMENTS, step)
class FlatRows(linears(s=(H, A), x=(M, A), w=(A, 1))):
    """Rows of all steps flattened before the sum; weights returned."""

    def forward(self, state, x):
        b, t, n = x.size()
        x_proj = self.x(x.view(-1, n)).view(b, t, -1)
        s_proj = self.s(state).unsqueeze(1).expand(b, t, A)
        rows = torch.tanh(s_proj + x_proj).view(-1, A)
        return F.softmax(self.w(rows).view(b, t), dim=1)


@case(ALIGNMENTS, lambda s, d: (d(s.B, H), d(s.Tk, s.B, M)))
class TimeMajorFlat(linears(i2h=(M, A, False), h2h=(H, A), score=(A, 1, False))):
    def forward(self, hidden, feats):
        t, b, n = feats.size()
        proj = self.i2h(feats.view(-1, n))
        prev = self.h2h(hidden).view(1, b, A).expand(t, b, A).contiguous().view(-1, A)
        e = self.score(F.tanh(proj + prev)).view(t, b)
        return F.softmax(e, dim=0)


@case(CONTEXT, _map)
class MapOfFeatures(nn.Module):
    """A feature map, a 3x3 convolution for its keys, softmax over all places."""

    def __init__(self):
        super().__init__()
        self.feat = nn.Conv2d(M, A, 3, padding=1)
        self.state, self.score = nn.Conv2d(H, A, 1, bias=False), nn.Conv2d(A, 1, 1, bias=False)

    def forward(self, state, feats):
        b, _, h, w = feats.shape
        keys = self.feat(feats)
        query = self.state(state.view(b, -1, 1, 1)).expand(-1, -1, h, w)
        e = self.score(torch.tanh(keys + query))
        a = torch.softmax(e.flatten(1), dim=1).view(b, 1, h, w)
        return (feats * a).sum(dim=(2, 3))


@case(CONTEXT, lambda s, d: (d(s.B, s.Tq, H), d(s.B, M, 3, s.Tk), d.padding(s.B, s.Tk)))
class MapAndQueries(nn.Module):
    """Five axes: all states against all places of a map, columns beyond the image left out."""

    def __init__(self):
        super().__init__()
        self.k, self.q, self.v = nn.Conv2d(M, A, 3, padding=1), nn.Linear(H, A), nn.Linear(A, 1)

    def forward(self, query, feats, beyond):
        b, tq = query.size(0), query.size(1)
        h, w = feats.size(2), feats.size(3)
        k = self.k(feats).unsqueeze(1)
        q = self.q(query).view(b, tq, A, 1, 1)
        e = self.v(torch.tanh(k + q).permute(0, 1, 3, 4, 2).contiguous())
        e = e.masked_fill(beyond[:, None, None, :, None], float("-inf"))
        a = F.softmax(e.view(b, tq, -1), dim=-1).view(b, tq, h, w, 1)
        c = (feats.unsqueeze(1) * a.permute(0, 1, 4, 2, 3)).sum((3, 4))
        return c, a


@case(CONTEXT, lambda s, d: (d(s.B, M, 3, s.Tk),))
class LearnedQueries(nn.Module):
    """Queries are embeddings of positions, without a batch."""

    def __init__(self):
        super().__init__()
        self.order = nn.Embedding(9, H)
        self.q, self.k, self.v = nn.Linear(H, A), nn.Linear(M, A), nn.Linear(A, 1, bias=False)

    def forward(self, feats):
        x = feats.flatten(2).transpose(1, 2)
        order = torch.arange(9)
        q = self.q(self.order(order).unsqueeze(0)).unsqueeze(2)
        e = self.v(torch.tanh(q + self.k(x).unsqueeze(1))).squeeze(3)
        return torch.softmax(e, 2).bmm(x)


@case(CONTEXT, lambda s, d: (d(s.B, H), d(s.B, 3 * s.Tk, M)))
class CaptionStep(nn.Module):
    """Regions of an image, products and sums for scores and context."""

    def __init__(self):
        super().__init__()
        self.U, self.W, self.v = nn.Linear(H, A), nn.Linear(M, A), nn.Linear(A, 1)
        self.softmax = nn.Softmax(1)

    def forward(self, hidden, regions):
        u = self.U(hidden).unsqueeze(1)
        e = self.v(torch.tanh(self.W(regions) + u)).squeeze(2)
        alpha = self.softmax(e)
        return (regions * alpha.unsqueeze(2)).sum(1), alpha


@case(ALIGNMENTS, step_padded)
class RenormalisedRegions(linears(h2att=(H, A), ctx=(M, A), alpha=(A, 1))):
    """expand_as, rows flattened, weights multiplied by a mask and divided by their sum."""

    def forward(self, h, feats, padding):
        p = self.ctx(feats)
        att_h = self.h2att(h).unsqueeze(1).expand_as(p)
        dot = self.alpha(torch.tanh(p + att_h).view(-1, A)).view(-1, feats.size(1))
        weight = F.softmax(dot, dim=1) * (~padding).to(dot.dtype)
        weight = weight / weight.sum(1, keepdim=True)
        return torch.bmm(weight.unsqueeze(1), feats).squeeze(1)


@case(CONTEXT, lambda s, d: (d(s.B, H), d(s.B, M, s.Tk), d.constant(s.B, 1, s.Tk)))
class ChannelsFirst(nn.Module):
    """(B, C, L) all through: 1x1 convolutions, a matrix product for the score vector."""

    def __init__(self):
        super().__init__()
        self.U, self.f, self.Q = nn.Conv1d(M, A, 1), nn.Conv1d(1, A, 3, padding=1), nn.Linear(H, A)
        self.v = nn.Parameter(torch.randn(1, A))

    def forward(self, h, x, summed):
        keys = self.U(x) + self.f(summed.detach())
        e = torch.matmul(self.v, torch.tanh(keys + self.Q(h).unsqueeze(2).expand_as(keys)))
        a = e.softmax(dim=-1)
        return torch.bmm(x, a.transpose(1, 2)).squeeze(2), a + summed


@case(CONTEXT, step)
class VideoFrames(linears(linear1=(H + M, A), linear2=(A, 1, False))):
    def forward(self, hidden, frames):
        b, t, _ = frames.size()
        inputs = torch.cat((frames, hidden.unsqueeze(1).repeat(1, t, 1)), 2).view(-1, H + M)
        e = self.linear2(torch.tanh(self.linear1(inputs))).view(b, t)
        return torch.bmm(F.softmax(e, dim=1).unsqueeze(1), frames).squeeze(1)


@case(ALIGNMENTS, step)
class NeighboursSwapped(linears(q=(H, A), k=(M, A), v=(A, 1))):
    """What follows the softmax is of another kind."""

    def forward(self, state, memory):
        a = self.v(torch.tanh(self.q(state).unsqueeze(1) + self.k(memory))).softmax(1)
        a = 0.9 * a + 0.1 * a.roll(1, 1)
        return (a * memory).sum(1)
