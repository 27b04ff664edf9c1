"""Stateful attentions in the loop of Seq2Seq, against steps: the checks that tests/test_loop.py does not contain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_kernels import Memory
from attn_kernels.mechanisms import CoverageAttention, LocationSensitiveAttention
from attn_kernels.mechanisms.coverage import CoverageState
from attn_kernels.mechanisms.location import CumulativeLocationState, LocationState
from attn_kernels.seq2seq import Seq2Seq
from attn_kernels.seq2seq.state import DecoderState
from formulas import assert_same
from sentences import LOSSES
from test_loop import HIDDEN, WITH_STATE, B, S, T, batch, looped, models

attentions = pytest.mark.parametrize("attention", WITH_STATE)
SIZES = (HIDDEN, 2 * HIDDEN, 7)
Make = Callable[[], nn.Module]
MADE: dict[str, Make] = {
    "sharpened": lambda: LocationSensitiveAttention(*SIZES, 3, 5, scale=1.7, dtype=torch.float64),
    "no bias": lambda: LocationSensitiveAttention(*SIZES, 3, 5, True, bias=False, dtype=torch.float64),
    "uniform": lambda: LocationSensitiveAttention(*SIZES, 2, 3, True, initial="uniform", dtype=torch.float64),
    "one tap": lambda: LocationSensitiveAttention(*SIZES, 4, 1, dtype=torch.float64),
    "more taps than steps": lambda: LocationSensitiveAttention(*SIZES, 2, 2 * S + 3, dtype=torch.float64),
    "coverage as of ESPnet": lambda: CoverageAttention(*SIZES, scale=2.0, initial="uniform", dtype=torch.float64),
    "coverage without bias": lambda: CoverageAttention(*SIZES, bias=False, dtype=torch.float64),
}


def decode(model: Seq2Seq, memory: Memory, state: DecoderState, **leaves: Tensor) -> dict[str, Tensor | None]:
    """Results, and the gradients of the decoder's parameters and of the leaves."""
    logits, alignments = model.decoder(batch()[2], state, memory)
    named = {**dict(model.decoder.named_parameters()), **leaves}
    found = torch.autograd.grad(LOSSES["both"](logits, alignments), list(named.values()), allow_unused=True)
    return {"logits": logits, "alignments": alignments, **dict(zip(named, found, strict=True))}


def compare(made: dict[str, Seq2Seq], give: Callable[[Seq2Seq], dict[str, Any]]) -> None:
    """give: of a model, the arguments of ``decode``."""
    got, expected = (decode(made[name], **give(made[name])) for name in ("loop", "steps"))
    assert_same(got, expected, atol=1e-12, rtol=1e-9)


def random(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("name", MADE)
def test_settings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = models()
    for model in made.values():
        torch.manual_seed(2)
        model.decoder.attention = MADE[name]()
        with torch.no_grad():
            for parameter in model.decoder.attention.parameters():
                parameter.mul_(2).add_(0.1)
    calls = looped(made, monkeypatch)
    compare(made, lambda model: dict(zip(("memory", "state"), model.encode(*batch()[:2]), strict=True)))
    assert calls == [1]


@attentions
def test_padding_is_not_read(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values hold NaN there; their gradients are 0 there, and none is NaN."""
    made = models(attention=attention)
    calls = looped(made, monkeypatch)
    lengths = batch()[1]
    padding = (torch.arange(S) >= lengths[:, None])[..., None]

    def give(model: Seq2Seq) -> dict[str, Any]:
        memory, state = model.encode(*batch()[:2])
        keys, values = (
            x.detach().masked_fill(padding, torch.nan).requires_grad_() for x in (memory.keys, memory.values)
        )
        return dict(memory=Memory(keys, values, lengths), state=state, keys=keys, values=values)

    compare(made, give)
    found = decode(made["loop"], **give(made["loop"]))
    for name, x in found.items():
        assert x is None or x.isfinite().all(), name
    for name in ("keys", "values"):
        assert not found[name].masked_select(padding).any() and found[name][0].all()
    assert not found["alignments"][2].any()  # of an empty sentence
    assert calls == [1, 1]


STATES = {"location": LocationState, "location-cumulative": CumulativeLocationState, "coverage": CoverageState}


@attentions
def test_another_first_state(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which gets gradients."""
    made = models(attention=attention)
    calls = looped(made, monkeypatch)
    kind = STATES[attention]

    def give(model: Seq2Seq) -> dict[str, Any]:
        memory, state = model.encode(*batch()[:2])
        before = kind(*(random(B, 1, S).add(n).requires_grad_() for n in range(len(kind._fields))))
        return dict(memory=memory, state=state._replace(attention=before), **before._asdict())

    compare(made, give)
    assert all(x is not None and x.any() for x in list(decode(made["loop"], **give(made["loop"])).values())[-1:])
    assert len(calls) == 2


@attentions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(attention: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both round, at other places: alike to a few roundings. Sums of alignments are of 32 bits."""
    made = models(attention=attention, dtype=torch.float32)
    for model in made.values():
        model.to(dtype)
    calls = looped(made, monkeypatch)
    got, expected = (decode(made[name], *made[name].encode(*batch()[:2])) for name in ("loop", "steps"))
    for name, x in expected.items():
        if x is not None:
            largest = x.float().abs().max().item()
            bound = {torch.bfloat16: 0.06, torch.float16: 0.01}[dtype] * largest
            torch.testing.assert_close(got[name].float(), x.float(), atol=bound, rtol=0.0, msg=name)
    assert calls == [1]


@attentions
def test_no_keys_of_single_steps_are_kept(attention: str) -> None:
    kept: list[Tensor] = []
    for name, model in models(attention=attention).items():
        memory, state = model.encode(*batch()[:2])
        del kept[:]
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            model.decoder(batch()[2], state, memory)
        of_units = [x for x in kept if x.shape == memory.keys.shape]
        assert len(of_units) <= 1 if name == "loop" else len(of_units) >= T


def _hook(model: Seq2Seq) -> None:
    model.decoder.attention.register_forward_hook(lambda *_: None)


def _parametrize(model: Seq2Seq) -> None:
    for name in ("location_convolution", "location_projection"):
        torch.nn.utils.parametrizations.weight_norm(model.decoder.attention.get_submodule(name))


class _Half(LocationSensitiveAttention):
    def _step(self, query: Tensor, memory: Memory, state: Any) -> Any:
        return super()._step(0.5 * query, memory, state)


def _subclass(model: Seq2Seq) -> None:
    model.decoder.attention.__class__ = _Half


def _replace_method(model: Seq2Seq) -> None:
    model.decoder.attention._step = lambda *args: LocationSensitiveAttention._step(model.decoder.attention, *args)


@pytest.mark.parametrize("change", [_hook, _parametrize, _subclass, _replace_method])
def test_what_is_not_stock_goes_step_by_step(
    change: Callable[[Seq2Seq], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = models(attention="location")
    for model in made.values():
        change(model)
    calls = looped(made, monkeypatch)
    compare(made, lambda model: dict(zip(("memory", "state"), model.encode(*batch()[:2]), strict=True)))
    assert calls == []


def test_a_state_that_does_not_fit_is_refused() -> None:
    model = models(attention="location")["loop"]
    memory, state = model.encode(*batch()[:2])
    longer = LocationState(torch.zeros(B, 1, S + 1, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"state.alignments must have shape \(B, K, 9\), got \(4, 1, 10\)"):
        model.decoder(batch()[2], state._replace(attention=longer), memory)
    two = CumulativeLocationState(*(torch.zeros(B, 1, S, dtype=torch.float64),) * 2)
    with pytest.raises(ValueError, match=r"state must be LocationState\(alignments\), got 2 tensors"):
        model.decoder(batch()[2], state._replace(attention=two), memory)
