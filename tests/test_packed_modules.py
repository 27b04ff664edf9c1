"""Modules on packed memories: same results and gradients as on padded memories, whatever the padding contains."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import formulas
from attn_kernels import BahdanauAttention, LuongAttention, Memory, mechanisms, memory_gradient
from attn_kernels.attention_module import AttentionModule
from attn_kernels.seq2seq import Seq2Seq
from conftest import available
from formulas import assert_same, gradients
from matrix import interpreted, slow_if
from sentences import SOURCE, TARGET, random_batch, run
from test_modules import MECHANISMS, Q

LENGTHS = [3, 0, 5, 1]
B, TQ, TK, N, STEPS = len(LENGTHS), 3, max(LENGTHS), sum(LENGTHS), 4
EXACT = {"atol": 1e-12, "rtol": 1e-9}
every_mechanism = pytest.mark.parametrize("mechanism", MECHANISMS)


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def rows(size: int, lengths: list[int] = LENGTHS) -> Tensor:
    return torch.randn(sum(lengths), size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def pad(packed: Tensor, lengths: list[int] = LENGTHS, filling: float = torch.nan) -> Tensor:
    """(B, Tk, *), of NaN behind the sentences."""
    parts = packed.split(lengths)
    longest = max(lengths)
    return torch.stack([torch.cat((x, x.new_full((longest - len(x), x.shape[1]), filling))) for x in parts])


def as_jagged(packed: Tensor) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(packed, offsets_of(LENGTHS).to(packed.device))


KINDS: dict[str, Callable[[nn.Module, Tensor], Memory]] = {
    "offsets": lambda module, x: module.memory(x, memory_offsets=offsets_of(LENGTHS).to(x.device)),
    "int32 offsets": lambda module, x: module.memory(x, memory_offsets=offsets_of(LENGTHS).to(x.device, torch.int32)),
    "jagged": lambda module, x: module.memory(as_jagged(x)),
    "padded": lambda module, x: module.memory(pad(x), torch.tensor(LENGTHS, device=x.device)),
}


def make(mechanism: str, **options: Any) -> tuple[AttentionModule, int]:
    torch.manual_seed(1)
    module = MECHANISMS[mechanism].make(**{"dtype": torch.float64, **options})
    return formulas.randomize(module), MECHANISMS[mechanism].memory_size


def decode(module: nn.Module, memory: Memory, given: Tensor, queries: Tensor, **options: Any) -> dict[str, Tensor]:
    """Queries of one call, then the same in steps, each of which reads the context before it."""
    results = list(module(queries, memory, **options))
    feed: Tensor | float = 0.0
    for query in queries.unbind(1):
        context, alignments = module(query + feed, memory, **options)
        feed = 0.25 * context.sum(-1, keepdim=True)
        results += [context, alignments]
    results = [x for x in results if x is not None]
    named = {str(n): x for n, x in enumerate(results)}
    return named | gradients(module, results, outputs=given, queries=queries)


def queries(count: int = STEPS, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(B, count, Q, generator=generator, dtype=torch.float64).to(device).requires_grad_()


@pytest.fixture(autouse=True)
def _kernels() -> None:
    available("cpu")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "padded"])
@every_mechanism
def test_as_padded(mechanism: str, kind: str) -> None:
    check_as_padded(mechanism, kind, "cpu", "cpu")


@slow_if(interpreted)
def test_every_backend(backend: str, device: str) -> None:
    check_as_padded("bahdanau", "offsets", backend, device)


def check_as_padded(mechanism: str, kind: str, backend: str, device: str) -> None:
    module, size = make(mechanism, backend=backend, device=device)
    given, asked = rows(size).to(device).requires_grad_(), queries(device=device)
    memory = KINDS[kind](module, given)
    assert (memory.memory_offsets is not None) == (backend in ("cpu", "triton")) and memory.batch_size == B
    got = decode(module, memory, given, asked)
    assert_same(got, decode(module, KINDS["padded"](module, given), given, asked), **EXACT)
    assert got["0"].shape == (B, STEPS, size) and got["1"].shape == (B, STEPS, TK)
    assert not got["0"][1].any() and not got["1"][1].any()  # an empty sentence
    assert not got["queries"][1].any() and all(x.isfinite().all() for x in got.values())


@pytest.mark.parametrize("is_sorted", [True, False])
def test_packed_sequence(is_sorted: bool) -> None:
    """As of PyTorch's recurrent layers: steps take turns, and sentences may have another order within."""
    lengths = [5, 3, 3, 1] if is_sorted else [3, 1, 5, 3]
    module, size = make("bahdanau")
    packed = rows(size, lengths).requires_grad_()
    padded = pad(packed, lengths, 0.0)
    sequence = pack_padded_sequence(padded, torch.tensor(lengths), batch_first=True, enforce_sorted=is_sorted)
    assert (sequence.unsorted_indices is None) == is_sorted
    memory = module.memory(sequence)
    torch.testing.assert_close(memory.values, packed, rtol=0, atol=0)
    assert memory.memory_offsets.tolist() == offsets_of(lengths).tolist()
    expected = module.memory(padded, torch.tensor(lengths))
    asked = queries()
    assert_same(*(decode(module, x, packed, asked) for x in (memory, expected)), **EXACT)
    with pytest.raises(ValueError, match="memory_offsets must be None with a PackedSequence, which has its own"):
        module.memory(sequence, memory_offsets=offsets_of(lengths))


def test_max_seqlen() -> None:
    """Of a jagged tensor that knows one, alignments have as many columns."""
    module, size = make("bahdanau")
    given = torch.nested.nested_tensor_from_jagged(rows(size), offsets_of(LENGTHS), max_seqlen=TK + 2)
    memory = module.memory(given)
    assert memory.max_length == TK + 2
    context, alignments = module(queries(), memory)
    expected = module(queries(), module.memory(rows(size), memory_offsets=offsets_of(LENGTHS)))
    torch.testing.assert_close(context, expected.context)
    torch.testing.assert_close(alignments, nn.functional.pad(expected.alignments, (0, 2)))
    assert memory.padded().keys.shape[1] == TK + 2


# Gradients that steps leave to one pass -------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every memory is large enough. Gives the numbers of steps of which gradients of a memory were made at once."""
    made: list[int] = []
    memory_gradients = memory_gradient._memory_gradients
    monkeypatch.setattr(memory_gradient, "_MIN_BYTES", 0)
    monkeypatch.setattr(
        memory_gradient, "_memory_gradients", lambda steps: made.append(len(steps)) or memory_gradients(steps)
    )
    return made


@pytest.mark.parametrize("need_weights", [True, False])
@every_mechanism
def test_gradients_of_all_steps_at_once(mechanism: str, need_weights: bool, passes: list[int]) -> None:
    module, size = make(mechanism)
    given, asked = rows(size).requires_grad_(), queries()
    found = [
        decode(module, KINDS[kind](module, given), given, asked, need_weights=need_weights)
        for kind in ("jagged", "padded")
    ]
    assert_same(*found, **EXACT)
    assert passes == [1 + STEPS] * 2


def test_steps_with_and_without_weights(passes: list[int]) -> None:
    """Alignments that nobody asked for are joined with those that were."""
    module, size = make("luong-general")
    given, asked = rows(size).requires_grad_(), queries()
    found = []
    for kind in ("offsets", "padded"):
        memory = KINDS[kind](module, given)
        contexts = [module(q, memory, need_weights=n % 2 == 0).context for n, q in enumerate(asked.unbind(1))]
        found.append(gradients(module, contexts, outputs=given, queries=asked))
    assert_same(*found, **EXACT)
    assert passes == [STEPS] * 2


def test_second_derivatives(passes: list[int]) -> None:
    module, size = make("bahdanau")
    asked, found = queries(2), []
    for kind in ("offsets", "padded"):
        given = rows(size).requires_grad_()
        memory = KINDS[kind](module, given)
        loss = sum(module(q, memory).context.square().sum() for q in asked.unbind(1))
        (first,) = torch.autograd.grad(loss, given, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [given, asked, *module.parameters()]))
    torch.testing.assert_close(*found, **EXACT)


def test_autocast_and_16_bits() -> None:
    module, size = make("bahdanau", dtype=torch.float32)
    given, asked = rows(size).float(), queries().float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = [module(asked, KINDS[kind](module, given)) for kind in ("offsets", "padded")]
    torch.testing.assert_close(*found)
    assert found[0].context.dtype == torch.bfloat16
    module = module.to(torch.float16)
    with torch.no_grad():
        found = [module(asked.half(), KINDS[kind](module, given.half())) for kind in ("offsets", "padded")]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("mechanism", ["bahdanau", "luong-general"])
def test_compiled(mechanism: str) -> None:
    torch._dynamo.reset()
    module, size = make(mechanism, dtype=torch.float32)
    given, asked = rows(size).float(), queries().detach().float()

    def function(given: Tensor, offsets: Tensor) -> Tensor:
        return module(asked, module.memory(given, memory_offsets=offsets), need_weights=False).context

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(given, offsets_of(LENGTHS)), function(given, offsets_of(LENGTHS)))


# A memory as a value --------------------------------------------------------------------------------------------------


def packed_memory(size: int = 4) -> Memory:
    keys, values = rows(3), rows(size)
    return Memory(keys, values, memory_offsets=offsets_of(LENGTHS))


def test_padded() -> None:
    memory = packed_memory()
    padded = memory.padded()
    assert padded.memory_offsets is None and padded.memory_lengths.tolist() == LENGTHS and padded.has_zero_padding()
    torch.testing.assert_close(padded.keys, pad(memory.keys, filling=0.0))
    torch.testing.assert_close(padded.values, pad(memory.values, filling=0.0))
    assert padded.padded() is padded
    shared = Memory(memory.keys, memory.keys, memory_offsets=offsets_of(LENGTHS)).padded()
    assert shared.keys is shared.values


@pytest.mark.parametrize(
    "chosen", [[2, 0], [1], [], [3, 3, 1, 2], [True, False, True, True]], ids=lambda chosen: str(chosen)
)
def test_select(chosen: list[int]) -> None:
    memory = packed_memory()
    indices = torch.tensor(chosen, dtype=None if chosen else torch.int64)
    got = memory.select(indices)
    sentences = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
    lengths = [LENGTHS[i] for i in sentences]
    assert got.memory_offsets.tolist() == offsets_of(lengths).tolist() and got.batch_size == len(lengths)
    parts = [memory.values.split(LENGTHS)[i] for i in sentences]
    torch.testing.assert_close(got.values, torch.cat([*parts, rows(4)[:0]]))
    if lengths and max(lengths) == TK:
        expected = memory.padded().select(indices)
        torch.testing.assert_close(got.padded().keys, expected.keys)


def test_copies() -> None:
    memory = Memory(rows(3), rows(4), memory_offsets=offsets_of(LENGTHS), max_length=7)
    leaves, structure = torch.utils._pytree.tree_flatten(memory)
    copies = [copy.deepcopy(memory), pickle.loads(pickle.dumps(memory)), memory.to("cpu")]
    for other in (*copies, torch.utils._pytree.tree_unflatten(leaves, structure)):
        assert other.max_length == 7
        torch.testing.assert_close(other.keys, memory.keys)
        torch.testing.assert_close(other.memory_offsets, memory.memory_offsets)
    narrow = memory.to(torch.float32)
    assert narrow.keys.dtype == torch.float32 and narrow.memory_offsets.dtype == torch.int64


MASK = torch.ones(B, TK, dtype=torch.bool)
BAD_OFFSETS = torch.tensor([0, 3, 2, 8, 9])
ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "lengths": (
        lambda: Memory(rows(3), rows(4), torch.tensor(LENGTHS), memory_offsets=offsets_of(LENGTHS)),
        ValueError,
        "Memory: memory_lengths is not for jagged keys, nor with memory_offsets",
    ),
    "axes": (
        lambda: Memory(pad(rows(3)), pad(rows(4)), memory_offsets=offsets_of(LENGTHS)),
        ValueError,
        "Memory: keys must have shape (N, A) with memory_offsets, got (4, 5, 3)",
    ),
    "values": (
        lambda: Memory(rows(3), rows(4)[1:], memory_offsets=offsets_of(LENGTHS)),
        ValueError,
        "Memory: values must have shape (N, D) = (9, *), got (8, 4)",
    ),
    "integers": (
        lambda: Memory(rows(3).long(), rows(4), memory_offsets=offsets_of(LENGTHS)),
        TypeError,
        "Memory: keys must be floating point, got torch.int64",
    ),
    "offsets": (
        lambda: Memory(rows(3), rows(4), memory_offsets=offsets_of(LENGTHS).float()),
        TypeError,
        "Memory: memory_offsets must be int32 or int64, got torch.float32",
    ),
    "max_length": (
        lambda: Memory(pad(rows(3)), pad(rows(4)), max_length=TK),
        ValueError,
        "Memory: max_length must be None without memory_offsets",
    ),
    "too short a max_length": (
        lambda: Memory(rows(3), rows(4), memory_offsets=offsets_of(LENGTHS), max_length=4).padded(),
        ValueError,
        "Memory.padded: a sentence is longer than max_length (max_seqlen of jagged keys), 4",
    ),
    "a max_length that is no number": (
        lambda: Memory(rows(3), rows(4), memory_offsets=offsets_of(LENGTHS), max_length=7.0),
        ValueError,
        "Memory: max_length must be an integer of at least 0, got 7.0",
    ),
    "order": (
        lambda: Memory(rows(3), rows(4), memory_offsets=BAD_OFFSETS).select(torch.tensor([0])),
        ValueError,
        "Memory.select: memory_offsets must start with 0, not decrease and end with N = 9",
    ),
    "mask of outputs": (
        lambda: make("bahdanau")[0].memory(as_jagged(rows(7)), mask=MASK),
        ValueError,
        "BahdanauAttention.memory: mask is not for jagged memory, nor with memory_offsets; pad memory, with memory_le",
    ),
    "both": (
        lambda: make("bahdanau")[0].memory(as_jagged(rows(7)), memory_offsets=offsets_of(LENGTHS)),
        ValueError,
        "BahdanauAttention.memory: memory_offsets must be None with jagged memory, which has its own",
    ),
    "size": (
        lambda: make("bahdanau")[0].memory(rows(8), memory_offsets=offsets_of(LENGTHS)),
        ValueError,
        "BahdanauAttention.memory: memory must have shape (N, memory_size) = (*, 7), got (9, 8)",
    ),
    "padded with offsets": (
        lambda: make("bahdanau")[0].memory(pad(rows(7)), memory_offsets=offsets_of(LENGTHS)),
        ValueError,
        "BahdanauAttention.memory: memory must have shape (N, memory_size) = (*, 7), got (4, 5, 7)",
    ),
    "list": (
        lambda: make("bahdanau")[0].memory([1.0], memory_offsets=offsets_of(LENGTHS)),
        TypeError,
        "BahdanauAttention.memory: memory must be a tensor, got list",
    ),
    "another module's": (
        lambda: make("bahdanau")[0](queries(), packed_memory()),
        ValueError,
        "BahdanauAttention: memory must have keys (9, 9) and values (9, 7), got (9, 3) and (9, 4), as of another",
    ),
    "order of outputs": (
        lambda: make("bahdanau")[0].memory(rows(7), memory_offsets=BAD_OFFSETS),
        ValueError,
        "BahdanauAttention.memory: memory_offsets must start with 0, not decrease and end with N = 9",
    ),
    "integers as outputs": (
        lambda: make("bahdanau")[0].memory(rows(7).long(), memory_offsets=offsets_of(LENGTHS)),
        TypeError,
        "BahdanauAttention.memory: memory must be floating point, got torch.int64",
    ),
    "a step": (
        lambda: make("bahdanau")[0](queries(), Memory(rows(9), rows(7), memory_offsets=BAD_OFFSETS)),
        ValueError,
        "additive_attention: memory_offsets must start with 0, not decrease and end with N = 9",
    ),
    "an initial state": (
        lambda: mechanisms.LocationSensitiveAttention(Q, 4, 3).initial_state(packed_memory()),
        ValueError,
        "initial_state: memory must be padded, as memory.padded() makes it, got a packed one",
    ),
    "an initial state of a monotonic form": (
        lambda: mechanisms.MonotonicAttention(Q, 4, 3).initial_state(packed_memory()),
        ValueError,
        "MonotonicAttention.initial_state: memory must be padded, as memory.padded() makes it, got a packed one",
    ),
    "a state": (
        lambda: mechanisms.CoverageAttention(Q, 4, 3, dtype=torch.float64)(
            queries(1), packed_memory(), (MASK[:, None],)
        ),
        ValueError,
        "CoverageAttention: memory must be padded, as memory.padded() makes it, got a packed one",
    ),
    "a normalizer": (
        lambda: mechanisms.NormalizedAttention(BahdanauAttention(Q, 4, 3, dtype=torch.float64), "sigmoid")(
            queries(), packed_memory()
        ),
        ValueError,
        "NormalizedAttention: memory must be padded, as memory.padded() makes it, got a packed one",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, kind, message = ERRORS[name]
    with pytest.raises(kind) as caught:
        call()
    assert message in str(caught.value)


# What takes no packed memory ------------------------------------------------------------------------------------------

OTHERS: dict[str, Callable[..., nn.Module]] = {
    "pointer": lambda **k: mechanisms.PointerAttention(Q, 7, 5, **k),
    "layer norm": lambda **k: mechanisms.LayerNormBahdanauAttention(Q, 7, 5, **k),
    "heads": lambda **k: mechanisms.MultiHeadAttention(Q, 7, 5, 2, **k),
    "normalizer": lambda **k: mechanisms.NormalizedAttention(LuongAttention(Q, 7, **k), "sigmoid"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_given_a_padded_copy(name: str) -> None:
    torch.manual_seed(1)
    module, given, asked = OTHERS[name](dtype=torch.float64), rows(7).requires_grad_(), queries()
    found = []
    for kind in ("jagged", "offsets", "padded"):
        results = module(asked, KINDS[kind](module, given))
        results = [x.nan_to_num(neginf=0.0) for x in ((results,) if isinstance(results, Tensor) else results)]
        named = {str(n): x for n, x in enumerate(results)}
        found.append(named | gradients(module, results, outputs=given, queries=asked))
    for other in found[:2]:
        assert_same(other, found[2], **EXACT)


def test_a_state_is_made_of_a_padded_copy() -> None:
    torch.manual_seed(1)
    module = mechanisms.LocationSensitiveAttention(Q, 7, 5, 2, 3, dtype=torch.float64)
    given, asked = rows(7).requires_grad_(), queries()
    found = []
    for kind in ("jagged", "padded"):
        contexts, alignments, _ = module.sequence(asked, KINDS[kind](module, given))
        found.append(gradients(module, (contexts, alignments), outputs=given, queries=asked))
    assert_same(*found, **EXACT)


# Seq2Seq --------------------------------------------------------------------------------------------------------------


class PackedOutputs(nn.Module):
    """An encoder whose outputs are packed, in a form."""

    def __init__(self, encoder: nn.Module, form: str) -> None:
        super().__init__()
        self.encoder, self.form, self.rnn = encoder, form, encoder.rnn

    def forward(self, source: Tensor, lengths: Tensor) -> tuple[Any, Any]:
        outputs, states = self.encoder(source, lengths)
        if self.form == "PackedSequence":
            return pack_padded_sequence(outputs, lengths, batch_first=True, enforce_sorted=False), states
        rows = outputs[torch.arange(source.shape[1]) < lengths[:, None]]
        return torch.nested.nested_tensor_from_jagged(rows, offsets_of(lengths.tolist())), states


@pytest.mark.parametrize("form", ["PackedSequence", "jagged"])
@pytest.mark.parametrize("input_feeding", [True, False])
@pytest.mark.parametrize("attention", ["bahdanau", "luong-general", "location", "gmm"])
def test_seq2seq(attention: str, input_feeding: bool, form: str) -> None:
    lengths = torch.tensor([3, 6, 1, 4] if form == "PackedSequence" else LENGTHS)
    data = random_batch(lengths, int(lengths.max()), 5, torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    sizes = {"embedding_size": 5, "hidden_size": 6, "units": 7, "dtype": torch.float64}
    model = Seq2Seq(SOURCE, TARGET, **sizes, attention=attention, input_feeding=input_feeding)
    expected = run(model, data)
    searches = [model.generate(*data[:2], beam_size=2, max_length=4)]
    model.encoder = PackedOutputs(model.encoder, form)
    memory, _ = model.encode(*data[:2])
    assert (memory.memory_offsets is not None) == (attention in ("bahdanau", "luong-general"))
    got = {name.replace("encoder.encoder", "encoder"): x for name, x in run(model, data).items()}
    shared = {name: x for name, x in got.items() if name in expected}
    assert_same(shared, {name: expected[name] for name in shared}, **EXACT)
    assert len(shared) >= len(expected) - 1
    searches.append(model.generate(*data[:2], beam_size=2, max_length=4))
    a, b = ([[(h.tokens, round(h.score, 9)) for h in found] for found in search] for search in searches)
    assert a == b


def test_steps_of_hypotheses() -> None:
    """K queries of each sentence, on the packed memory."""
    torch.manual_seed(0)
    model = Seq2Seq(SOURCE, TARGET, 5, 6, 7, dtype=torch.float64)
    data = random_batch(torch.tensor(LENGTHS), TK, 2, torch.Generator().manual_seed(1))
    plain = model.encode(*data[:2])
    model.encoder = PackedOutputs(model.encoder, "jagged")
    packed = model.encode(*data[:2])
    tokens = torch.randint(3, TARGET, (B, 2))
    found = [
        model.decoder.step(tokens, state.reorder(torch.zeros(B, 2, dtype=torch.int64)), memory)[:2]
        for memory, state in (plain, packed)
    ]
    torch.testing.assert_close(*found, **EXACT)
