"""ESPnet: the attention of its recurrent decoders (``espnet.nets.pytorch_backend.rnn.attentions``).

A decoder calls ``reset()`` for each batch and then the module for each step; the first step projects the encoder's
output and keeps it in the module's attributes, which decoders read and write. They are kept here as they are there.

Covered: steps whose mask leaves each utterance something to attend, without a window around the last attended frame and
outside of torch.compile; everything else falls through. Padding that holds NaN is ignored, where the original's context
would be NaN. The bias of ``gvec`` adds the same to all scores of a softmax: its gradient is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from ...checksums import is_cacheable
from ...errors import ArgumentTypeError
from ...functional import additive_attention, attend
from ...memory import Memory
from ...scores import AdditiveScore, DotScore
from ...stock import is_stock_linear
from ...types import Attention
from ..adapter import Fused, NotSupported, to_softmax_dtype
from ..cache import cached, clear
from ..registry import adapts

_MODULE = "espnet.nets.pytorch_backend.rnn.attentions"
_LIBRARY = {"library": "ESPnet", "versions": "202511"}


class _Steps(NamedTuple):
    """What a mask leaves to attend. allowed: (B, T) bool, True = attend; None: all of it. empty: of some utterance."""

    allowed: Tensor | None
    empty: bool


class _Fused(Fused):
    """What the classes share: the state of a batch, and a step of one head."""

    min_numel = 1 << 13  # measured: 0.6 to 0.8x at (1, 8, 16), 1.03 to 1.13x at (1, 50, 320)
    h_length: int | None
    enc_h: Tensor
    mask: Tensor | None
    dunits: int
    han_mode = False  # of the classes that lack it

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        clear(self)

    def _begin(self, memory: Tensor, lengths: Any, state: Tensor | None) -> Any:
        """What a step begins with. memory: (B, T, eprojs). Returns the decoder's state, (B, dunits), or NotSupported."""
        if is_compiling():
            return NotSupported("torch.compile")
        self._project(memory)
        if self.mask is None:
            self.mask = _padding(lengths).to(memory.device)
        if self.mask.dtype != torch.bool or self.mask.shape != self.enc_h.shape[:2]:
            return NotSupported("a mask of another kind")
        if self._steps().empty:
            return NotSupported("an utterance with nothing to attend")  # NaN there
        return memory.new_zeros(len(memory), self.dunits) if state is None else state.view(len(memory), self.dunits)

    def _project(self, memory: Tensor) -> None:
        raise NotImplementedError

    def _remember(self, memory: Tensor) -> None:
        self.enc_h = memory
        self.h_length = memory.size(1)

    def _steps(self) -> _Steps:
        mask: Any = self.mask
        if not is_cacheable(mask):  # a GPU's mask is not read: see _as_there
            return _Steps(~mask, False)
        return cached(self, "steps", lambda: _steps_of(mask), read=(mask,))

    def _additive(
        self, head: int, query: Tensor, keys: Tensor, values: Any, gvec: Any, scale: Any, extra: Tensor | None = None
    ) -> Attention:
        """query: (B, A). keys, extra: (B, T, A). values: (B, T, D) or, with extra, None. gvec: A -> 1."""
        if not isinstance(scale, int | float):
            raise ArgumentTypeError("a scaling that is no number")
        v = gvec.weight.view(-1)
        if scale != 1:
            v = scale * v
        if gvec.bias is not None and gvec.bias.requires_grad and torch.is_grad_enabled():
            v = torch.add(v, gvec.bias, alpha=0)  # for its gradient, which is 0
        if extra is None:
            result = attend(AdditiveScore(v), query, self._memory(head, keys, values), True, None)
        else:
            result = additive_attention(query, keys, values, v, extra=extra, mask=self._steps().allowed)
        return self._as_there(result, values)

    def _dot(self, head: int, query: Tensor, keys: Tensor, values: Tensor) -> Attention:
        """query: (B, A). keys: (B, T, A). values: (B, T, D)."""
        result = attend(DotScore(), query.unsqueeze(1), self._memory(head, keys, values), True, None)
        return self._as_there(Attention(result.context.squeeze(1), result.alignments.squeeze(1)), values)

    def _memory(self, head: int, keys: Tensor, values: Tensor) -> Memory:
        allowed = self._steps().allowed
        return cached(self, f"memory {head}", lambda: Memory(keys, values, mask=allowed), held=(keys, values, allowed))

    def _as_there(self, result: Attention, values: Tensor | None) -> Attention:
        """In the dtypes of the original under autocast; NaN for an empty utterance of a mask that was not read."""
        context, alignments = result
        alignments = to_softmax_dtype(alignments)
        if context is not None:
            context = _as_product(context, alignments, values)
        if not is_cacheable(self.mask):
            some = self._steps().allowed.any(1, keepdim=True)
            alignments = alignments.where(some, torch.nan)
            context = context if context is None else context.where(some, torch.nan)
        return Attention(context, alignments)


class _FusedSingle(_Fused):
    """One head, with the projected encoder output in ``pre_compute_enc_h``."""

    pre_compute_enc_h: Tensor | None
    mlp_enc: Any
    mlp_dec: Any
    gvec: Any

    def _project(self, memory: Tensor) -> None:
        if self.pre_compute_enc_h is None or self.han_mode:
            self._remember(memory)
            self.pre_compute_enc_h = self.mlp_enc(self.enc_h)

    def _single(self, query: Tensor, scale: Any, extra: Tensor | None = None) -> Attention:
        return self._additive(0, query, self.pre_compute_enc_h, self.enc_h, self.gvec, scale, extra)


class _FusedLocation(_FusedSingle):
    """Features of alignments by a convolution."""

    loc_conv: Any
    mlp_att: Any

    def _features(self, alignments: Tensor) -> Tensor:
        """alignments: (B, T). Returns (B, T, A)."""
        features = self.loc_conv(alignments.view(len(alignments), 1, 1, self.h_length))
        return self.mlp_att(features.squeeze(2).transpose(1, 2))


@adapts(f"{_MODULE}:AttDot", **_LIBRARY, sources=("a0ae0b1b088d",))
class FusedAttDot(_FusedSingle):
    """scores_j = tanh(mlp_dec(z)) . tanh(mlp_enc(h_j))."""

    min_numel = 1 << 15  # measured: 0.7x at (1, 50, 320) without gradients, 1.5x at (16, 200, 320)

    def _project(self, memory: Tensor) -> None:
        if self.pre_compute_enc_h is None or self.han_mode:
            self._remember(memory)
            self.pre_compute_enc_h = torch.tanh(self.mlp_enc(self.enc_h))

    def attend(self, enc_hs_pad: Tensor, enc_hs_len: Any, dec_z: Any, att_prev: Any, scaling: float = 2.0) -> Any:
        state = self._begin(enc_hs_pad, enc_hs_len, dec_z)
        if isinstance(state, NotSupported):
            return state
        query = scaling * torch.tanh(self.mlp_dec(state))
        return tuple(self._dot(0, query, self.pre_compute_enc_h, self.enc_h))


@adapts(f"{_MODULE}:AttAdd", **_LIBRARY, sources=("4f7be4b3459e",))
class FusedAttAdd(_FusedSingle):
    """scores_j = gvec . tanh(mlp_dec(z) + mlp_enc(h_j)): Bahdanau et al. 2015, appendix A.1.2."""

    def attend(self, enc_hs_pad: Tensor, enc_hs_len: Any, dec_z: Any, att_prev: Any, scaling: float = 2.0) -> Any:
        state = self._begin(enc_hs_pad, enc_hs_len, dec_z)
        if isinstance(state, NotSupported) or not is_stock_linear(self.gvec):
            return _not_supported(state)
        return tuple(self._single(self.mlp_dec(state), scaling))


@adapts(f"{_MODULE}:AttLoc", **_LIBRARY, sources=("7db40d2f39dc",))
class FusedAttLoc(_FusedLocation):
    """With location features: Chorowski et al., "Attention-based models for speech recognition", 2015, section 2.1."""

    def attend(
        self,
        enc_hs_pad: Tensor,
        enc_hs_len: Any,
        dec_z: Any,
        att_prev: Tensor | None,
        scaling: float = 2.0,
        last_attended_idx: int | None = None,
        backward_window: int = 1,
        forward_window: int = 3,
    ) -> Any:
        if last_attended_idx is not None:
            return NotSupported("a window around the last attended frame")
        state = self._begin(enc_hs_pad, enc_hs_len, dec_z)
        if isinstance(state, NotSupported) or not is_stock_linear(self.gvec):
            return _not_supported(state)
        if att_prev is None:
            att_prev = _uniform(enc_hs_len, state.device, state.dtype)
        return tuple(self._single(self.mlp_dec(state), scaling, self._features(att_prev)))


@adapts(f"{_MODULE}:AttCov", **_LIBRARY, sources=("1df44dd08bc1",))
class FusedAttCov(_FusedSingle):
    """With the sum of all alignments so far: See et al., "Get to the point", 2017, section 2.3."""

    wvec: Any

    def attend(
        self, enc_hs_pad: Tensor, enc_hs_len: Any, dec_z: Any, att_prev_list: list[Tensor] | None, scaling: float = 2.0
    ) -> Any:
        state = self._begin(enc_hs_pad, enc_hs_len, dec_z)
        if isinstance(state, NotSupported) or not is_stock_linear(self.gvec):
            return _not_supported(state)
        if att_prev_list is None:
            att_prev_list = [_uniform(enc_hs_len, enc_hs_pad.device, torch.float32)]
        extra = self._covered(sum(att_prev_list))  # type: ignore[arg-type]
        context, alignments = self._single(self.mlp_dec(state), scaling, extra)
        att_prev_list += [alignments]  # in place, as there
        return context, att_prev_list

    def _covered(self, coverage: Tensor) -> Tensor:
        return self.wvec(coverage.unsqueeze(-1))


@adapts(f"{_MODULE}:AttCovLoc", **_LIBRARY, sources=("4997ba0d9c15",))
class FusedAttCovLoc(FusedAttCov, _FusedLocation):
    """With location features of the sum of all alignments so far."""

    def _covered(self, coverage: Tensor) -> Tensor:
        return self._features(coverage)


@adapts(f"{_MODULE}:AttLoc2D", **_LIBRARY, sources=("1a6d6dae68e6",))
class FusedAttLoc2D(_FusedLocation):
    """With location features of the last ``att_win`` alignments."""

    att_win: int

    def attend(
        self, enc_hs_pad: Tensor, enc_hs_len: Any, dec_z: Any, att_prev: Tensor | None, scaling: float = 2.0
    ) -> Any:
        state = self._begin(enc_hs_pad, enc_hs_len, dec_z)
        if isinstance(state, NotSupported) or not is_stock_linear(self.gvec):
            return _not_supported(state)
        if att_prev is None:
            uniform = _uniform(enc_hs_len, enc_hs_pad.device, torch.float32)
            att_prev = uniform.unsqueeze(1).expand(-1, self.att_win, -1)
        extra = self.mlp_att(self.loc_conv(att_prev.unsqueeze(1)).squeeze(2).transpose(1, 2))
        context, alignments = self._single(self.mlp_dec(state), scaling, extra)
        return context, torch.cat([att_prev, alignments.unsqueeze(1)], dim=1)[:, 1:]


@adapts(f"{_MODULE}:AttLocRec", **_LIBRARY, sources=("e03080b5588f",))
class FusedAttLocRec(_FusedSingle):
    """With an LSTM over pooled features of the previous alignments, whose state is added to the query."""

    att_dim: int
    loc_conv: Any
    att_lstm: Any

    def attend(
        self, enc_hs_pad: Tensor, enc_hs_len: Any, dec_z: Any, att_prev_states: Any, scaling: float = 2.0
    ) -> Any:
        state = self._begin(enc_hs_pad, enc_hs_len, dec_z)
        if isinstance(state, NotSupported) or not is_stock_linear(self.gvec):
            return _not_supported(state)
        batch = len(enc_hs_pad)
        if att_prev_states is None:
            zeros = enc_hs_pad.new_zeros(batch, self.att_dim)
            att_prev_states = (_uniform(enc_hs_len, enc_hs_pad.device, torch.float32), (zeros, zeros))
        previous, states = att_prev_states
        features = F.relu(self.loc_conv(previous.view(batch, 1, 1, self.h_length)))
        states = self.att_lstm(F.max_pool2d(features, (1, features.size(3))).view(batch, -1), states)
        context, alignments = self._single(self.mlp_dec(state) + states[0], scaling)
        return context, (alignments, states)


class _FusedForward(_FusedLocation):
    """Alignments re-weighted by the previous ones: Zhang et al., "Forward attention in sequence-to-sequence acoustic
    modelling for speech synthesis", 2018.
    """

    def _forward_step(
        self, state: Tensor, previous: Tensor, scaling: Any, stay: Any, move: Any
    ) -> tuple[Tensor, Tensor]:
        """stay, move: probabilities, or 1, of the frame that was attended before and of the one after it."""
        keys, extra = self.pre_compute_enc_h, self._features(previous)
        alignments = self._additive(0, self.mlp_dec(state), keys, None, self.gvec, scaling, extra).alignments
        alignments = (stay * previous + move * F.pad(previous, (1, 0))[:, :-1]) * alignments
        alignments = F.normalize(torch.clamp(alignments, 1e-6), p=1, dim=1)  # which also gives padding a little
        context = torch.bmm(alignments.unsqueeze(1), self.enc_h).squeeze(1)
        return _as_product(context, alignments, self.enc_h), alignments

    def _first(self, memory: Tensor) -> Tensor:
        first = memory.new_zeros(memory.shape[:2])
        first[:, 0] = 1.0
        return first


@adapts(f"{_MODULE}:AttForward", **_LIBRARY, sources=("fa9f43f7449a",))
class FusedAttForward(_FusedForward):
    """Forward attention, section 3.1 of that paper."""

    def attend(
        self,
        enc_hs_pad: Tensor,
        enc_hs_len: Any,
        dec_z: Any,
        att_prev: Tensor | None,
        scaling: float = 1.0,
        last_attended_idx: int | None = None,
        backward_window: int = 1,
        forward_window: int = 3,
    ) -> Any:
        if last_attended_idx is not None:
            return NotSupported("a window around the last attended frame")
        state = self._begin(enc_hs_pad, enc_hs_len, dec_z)
        if isinstance(state, NotSupported) or not is_stock_linear(self.gvec):
            return _not_supported(state)
        previous = self._first(enc_hs_pad) if att_prev is None else att_prev
        return self._forward_step(state, previous, scaling, 1, 1)


@adapts(f"{_MODULE}:AttForwardTA", **_LIBRARY, sources=("e4737a7768ef",))
class FusedAttForwardTA(_FusedForward):
    """Forward attention with a transition agent, section 3.2 of that paper."""

    mlp_ta: Any
    trans_agent_prob: Any

    def attend(
        self,
        enc_hs_pad: Tensor,
        enc_hs_len: Any,
        dec_z: Any,
        att_prev: Tensor | None,
        out_prev: Tensor,
        scaling: float = 1.0,
        last_attended_idx: int | None = None,
        backward_window: int = 1,
        forward_window: int = 3,
    ) -> Any:
        if last_attended_idx is not None:
            return NotSupported("a window around the last attended frame")
        state = self._begin(enc_hs_pad, enc_hs_len, dec_z)
        if isinstance(state, NotSupported) or not is_stock_linear(self.gvec):
            return _not_supported(state)
        previous = self._first(enc_hs_pad) if att_prev is None else att_prev
        stay = self.trans_agent_prob
        context, alignments = self._forward_step(state, previous, scaling, stay, 1 - stay)
        self.trans_agent_prob = torch.sigmoid(self.mlp_ta(torch.cat([context, out_prev, state], dim=1)))
        return context, alignments


class _FusedHeads(_Fused):
    """Several heads, each with projections of its own; lists of them in ``pre_compute_k`` and ``pre_compute_v``."""

    min_numel = 1 << 15  # measured: 0.84x at (1, 50, 320), 1.04 to 4x at (16, 200, 320)
    aheads: int
    scaling: float
    pre_compute_k: list[Tensor] | None
    pre_compute_v: list[Tensor] | None
    mlp_q: Any
    mlp_k: Any
    mlp_v: Any
    mlp_o: Any
    gvec: Any

    def _project(self, memory: Tensor) -> None:
        if self.pre_compute_k is None or self.han_mode:
            self._remember(memory)
            self.pre_compute_k = [self._keys(project) for project in self.mlp_k]
        if self.pre_compute_v is None or self.han_mode:
            self._remember(memory)
            self.pre_compute_v = [project(self.enc_h) for project in self.mlp_v]

    def _keys(self, project: Any) -> Tensor:
        return project(self.enc_h)

    def _join(self, heads: Sequence[Any]) -> tuple[Tensor, list[Tensor]]:
        contexts, alignments = zip(*heads, strict=True)
        return self.mlp_o(torch.cat(contexts, dim=1)), list(alignments)

    def _head(self, h: int, state: Tensor, scale: Any, extra: Tensor | None = None) -> Attention:
        query = self.mlp_q[h](state)
        return self._additive(h, query, self.pre_compute_k[h], self.pre_compute_v[h], self.gvec[h], scale, extra)


@adapts(f"{_MODULE}:AttMultiHeadDot", **_LIBRARY, sources=("add51694aeb4",))
class FusedAttMultiHeadDot(_FusedHeads):
    """Heads of AttDot with a scale of 1 / sqrt(att_dim_k)."""

    def _keys(self, project: Any) -> Tensor:
        return torch.tanh(project(self.enc_h))

    def attend(self, enc_hs_pad: Tensor, enc_hs_len: Any, dec_z: Any, att_prev: Any, **kwargs: Any) -> Any:
        state = self._begin(enc_hs_pad, enc_hs_len, dec_z)
        if isinstance(state, NotSupported):
            return state
        heads = []
        for h in range(self.aheads):
            query = self.scaling * torch.tanh(self.mlp_q[h](state))
            heads.append(self._dot(h, query, self.pre_compute_k[h], self.pre_compute_v[h]))
        return self._join(heads)


@adapts(f"{_MODULE}:AttMultiHeadAdd", **_LIBRARY, sources=("6c3fd45dfd37",))
class FusedAttMultiHeadAdd(_FusedHeads):
    """Heads of AttAdd with a scale of 1 / sqrt(att_dim_k)."""

    def attend(self, enc_hs_pad: Tensor, enc_hs_len: Any, dec_z: Any, att_prev: Any, **kwargs: Any) -> Any:
        state = self._begin(enc_hs_pad, enc_hs_len, dec_z)
        if isinstance(state, NotSupported) or not all(map(is_stock_linear, self.gvec)):
            return _not_supported(state)
        return self._join([self._head(h, state, self.scaling) for h in range(self.aheads)])


class _FusedHeadsLocation(_FusedHeads):
    loc_conv: Any
    mlp_att: Any

    def _located(self, memory: Tensor, lengths: Any, state: Any, previous: list[Tensor] | None, scale: Any) -> Any:
        state = self._begin(memory, lengths, state)
        if isinstance(state, NotSupported) or not all(map(is_stock_linear, self.gvec)):
            return _not_supported(state)
        if previous is None:
            previous = [_uniform(lengths, memory.device, torch.float32)] * self.aheads
        heads = []
        for h in range(self.aheads):
            features = self.loc_conv[h](previous[h].view(len(memory), 1, 1, self.h_length))
            extra = self.mlp_att[h](features.squeeze(2).transpose(1, 2))
            heads.append(self._head(h, state, scale, extra))
        return self._join(heads)


@adapts(f"{_MODULE}:AttMultiHeadLoc", **_LIBRARY, sources=("bbd1724454ff",))
class FusedAttMultiHeadLoc(_FusedHeadsLocation):
    """Heads of AttLoc."""

    def attend(
        self, enc_hs_pad: Tensor, enc_hs_len: Any, dec_z: Any, att_prev: Any, scaling: float = 2.0, **kwargs: Any
    ) -> Any:
        return self._located(enc_hs_pad, enc_hs_len, dec_z, att_prev, scaling)


@adapts(f"{_MODULE}:AttMultiHeadMultiResLoc", **_LIBRARY, sources=("ae6c47b54f5b",))
class FusedAttMultiHeadMultiResLoc(_FusedHeadsLocation):
    """Heads of AttLoc, each with a width of its own, and a scale of 1 / sqrt(att_dim_k)."""

    def attend(self, enc_hs_pad: Tensor, enc_hs_len: Any, dec_z: Any, att_prev: Any, **kwargs: Any) -> Any:
        return self._located(enc_hs_pad, enc_hs_len, dec_z, att_prev, self.scaling)


def _not_supported(begun: Any) -> NotSupported:
    return begun if isinstance(begun, NotSupported) else NotSupported("a score layer that is no plain nn.Linear")


def _as_product(context: Tensor, alignments: Tensor, values: Any) -> Tensor:
    """The context in the dtype of alignments * values: under autocast that is not the dtype of a matrix product."""
    return context.to(torch.promote_types(alignments.dtype, values.dtype))


def _steps_of(mask: Tensor) -> _Steps:
    allowed = ~mask
    return _Steps(allowed if mask.any() else None, not allowed.any(1).all())


def _padding(lengths: Any) -> Tensor:
    """(B, longest), True beyond each length."""
    lengths = torch.as_tensor(lengths).long()  # floats are cut, as there
    return torch.arange(int(lengths.max()), device=lengths.device) >= lengths[:, None]


def _uniform(lengths: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(B, longest): 1 / length within each, 0 beyond."""
    if not isinstance(lengths, list):
        raise ArgumentTypeError("lengths that are no list")
    within = (~_padding(lengths)).to(device=device, dtype=dtype)
    return within / torch.tensor(lengths, device=device, dtype=dtype).unsqueeze(-1)
