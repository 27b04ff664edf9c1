"""Seq2Seq(decoder="loop"), the whole sequence as one op, against decoder="steps"."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import formulas
import sentences
from attn_kernels import LuongAttention, Memory
from attn_kernels.scores import AdditiveScore, DotScore
from attn_kernels.seq2seq import Seq2Seq, decoder
from attn_kernels.seq2seq.attentions import STATELESS as ATTENTIONS
from attn_kernels.seq2seq.fused import cell_steps
from attn_kernels.seq2seq.fused.inputs import flatten, unflatten
from matrix import device_of, slow_interpreted
from sentences import SOURCE, TARGET, Batch, random_batch, run, weighted

B, S, T = 4, 9, 7
HIDDEN = 6

WITH_STATE = ("location", "location-cumulative", "coverage")  # those of which the loop computes the steps
attentions = pytest.mark.parametrize("attention", [*ATTENTIONS, *WITH_STATE])
cells = pytest.mark.parametrize("cell", ["lstm", "gru"])


def models(**settings: Any) -> dict[str, Seq2Seq]:
    """The same model twice, with steps and with the loop."""
    torch.manual_seed(0)
    sizes = {"embedding_size": 5, "hidden_size": HIDDEN, "units": 7, "dtype": torch.float64}
    made = {name: Seq2Seq(SOURCE, TARGET, **{**sizes, **settings}, decoder=name) for name in ("steps", "loop")}
    made["loop"].load_state_dict(made["steps"].state_dict())
    return made


def batch(steps: int = T, source: int = S) -> Batch:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([source, source // 2, 0, min(1, source)])
    return random_batch(lengths, source, steps, generator)


LOSSES = {**sentences.LOSSES, "last step": lambda logits, alignments: weighted(logits[:, -1])}


def masked(model: Seq2Seq) -> tuple[Memory, Any]:
    """The memory of the batch with a mask (B, 1, S), and the first decoder state."""
    memory, state = model.encode(*batch()[:2])
    mask = torch.rand(B, 1, S, generator=torch.Generator().manual_seed(4)) < 0.6
    return Memory(memory.keys, memory.values, memory.memory_lengths, mask), state


def assert_same(made: dict[str, Seq2Seq], data: tuple[Tensor, ...], loss: str = "both", **tolerance: float) -> None:
    tolerance = tolerance or {"atol": 1e-12, "rtol": 1e-9}
    formulas.assert_same(*(run(made[name], data, LOSSES[loss]) for name in ("loop", "steps")), **tolerance)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("num_layers", [1, 3])
@cells
@attentions
def test_results_and_gradients(attention: str, cell: str, num_layers: int, backend: str | None) -> None:
    assert_same(models(attention=attention, cell=cell, num_layers=num_layers, backend=backend), batch())


@slow_interpreted("bahdanau")
@attentions
def test_every_backend(attention: str, fused: str) -> None:
    device = device_of(fused)
    made = {name: model.to(device) for name, model in models(attention=attention, backend=fused).items()}
    assert_same(made, tuple(tensor.to(device) for tensor in batch()))


@pytest.mark.parametrize("loss", LOSSES)
@cells
@attentions
def test_losses(attention: str, cell: str, loss: str) -> None:
    made = models(attention=attention, cell=cell)
    steps, loop = (run(made[name], batch(), LOSSES[loss]) for name in ("steps", "loop"))
    for name, expected in steps.items():
        # Where a parameter takes no part, steps leave None and the loop may give zeros.
        got, expected = (torch.zeros(()) if x is None else x for x in (loop[name], expected))
        torch.testing.assert_close(got, expected.expand_as(got), atol=1e-12, rtol=1e-9, check_dtype=False)


@cells
@pytest.mark.parametrize(("steps", "source"), [(1, S), (T, 0), (T, 1), (1, 0)])
def test_sizes(cell: str, steps: int, source: int) -> None:
    for attention in ("bahdanau", "luong-general", "cosine", "location-cumulative"):
        assert_same(models(attention=attention, cell=cell), batch(steps, source))


@cells
@attentions
def test_float32(attention: str, cell: str) -> None:
    assert_same(models(attention=attention, cell=cell, dtype=torch.float32), batch(), atol=2e-5, rtol=2e-4)


@cells
def test_bfloat16(cell: str) -> None:
    """Both round everywhere, at other places: alike to a few roundings."""
    made = models(attention="bahdanau", cell=cell, dtype=torch.bfloat16)
    steps, loop = (run(made[name], batch(), LOSSES["both"]) for name in ("steps", "loop"))
    for name, expected in steps.items():
        largest = expected.float().abs().max()
        torch.testing.assert_close(loop[name].float(), expected.float(), atol=0.06 * largest.item(), rtol=0.0, msg=name)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_lstm_without_its_op(num_layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, or with no compiled module."""
    monkeypatch.setattr(cell_steps, "choose", lambda *_: "reference")
    assert_same(models(attention="bahdanau", cell="lstm", num_layers=num_layers), batch())


def test_weights_in_packed_form() -> None:
    """Sizes at which the products of the gates are oneDNN's."""
    sizes = {"embedding_size": 8, "hidden_size": 256, "units": 16, "dtype": torch.float32}
    assert_same(models(attention="bahdanau", cell="lstm", **sizes), batch(steps=14), atol=2e-5, rtol=1e-3)


class _Halved(nn.Module):
    """In place of dropout: the same units of every vector are dropped, whoever asks."""

    p = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.arange(x.shape[-1]) % 2 * 2.0).to(x.dtype)


@pytest.mark.parametrize("num_layers", [1, 2])
@cells
def test_dropout_is_where_it_is_in_steps(cell: str, num_layers: int) -> None:
    made = models(cell=cell, num_layers=num_layers, dropout=0.5)
    for model in made.values():
        model.encoder.eval()
        model.decoder.dropout = _Halved()
    assert_same(made, batch())


@cells
def test_gradients_with_dropout(cell: str) -> None:
    """The gradients are those of the factors that were drawn."""
    model = models(cell=cell, num_layers=2, dropout=0.4)["loop"]
    source, lengths, target = batch(steps=3, source=4)
    parameters = dict(model.decoder.named_parameters())
    names = [name for name in parameters if name.startswith(("rnn", "attentional", "attention."))]

    def logits(*values: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        changed = {f"decoder.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(model, changed, (source, lengths, target))

    inputs = tuple(parameters[name].detach().clone().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(logits, inputs, fast_mode=True)


def test_dropout_is_drawn_anew_and_off_in_evaluation() -> None:
    model = models(dropout=0.5)["loop"]
    first, second = (model(*batch())[0] for _ in range(2))
    assert not torch.equal(first, second)
    model.eval()
    first, second = (model(*batch())[0] for _ in range(2))
    assert torch.equal(first, second)


def test_backward_twice() -> None:
    model = models()["loop"]
    logits, alignments = model(*batch())
    loss = LOSSES["both"](logits, alignments)
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(loss, parameters, allow_unused=True)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, parameters, allow_unused=True)


def test_memory_is_let_go_after_backward() -> None:
    """What the loop keeps goes with the backward, not with the loss, which a training loop holds into its next step."""
    model = models()["loop"]
    kept = []

    def note(x: Tensor) -> Tensor:
        kept.append(weakref.ref(x.untyped_storage()))
        return x

    memory, state = model.encode(*batch()[:2])
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        logits, _ = model.decoder(batch()[2], state, memory)
    before = sum(reference() is not None for reference in kept)
    logits.sum().backward()
    del memory, state
    after = sum(reference() is not None for reference in kept)
    parameters = len(list(model.decoder.parameters()))
    assert after <= parameters < before - 10


def looped(made: dict[str, Seq2Seq], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the calls that the loop computes."""
    calls: list[int] = []
    decode = decoder.decode_sequence
    monkeypatch.setattr(decoder, "decode_sequence", lambda *args: calls.append(1) or decode(*args))
    return calls


@pytest.mark.parametrize("score", ["dot", "general", "concat"])
def test_learned_scale(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A factor of the query, which no attention that Seq2Seq makes has."""
    made = models(attention="luong-dot")
    for model in made.values():
        torch.manual_seed(2)
        units = 7 if score == "concat" else None
        attention = LuongAttention(HIDDEN, HIDDEN, units, score=score, scale=True, dtype=torch.float64)
        model.decoder.attention = attention
        with torch.no_grad():
            attention.g.fill_(0.7)
    calls = looped(made, monkeypatch)
    assert_same(made, batch())
    assert calls == [1]
    gradients = run(made["loop"], batch(steps=3), LOSSES["both"])
    logits, alignments = made["loop"](*batch(steps=3))
    parameters = list(made["loop"].decoder.attention.parameters())
    again = torch.autograd.grad(LOSSES["both"](logits, alignments), parameters, create_graph=True)
    names = [f"decoder.attention.{name}" for name, _ in made["loop"].decoder.attention.named_parameters()]
    for name, gradient in zip(names, again, strict=True):
        torch.testing.assert_close(gradient, gradients[name], atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("attention", ["cosine", "luong-dot"])
def test_factor_of_zero(attention: str) -> None:
    """All steps then count alike, and the factor itself has a gradient."""
    made = models(attention=attention)
    for model in made.values():
        if attention == "luong-dot":
            model.decoder.attention = LuongAttention(HIDDEN, HIDDEN, score="dot", scale=True, dtype=torch.float64)
        with torch.no_grad():
            model.decoder.attention.query_factor().zero_()
    assert_same(made, batch())


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("attention", ["bahdanau", "luong-general", "location"])
def test_mask_of_one_query(attention: str, backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """(B, 1, S): the same for each step, as for the queries of all steps, of which the backward makes one call."""
    made, found = models(attention=attention, backend=backend), {}
    calls = looped(made, monkeypatch)
    for name, model in made.items():
        memory, state = masked(model)
        logits, alignments = model.decoder(batch()[2], state, memory)
        gradients = torch.autograd.grad(LOSSES["both"](logits, alignments), list(model.decoder.attention.parameters()))
        found[name] = (logits, alignments, *gradients)
    torch.testing.assert_close(found["loop"], found["steps"], atol=1e-12, rtol=1e-9)
    assert calls == [1]


def test_trees_of_tensors() -> None:
    """A tree is what was taken apart, and its structure is a key: it differs where anything but the tensors does."""
    memory = Memory(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))
    tree = ((torch.ones(1), None), AdditiveScore(torch.ones(4)), DotScore(2.0), memory, "cpu")
    tensors, structure = flatten(tree)
    assert len(tensors) == 9
    again = unflatten(structure, iter(tensors))
    assert type(again[1]) is AdditiveScore and again[1].v is tree[1].v
    assert again[2] == DotScore(2.0) and type(again[3]) is Memory and again[3].keys is memory.keys and again[4] == "cpu"
    others = [(*tree[:2], DotScore(3.0), *tree[3:]), (*tree[:4], "cuda"), ((torch.ones(1),), *tree[1:])]
    structures = [structure, *(flatten(other)[1] for other in others)]
    assert len(set(structures)) == 4 and hash(structure) == hash(flatten(again)[1])


@pytest.mark.parametrize(
    ("attention", "settings"),
    [
        ("bahdanau-normalized", {}),
        ("luong-dot", {"cell": "gru", "num_layers": 2, "dropout": 0.3}),
        ("cosine", {"backend": "reference"}),
        ("location-cumulative", {"cell": "gru"}),
        ("coverage", {"backend": "reference"}),
    ],
)
def test_second_derivatives(attention: str, settings: dict[str, Any]) -> None:
    """Of every parameter that the loop reads, and of the gradients themselves."""
    model = models(attention=attention, **settings)["loop"]
    source, _, target = batch(steps=2, source=3)
    lengths = torch.tensor([3, 2, 3, 1]) if attention != "cosine" else torch.full((B,), 3)
    wanted = ("rnn.weight_hh_l0", "rnn.bias_ih_l0", "attentional", "attention.", "bridges.0.bias")
    names = [name for name, _ in model.named_parameters() if name.removeprefix("decoder.").startswith(wanted)]
    check_second_derivatives(model, names, (source, lengths, target))


def check_second_derivatives(model: Seq2Seq, names: list[str], inputs: tuple[Tensor, ...]) -> None:
    """gradgradcheck with regard to the parameters of these names, with the same random numbers in each call."""

    def results(*values: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), inputs)

    parameters = dict(model.named_parameters())
    leaves = tuple(parameters[name].detach().clone().requires_grad_() for name in names)
    assert torch.autograd.gradgradcheck(results, leaves, fast_mode=True)


@pytest.mark.parametrize("loss", LOSSES)
def test_differentiable_gradients_are_the_gradients(loss: str) -> None:
    made = models(num_layers=2, attention="luong-concat")
    parameters = [list(made[name].decoder.parameters()) for name in ("loop", "loop", "steps")]
    found = []
    for name, create_graph, of in zip(("loop", "loop", "steps"), (False, True, False), parameters, strict=True):
        value = LOSSES[loss](*made[name](*batch()))
        found.append(torch.autograd.grad(value, of, create_graph=create_graph, allow_unused=True))
    for plain, differentiable, steps in zip(*found, strict=True):
        x, y, z = (torch.zeros(()).double() if g is None else g for g in (plain, differentiable, steps))
        torch.testing.assert_close(y.expand_as(z), z, atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(x, y.expand_as(x), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(
    "settings",
    [{}, {"input_feeding": False, "backend": "reference"}, {"cell": "gru"}, {"attention": "location"}],
    ids=str,
)
def test_gradient_penalty(settings: dict[str, Any]) -> None:
    """Of the gradients of the whole model; with the formula in plain steps as the oracle."""
    made = models(**settings)
    made["steps"].decoder.attention.backend = "reference"
    found = {}
    for name, model in made.items():
        model.zero_grad()
        value = LOSSES["both"](*model(*batch(steps=3)))
        gradients = torch.autograd.grad(value, list(model.parameters()), create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()
        found[name] = {key: parameter.grad for key, parameter in model.named_parameters()}
    for name, expected in found["steps"].items():
        torch.testing.assert_close(found["loop"][name], expected, atol=1e-11, rtol=1e-8, msg=name)


@pytest.mark.parametrize("decoder", ["loop", "steps"])
def test_functional_gradients(decoder: str) -> None:
    """torch.func.grad of a functional call, and a batch of gradients at once. (Packed RNNs cannot be transformed.)"""
    model = models(backend="reference")[decoder]
    source, _, target = batch()
    data = (source, torch.full((B,), S), target)
    expected = run(model, data, lambda logits, _: weighted(logits))

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return weighted(torch.func.functional_call(model, parameters, data)[0])

    for name, gradient in torch.func.grad(loss)({k: p.detach() for k, p in model.named_parameters()}).items():
        other = expected[name]
        torch.testing.assert_close(gradient, torch.zeros_like(gradient) if other is None else other)
    each = model(*batch())[0].sum((1, 2))
    weight = model.decoder.attentional.weight
    together = torch.autograd.grad(each, weight, torch.eye(B).double(), is_grads_batched=True, retain_graph=True)[0]
    for i in range(B):
        torch.testing.assert_close(together[i], torch.autograd.grad(each[i], weight, retain_graph=True)[0])


def test_results_may_be_changed_in_place() -> None:
    made = models()
    expected = run(made["loop"], batch(), LOSSES["both"])
    logits, alignments = made["loop"](*batch())
    loss = LOSSES["both"](logits, alignments)
    made["loop"].zero_grad()
    with torch.no_grad():
        alignments.zero_()
    loss.backward()
    for name, parameter in made["loop"].named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=0, rtol=0)


def test_changed_inputs_are_refused() -> None:
    model = models()["loop"]
    logits, _ = model(*batch())
    with torch.no_grad():
        model.decoder.attentional.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weighted(logits).backward()


def test_frozen_parts() -> None:
    made = models(num_layers=2)
    for model in made.values():
        model.encoder.requires_grad_(False)
        model.decoder.attention.requires_grad_(False)
        model.decoder.rnn.weight_hh_l0.requires_grad_(False)
    assert_same(made, batch())


def test_no_gradients_wanted() -> None:
    made = models()
    with torch.no_grad():
        for got, expected in zip(made["loop"](*batch()), made["steps"](*batch()), strict=True):
            torch.testing.assert_close(got, expected)
            assert got.grad_fn is None


@pytest.mark.parametrize("input_feeding", [True, False])
def test_parameters_are_the_same(input_feeding: bool) -> None:
    made = models(input_feeding=input_feeding)
    states = {name: model.state_dict() for name, model in made.items()}
    assert list(states["steps"]) == list(states["loop"])
    assert_same(made, batch())


def test_autocast_and_compile() -> None:
    """They look into steps: the loop leaves the work to those."""
    made = models(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        steps, loop = (made[name](*batch())[0] for name in ("steps", "loop"))
    torch.testing.assert_close(loop, steps)
    data = batch()
    memory, state = made["loop"].encode(*data[:2])
    with torch._dynamo.config.patch(allow_rnn=True):
        logits, _ = torch.compile(made["loop"].decoder, backend="eager", fullgraph=True)(data[2], state, memory)
    torch.testing.assert_close(logits, made["steps"].decoder(data[2], state, memory)[0])


class Operations(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(operation.name())
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", [*ATTENTIONS, *WITH_STATE, "cosine, sharpness not learned"])
def test_no_tensor_is_made_on_the_host(attention: str) -> None:
    """Such a tensor is copied to a GPU, which waits, and which a CUDA graph around the step cannot record."""
    model, (source, lengths, target) = models(attention=attention.partition(",")[0])["loop"], batch()
    if "not learned" in attention:
        del model.decoder.attention.sharpness
        model.decoder.attention.sharpness = 10.0
    memory, state = model.encode(source, lengths)  # reads lengths on the host
    with Operations() as ran:
        model.decoder(target, state, memory)[0].sum().backward()
    assert "aten::lift_fresh" not in ran.names and "aten::_local_scalar_dense" not in ran.names


@pytest.mark.parametrize("hooked", ["attention", "attentional", "attention.query_projection"])
def test_hooks_fire(hooked: str) -> None:
    model = models()["loop"]
    calls = []
    model.decoder.get_submodule(hooked).register_forward_hook(lambda *args: calls.append(1))
    model(*batch())
    assert len(calls) == T


@pytest.mark.slow
def test_training_takes_the_same_course() -> None:
    """200 steps of training from one seed, in float64: loop and kernels against steps and the reference."""
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_size": 8, "units": 8, "dtype": torch.float64}
    model = Seq2Seq(SOURCE, TARGET, **sizes, decoder="loop")
    plain = Seq2Seq(SOURCE, TARGET, **sizes, decoder="steps", backend="reference")
    plain.load_state_dict(model.state_dict())
    optimizers = [torch.optim.Adam(m.parameters(), lr=5e-3) for m in (model, plain)]
    generator = torch.Generator().manual_seed(2)
    for step in range(200):
        source = torch.randint(3, SOURCE, (8, 6), generator=generator)
        losses = []
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            logits, _ = m(source, torch.full((8,), 6), source)  # to write the source again
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), source.flatten())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-8), f"step {step}"
    assert losses[0] < 1.9  # of 2.4 at first: it does learn
