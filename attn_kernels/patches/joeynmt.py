"""JoeyNMT: the attention of its recurrent decoder.

The decoder calls ``compute_proj_keys`` once in a training step, but anew in every step of a greedy or beam search,
although the sentences are the same: there a projection is used again. A greedy search hands over the same tensor. A
beam search hands over another each time, with the rows of a sentence's hypotheses, which are all equal, re-ordered, and
without those of sentences that are done: such rows are recognised by comparing all of them, every time.

What is kept for that is as large as ``proj_keys``, which JoeyNMT keeps as long. It is used under ``torch.no_grad()``
only, and only where nothing it was made from was written to since, as far as autograd notices (``.data`` hides it).
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..functional import additive_step, dot_step, prepare_keys
from ..memory import Memory
from ..patching import Fused, Uncovered, adapts
from ..reference import Attention


class _Projection(NamedTuple):
    """Rows (B, Tk, M), the weight (A, M) that projected them, their keys (B, Tk, A), and the state of all three."""

    rows: Tensor
    weight: Tensor
    keys: Tensor
    state: tuple[Any, ...]


class _Reading(NamedTuple):
    """What a step read: keys, values and mask, their state, and the memory that they make.

    That is None where the mask leaves some row nothing.
    """

    tensors: tuple[Tensor, Tensor, Tensor]
    state: tuple[Any, ...]
    memory: Memory | None


# The last of each module; beside it, and not in it, so that copies and pickles hold what the original's hold.
_projections: WeakKeyDictionary[Any, _Projection] = WeakKeyDictionary()
_readings: WeakKeyDictionary[Any, _Reading] = WeakKeyDictionary()


class _FusedMechanism(Fused):
    """What the two mechanisms share: rows are projected once, and all steps on their keys read one memory."""

    key_layer: Any
    proj_keys: Tensor | None
    _check_input_shapes_forward: Any

    def compute_proj_keys(self, keys: Tensor) -> None:
        """keys: (B, Tk, M), the encoder's output. Leaves its projection, (B, Tk, A), in ``proj_keys``."""
        if is_compiling():
            super().compute_proj_keys(keys)  # type: ignore[misc]
            return
        last = _projections.pop(self, None)
        layer = self.key_layer
        if torch.is_grad_enabled() or not _is_plain(layer):
            super().compute_proj_keys(keys)  # type: ignore[misc]
            return
        projected = None if last is None or last.weight is not layer.weight else _project_again(last, keys)
        if projected is None:
            super().compute_proj_keys(keys)  # type: ignore[misc]
        else:
            self.proj_keys = projected
        tensors = (keys, layer.weight, self.proj_keys)
        _projections[self] = _Projection(*tensors, _state(*tensors))

    def attend(self, query: Tensor, mask: Tensor, values: Tensor) -> Any:
        """query: (B, 1, H), mask: (B, 1, Tk), > 0 where a step may be attended, values: (B, Tk, M)."""
        self._check_input_shapes_forward(query=query, mask=mask, values=values)
        if self.proj_keys is None:
            return Uncovered("no projected keys")
        if is_compiling():  # whether a row is empty is not known when the graph is made
            allowed = _allowed(mask)
            context, alignments = self._step(query, Memory(self.proj_keys, values, mask=allowed))
            some = allowed.any(2, keepdim=True)
            context, alignments = context.where(some, torch.nan), alignments.where(some, torch.nan)
        else:
            memory = self._memory(self.proj_keys, values, mask)
            if memory is None:
                return Uncovered("a row with nothing to attend")  # NaN there, and in all gradients
            context, alignments = self._step(query, memory)
        if torch.is_autocast_enabled(query.device.type) and alignments.dtype != torch.float64:
            alignments = alignments.float()  # what a softmax returns there
        return context, alignments

    def _memory(self, keys: Tensor, values: Tensor, mask: Tensor) -> Memory | None:
        tensors = (keys, values, mask)
        state = _state(*tensors)
        last = _readings.get(self)
        if last is not None and state == last.state and all(a is b for a, b in zip(tensors, last.tensors, strict=True)):
            return last.memory
        allowed = _allowed(mask)
        memory = None
        if allowed.any(2).all():
            known = (
                last is not None and last.memory is not None and last.memory.keys is keys and last.state[0] == state[0]
            )
            memory = Memory(keys, values, mask=allowed, prepared=last.memory.prepared if known else self._prepare(keys))
        _readings[self] = _Reading(tensors, state, memory)
        return memory

    def _prepare(self, keys: Tensor) -> Tensor | None:
        return None

    def _step(self, query: Tensor, memory: Memory) -> Attention:
        raise NotImplementedError


@adapts("joeynmt.attention:BahdanauAttention", library="JoeyNMT", versions="2.3.0", sources=("1691e38654ae",))
class FusedBahdanauAttention(_FusedMechanism):
    r"""scores_j = v . tanh(W_q query + W_k memory_j), with the projected memory in ``proj_keys``.

    Source: Bahdanau, Cho, Bengio, "Neural machine translation by jointly learning to align and translate", 2015,
    appendix A.1.2.

    Covered: all of it but a row that may attend nothing: that is left to the original, which gives NaN (in a graph of
    ``torch.compile``, NaN comes from here). Memory and keys that are NaN or infinite where the mask is 0 are ignored;
    the original returns NaN.
    """

    energy_layer: Any
    proj_query: Tensor
    compute_proj_query: Any

    def attend(self, query: Tensor, mask: Tensor, values: Tensor) -> Any:
        if not _is_plain(self.energy_layer):
            return Uncovered("an energy layer that is no plain nn.Linear")
        return super().attend(query, mask, values)

    def _prepare(self, keys: Tensor) -> Tensor | None:
        return prepare_keys(keys)

    def _step(self, query: Tensor, memory: Memory) -> Attention:
        self.compute_proj_query(query)
        return additive_step(self.proj_query, self.energy_layer.weight.view(-1), None, memory, True, None)


@adapts("joeynmt.attention:LuongAttention", library="JoeyNMT", versions="2.3.0", sources=("b326c557d00a",))
class FusedLuongAttention(_FusedMechanism):
    r"""scores_j = query . W memory_j, with the projected memory in ``proj_keys``.

    Source: Luong, Pham, Manning, "Effective approaches to attention-based neural machine translation", 2015, section
    3.1, "general".

    Covered: as of :class:`FusedBahdanauAttention`.
    """

    def _step(self, query: Tensor, memory: Memory) -> Attention:
        return dot_step(query, memory, True, None)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer does what its weight says, and nothing else."""
    return type(layer) is nn.Linear and not (layer._forward_pre_hooks or layer._forward_hooks)


def _allowed(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > 0


def _state(*tensors: Tensor) -> tuple[Any, ...]:
    """Differs where one of the tensors was written to, or another kind of result is asked for."""
    device = tensors[0].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return (*map(_version, tensors), autocast)


def _version(tensor: Tensor) -> Any:
    # Tensors of torch.inference_mode() count no writes: each time they may be others.
    return object() if tensor.is_inference() else (tensor._version, tensor.data_ptr())


def _project_again(last: _Projection, rows: Tensor) -> Tensor | None:
    """The keys of rows (B, Tk, M) by the last projection, if it has keys of equal ones and they still hold."""
    if _state(last.rows, last.weight, last.keys) != last.state:
        return None
    if rows is last.rows:
        return last.keys
    if rows.shape[1:] != last.rows.shape[1:] or (rows.dtype, rows.device) != (last.rows.dtype, last.rows.device):
        return None
    if torch.equal(rows, last.rows):
        return last.keys
    indices = _find(rows, last.rows)
    if indices is None or not torch.equal(rows, last.rows.index_select(0, indices)):
        return None
    return last.keys.index_select(0, indices)


def _find(rows: Tensor, among: Tensor) -> Tensor | None:
    """(B,): for each of rows (B, Tk, M) one of ``among`` that has some elements in common with it, or None."""
    if 0 in rows.shape or 0 in among.shape:
        return None
    step = max(1, rows.shape[1] // 8)  # in a bidirectional encoder the last unit depends on all that follows
    alike = (rows[:, None, ::step, -1] == among[None, :, ::step, -1]).all(2)
    return alike.byte().argmax(1) if alike.any(1).all() else None
