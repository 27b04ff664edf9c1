"""ESPnet 202511: the attentions of its recurrent decoders, original against patched."""

from __future__ import annotations

import copy

import pytest
import torch

attentions = pytest.importorskip(
    "espnet.nets.pytorch_backend.rnn.attentions", reason="ESPnet: tests/peers/requirements.txt"
)

from attn_kernels import BahdanauAttention, patch
from attn_kernels.mechanisms import CoverageAttention, ForwardAttention, LocationSensitiveAttention, MultiHeadAttention
from steps import check_copies_are_patched, compare

pytestmark = pytest.mark.usefixtures("at_any_size")

EPROJS, DUNITS, UNITS, OUT = 6, 7, 5, 4
SINGLE = (EPROJS, DUNITS, UNITS)
HEADS = (EPROJS, DUNITS, 3, UNITS, 4)
TYPES = {
    "AttDot": SINGLE,
    "AttAdd": SINGLE,
    "AttLoc": (*SINGLE, 3, 2),
    "AttCov": SINGLE,
    "AttCovLoc": (*SINGLE, 3, 2),
    "AttLoc2D": (*SINGLE, 2, 3, 2),
    "AttLocRec": (*SINGLE, 3, 2),
    "AttForward": (*SINGLE, 3, 2),
    "AttForwardTA": (*SINGLE, 3, 2, OUT),
    "AttMultiHeadDot": HEADS,
    "AttMultiHeadAdd": HEADS,
    "AttMultiHeadLoc": (*HEADS, 3, 2),
    "AttMultiHeadMultiResLoc": (*HEADS, 3, 6),
}
FIRST_IN_FLOAT32 = ("AttCov", "AttCovLoc", "AttLoc2D", "AttLocRec", "AttMultiHeadLoc", "AttMultiHeadMultiResLoc")
KEEPS = ("h_length", "enc_h", "pre_compute_enc_h", "pre_compute_k", "pre_compute_v", "mask", "trans_agent_prob")
types_ = pytest.mark.parametrize("name", TYPES)


def make(name, **options):
    return getattr(attentions, name)(*TYPES[name], **options)


def flat(x):
    if isinstance(x, torch.Tensor):
        return [x]
    return [part for one in x for part in flat(one)] if isinstance(x, list | tuple) else []


def decode(module, memory, states, lengths, resets=2, **options):
    """Utterances one after the other, with their alignments handed on; also what the module keeps."""
    if isinstance(module, attentions.AttForward | attentions.AttForwardTA) and "scaling" not in options:
        options["scaling"] = 1.0
    results = []
    for _ in range(resets):
        module.reset()
        previous = None
        for state in states:
            extra = (torch.tanh(state[:, :OUT]),) if isinstance(module, attentions.AttForwardTA) else ()
            context, previous = module(memory, lengths, state, previous, *extra, **options)
            results += [context, *(list(flat(previous))[-9:])]
    kept = [getattr(module, name, None) for name in KEEPS]
    return results + [x for x in flat(kept) if x.is_floating_point()]


def inputs(seed, batch=3, steps=9, **sizes):
    torch.manual_seed(seed)
    lengths = sorted((int(torch.randint(1, steps + 1, ())) for _ in range(batch)), reverse=True)
    lengths[0] = steps
    return {
        "memory": torch.randn(batch, steps, EPROJS).double(),
        "states": torch.randn(4, batch, DUNITS).double(),
        "lengths": lengths,
    }


@types_
@pytest.mark.parametrize("seed", range(3))
def test_decoding(name, seed):
    """The alignments of a first step, which some classes make in float32 whatever the model is, are given to them."""
    given = inputs(seed)
    if name in FIRST_IN_FLOAT32:
        module = make(name)
        patched = copy.deepcopy(module)
        assert len(patch(patched).replaced) == 1
        check_float32(module, patched, given)
    else:
        assert compare(make(name), decode, given) == []


def check_float32(module, patched, given):
    results = []
    for one in (module, patched):
        leaves = [x.float().requires_grad_() for x in (given["memory"], given["states"])]
        outputs = decode(one, *leaves, given["lengths"])
        torch.manual_seed(9)
        loss = sum((x * torch.randn_like(x)).sum() for x in outputs)
        gradients = torch.autograd.grad(loss, [*leaves, *one.parameters()], allow_unused=True)
        results.append([x.detach() for x in outputs] + list(gradients))
    assert len(results[0]) == len(results[1])
    for expected, got in zip(*results, strict=True):
        assert (expected is None) == (got is None)
        if expected is not None:
            scale = max(1.0, expected.abs().max().item())
            torch.testing.assert_close(got, expected, atol=1e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in FIRST_IN_FLOAT32 if name != "AttLocRec"])
def test_first_alignments_given(name):
    """In float64, to the classes that take them alone."""

    def call(module, memory, states, lengths):
        module.reset()
        uniform = (torch.arange(memory.shape[1]) < torch.tensor(lengths)[:, None]).to(memory) / memory.shape[1]
        first = {"AttLoc2D": uniform[:, None].expand(-1, 2, -1)}.get(name, [uniform] * (3 if "Head" in name else 1))
        results, previous = [], first
        for state in states:
            context, previous = module(memory, lengths, state, previous)
            results += [context, *flat(previous)]
        return results

    assert compare(make(name), call, inputs(3)) == []


@types_
def test_options(name):
    given = inputs(5)
    if "Head" in name and name != "AttMultiHeadLoc":
        options = {}
    else:
        options = {"scaling": 0.7}
    check = lambda module, memory, states, lengths: decode(module, memory, states, lengths, **options)  # noqa: E731
    module = make(name) if name.startswith("AttForward") else make(name, han_mode=True)
    patched = copy.deepcopy(module)
    patch(patched)
    for one in (module, patched):
        one.float()
    with torch.no_grad():
        args = (given["memory"].float(), given["states"].float(), given["lengths"])
        for expected, got in zip(check(module, *args), check(patched, *args), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    given = given["memory"].float(), given["lengths"], None, None
    extra = (torch.zeros(3, OUT),) if name == "AttForwardTA" else ()
    module.reset(), patched.reset()
    for expected, got in zip(flat(module(*given, *extra)), flat(patched(*given, *extra)), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@types_
def test_what_falls_through(name):
    module = make(name)
    patched = copy.deepcopy(module)
    report = patch(patched)
    args = (torch.randn(1, 6, EPROJS), [6], torch.randn(1, DUNITS), None)
    extra = (torch.zeros(1, OUT),) if name == "AttForwardTA" else ()
    if name in ("AttLoc", "AttForward", "AttForwardTA"):
        for one in (module, patched):
            one.reset()
        window = {"last_attended_idx": 2}
        for expected, got in zip(
            flat(module(*args, *extra, **window)), flat(patched(*args, *extra, **window)), strict=True
        ):
            assert torch.equal(got, expected)
        assert [fallback.reason for fallback in report.fallbacks] == ["a window around the last attended frame"]
    args = (torch.randn(2, 6, EPROJS), [6, 0], torch.randn(2, DUNITS), None)
    extra = (torch.zeros(2, OUT),) if name == "AttForwardTA" else ()
    for one in (module, patched):
        one.reset()
    for expected, got in zip(flat(module(*args, *extra)), flat(patched(*args, *extra)), strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True)
    assert report.fallbacks[-1].reason == "a row with nothing to attend"


@types_
def test_copies_and_back(name):
    check_copies_are_patched(make(name))


@types_
def test_autocast(name):
    """The dtypes of the original, and its numbers to the rounding of bfloat16; parameters get the same gradients."""
    given = inputs(7)
    module = make(name).float()
    patched = copy.deepcopy(module)
    report = patch(patched)
    results = []
    for one in (module, patched):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = decode(one, given["memory"].float(), given["states"].float(), given["lengths"])
        outputs[0].float().square().sum().backward()
        results.append(outputs + [parameter.grad for parameter in one.parameters() if parameter.grad is not None])
    assert len(results[0]) == len(results[1])
    for expected, got in zip(*results, strict=True):
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(got, expected, atol=0.03 * scale, rtol=0.03)
    assert report.fallbacks == []


@types_
def test_lengths(name):
    """In a tensor, of which some classes have an error; floats, which are cut."""
    given = inputs(8)
    args = given["memory"].float(), given["states"].float()
    module = make(name).float()
    patched = copy.deepcopy(module)
    patch(patched)
    with torch.no_grad():
        for lengths in ([9.0, 5.5, 2.9], torch.tensor([9, 5, 2])):
            try:
                expected = decode(module, *args, lengths)
            except TypeError:
                with pytest.raises(TypeError):
                    decode(patched, *args, lengths)
                continue
            for a, b in zip(decode(patched, *args, lengths), expected, strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@types_
def test_one_batch_after_another(name):
    """Other utterances after reset(): nothing of those before is used; with and without gradients in turn."""
    module = make(name).float()
    patched = copy.deepcopy(module)
    report = patch(patched)
    for seed in range(6):
        given = inputs(20 + seed, batch=1 + seed % 3, steps=4 + seed)
        args = given["memory"].float(), given["states"].float(), given["lengths"]
        with torch.set_grad_enabled(seed % 2 == 0):
            for a, b in zip(decode(patched, *args, 1), decode(module, *args, 1), strict=True):
                torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)
    assert report.fallbacks == []


def test_every_attention_is_known():
    """All but NoAtt, which computes none, and GDCAttLoc of singing, which is given how long each note lasts."""
    known = {name for name in vars(attentions) if name.startswith(("Att", "GDC", "NoAtt"))}
    assert known - set(TYPES) == {"NoAtt", "GDCAttLoc"}


# Modules of our own with the same weights -----------------------------------------------------------------------------


def with_weights_of(module, ours):
    """ours: ours, with the parameters of the original; the biases that ESPnet adds up are one."""
    named = module.state_dict()
    renamed = {
        "query_projection.weight": named["mlp_dec.weight"],
        "memory_projection.weight": named["mlp_enc.weight"],
        "bias": named["mlp_enc.bias"],
        "v": named["gvec.weight"][0],
    }
    if "loc_conv.weight" in named:
        filters = named["loc_conv.weight"].squeeze(2)
        if ours.location_convolution.in_channels == 2:  # of the alignments before, which AttCovLoc does not read
            filters = torch.cat([torch.zeros_like(filters), filters], dim=1)
        renamed["location_convolution.weight"] = filters
        renamed["location_projection.weight"] = named["mlp_att.weight"]
    if "wvec.weight" in named:
        renamed["coverage_weight"] = named["wvec.weight"][:, 0]
        renamed["bias"] = named["mlp_enc.bias"] + named["wvec.bias"]
    if "mlp_ta.weight" in named:  # of context, output, state; the probability of staying
        context, output, state = named["mlp_ta.weight"].split([EPROJS, OUT, DUNITS], dim=1)
        renamed["transition.weight"] = -torch.cat([context, state, output], dim=1)
        renamed["transition.bias"] = -named["mlp_ta.bias"]
        projection = named["mlp_dec.weight"]  # of scores, which do not read the output
        renamed["query_projection.weight"] = torch.cat([projection, projection.new_zeros(UNITS, OUT)], dim=1)
    ours.load_state_dict(renamed)
    return ours


OURS = {
    "AttLoc": (lambda **k: LocationSensitiveAttention(DUNITS, EPROJS, UNITS, 3, 5, initial="uniform", **k), 2.0),
    "AttCov": (lambda **k: CoverageAttention(DUNITS, EPROJS, UNITS, initial="uniform", **k), 2.0),
    "AttCovLoc": (
        lambda **k: LocationSensitiveAttention(DUNITS, EPROJS, UNITS, 3, 5, True, initial="uniform", **k),
        2.0,
    ),
    "AttForward": (lambda **k: ForwardAttention(DUNITS, EPROJS, UNITS, channels=3, kernel_size=5, **k), 1.0),
    "AttForwardTA": (lambda **k: ForwardAttention(DUNITS + OUT, EPROJS, UNITS, True, 3, 5, **k), 1.0),
}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("seed", range(3))
def test_mechanisms(name, seed, monkeypatch):
    """Contexts, alignments and gradients of four steps. What an agent reads of the step before is in our query."""
    given = inputs(10 + seed)
    memory, states, lengths = given["memory"].requires_grad_(), given["states"].requires_grad_(), given["lengths"]
    module = make(name).double()
    make_ours, scale = OURS[name]
    ours = with_weights_of(module, make_ours(scale=scale, dtype=torch.float64))
    projected = ours.memory(memory, torch.tensor(lengths))
    state = ours.initial_state(projected)
    # The first alignments of coverage, which are summed up, are float32 whatever the model is.
    previous = [state[-1][:, 0]] if name in ("AttCov", "AttCovLoc") else None
    module.reset()
    results, expected = [], []
    for query in states:
        extra = (torch.tanh(query[:, :OUT]),) if name == "AttForwardTA" else ()
        context, alignments, state = ours(torch.cat([query, *extra], dim=1), projected, state)
        results += [context, alignments]
        with monkeypatch.context() as patch_:
            patch_.setattr(torch, "clamp", lambda x, least: x)  # of ESPnet's, at least 1e-6 of every alignment
            context, previous = module(memory, lengths, query, previous, *extra, scaling=scale)
        expected += [context, previous[-1] if isinstance(previous, list) else previous]
    check_same(results, expected, memory, states)


def check_same(results, expected, *leaves):
    torch.testing.assert_close(results, expected)
    gradients = []
    for outputs in (results, expected):
        torch.manual_seed(1)
        loss = sum((x * torch.randn_like(x)).sum() for x in outputs)
        gradients.append(torch.autograd.grad(loss, leaves, retain_graph=True))
    torch.testing.assert_close(*gradients)


def additive_of(module, projection):
    """BahdanauAttention with the scores of the original, times 2. projection: of its query."""
    named = module.state_dict()
    ours = BahdanauAttention(projection.shape[1], EPROJS, UNITS, normalize=True, dtype=torch.float64)
    v = named["gvec.weight"][0]
    named = {
        "memory_projection.weight": named["mlp_enc.weight"],
        "bias": named["mlp_enc.bias"],
        "v": v,
        "g": 2 * v.norm(),
    }
    ours.load_state_dict(named | {"query_projection.weight": projection})
    return ours


def heads_of(module, score):
    named = module.state_dict()
    sizes = {"heads": 3, "value_size": 4, "output_size": EPROJS}
    ours = MultiHeadAttention(DUNITS, EPROJS, UNITS, score=score, tanh=score == "dot", dtype=torch.float64, **sizes)
    stacked = {
        "query_projection.weight": "mlp_q.{}.weight",
        "query_projection.bias": "mlp_q.{}.bias",
        "memory_projection.weight": "mlp_k.{}.weight",
        "value_projection.weight": "mlp_v.{}.weight",
    }
    weights = {mine: torch.cat([named[name.format(h)] for h in range(3)]) for mine, name in stacked.items()}
    if score == "additive":
        weights["v"] = torch.cat([named[f"gvec.{h}.weight"] for h in range(3)])
    ours.load_state_dict(weights | {"output_projection.weight": named["mlp_o.weight"]})
    return ours


@pytest.mark.parametrize("name", ["AttAdd", "AttMultiHeadAdd", "AttMultiHeadDot"])
def test_mechanisms_without_a_state(name):
    given = inputs(20)
    memory, states, lengths = given["memory"].requires_grad_(), given["states"].requires_grad_(), given["lengths"]
    module = make(name).double()
    if name == "AttAdd":
        ours = additive_of(module, module.mlp_dec.weight)
    else:
        ours = heads_of(module, "additive" if name == "AttMultiHeadAdd" else "dot")
    projected = ours.memory(memory, torch.tensor(lengths))
    results, expected = [], []
    for query in states:
        results += ours(query, projected)
        context, alignments = module(memory, lengths, query, None)
        expected += [context, alignments if name == "AttAdd" else torch.stack(alignments, 1)]
    check_same(results, expected, memory, states)


def test_location_recurrent():
    """AttLocRec: what its LSTM says is added to all keys alike, and so is a part of the query of BahdanauAttention."""
    given = inputs(21)
    memory, states, lengths = given["memory"].requires_grad_(), given["states"].requires_grad_(), given["lengths"]
    module = make("AttLocRec").double()
    ours = additive_of(module, torch.cat([module.mlp_dec.weight, torch.eye(UNITS)], dim=1).detach())
    projected = ours.memory(memory, torch.tensor(lengths))
    alignments = (torch.arange(9) < torch.tensor(lengths)[:, None]) / torch.tensor(lengths).double()[:, None]
    hidden = memory.new_zeros(2, 3, UNITS).unbind()
    previous = (alignments, hidden)
    results, expected = [], []
    for query in states:
        features = torch.relu(torch.conv1d(alignments[:, None], module.loc_conv.weight.squeeze(2), padding=2))
        hidden = module.att_lstm(features.amax(2), hidden)
        context, alignments = ours(torch.cat([query, hidden[0]], dim=1), projected)
        results += [context, alignments]
        context, previous = module(memory, lengths, query, previous)
        expected += [context, previous[0]]
    check_same(results, expected, memory, states)
